// atom, red, ld.relaxed, ld.acquire and fence: how blocks of a launch tell each other what is done.
//
// What a block did before a release is done for a block that acquired what was released. Integers
// are what they tell each other by, and race with nothing; sums of floats depend on their order, and
// race as stores do.
#include "global.h"
#include "lanes.h"

namespace emulator {

namespace {

constexpr uint32_t MOST_LOOKS = 1000;  // at one value: blocks run one after another, none will change it

enum Order : uint32_t { RELAXED = 0, ACQUIRES = 1, RELEASES = 2 };

void acquire(Block &block) { raise_to(block.done, block.told); }

// What this block does from now on has another stamp than what it tells others to be done.
void release(Block &block) {
  Launch &launch = *block.launch;
  block.done.resize(std::max<size_t>(block.done.size(), block.index + 1));
  block.done[block.index] = ++block.epoch;
  block.tells = block.done;
  block.stamp = launch.new_epoch(block.index, block.epoch - 1);
}

void fence(Warp &warp, const Instruction &) {
  acquire(*warp.block);
  release(*warp.block);
}

// Add to an integer, and read and tell what is done; what was there.
uint32_t add(Block &block, uint64_t address, uint32_t by, uint32_t order) {
  uint32_t *memory = reinterpret_cast<uint32_t *>(address);
  Launch::Told &told = block.launch->told[address];
  told.before = *memory;
  told.epochs_before = told.epochs;
  raise_to(block.told, told.epochs);
  if (order & ACQUIRES) acquire(block);
  raise_to(told.epochs, block.tells);
  *memory += by;
  return told.before;
}

// What is there; where blocks run last to first, a relaxed load sees what was there before.
uint32_t look(Block &block, uint64_t address, uint32_t order) {
  const uint32_t now = *reinterpret_cast<uint32_t *>(address);
  const auto found = block.launch->told.find(address);
  if (found == block.launch->told.end()) return now;
  const Launch::Told &told = found->second;
  const bool old = order == RELAXED && settings.order == 1;
  raise_to(block.told, old ? told.epochs_before : told.epochs);
  if (order & ACQUIRES) acquire(block);
  return old ? told.before : now;
}

// Whether 4 * `count` bytes are there, aligned, and were ever written.
bool holds(Warp &warp, const Instruction &i, int lane, uint64_t address, uint32_t bytes) {
  if (address & (bytes - 1)) {
    report(warp, i, lane, "misaligned", std::to_string(bytes) + " bytes of global memory");
    return false;
  }
  if (!global_memory.find(address, bytes)) {
    report(warp, i, lane, "out-of-bounds",
           "an atomic access of " + std::to_string(bytes) + " bytes that no allocation holds");
    return false;
  }
  const uint16_t *halves = reinterpret_cast<const uint16_t *>(address);
  if (halves[0] == UNWRITTEN_HALF && halves[1] == UNWRITTEN_HALF)
    report(warp, i, lane, "unwritten-global", "an atomic access of memory that nobody wrote");
  return true;
}

void load_ordered(Warp &warp, const Instruction &i) {
  Block &block = *warp.block;
  const uint64_t *row = warp.row<uint64_t>(i.operand[1]);
  uint32_t *to = warp.row<uint32_t>(i.operand[0]);
  for_lanes(warp.exec, [&](int lane) {
    const uint64_t address = row[lane] + (uint64_t)i.offset;
    if (!holds(warp, i, lane, address, 4)) return;
    to[lane] = look(block, address, i.flags);
    const bool again = block.looked_at == address && block.saw == to[lane];
    block.looks = again && i.flags & ACQUIRES ? block.looks + 1 : 0;
    block.looked_at = address;
    block.saw = to[lane];
  });
  if (block.looks > MOST_LOOKS)
    throw Error("a block of " + warp.kernel->name + " waits for what no block before it does");
}

// Integers, one each; the result, if there is one, is what was there.
void add_integers(Warp &warp, const Instruction &i) {
  Block &block = *warp.block;
  const uint64_t *row = warp.row<uint64_t>(i.operand[i.results]);
  const uint32_t *by = warp.row<uint32_t>(i.operand[i.results + 1]);
  if (i.flags & RELEASES) release(block);
  for_lanes(warp.exec, [&](int lane) {
    const uint64_t address = row[lane] + (uint64_t)i.offset;
    if (!holds(warp, i, lane, address, 4)) return;
    const uint32_t before = add(block, address, by[lane], i.flags);
    if (i.results && !i.operand[0].is_sink()) warp.row<uint32_t>(i.operand[0])[lane] = before;
  });
}

void add_floats(Warp &warp, const Instruction &i) {
  const int count = i.count, bytes = 4 * count;
  const uint64_t *row = warp.row<uint64_t>(i.operand[i.results]);
  for_lanes(warp.exec, [&](int lane) {
    uint64_t addresses[LANES] = {};
    alignas(16) float sums[4 * LANES], before[4];
    const uint64_t address = addresses[lane] = row[lane] + (uint64_t)i.offset;
    if (!holds(warp, i, lane, address, bytes)) return;
    memcpy(before, reinterpret_cast<void *>(address), bytes);
    float *own = sums + lane * count;
    for (int n = 0; n < count; n++) {
      const uint32_t by = warp.row<uint32_t>(i.operand[i.results + 1 + n])[lane];
      own[n] = canonical(flushed(flushed(before[n]) + flushed(as_float(by))));
      if (n < i.results && !i.operand[n].is_sink())
        warp.row<uint32_t>(i.operand[n])[lane] = as_bits(before[n]);
    }
    check_global(warp, i, 1u << lane, addresses, bytes, true, reinterpret_cast<uint8_t *>(sums));
    memcpy(reinterpret_cast<void *>(address), own, bytes);
  });
}

// PTX has the order, the scope, the space; Triton the space, the scope, the order.
uint32_t take_order(Decoder &d) {
  const bool global = d.take("global"), gpu = global && d.take("gpu");
  const uint32_t order = d.take("acquire")   ? (uint32_t)ACQUIRES
                         : d.take("release") ? (uint32_t)RELEASES
                         : d.take("acq_rel") ? ACQUIRES | RELEASES
                                             : (d.take("relaxed"), (uint32_t)RELAXED);
  if (!(gpu || d.take("gpu"))) d.unknown("scope");
  if (!(global || d.take("global"))) d.unknown("space");
  return order;
}

void decode_add(Decoder &d, bool gives) {
  d.instruction.flags = take_order(d);
  if (!d.take("add")) d.unknown("operation");
  d.instruction.count = d.take("v4") ? 4 : d.take("v2") ? 2 : 1;
  const Type type = d.type();
  const bool floats = type == Type::f32;
  if (!floats && ((type != Type::u32 && type != Type::s32) || d.instruction.count != 1))
    d.unknown("type");
  d.expect_arguments(gives ? 3 : 2, gives ? 3 : 2);
  if (d.vector_length(gives ? 2 : 1) != (size_t)d.instruction.count) d.unknown("number of registers");
  if (gives) d.results(0, Width::bits32);
  d.address(gives);
  d.sources(gives + 1, Width::bits32);
  d.instruction.run = floats ? add_floats : add_integers;
}

}  // namespace

bool decode_ordered_load(Decoder &d) {
  if (d.take("acquire")) d.instruction.flags = ACQUIRES;
  else if (!d.take("relaxed")) return false;
  if (!d.take("gpu") || !d.take("global")) d.unknown("scope or space");
  if (size_of(d.type()) != 4) d.unknown("type");
  d.expect_arguments(2, 2);
  d.result(0, Width::bits32);
  d.address(1);
  d.instruction.run = load_ordered;
  return true;
}

bool decode_atomics(Decoder &d) {
  const std::string &base = d.base();
  if (base == "atom" || base == "red") {
    decode_add(d, base == "atom");
  } else if (base == "fence" && (d.take("acq_rel") || d.take("sc"))) {
    if (!d.take("gpu")) d.unknown("scope");
    d.instruction.run = fence;
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
