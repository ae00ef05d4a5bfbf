// cp.async: global memory to shared memory, which is written when it is waited for.
#include "global.h"
#include "lanes.h"

namespace emulator {

namespace {

void issue_copy(Warp &warp, const Instruction &i) {
  SharedMemory &shared = warp.block->shared;
  const uint32_t *to = warp.row<uint32_t>(i.operand[0]);
  const uint64_t *from = warp.row<uint64_t>(i.operand[1]);
  Copy copy;
  copy.bytes = i.size;
  copy.instruction = &i;
  for (int lane = 0; lane < LANES; lane++) {
    copy.to[lane] = to[lane] + (uint32_t)i.offset;
    copy.from[lane] = from[lane] + (uint64_t)i.from_offset;
    copy.taken[lane] = (uint8_t)i.size;
  }
  if (i.operands == 3) {
    const uint32_t *taken = warp.row<uint32_t>(i.operand[2]);
    for (int lane = 0; lane < LANES; lane++)
      copy.taken[lane] = (uint8_t)(taken[lane] < (uint32_t)i.size ? taken[lane] : (uint32_t)i.size);
  }
  copy.mask = check_global(warp, i, warp.exec, copy.from, i.size, false, nullptr, copy.taken);
  for_lanes(copy.mask, [&](int lane) {
    const uint32_t address = copy.to[lane];
    const bool aligned = address % i.size == 0;
    if (!aligned || !shared.holds(address, i.size)) {
      copy.mask &= ~(1u << lane);
      return report(warp, i, lane, aligned ? "out-of-bounds" : "misaligned",
                    "cp.async writes " + std::to_string(i.size) + " bytes of shared memory at " +
                        std::to_string((int64_t)address - SHARED_BASE));
    }
    if (!settings.check) return;
    // Whoever reads or writes there from now to the wait, with no barrier, races with it.
    const uint32_t problems = shared.write(address, i.size, warp.number, nullptr);
    if (problems) report_shared(warp, i, lane, problems, address, true);
    shared.begin_copy(address, i.size);
  });
  warp.copies.add(copy);
}

void finish_copy(Warp &warp, const Copy &copy) {
  SharedMemory &shared = warp.block->shared;
  const Instruction &i = *copy.instruction;
  uint32_t unwritten = 0;
  for_lanes(copy.mask, [&](int lane) {
    uint8_t bytes[16] = {};
    memcpy(bytes, reinterpret_cast<const uint8_t *>(copy.from[lane]), copy.taken[lane]);
    if (settings.check) {
      shared.end_copy(copy.to[lane], copy.bytes);
      const uint32_t problems = shared.write(copy.to[lane], copy.bytes, warp.number, nullptr);
      shared.by_copy(copy.to[lane], copy.bytes);
      if (problems) report_shared(warp, i, lane, problems, copy.to[lane], true);
      for (uint32_t at = 0; at + 4 <= copy.taken[lane]; at += 4) {
        uint16_t halves[2];
        memcpy(halves, bytes + at, 4);
        if (halves[0] == UNWRITTEN_HALF && halves[1] == UNWRITTEN_HALF) unwritten |= 1u << lane;
      }
    }
    shared.changed(copy.to[lane]);
    memcpy(shared.at(copy.to[lane]), bytes, copy.bytes);
  });
  if (unwritten)
    report(warp, i, first_lane(unwritten), "unwritten-global",
           "copies global memory that nobody wrote since it was allocated");
}

void commit_copies(Warp &warp, const Instruction &) { warp.copies.commit(); }

void wait_for_copies(Warp &warp, const Instruction &i) {
  warp.copies.wait(i.count, [&](const Copy &copy) { finish_copy(warp, copy); });
}

void wait_for_all_copies(Warp &warp, const Instruction &) { finish_copies(warp); }

}  // namespace

void finish_copies(Warp &warp) {
  warp.copies.commit();
  warp.copies.wait(0, [&](const Copy &copy) { finish_copy(warp, copy); });
}

bool decode_copies(Decoder &d) {
  if (d.base() != "cp") return false;
  if (!d.take("async")) d.unknown("form of cp");
  if (d.take("commit_group")) {
    d.instruction.run = commit_copies;
    return true;
  }
  if (d.take("wait_all")) {
    d.instruction.run = wait_for_all_copies;
    return true;
  }
  if (d.take("wait_group")) {
    d.instruction.count = (int32_t)d.immediate(0);
    d.instruction.run = wait_for_copies;
    return true;
  }
  if (d.take("mbarrier")) {
    decode_copies_arrive(d);
    return true;
  }
  if (d.take("bulk")) {
    decode_bulk_copy(d);
    return true;
  }
  const bool wide = d.take("cg");
  if (!wide && !d.take("ca")) d.unknown("form of cp.async");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("global")) d.unknown("space");
  while (d.take("L2::cache_hint") || d.take("L2::128B") || d.take("L2::256B") || d.take("L2::64B")) {
  }
  d.expect_arguments(3, 4);
  d.address(1);
  d.instruction.from_offset = d.instruction.offset;
  d.address(0);
  d.swap_operands(0, 1);
  d.instruction.size = (int32_t)d.immediate(2);
  if (d.arguments() == 4) d.source(3, Width::bits32);
  const int size = d.instruction.size;
  if (size != 16 && (wide || (size != 4 && size != 8))) d.unknown("size");
  if (d.operand(0).width != Width::bits32 || d.operand(1).width != Width::bits64) d.unknown("address");
  d.instruction.run = issue_copy;
  return true;
}

}  // namespace emulator
