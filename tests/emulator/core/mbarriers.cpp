// mbarriers: warps, cp.async and bulk copies arrive at them, and warps wait for a phase to end.
#include "lanes.h"
#include "parser.h"

namespace emulator {

namespace {

constexpr uint32_t EXPECTS_BYTES = 1, HAS_COUNT = 2;
constexpr uint32_t MBARRIER_BYTES = 8;

// The address that the lanes give; those of a warp have the same.
uint32_t address_of(const Warp &warp, const Instruction &i, int operand = 0) {
  return warp.row<uint32_t>(i.operand[operand])[first_lane(warp.exec)] + (uint32_t)i.offset;
}

// Whether there is an mbarrier. Using it counts as reading it: who made it must come before.
Mbarrier *found(Warp &warp, const Instruction &i, uint32_t address) {
  auto place = warp.block->mbarriers.find(address);
  if (place == warp.block->mbarriers.end()) {
    report(warp, i, first_lane(warp.exec), "no-mbarrier",
           "no mbarrier was made in shared memory at " + std::to_string((int64_t)address - SHARED_BASE));
    return nullptr;
  }
  if (settings.check) {
    const uint32_t problems = warp.block->shared.read(address, MBARRIER_BYTES, warp.number);
    if (problems) report_shared(warp, i, first_lane(warp.exec), problems, address, false);
  }
  return &place->second;
}

void end_phase(Mbarrier &barrier) {
  if (barrier.pending > 0 || barrier.bytes) return;
  barrier.complete.take(barrier.arrived);
  barrier.arrived = Seen();
  barrier.pending = barrier.count;
  barrier.phase++;
}

void arrive_at(Warp &warp, const Instruction &i, Mbarrier &barrier, int64_t arrivals) {
  if (arrivals > barrier.pending)
    report(warp, i, first_lane(warp.exec), "mbarrier-count",
           "more arrive at an mbarrier than the " + std::to_string(barrier.count) + " that it is made for");
  barrier.arrived.take(warp.block->shared.order.given(warp.number));
  barrier.pending -= arrivals;
  end_phase(barrier);
}

void make(Warp &warp, const Instruction &i) {
  const uint32_t address = address_of(warp, i), count = warp.row<uint32_t>(i.operand[1])[first_lane(warp.exec)];
  SharedMemory &shared = warp.block->shared;
  if (address % MBARRIER_BYTES || !shared.holds(address, MBARRIER_BYTES)) {
    const bool aligned = address % MBARRIER_BYTES == 0;
    return report(warp, i, first_lane(warp.exec), aligned ? "out-of-bounds" : "misaligned",
                  "an mbarrier in shared memory at " + std::to_string((int64_t)address - SHARED_BASE));
  }
  if (settings.check) {
    const uint32_t problems = shared.write(address, MBARRIER_BYTES, warp.number, nullptr);
    if (problems) report_shared(warp, i, first_lane(warp.exec), problems, address, true);
  }
  Mbarrier barrier;
  barrier.count = count;
  barrier.pending = count;
  warp.block->mbarriers[address] = barrier;
}

void end(Warp &warp, const Instruction &i) {
  if (found(warp, i, address_of(warp, i))) warp.block->mbarriers.erase(address_of(warp, i));
}

// Each lane arrives, once or as often as it says; with EXPECTS_BYTES it first adds to the bytes.
void arrive(Warp &warp, const Instruction &i) {
  Mbarrier *barrier = found(warp, i, address_of(warp, i, i.results));
  if (!barrier) return;
  int64_t arrivals = 0;
  for_lanes(warp.exec, [&](int lane) {
    const uint32_t said = i.flags ? warp.row<uint32_t>(i.operand[i.results + 1])[lane] : 1;
    arrivals += i.flags & HAS_COUNT ? said : 1;
    if (i.flags & EXPECTS_BYTES) barrier->bytes += said;
  });
  arrive_at(warp, i, *barrier, arrivals);
}

// cp.async.mbarrier.arrive: each lane arrives when its copies so far are done, which is now.
void copies_arrive(Warp &warp, const Instruction &i) {
  Mbarrier *barrier = found(warp, i, address_of(warp, i));
  if (!barrier) return;
  finish_copies(warp);
  arrive_at(warp, i, *barrier, __builtin_popcount(warp.exec));
}

// Whether the phase of this parity has ended. If not, the warp is told so, and goes on if it does
// not care; when it asks again, it is held up until others have gone on.
void wait(Warp &warp, const Instruction &i) {
  const uint32_t address = address_of(warp, i, 1);
  Mbarrier *barrier = found(warp, i, address);
  const uint32_t parity = warp.row<uint32_t>(i.operand[2])[first_lane(warp.exec)] & 1;
  if (barrier && warp.asked == &i) finish_bulk_copies(*warp.block, address);
  const bool done = !barrier || (barrier->phase & 1) != parity;
  if (!done && !warp.forced && warp.asked == &i) return block(warp);
  const bool result = done || warp.forced;
  if (done && barrier) warp.block->shared.order.take(warp.number, barrier->complete);
  warp.forced = false;
  warp.asked = result ? nullptr : &i;
  each_predicate(warp, warp.predicate(i.operand[0]), [&](int) { return result; });
}

void take_shared(Decoder &d) {
  if (!d.take("shared::cta") && !d.take("shared::cluster") && !d.take("shared")) d.unknown("space");
  if (!d.take("b64")) d.unknown("type");
}

}  // namespace

void complete_bytes(Block &block, uint32_t address, const BulkCopy &copy) {
  auto place = block.mbarriers.find(address);
  if (place == block.mbarriers.end()) return;
  Mbarrier &barrier = place->second;
  barrier.bytes -= copy.bytes;
  barrier.arrived.step[TENSOR_COPIES] = std::max(barrier.arrived.step[TENSOR_COPIES], copy.step);
  end_phase(barrier);
}

void decode_copies_arrive(Decoder &d) {
  if (!d.take("arrive") || !d.take("noinc")) d.unknown("form of cp.async.mbarrier");
  take_shared(d);
  d.expect_arguments(1, 1);
  d.address(0);
  d.instruction.run = copies_arrive;
}

bool decode_mbarriers(Decoder &d) {
  if (d.base() != "mbarrier") return false;
  Instruction &i = d.instruction;
  d.parser().kernel().has_mbarriers = true;
  if (d.take("init")) {
    take_shared(d);
    d.expect_arguments(2, 2);
    d.address(0);
    d.source(1, Width::bits32);
    i.run = make;
  } else if (d.take("inval")) {
    take_shared(d);
    d.expect_arguments(1, 1);
    d.address(0);
    i.run = end;
  } else if (d.take("arrive")) {
    const bool expects = d.take("expect_tx");
    take_shared(d);
    d.expect_arguments(2, 3);
    if (d.argument(0) != "_") d.unknown("use of an mbarrier's state");
    d.address(1);
    if (d.arguments() == 3) d.source(2, Width::bits32);
    else if (expects) d.unknown("number of arguments");
    i.flags = expects ? EXPECTS_BYTES : d.arguments() == 3 ? HAS_COUNT : 0;
    i.run = arrive;
  } else if (d.take("try_wait")) {
    if (!d.take("parity")) d.unknown("form of mbarrier.try_wait");
    take_shared(d);
    d.expect_arguments(3, 3);
    d.result(0, Width::predicate);
    d.address(1);
    d.source(2, Width::bits32);
    i.run = wait;
  } else {
    d.unknown("form of mbarrier");
  }
  return true;
}

}  // namespace emulator
