#include "products.h"

#include "lanes.h"
#include "tiles.h"

namespace emulator {

namespace {

constexpr uint32_t TRANSPOSED_A = 1, TRANSPOSED_B = 2, A_IN_REGISTERS = 4;

// The left tile out of four registers, as mma and wgmma have it. Every lane of a row of the result
// needs each k, which one of its four lanes holds.
template <int32_t FORMAT>
void left_from_registers(const Warp &warp, const Operand *registers, LeftTile &tile) {
  for (int n = 0; n < 4; n++) {
    const uint32_t *row = warp.row<uint32_t>(registers[n]);
    const int half = n % 2, second = n / 2;
    for (int k = 0; k < 4; k++) {
      uint32_t pair[LANES];
      for (int lane = 0; lane < LANES; lane++) pair[lane] = row[(lane & ~3) + k];
      if (FORMAT == TF32) {
        float *to = tile.at[k + second * 4][half];
        for (int lane = 0; lane < LANES; lane++) to[lane] = from_tf32(pair[lane]);
        continue;
      }
      float *even = tile.at[2 * k + second * 8][half], *odd = tile.at[2 * k + 1 + second * 8][half];
      for (int lane = 0; lane < LANES; lane++) even[lane] = from_half<FORMAT>(pair[lane] & 0xffff);
      for (int lane = 0; lane < LANES; lane++) odd[lane] = from_half<FORMAT>(pair[lane] >> 16);
    }
  }
}

// The same: several products in a row often have the same left tile, which is found out by its bits.
const LeftTile &left_from_registers(const Warp &warp, const Operand *registers, int32_t format) {
  static thread_local LeftTile tile;
  static thread_local uint32_t bits[4][LANES];
  static thread_local int32_t bits_format = -1;
  bool same = bits_format == format;
  for (int n = 0; n < 4 && same; n++)
    same = !memcmp(bits[n], warp.row<uint32_t>(registers[n]), sizeof bits[n]);
  if (same) return tile;
  bits_format = format;
  for (int n = 0; n < 4; n++) memcpy(bits[n], warp.row<uint32_t>(registers[n]), sizeof bits[n]);
  if (format == FLOAT16) left_from_registers<FLOAT16>(warp, registers, tile);
  else if (format == BFLOAT16) left_from_registers<BFLOAT16>(warp, registers, tile);
  else left_from_registers<TF32>(warp, registers, tile);
  return tile;
}

template <int32_t FORMAT>
void right_from_registers(const Warp &warp, const Operand *registers, RightTile &tile) {
  float values[MOST_K][8];
  for (int n = 0; n < 2; n++) {
    const uint32_t *row = warp.row<uint32_t>(registers[n]);
    for (int lane = 0; lane < LANES; lane++) {
      const int column = lane / 4, k = lane % 4;
      if (FORMAT == TF32) {
        values[k + n * 4][column] = from_tf32(row[lane]);
      } else {
        values[2 * k + n * 8][column] = from_half<FORMAT>(row[lane] & 0xffff);
        values[2 * k + 1 + n * 8][column] = from_half<FORMAT>(row[lane] >> 16);
      }
    }
  }
  for (int k = 0; k < 2 * elements_of(FORMAT); k++) place_right(tile, k, values[k], 8);
}

void multiply_registers(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "mma");
  static thread_local RightTile right;
  const LeftTile &left = left_from_registers(warp, i.operand + 4, i.size);
  if (i.size == FLOAT16) right_from_registers<FLOAT16>(warp, i.operand + 8, right);
  else if (i.size == BFLOAT16) right_from_registers<BFLOAT16>(warp, i.operand + 8, right);
  else right_from_registers<TF32>(warp, i.operand + 8, right);
  float *results[4];
  const float *sums[4];
  for (int n = 0; n < 4; n++) {
    results[n] = warp.row<float>(i.operand[n]);
    sums[n] = warp.row<float>(i.operand[10 + n]);
  }
  multiply(left, right, 0, i.count, results, sums);
}

int columns_of(const Instruction &i) { return i.results * 2; }

void compute(Warp &warp, const Product &product) {
  const Instruction &i = *product.instruction;
  static thread_local LeftTile from_memory;
  if (product.left) left_values(warp, *product.left, from_memory);
  const LeftTile &left =
      product.left ? from_memory : left_from_registers(warp, i.operand + i.results, i.size);
  const RightTile &right = right_values(warp, *product.right);
  static const float zeros[LANES] = {};
  for (int n = 0; n < columns_of(i) / 8; n++) {
    float *results[4];
    const float *sums[4];
    for (int j = 0; j < 4; j++) {
      results[j] = warp.row<float>(i.operand[4 * n + j]);
      sums[j] = product.accumulate ? results[j] : zeros;
    }
    multiply(left, right, n, i.count, results, sums);
  }
}

// Visit the tiles that a product reads; the right one is read by all the warps of a group.
template <class F>
void each_tile(const Product &product, F &&visit) {
  if (product.left) visit(*product.left, false);
  visit(*product.right, true);
}

void mark(Warp &warp, const Operand &place, uint8_t use) {
  for (uint32_t at = place.where / 64; at < (place.where + row_bytes(place.width)) / 64; at++) {
    if (!warp.uses[at]) warp.used.push_back(at);
    warp.uses[at] |= use;
  }
}

// Drop marks of all registers but those in `kept`.
void keep_marks(Warp &warp, uint8_t kept) {
  size_t left = 0;
  for (uint32_t at : warp.used) {
    warp.uses[at] &= kept;
    if (warp.uses[at]) warp.used[left++] = at;
  }
  warp.used.resize(left);
}

void mark_registers(Warp &warp, const Product &product) {
  const Instruction &i = *product.instruction;
  for (int n = 0; n < i.results; n++) mark(warp, i.operand[n], ACCUMULATES);
  if (i.flags & A_IN_REGISTERS)
    for (int n = 0; n < 4; n++)
      if (!i.operand[i.results + n].is_constant()) mark(warp, i.operand[i.results + n], READS);
}

bool touched(const Warp &warp, const Instruction &i, int first, int count) {
  bool found = false;
  for (int n = first; n < first + count; n++)
    if (!i.operand[n].is_constant()) found |= warp.uses[i.operand[n].where / 64] & TOUCHED;
  return found;
}

void check_fence(Warp &warp, const Instruction &i) {
  if (!warp.products_fenced || touched(warp, i, 0, i.results))
    report(warp, i, -1, "wgmma-fence", "no wgmma.fence between wgmma and what wrote its accumulators");
  if (settings.fenced_operands && i.flags & A_IN_REGISTERS && touched(warp, i, i.results, 4))
    report(warp, i, -1, "wgmma-fence-operand", "no wgmma.fence between wgmma and what wrote its operands");
}

uint64_t uniform(Warp &warp, const Instruction &i, const Operand &place) {
  const uint64_t *row = warp.row<uint64_t>(place);
  for (int lane = 1; lane < LANES; lane++)
    if (row[lane] != row[0]) {
      report(warp, i, lane, "wgmma-descriptor", "a descriptor differs between the lanes of a warp");
      break;
    }
  // The base offset moves the pattern of a swizzle; without one it says nothing.
  if (row[0] >> 49 & 7 && row[0] >> 62)
    throw Error("wgmma: base offsets of swizzled tiles are not emulated");
  return row[0];
}

void issue_product(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "wgmma");
  const int a = i.results, b = a + (i.flags & A_IN_REGISTERS ? 4 : 1);
  Product product;
  product.instruction = &i;
  if (!(i.flags & A_IN_REGISTERS))
    product.left = &tile_cache.find({uniform(warp, i, i.operand[a]), i.size, warp.number % 4 * 16, 16,
                                     (i.flags & TRANSPOSED_A) != 0});
  product.right = &tile_cache.find({uniform(warp, i, i.operand[b]), i.size, 0, columns_of(i),
                                    (i.flags & TRANSPOSED_B) != 0});
  product.accumulate = warp.predicate(i.operand[b + 1]) & 1;
  SharedMemory &shared = warp.block->shared;
  bool inside = true;
  each_tile(product, [&](Tile &tile, bool) {
    if (shared.holds(tile.begin, tile.end - tile.begin)) return;
    inside = false;
    report(warp, i, -1, "out-of-bounds",
           "wgmma reads " + std::to_string((int64_t)tile.begin - SHARED_BASE) + " to " +
               std::to_string((int64_t)tile.end - SHARED_BASE) + " of " +
               std::to_string(shared.bytes()) + " bytes of shared memory");
  });
  if (!inside) return;
  if (settings.check) {
    check_fence(warp, i);
    each_tile(product, [&](Tile &tile, bool for_all_warps) {
      uint32_t where = 0;
      const uint32_t problems = check_tile(warp, tile, for_all_warps, where);
      if (problems) report_shared(warp, i, -1, problems, where, false);
      shared.begin_product(warp.number, tile.begin, tile.end, tile.chunks);
    });
    mark_registers(warp, product);
  }
  if (!settings.late) compute(warp, product);
  warp.products.add(product);
}

void fence_products(Warp &warp, const Instruction &) {
  warp.products_fenced = true;
  if (!settings.check) return;
  keep_marks(warp, ACCUMULATES | READS);
  warp.tracking = true;
  warp.look_again();
}

void commit_products(Warp &warp, const Instruction &) { warp.products.commit(); }

void wait_for_products(Warp &warp, const Instruction &i) {
  warp.products.wait(i.count, [&](const Product &product) {
    if (settings.late) compute(warp, product);
    if (!settings.check) return;
    // Who writes there from now on, before a barrier, races with the others of the group.
    uint32_t where = 0;
    each_tile(product, [&](Tile &tile, bool all) {
      check_tile(warp, tile, all, where);
      warp.block->shared.end_product(warp.number, tile.begin, tile.end);
    });
  });
  if (!settings.check) return;
  const bool done = warp.products.waiting.empty();
  keep_marks(warp, done ? 0 : TOUCHED);
  for (const Product &product : warp.products.waiting) mark_registers(warp, product);
  if (done) {
    warp.products_fenced = warp.tracking = false;
    warp.look_again();
  }
}

void decode_mma(Decoder &d) {
  if (!d.take("sync") || !d.take("aligned")) d.unknown("form");
  const std::string shape = d.next();
  if (!d.take("row") || !d.take("col") || !d.take("f32")) d.unknown("form");
  const Type a = d.type(), b = d.type(), c = d.type();
  if (a != b || c != Type::f32) d.unknown("types");
  Instruction &i = d.instruction;
  if (shape == "m16n8k16" && (a == Type::f16 || a == Type::bf16)) {
    i.count = 16;
    i.size = a == Type::f16 ? FLOAT16 : BFLOAT16;
  } else if (shape == "m16n8k8" && a == Type::tf32) {
    i.count = 8;
    i.size = TF32;
  } else {
    d.unknown("shape or types");
  }
  d.expect_arguments(4, 4);
  d.results(0, Width::bits32);
  for (int n = 1; n < 4; n++) d.sources(n, Width::bits32);
  if (i.results != 4 || i.operands != 14) d.unknown("number of registers");
  i.run = multiply_registers;
}

void decode_mma_async(Decoder &d) {
  if (!d.take("sync") || !d.take("aligned")) d.unknown("form");
  const std::string shape = d.next();
  if (!d.take("f32")) d.unknown("type of the sums");
  const Type a = d.type(), b = d.type();
  int columns = 0, steps = 0;
  if (sscanf(shape.c_str(), "m64n%dk%d", &columns, &steps) != 2) d.unknown("shape ." + shape);
  if (a != b || (a != Type::f16 && a != Type::bf16 && a != Type::tf32)) d.unknown("types");
  if (steps != (a == Type::tf32 ? 8 : 16)) d.unknown("shape ." + shape);
  Instruction &i = d.instruction;
  i.size = a == Type::f16 ? FLOAT16 : a == Type::bf16 ? BFLOAT16 : TF32;
  i.count = steps;
  i.of_wgmma = true;
  const bool in_registers = d.argument(1)[0] == '{';
  const size_t transposes = a == Type::tf32 ? 0 : in_registers ? 1 : 2;
  d.expect_arguments(6 + transposes, 6 + transposes);
  d.results(0, Width::bits32);
  if (i.results * 2 != columns) d.unknown("number of registers");
  d.sources(1, in_registers ? Width::bits32 : Width::bits64);
  d.source(2, Width::bits64);
  d.source(3, Width::predicate);
  if (i.operands != i.results + (in_registers ? 4 : 1) + 2) d.unknown("number of registers");
  if (d.immediate(4) != 1 || d.immediate(5) != 1) d.unknown("scale");
  if (in_registers) i.flags |= A_IN_REGISTERS;
  if (transposes == 2 && d.immediate(6)) i.flags |= TRANSPOSED_A;
  if (transposes && d.immediate(5 + transposes)) i.flags |= TRANSPOSED_B;
  i.run = issue_product;
}

}  // namespace

void track(Warp &warp, const Instruction &i) {
  if (i.of_wgmma) return;
  for (int n = 0; n < i.operands; n++) {
    const Operand &place = i.operand[n];
    if (place.is_constant() || place.is_sink() || place.width == Width::predicate) continue;
    const uint8_t use = warp.uses[place.where / 64];
    const bool writes = n < i.results;
    if (use & ACCUMULATES)
      report(warp, i, first_lane(warp.exec), "wgmma-register",
             std::string(writes ? "writes" : "reads") + " an accumulator of a wgmma not yet waited for");
    if (use & READS && writes)
      report(warp, i, first_lane(warp.exec), "wgmma-register",
             "writes a register that a wgmma not yet waited for reads");
    if (writes) mark(warp, place, TOUCHED);
  }
}

bool decode_products(Decoder &d) {
  if (d.base() == "mma") {
    decode_mma(d);
    return true;
  }
  if (d.base() != "wgmma") return false;
  if (d.take("mma_async")) {
    decode_mma_async(d);
    return true;
  }
  d.instruction.of_wgmma = true;
  if (d.take("fence")) {
    d.instruction.run = fence_products;
  } else if (d.take("commit_group")) {
    d.instruction.run = commit_products;
  } else if (d.take("wait_group")) {
    d.instruction.run = wait_for_products;
    d.instruction.count = (int32_t)d.immediate(0);
  } else {
    d.unknown("form of wgmma");
  }
  if (!d.take("sync") || !d.take("aligned")) d.unknown("form of wgmma");
  return true;
}

}  // namespace emulator
