// Global memory that kernels may touch, with a shadow of which blocks of a launch wrote and read it.
//
// Blocks run one after another here, at once on a GPU: what one writes and another reads or writes
// in the same launch is a race. The shadow has an entry for every 4 bytes of an allocation, or for
// every 2 or 1 once something as narrow is accessed.
#pragma once
#include <cstdint>
#include <map>
#include <memory>

#include "warp.h"

namespace emulator {

struct Allocation {
  uint64_t base = 0, bytes = 0;
  int shift = 2;                // bytes an entry, as a power of two
  uint32_t *writers = nullptr;  // stamps of blocks; the system gives their memory once it is touched
  uint32_t *readers = nullptr;
  ~Allocation();
  bool holds(uint64_t address, uint64_t count) const {
    return address >= base && count <= bytes && address - base <= bytes - count;
  }
  void refine(int to);  // make entries as narrow as 1 << to
};

class GlobalMemory {
 public:
  void allocate(uint64_t base, uint64_t bytes);
  void free(uint64_t base);
  Allocation *find(uint64_t address, uint64_t bytes) const;

  // Stamps for the blocks of a launch, and one for "several": the first of them.
  uint32_t begin_launch(uint64_t blocks);
  uint32_t next_stamp() { return next_stamp_++; }  // one more for a block of this launch

 private:
  std::map<uint64_t, std::unique_ptr<Allocation>> allocations_;
  uint32_t next_stamp_ = 1;
};

extern GlobalMemory global_memory;

// What a lane's bytes are when nobody wrote them since they were allocated, in 16-bit halves.
constexpr uint16_t UNWRITTEN_HALF = 0x7fa5;

// Check an access of all lanes in `mask` at `addresses`, `bytes` each, and return the lanes whose
// memory is there. `values` (of a write, `bytes` a lane) is compared where two blocks write.
uint32_t check_global(Warp &warp, const Instruction &instruction, uint32_t mask,
                      const uint64_t *addresses, uint32_t bytes, bool writes,
                      const uint8_t *values, const uint8_t *lane_bytes = nullptr);

}  // namespace emulator
