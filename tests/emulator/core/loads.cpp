// ld, st, ldmatrix, stmatrix: between registers and global or shared memory.
#include "global.h"
#include "lanes.h"
#include "parser.h"

namespace emulator {

namespace {

constexpr int MOST = 16;  // bytes that a lane accesses at once
constexpr uint32_t EXTENDS_SIGN = 1;  // of 32 bits that are loaded to 64

void load_parameter(Warp &warp, const Instruction &i) {
  const Operand to = i.operand[0], from = i.operand[1];
  if (to.width == Width::bits64) {
    const uint64_t *a = warp.row<uint64_t>(from);
    each_lane(warp, warp.row<uint64_t>(to), [&](int l) { return a[l]; });
  } else if (to.width == Width::bits32) {
    const uint32_t *a = warp.row<uint32_t>(from);
    each_lane(warp, warp.row<uint32_t>(to), [&](int l) { return a[l]; });
  } else {
    const uint16_t *a = warp.row<uint16_t>(from);
    each_lane(warp, warp.row<uint16_t>(to), [&](int l) { return a[l]; });
  }
}

// Element n of each lane's bytes to or from a register of R, as T.
template <class R, class T>
void spread(const Warp &warp, const Operand &to, const uint8_t *bytes, int each, int n, uint32_t mask) {
  R *row = warp.row<R>(to);
  if (mask == ALL) {
    for (int lane = 0; lane < LANES; lane++) {
      T value;
      memcpy(&value, bytes + lane * each + n * sizeof(T), sizeof(T));
      row[lane] = value;
    }
    return;
  }
  for_lanes(mask, [&](int lane) {
    T value;
    memcpy(&value, bytes + lane * each + n * sizeof(T), sizeof(T));
    row[lane] = value;
  });
}

template <class R, class T>
void collect(const Warp &warp, const Operand &from, uint8_t *bytes, int each, int n) {
  const R *row = warp.row<R>(from);
  for (int lane = 0; lane < LANES; lane++) {
    const T value = (T)row[lane];
    memcpy(bytes + lane * each + n * sizeof(T), &value, sizeof(T));
  }
}

template <class T>
void spread_any(const Warp &warp, const Operand &to, const uint8_t *bytes, int each, int n, uint32_t mask) {
  if (to.is_sink()) return;
  if (to.width == Width::bits16) spread<uint16_t, T>(warp, to, bytes, each, n, mask);
  else if (to.width == Width::bits32) spread<uint32_t, T>(warp, to, bytes, each, n, mask);
  else spread<uint64_t, T>(warp, to, bytes, each, n, mask);
}

template <class T>
void collect_any(const Warp &warp, const Operand &from, uint8_t *bytes, int each, int n) {
  if (from.width == Width::bits16) collect<uint16_t, T>(warp, from, bytes, each, n);
  else if (from.width == Width::bits32) collect<uint32_t, T>(warp, from, bytes, each, n);
  else collect<uint64_t, T>(warp, from, bytes, each, n);
}

void to_registers(const Warp &warp, const Instruction &i, const uint8_t *bytes, uint32_t mask) {
  const int each = i.size * i.count;
  for (int n = 0; n < i.count; n++) {
    if (i.size == 1) spread_any<uint8_t>(warp, i.operand[n], bytes, each, n, mask);
    else if (i.size == 2) spread_any<uint16_t>(warp, i.operand[n], bytes, each, n, mask);
    else if (i.size == 4 && i.flags & EXTENDS_SIGN) spread_any<int32_t>(warp, i.operand[n], bytes, each, n, mask);
    else if (i.size == 4) spread_any<uint32_t>(warp, i.operand[n], bytes, each, n, mask);
    else spread_any<uint64_t>(warp, i.operand[n], bytes, each, n, mask);
  }
}

// The values of a store; its first operand is the address.
void from_registers(const Warp &warp, const Instruction &i, uint8_t *bytes) {
  const int each = i.size * i.count;
  for (int n = 0; n < i.count; n++) {
    const Operand &from = i.operand[1 + n];
    if (i.size == 1) collect_any<uint8_t>(warp, from, bytes, each, n);
    else if (i.size == 2) collect_any<uint16_t>(warp, from, bytes, each, n);
    else if (i.size == 4) collect_any<uint32_t>(warp, from, bytes, each, n);
    else collect_any<uint64_t>(warp, from, bytes, each, n);
  }
}

void global_addresses(const Warp &warp, const Instruction &i, const Operand &base, uint64_t *addresses) {
  const uint64_t *row = warp.row<uint64_t>(base);
  for (int lane = 0; lane < LANES; lane++) addresses[lane] = row[lane] + (uint64_t)i.offset;
}

// A constant size lets the compiler make each copy one move.
template <uint32_t BYTES>
void copy_lanes(uint32_t mask, const uint64_t *addresses, uint8_t *bytes, bool writes) {
  for_lanes(mask, [&](int lane) {
    uint8_t *memory = reinterpret_cast<uint8_t *>(addresses[lane]);
    if (writes) memcpy(memory, bytes + lane * BYTES, BYTES);
    else memcpy(bytes + lane * BYTES, memory, BYTES);
  });
}

void copy_lanes(uint32_t mask, const uint64_t *addresses, uint32_t each, uint8_t *bytes, bool writes) {
  switch (each) {
    case 1: return copy_lanes<1>(mask, addresses, bytes, writes);
    case 2: return copy_lanes<2>(mask, addresses, bytes, writes);
    case 4: return copy_lanes<4>(mask, addresses, bytes, writes);
    case 8: return copy_lanes<8>(mask, addresses, bytes, writes);
    default: return copy_lanes<16>(mask, addresses, bytes, writes);
  }
}

// Elements of two bytes or more that have the pattern of fresh memory throughout.
uint32_t unwritten_lanes(const uint8_t *bytes, int each, int size, uint32_t used, uint32_t mask) {
  if (size < 2) return 0;
  uint32_t found = 0;
  const int halves = size / 2;
  for (int lane = 0; lane < LANES; lane++) {
    uint32_t any = 0;
    for (int n = 0; n < each / size; n++) {
      uint32_t all = 1;
      for (int half = 0; half < halves; half++) {
        uint16_t value;
        memcpy(&value, bytes + lane * each + n * size + 2 * half, 2);
        all &= value == UNWRITTEN_HALF;
      }
      any |= all & (used >> (n * size));
    }
    found |= any ? LANE_BIT[lane] : 0;
  }
  return found & mask;
}

void load_global(Warp &warp, const Instruction &i) {
  const int each = i.size * i.count;
  uint64_t addresses[LANES];
  alignas(64) uint8_t bytes[LANES * MOST];
  global_addresses(warp, i, i.operand[i.results], addresses);
  const uint32_t there = check_global(warp, i, warp.exec, addresses, each, false, nullptr);
  if (there != ALL) memset(bytes, 0, sizeof bytes);
  copy_lanes(there, addresses, each, bytes, false);
  if (settings.check) {
    const uint32_t unwritten = unwritten_lanes(bytes, each, i.size, i.used_bytes, there);
    if (unwritten)
      report(warp, i, first_lane(unwritten), "unwritten-global",
             "reads global memory that nobody wrote since it was allocated");
  }
  to_registers(warp, i, bytes, warp.exec);
}

void store_global(Warp &warp, const Instruction &i) {
  const int each = i.size * i.count;
  uint64_t addresses[LANES];
  alignas(64) uint8_t bytes[LANES * MOST];
  global_addresses(warp, i, i.operand[0], addresses);
  from_registers(warp, i, bytes);
  const uint32_t there = check_global(warp, i, warp.exec, addresses, each, true, bytes);
  copy_lanes(there, addresses, each, bytes, true);
}

template <bool WRITES>
uint32_t check_shared(Warp &warp, const Instruction &i, int lane, uint32_t address, uint32_t each,
                      const uint8_t *bytes) {
  SharedMemory &shared = warp.block->shared;
  if (address & (each - 1)) {
    report(warp, i, lane, "misaligned",
           std::to_string(each) + " bytes of shared memory at " + std::to_string(address - SHARED_BASE));
    return 0;
  }
  if (!shared.holds(address, each)) {
    report(warp, i, lane, "out-of-bounds",
           std::string(WRITES ? "writes " : "reads ") + std::to_string(each) + " bytes of " +
               std::to_string(shared.bytes()) + " of shared memory at " +
               std::to_string((int64_t)address - SHARED_BASE));
    return 0;
  }
  if (WRITES) shared.changed(address);
  if (settings.check) {
    uint32_t problems = 0;
    if (WRITES) {
      problems = shared.write(address, each, warp.number, bytes);
    } else if (i.used_bytes == ALL) {
      problems = shared.read(address, each, warp.number);
    } else {
      for (uint32_t at = 0; at < each; at += i.size)
        if (i.used_bytes >> at & 1) problems |= shared.read(address + at, i.size, warp.number);
    }
    if (problems) report_shared(warp, i, lane, problems, address, WRITES);
  }
  return 1;
}

void load_shared(Warp &warp, const Instruction &i) {
  const uint32_t each = i.size * i.count;
  const uint32_t *row = warp.row<uint32_t>(i.operand[i.results]);
  alignas(64) uint8_t bytes[LANES * MOST];
  if (warp.exec != ALL) memset(bytes, 0, sizeof bytes);
  for_lanes(warp.exec, [&](int lane) {
    const uint32_t address = row[lane] + (uint32_t)i.offset;
    if (check_shared<false>(warp, i, lane, address, each, nullptr))
      memcpy(bytes + lane * each, warp.block->shared.at(address), each);
    else
      memset(bytes + lane * each, 0, each);
  });
  to_registers(warp, i, bytes, warp.exec);
}

void store_shared(Warp &warp, const Instruction &i) {
  const uint32_t each = i.size * i.count;
  const uint32_t *row = warp.row<uint32_t>(i.operand[0]);
  alignas(64) uint8_t bytes[LANES * MOST];
  from_registers(warp, i, bytes);
  for_lanes(warp.exec, [&](int lane) {
    const uint32_t address = row[lane] + (uint32_t)i.offset;
    if (check_shared<true>(warp, i, lane, address, each, bytes + lane * each))
      memcpy(warp.block->shared.at(address), bytes + lane * each, each);
  });
}

// ldmatrix: lane 8j + r has the address of row r of matrix j, 8 halves; each lane gets two.
void load_matrices(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "ldmatrix");
  const uint32_t *row = warp.row<uint32_t>(i.operand[i.results]);
  uint16_t matrix[4][8][8] = {};
  for (int lane = 0; lane < 8 * i.count; lane++) {
    const uint32_t address = row[lane] + (uint32_t)i.offset;
    if (check_shared<false>(warp, i, lane, address, 16, nullptr))
      memcpy(matrix[lane / 8][lane % 8], warp.block->shared.at(address), 16);
  }
  for (int n = 0; n < i.count; n++) {
    uint32_t *to = warp.row<uint32_t>(i.operand[n]);
    for (int lane = 0; lane < LANES; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      to[lane] = i.flags ? matrix[n][c][r] | (uint32_t)matrix[n][c + 1][r] << 16
                         : matrix[n][r][c] | (uint32_t)matrix[n][r][c + 1] << 16;
    }
  }
}

void store_matrices(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "stmatrix");
  const uint32_t *row = warp.row<uint32_t>(i.operand[0]);
  uint16_t matrix[4][8][8];
  for (int n = 0; n < i.count; n++) {
    const uint32_t *from = warp.row<uint32_t>(i.operand[1 + n]);
    for (int lane = 0; lane < LANES; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint16_t low = (uint16_t)from[lane], high = (uint16_t)(from[lane] >> 16);
      (i.flags ? matrix[n][c][r] : matrix[n][r][c]) = low;
      (i.flags ? matrix[n][c + 1][r] : matrix[n][r][c + 1]) = high;
    }
  }
  for (int lane = 0; lane < 8 * i.count; lane++) {
    const uint32_t address = row[lane] + (uint32_t)i.offset;
    const uint8_t *bytes = reinterpret_cast<uint8_t *>(matrix[lane / 8][lane % 8]);
    if (check_shared<true>(warp, i, lane, address, 16, bytes))
      memcpy(warp.block->shared.at(address), bytes, 16);
  }
}

int vector_count(Decoder &d) { return d.take("v4") ? 4 : d.take("v2") ? 2 : 1; }

// Hints of caches and of volatile change nothing here.
void skip_hints(Decoder &d) {
  while (d.take("L1::evict_last") || d.take("L1::evict_first") || d.take("L1::no_allocate") ||
         d.take("L1::evict_normal") || d.take("ca") || d.take("cg") || d.take("cs") ||
         d.take("wb") || d.take("wt") || d.take("nc")) {
  }
}

void decode_access(Decoder &d, bool loads) {
  d.take("volatile");
  const bool parameter = d.take("param"), global = !parameter && d.take("global");
  const bool shared = !parameter && !global && (d.take("shared") || d.take("shared::cta"));
  if (!parameter && !global && !shared) d.unknown("space");
  skip_hints(d);
  d.instruction.count = vector_count(d);
  Type type = d.type();
  d.instruction.size = size_of(type);
  d.expect_arguments(2, 2);
  if (parameter) {
    if (!loads || d.instruction.count != 1) d.unknown("form");
    d.any_result(0);
    const std::string &name = d.argument(1);
    const bool is_signed = type == Type::s8 || type == Type::s16 || type == Type::s32;
    d.constant_source(d.parser().parameter(name.substr(1, name.size() - 2), d.operand(0).width, is_signed));
    d.instruction.run = load_parameter;
    return;
  }
  const int count = d.instruction.count;
  if (d.vector_length(loads ? 0 : 1) != (size_t)count) d.unknown("number of registers");
  if (d.instruction.size * count > MOST) d.unknown("size");
  if (loads) {
    d.any_results(0);
    d.address(1);
  } else {
    d.address(0);
    d.any_sources(1, width_of(type));
  }
  const bool narrow = type == Type::s8 || (type == Type::s16 && d.operand(0).width != Width::bits16);
  if (loads && narrow) d.unknown("load that extends a sign");
  if (loads && type == Type::s32 && d.operand(0).width == Width::bits64) d.instruction.flags = EXTENDS_SIGN;
  const Width width = d.operand(loads ? count : 0).width;
  if (width != (global ? Width::bits64 : Width::bits32)) d.unknown("width of address");
  d.instruction.run = loads ? (global ? load_global : load_shared)
                            : (global ? store_global : store_shared);
}

void decode_matrices(Decoder &d, bool loads) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.unknown("form");
  d.instruction.count = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
  d.instruction.flags = d.take("trans");
  if (!d.instruction.count || !(d.take("shared") || d.take("shared::cta")) || !d.take("b16"))
    d.unknown("form");
  d.expect_arguments(2, 2);
  if (loads) {
    d.results(0, Width::bits32);
    d.address(1);
  } else {
    d.address(0);
    d.sources(1, Width::bits32);
  }
  if (d.instruction.operands != d.instruction.count + 1) d.unknown("number of registers");
  d.instruction.run = loads ? load_matrices : store_matrices;
}

}  // namespace

void report_shared(const Warp &warp, const Instruction &i, int lane, uint32_t problems,
                   uint32_t address, bool writes) {
  const std::string place = "shared memory at " + std::to_string(address - SHARED_BASE);
  const std::string does = writes ? "writes " : "reads ";
  if (problems & RACE)
    report(warp, i, lane, "shared-race",
           does + place + ", which another warp accesses with no barrier between");
  if (problems & UNWRITTEN)
    report(warp, i, lane, "unwritten-shared", does + place + ", which nobody wrote since the block began");
  if (problems & PENDING_COPY)
    report(warp, i, lane, "pending-copy", does + place + ", which a cp.async not yet waited for writes");
  if (problems & PENDING_PRODUCT)
    report(warp, i, lane, "wgmma-race", does + place + ", which a wgmma not yet waited for reads");
  if (problems & UNFENCED)
    report(warp, i, lane, "proxy-fence",
           does + place + " by wgmma with no fence.proxy.async since it was stored");
  if (problems & UNFENCED_COPY && settings.fenced_copies)
    report(warp, i, lane, "proxy-fence-copy",
           does + place + " by wgmma with no fence.proxy.async since cp.async wrote it");
}

bool decode_memory(Decoder &d) {
  const std::string &base = d.base();
  if (base == "ld" || base == "st") decode_access(d, base == "ld");
  else if (base == "ldmatrix" || base == "stmatrix") decode_matrices(d, base == "ldmatrix");
  else return false;
  return true;
}

}  // namespace emulator
