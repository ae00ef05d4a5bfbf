#include "products.h"

#include "fragments.h"
#include "halves.h"
#include "lanes.h"

namespace emulator {

namespace {

enum Format : int32_t { FLOAT16, BFLOAT16, TF32 };
constexpr uint32_t TRANSPOSED_A = 1, TRANSPOSED_B = 2, A_IN_REGISTERS = 4;

// tf32 is a float whose last 13 bits are not looked at.
float from_tf32(uint32_t bits) { return as_float(bits & ~0x1fffu); }

float from_half(int32_t format, uint32_t bits) {
  return format == FLOAT16 ? from_float16(bits) : from_bfloat16(bits);
}

// The left tile out of four registers, as mma and wgmma have it.
void left_from_registers(const Warp &warp, const Operand *registers, int32_t format, LeftTile &tile) {
  for (int n = 0; n < 4; n++) {
    const uint32_t *row = warp.row<uint32_t>(registers[n]);
    const int half = n % 2;
    if (format == TF32) {
      for (int lane = 0; lane < LANES; lane++) {
        // Every lane of a row of the result needs each k, which one of its four lanes holds.
        for (int k = 0; k < 4; k++)
          tile.at[k + n / 2 * 4][half][lane] = from_tf32(row[lane / 4 * 4 + k]);
      }
      continue;
    }
    for (int k = 0; k < 4; k++) {
      for (int lane = 0; lane < LANES; lane++) {
        const uint32_t pair = row[lane / 4 * 4 + k];
        tile.at[2 * k + n / 2 * 8][half][lane] = from_half(format, pair & 0xffff);
        tile.at[2 * k + 1 + n / 2 * 8][half][lane] = from_half(format, pair >> 16);
      }
    }
  }
}

void multiply_registers(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "mma");
  static thread_local LeftTile left;
  static thread_local RightTile right;
  const int32_t format = i.size;
  const int steps = i.count;
  left_from_registers(warp, i.operand + 4, format, left);
  float values[MOST_K][8];
  for (int n = 0; n < 2; n++) {
    const uint32_t *row = warp.row<uint32_t>(i.operand[8 + n]);
    for (int lane = 0; lane < LANES; lane++) {
      const int column = lane / 4, k = lane % 4;
      if (format == TF32) {
        values[k + n * 4][column] = from_tf32(row[lane]);
      } else {
        values[2 * k + n * 8][column] = from_half(format, row[lane] & 0xffff);
        values[2 * k + 1 + n * 8][column] = from_half(format, row[lane] >> 16);
      }
    }
  }
  for (int k = 0; k < steps; k++) place_right(right, k, values[k], 8);
  float *results[4];
  const float *sums[4];
  for (int n = 0; n < 4; n++) {
    results[n] = warp.row<float>(i.operand[n]);
    sums[n] = warp.row<float>(i.operand[10 + n]);
  }
  multiply(left, right, 0, steps, results, sums);
}

// Where a tile lies that a descriptor names: addresses of its chunks of 16 bytes.
struct Layout {
  uint32_t start, leading, stride, width;  // width: of a swizzled row, or 16 where there is none

  explicit Layout(uint64_t descriptor) {
    static const uint32_t widths[] = {16, 128, 64, 32};
    start = (uint32_t)(descriptor & 0x3fff) << 4;
    leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    width = widths[descriptor >> 62];
  }
  uint32_t swizzled(uint32_t address) const { return address ^ ((address >> 3) & (width - 16)); }

  // Rows (or columns of the right tile) whose 16 bytes go along k.
  uint32_t along_k(uint32_t row, uint32_t chunk) const {
    const uint32_t step = width == 16 ? leading : 16;
    return swizzled(start + row % 8 * width + row / 8 * stride + chunk * step);
  }
  // Steps of k whose 16 bytes go along the rows.
  uint32_t along_rows(uint32_t k, uint32_t chunk) const {
    if (width == 16) return start + k % 8 * 16 + k / 8 * leading + chunk * stride;
    const uint32_t chunks = width / 16;
    return swizzled(start + chunk % chunks * 16 + chunk / chunks * leading + k % 8 * width + k / 8 * stride);
  }
};

// Chunks of 16 bytes of a tile: of the right one all, of the left one the 16 rows of this warp.
// `visit(address, a, b)`: a is the row or the step of k, b the chunk along the other.
template <class F>
void each_chunk(uint64_t descriptor, bool transposed, int first_row, int rows, int elements, F &&visit) {
  const Layout layout(descriptor);
  if (!transposed) {
    for (int row = 0; row < rows; row++)
      for (int chunk = 0; chunk < 2; chunk++)
        visit(layout.along_k(first_row + row, chunk), row, chunk);
  } else {
    for (int k = 0; k < 2 * elements; k++)
      for (int chunk = 0; chunk < rows / elements; chunk++)
        visit(layout.along_rows(k, first_row / elements + chunk), k, chunk);
  }
}

// The elements of one chunk as floats; how many there are.
int read_chunk(const uint8_t *bytes, int32_t format, float *values) {
  if (format == TF32) {
    uint32_t words[4];
    memcpy(words, bytes, 16);
    for (int n = 0; n < 4; n++) values[n] = from_tf32(words[n]);
    return 4;
  }
  uint16_t halves[8];
  memcpy(halves, bytes, 16);
  if (format == FLOAT16)
    for (int n = 0; n < 8; n++) values[n] = from_float16(halves[n]);
  else
    for (int n = 0; n < 8; n++) values[n] = from_bfloat16(halves[n]);
  return 8;
}

// A tile of `rows` by k into dense[k][row].
template <int STRIDE>
void read_tile(Warp &warp, uint64_t descriptor, bool transposed, int first_row, int rows,
               int32_t format, float (*dense)[STRIDE]) {
  const int elements = format == TF32 ? 4 : 8;
  each_chunk(descriptor, transposed, first_row, rows, elements, [&](uint32_t address, int a, int b) {
    float values[8];
    read_chunk(warp.block->shared.at(address), format, values);
    if (transposed)
      memcpy(dense[a] + b * elements, values, elements * sizeof(float));
    else
      for (int n = 0; n < elements; n++) dense[b * elements + n][a] = values[n];
  });
}

int columns_of(const Instruction &i) { return i.results * 2; }
int first_row_of(const Warp &warp) { return warp.number % 4 * 16; }

void compute(Warp &warp, const Product &product) {
  const Instruction &i = *product.instruction;
  static thread_local LeftTile left;
  static thread_local RightTile right;
  static thread_local float dense[MOST_K][MOST_N];
  const int columns = columns_of(i), steps = i.count;
  if (i.flags & A_IN_REGISTERS) {
    left_from_registers(warp, i.operand + i.results, i.size, left);
  } else {
    float rows[MOST_K][16];
    read_tile(warp, product.a, i.flags & TRANSPOSED_A, first_row_of(warp), 16, i.size, rows);
    for (int k = 0; k < steps; k++)
      for (int half = 0; half < 2; half++)
        for (int lane = 0; lane < LANES; lane++) left.at[k][half][lane] = rows[k][lane / 4 + half * 8];
  }
  read_tile(warp, product.b, i.flags & TRANSPOSED_B, 0, columns, i.size, dense);
  for (int k = 0; k < steps; k++) place_right(right, k, dense[k], columns);
  static const float zeros[LANES] = {};
  for (int n = 0; n < columns / 8; n++) {
    float *results[4];
    const float *sums[4];
    for (int j = 0; j < 4; j++) {
      results[j] = warp.row<float>(i.operand[4 * n + j]);
      sums[j] = product.accumulate ? results[j] : zeros;
    }
    multiply(left, right, n, steps, results, sums);
  }
}

// Visit all chunks that a product reads, of both tiles.
template <class F>
void each_chunk_of(const Warp &warp, const Product &product, F &&visit) {
  const Instruction &i = *product.instruction;
  const int elements = i.size == TF32 ? 4 : 8;
  if (!(i.flags & A_IN_REGISTERS))
    each_chunk(product.a, i.flags & TRANSPOSED_A, first_row_of(warp), 16, elements,
               [&](uint32_t address, int, int) { visit(address); });
  each_chunk(product.b, i.flags & TRANSPOSED_B, 0, columns_of(i), elements,
             [&](uint32_t address, int, int) { visit(address); });
}

void mark(Warp &warp, const Operand &place, uint8_t use) {
  for (uint32_t at = place.where / 64; at < (place.where + row_bytes(place.width)) / 64; at++) {
    if (!warp.uses[at]) warp.used.push_back(at);
    warp.uses[at] |= use;
  }
}

void mark_registers(Warp &warp, const Product &product) {
  const Instruction &i = *product.instruction;
  for (int n = 0; n < i.results; n++) mark(warp, i.operand[n], ACCUMULATES);
  if (i.flags & A_IN_REGISTERS)
    for (int n = 0; n < 4; n++)
      if (!i.operand[i.results + n].is_constant()) mark(warp, i.operand[i.results + n], READS);
}

void check_fence(Warp &warp, const Instruction &i) {
  bool touched = !warp.products_fenced;
  const int registers = i.results + (i.flags & A_IN_REGISTERS ? 4 : 0);
  for (int n = 0; n < registers; n++)
    if (!i.operand[n].is_constant()) touched |= warp.uses[i.operand[n].where / 64] & TOUCHED;
  if (touched)
    report(warp, i, -1, "wgmma-fence", "no wgmma.fence between wgmma and what wrote its registers");
}

uint64_t uniform(Warp &warp, const Instruction &i, const Operand &place) {
  const uint64_t *row = warp.row<uint64_t>(place);
  for (int lane = 1; lane < LANES; lane++)
    if (row[lane] != row[0]) {
      report(warp, i, lane, "wgmma-descriptor", "a descriptor differs between the lanes of a warp");
      break;
    }
  if (row[0] >> 49 & 7) throw Error("wgmma: base offsets of descriptors are not emulated");
  return row[0];
}

void issue_product(Warp &warp, const Instruction &i) {
  whole_warp(warp, i, "wgmma");
  const int a = i.results, b = a + (i.flags & A_IN_REGISTERS ? 4 : 1);
  Product product;
  product.instruction = &i;
  if (!(i.flags & A_IN_REGISTERS)) product.a = uniform(warp, i, i.operand[a]);
  product.b = uniform(warp, i, i.operand[b]);
  product.accumulate = warp.predicate(i.operand[b + 1]) & 1;
  SharedMemory &shared = warp.block->shared;
  uint32_t outside = 0;
  each_chunk_of(warp, product, [&](uint32_t address) {
    if (!shared.holds(address, 16)) outside = address;
  });
  if (outside)
    return report(warp, i, -1, "out-of-bounds",
                  "wgmma reads shared memory at " + std::to_string((int64_t)outside - SHARED_BASE) +
                      " of " + std::to_string(shared.bytes()));
  if (settings.check) {
    check_fence(warp, i);
    uint32_t problems = 0, where = 0;
    each_chunk_of(warp, product, [&](uint32_t address) {
      const uint32_t found = shared.begin_product_read(address, warp.number, warp.block->fenced);
      if (found & ~problems) where = address;
      problems |= found;
    });
    if (problems) report_shared(warp, i, -1, problems, where, false);
    mark_registers(warp, product);
  }
  if (!settings.late) compute(warp, product);
  warp.products.add(product);
}

void fence_products(Warp &warp, const Instruction &) {
  warp.products_fenced = true;
  if (!settings.check) return;
  for (uint32_t at : warp.used) warp.uses[at] &= ~TOUCHED;
  warp.tracking = true;
  warp.look_again();
}

void commit_products(Warp &warp, const Instruction &) { warp.products.commit(); }

void wait_for_products(Warp &warp, const Instruction &i) {
  warp.products.wait(i.count, [&](const Product &product) {
    if (settings.late) compute(warp, product);
    if (settings.check)
      each_chunk_of(warp, product,
                    [&](uint32_t address) { warp.block->shared.end_product_read(address, warp.number); });
  });
  if (!settings.check) return;
  const bool done = warp.products.waiting.empty();
  std::vector<uint32_t> before;
  before.swap(warp.used);
  for (uint32_t at : before) {
    warp.uses[at] = done ? 0 : warp.uses[at] & TOUCHED;
    if (warp.uses[at]) warp.used.push_back(at);
  }
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
