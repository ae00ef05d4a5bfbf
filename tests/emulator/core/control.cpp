// Branches, ends, barriers, fences, and what lanes tell each other: shfl, redux, votes.
#include <algorithm>
#include <climits>

#include "lanes.h"
#include "parser.h"

namespace emulator {

// Go on with the lanes that are furthest behind: where lanes parted they meet again.
void next_group(Warp &warp) {
  if (warp.active) warp.others.push_back({warp.pc, warp.active});
  warp.active = 0;
  if (warp.others.empty()) {
    warp.state = State::done;
    return warp.look_again();
  }
  int32_t lowest = INT_MAX, next = INT_MAX;
  for (const Warp::Group &group : warp.others) lowest = std::min(lowest, group.pc);
  size_t kept = 0;
  for (const Warp::Group &group : warp.others) {
    if (group.pc == lowest) {
      warp.active |= group.mask;
    } else {
      next = std::min(next, group.pc);
      warp.others[kept++] = group;
    }
  }
  warp.others.resize(kept);
  warp.pc = lowest;
  warp.lowest_other = next;
  warp.look_again();
}

void branch(Warp &warp, const Instruction &i) {
  if (i.target < warp.pc && settings.budget && warp.launch->run > settings.budget)
    throw Error("more than " + std::to_string(settings.budget) + " warp instructions in " + warp.kernel->name);
  if (warp.exec == warp.active) {
    warp.pc = i.target;
    return;
  }
  warp.active &= ~warp.exec;
  warp.others.push_back({i.target, warp.exec});
  next_group(warp);
}

namespace {

// Lanes with the index of the first one go on; others come back for theirs.
void branch_by_index(Warp &warp, const Instruction &i) {
  const uint32_t *index = warp.row<uint32_t>(i.operand[0]);
  const uint32_t first = index[first_lane(warp.exec)];
  if (first >= (uint32_t)i.count)
    throw Error("brx.idx with index " + std::to_string(first) + " of " + std::to_string(i.count));
  uint32_t same = 0;
  for_lanes(warp.exec, [&](int lane) { same |= (uint32_t)(index[lane] == first) << lane; });
  if (same != warp.exec) warp.others.push_back({warp.pc - 1, warp.exec & ~same});
  warp.active &= ~warp.exec;
  warp.others.push_back({warp.kernel->targets[i.target + first], same});
  next_group(warp);
}

}  // namespace

void exit_lanes(Warp &warp, const Instruction &) {
  warp.alive &= ~warp.exec;
  warp.active &= ~warp.exec;
  if (!warp.active) next_group(warp);
}

void block(Warp &warp) {
  warp.pc--;
  warp.state = State::blocked;
  warp.look_again();
}

void whole_warp(Warp &warp, const Instruction &i, const char *what) {
  if (warp.exec != ALL)
    report(warp, i, first_lane(warp.exec), "partial-warp",
           std::string(what) + " is run by " + std::to_string(__builtin_popcount(warp.exec)) + " of 32 lanes");
}

namespace {

void wait_at_barrier(Warp &warp, const Instruction &i) {
  if (warp.exec != ALL)
    report(warp, i, first_lane(warp.exec), "partial-barrier",
           "a barrier is reached by " + std::to_string(__builtin_popcount(warp.exec)) + " of 32 lanes");
  warp.barrier = (int)warp.row<uint32_t>(i.operand[0])[0];
  warp.barrier_threads = i.operands > 1 ? warp.row<uint32_t>(i.operand[1])[0] : warp.launch->threads;
  warp.state = State::at_barrier;
  warp.look_again();
}

void nothing(Warp &, const Instruction &) {}

// The lowest lane of those that run is the one that is elected.
void elect(Warp &warp, const Instruction &i) {
  const uint32_t members = warp.row<uint32_t>(i.operand[2])[first_lane(warp.exec)];
  if (members & ~warp.exec) whole_warp(warp, i, "elect");
  const int chosen = first_lane(members & warp.exec);
  if (!i.operand[0].is_sink())
    each_lane(warp, warp.row<uint32_t>(i.operand[0]), [&](int) { return (uint32_t)chosen; });
  each_predicate(warp, warp.predicate(i.operand[1]), [&](int lane) { return lane == chosen; });
}

// Registers go back to the block, or come from what others gave back: then the warp waits for them.
void set_registers(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "setmaxnreg");
  uint32_t others = 0;
  for (const Warp &each : warp.block->warps) others += &each == &warp ? 0 : each.registers;
  if ((others + i.count) * LANES > REGISTERS && !warp.forced) return block(warp);
  warp.forced = false;
  warp.registers = i.count;
}

void decode_set_registers(Decoder &d) {
  if (!(d.take("inc") || d.take("dec")) || !d.take("sync") || !d.take("aligned") || !d.take("u32"))
    d.unknown("form of setmaxnreg");
  d.expect_arguments(1, 1);
  const int64_t count = d.immediate(0);
  if (count < 24 || count > 256 || count % 8) d.unknown("number of registers");
  d.instruction.count = (int32_t)count;
  d.instruction.run = set_registers;
}

// "elect.sync register|predicate, members"
void decode_elect(Decoder &d) {
  if (!d.take("sync")) d.unknown("form of elect");
  d.expect_arguments(2, 2);
  d.pair_of_results(0, Width::bits32, Width::predicate);
  d.source(1, Width::bits32);
  d.instruction.run = elect;
}

void fence_proxy(Warp &warp, const Instruction &) {
  warp.block->shared.order.fence(warp.number);
  warp.block->fenced[warp.number] = warp.block->shared.fence();
}

enum Shuffle : uint32_t { UP, DOWN, BUTTERFLY, INDEX };

// Lanes that an instruction names but that do not take part.
void check_members(Warp &warp, const Instruction &i, uint32_t members, const char *what) {
  if (members & ~warp.exec) whole_warp(warp, i, what);
}

template <uint32_t HOW>
void shuffle(Warp &warp, const Instruction &i) {
  uint32_t value[LANES];
  memcpy(value, warp.row<uint32_t>(i.operand[1]), sizeof value);
  const uint32_t *by = warp.row<uint32_t>(i.operand[2]), *clamp = warp.row<uint32_t>(i.operand[3]);
  check_members(warp, i, warp.row<uint32_t>(i.operand[4])[first_lane(warp.exec)], "shfl");
  each_lane(warp, warp.row<uint32_t>(i.operand[0]), [&](int l) {
    const int lane = l, b = by[l] & 31, segment = clamp[l] >> 8 & 31, c = clamp[l] & 31;
    const int last = (lane & segment) | (c & ~segment);
    int from = 0;
    bool inside = false;
    if (HOW == UP) from = lane - b, inside = from >= last;
    if (HOW == DOWN) from = lane + b, inside = from <= last;
    if (HOW == BUTTERFLY) from = lane ^ b, inside = from <= last;
    if (HOW == INDEX) from = (lane & segment) | (b & ~segment), inside = from <= last;
    return value[(inside ? from : lane) & 31];
  });
}

void decode_shuffle(Decoder &d) {
  if (!d.take("sync")) d.unknown("form");
  const std::string how = d.next();
  d.instruction.run = how == "up"     ? shuffle<UP>
                      : how == "down" ? shuffle<DOWN>
                      : how == "bfly" ? shuffle<BUTTERFLY>
                      : how == "idx"  ? shuffle<INDEX>
                                      : nullptr;
  if (!d.instruction.run || !d.take("b32")) d.unknown("form");
  d.expect_arguments(5, 5);
  d.result(0, Width::bits32);
  for (int n = 1; n < 5; n++) d.source(n, Width::bits32);
}

template <class T, class F>
void reduce(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]);
  check_members(warp, i, warp.row<uint32_t>(i.operand[2])[first_lane(warp.exec)], "redux");
  T total = a[first_lane(warp.exec)];
  for_lanes(warp.exec & (warp.exec - 1), [&](int lane) { total = F::of(total, a[lane]); });
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int) { return total; });
}

struct Sum { template <class T> static T of(T a, T b) { return a + b; } };
struct Least { template <class T> static T of(T a, T b) { return std::min(a, b); } };
struct Most { template <class T> static T of(T a, T b) { return std::max(a, b); } };
struct All { template <class T> static T of(T a, T b) { return a & b; } };
struct Any { template <class T> static T of(T a, T b) { return a | b; } };
struct Odd { template <class T> static T of(T a, T b) { return a ^ b; } };

void decode_reduce(Decoder &d) {
  if (!d.take("sync")) d.unknown("form");
  const std::string how = d.next();
  const Type type = d.type();
  const bool is_signed = type == Type::s32, is_bits = type == Type::b32;
  if (!is_signed && !is_bits && type != Type::u32) d.unknown("type");
  Handler run = nullptr;
  if (is_bits)
    run = how == "and"  ? reduce<uint32_t, All>
          : how == "or" ? reduce<uint32_t, Any>
          : how == "xor" ? reduce<uint32_t, Odd>
                        : nullptr;
  else if (how == "add")
    run = reduce<uint32_t, Sum>;
  else if (how == "min")
    run = is_signed ? reduce<int32_t, Least> : reduce<uint32_t, Least>;
  else if (how == "max")
    run = is_signed ? reduce<int32_t, Most> : reduce<uint32_t, Most>;
  if (!run) d.unknown("reduction ." + how);
  d.instruction.run = run;
  d.expect_arguments(3, 3);
  d.result(0, Width::bits32);
  d.source(1, Width::bits32);
  d.source(2, Width::bits32);
}

// Launches run one after another here; what is checked is that a warp waits before it looks.
void wait_for_last_launch(Warp &warp, const Instruction &) { warp.waited = true; }

void decode_dependent_launch(Decoder &d) {
  if (d.take("launch_dependents")) {
    d.instruction.run = nothing;
    return;
  }
  if (!d.take("wait")) d.unknown("form of griddepcontrol");
  d.parser().kernel().overlaps = true;
  d.instruction.run = wait_for_last_launch;
}

void decode_barrier(Decoder &d) {
  if (d.take("warp")) {
    if (!d.take("sync")) d.unknown("form");
    d.instruction.run = nothing;
    return;
  }
  if (!d.take("sync")) d.unknown("form");
  d.expect_arguments(1, 2);
  d.source(0, Width::bits32);
  if (d.arguments() == 2) d.source(1, Width::bits32);
  d.instruction.run = wait_at_barrier;
}

void decode_fence(Decoder &d) {
  if (d.take("mbarrier_init")) {  // of a block's barriers, which a bar.sync makes visible as well
    if (!d.take("release") || !d.take("cluster")) d.unknown("form of fence");
    d.instruction.run = nothing;
    return;
  }
  if (!d.take("proxy") || !d.take("async") || !(d.take("shared::cta") || d.take("shared::cluster")))
    d.unknown("form of fence");
  d.instruction.run = fence_proxy;
}

}  // namespace

bool decode_control(Decoder &d) {
  const std::string &base = d.base();
  if (base == "bra") {
    d.take("uni");
    d.instruction.run = branch;
  } else if (base == "brx") {
    if (!d.take("idx")) d.unknown("form of brx");
    d.take("uni");
    d.expect_arguments(2, 2);
    d.source(0, Width::bits32);
    d.instruction.run = branch_by_index;
  } else if (base == "ret" || base == "exit") {
    d.instruction.run = exit_lanes;
  } else if (base == "bar" || base == "barrier") {
    decode_barrier(d);
  } else if (base == "setmaxnreg") {
    decode_set_registers(d);
  } else if (base == "elect") {
    decode_elect(d);
  } else if (base == "fence") {
    decode_fence(d);
  } else if (base == "griddepcontrol") {
    decode_dependent_launch(d);
  } else if (base == "shfl") {
    decode_shuffle(d);
  } else if (base == "redux") {
    decode_reduce(d);
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
