// Products of the tensor cores: mma, and wgmma with its rules.
#pragma once
#include "warp.h"

namespace emulator {

// What wgmma has to do with a register, in Warp::uses.
enum Use : uint8_t {
  ACCUMULATES = 1,  // a product not yet waited for writes it
  READS = 2,        // a product not yet waited for reads it
  TOUCHED = 4,      // another instruction wrote it since the last wgmma.fence
};

// Look at the registers of an instruction that ran while products may be pending.
void track(Warp &warp, const Instruction &instruction);

}  // namespace emulator
