// mov, and, or, xor, not, shifts, bfe, prmt, selp, setp.
#include <algorithm>

#include "halves.h"
#include "lanes.h"
#include "parser.h"

namespace emulator {

namespace {

template <class T>
void move(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) { return a[l]; });
}

void move_predicate(Warp &warp, const Instruction &i) {
  uint32_t &to = warp.predicate(i.operand[0]);
  to = (to & ~warp.exec) | (warp.predicate(i.operand[1]) & warp.exec);
}

// mov.b32 %r, {%a, %b}: parts of W become one of T.
template <class T, class W, int PARTS>
void pack(Warp &warp, const Instruction &i) {
  const W *part[PARTS];
  for (int n = 0; n < PARTS; n++) part[n] = warp.row<W>(i.operand[1 + n]);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) {
    T value = 0;
    for (int n = 0; n < PARTS; n++) value |= (T)part[n][l] << (n * sizeof(W) * 8);
    return value;
  });
}

// mov.b32 {%a, %b}, %r, where a part may be dropped.
template <class T, class W, int PARTS>
void unpack(Warp &warp, const Instruction &i) {
  const T *whole = warp.row<T>(i.operand[PARTS]);
  T copy[LANES];
  memcpy(copy, whole, sizeof copy);
  for (int n = 0; n < PARTS; n++) {
    if (i.operand[n].is_sink()) continue;
    each_lane(warp, warp.row<W>(i.operand[n]), [&](int l) { return (W)(copy[l] >> (n * sizeof(W) * 8)); });
  }
}

template <int PARTS, bool PACKS>
Handler parts_handler(Width whole, Width part) {
  if (whole == Width::bits32 && part == Width::bits16 && PARTS == 2)
    return PACKS ? pack<uint32_t, uint16_t, 2> : unpack<uint32_t, uint16_t, 2>;
  if (whole == Width::bits64 && part == Width::bits32 && PARTS == 2)
    return PACKS ? pack<uint64_t, uint32_t, 2> : unpack<uint64_t, uint32_t, 2>;
  if (whole == Width::bits64 && part == Width::bits16 && PARTS == 4)
    return PACKS ? pack<uint64_t, uint16_t, 4> : unpack<uint64_t, uint16_t, 4>;
  return nullptr;
}

void decode_move(Decoder &d) {
  Type type = d.type();
  const Width width = width_of(type);
  d.expect_arguments(2, 2);
  const bool packs = d.argument(1)[0] == '{', unpacks = d.argument(0)[0] == '{';
  if (!packs && !unpacks) {
    d.result(0, width);
    d.source(1, width);
    d.instruction.run = width == Width::predicate ? move_predicate
                        : width == Width::bits16  ? move<uint16_t>
                        : width == Width::bits32  ? move<uint32_t>
                                                  : move<uint64_t>;
    return;
  }
  const size_t parts = d.vector_length(packs ? 1 : 0);
  const Width part = width == Width::bits64 && parts == 2 ? Width::bits32 : Width::bits16;
  if (packs) {
    d.result(0, width);
    d.sources(1, part);
  } else {
    d.results(0, part);
    d.source(1, width);
  }
  if (parts == 2) d.instruction.run = packs ? parts_handler<2, true>(width, part) : parts_handler<2, false>(width, part);
  if (parts == 4) d.instruction.run = packs ? parts_handler<4, true>(width, part) : parts_handler<4, false>(width, part);
  if (!d.instruction.run) d.unknown("form of mov");
}

struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };

template <class T, class F>
void logic(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]), *b = warp.row<T>(i.operand[2]);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) { return F::of(a[l], b[l]); });
}

template <class F>
void predicate_logic(Warp &warp, const Instruction &i) {
  uint32_t &to = warp.predicate(i.operand[0]);
  const uint32_t value = F::of(warp.predicate(i.operand[1]), warp.predicate(i.operand[2]));
  to = (to & ~warp.exec) | (value & warp.exec);
}

template <class F>
void decode_logic(Decoder &d) {
  const Width width = width_of(d.type());
  d.expect_arguments(3, 3);
  d.result(0, width);
  d.source(1, width);
  d.source(2, width);
  d.instruction.run = width == Width::predicate ? predicate_logic<F>
                      : width == Width::bits16  ? logic<uint16_t, F>
                      : width == Width::bits32  ? logic<uint32_t, F>
                                                : logic<uint64_t, F>;
}

template <class T>
void complement(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) { return (T)~a[l]; });
}

void complement_predicate(Warp &warp, const Instruction &i) {
  uint32_t &to = warp.predicate(i.operand[0]);
  to = (to & ~warp.exec) | (~warp.predicate(i.operand[1]) & warp.exec);
}

void count_ones(Warp &warp, const Instruction &i) {
  const uint32_t *a = warp.row<uint32_t>(i.operand[1]);
  each_lane(warp, warp.row<uint32_t>(i.operand[0]),
            [&](int l) { return (uint32_t)__builtin_popcount(a[l]); });
}

void decode_count(Decoder &d) {
  if (d.type() != Type::b32) d.unknown("type");
  d.expect_arguments(2, 2);
  d.result(0, Width::bits32);
  d.source(1, Width::bits32);
  d.instruction.run = count_ones;
}

void decode_not(Decoder &d) {
  const Width width = width_of(d.type());
  d.expect_arguments(2, 2);
  d.result(0, width);
  d.source(1, width);
  d.instruction.run = width == Width::predicate ? complement_predicate
                      : width == Width::bits16  ? complement<uint16_t>
                      : width == Width::bits32  ? complement<uint32_t>
                                                : complement<uint64_t>;
}

// Counts past the width give 0, or the sign.
template <class T>
void shift_left(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]);
  const uint32_t *n = warp.row<uint32_t>(i.operand[2]);
  constexpr uint32_t bits = 8 * sizeof(T);
  each_lane(warp, warp.row<T>(i.operand[0]),
            [&](int l) { return (T)(n[l] >= bits ? 0 : a[l] << (n[l] % bits)); });
}

template <class T>
void shift_right(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]);
  const uint32_t *n = warp.row<uint32_t>(i.operand[2]);
  constexpr uint32_t bits = 8 * sizeof(T);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) {
    const T past = (T)(a[l] < 0 ? -1 : 0);
    return (T)(n[l] >= bits ? past : a[l] >> (n[l] % bits));
  });
}

void decode_shift(Decoder &d, bool left) {
  Type type = d.type();
  const Width width = width_of(type);
  d.expect_arguments(3, 3);
  d.result(0, width);
  d.source(1, width);
  d.source(2, Width::bits32);
  if (left) {
    d.instruction.run = width == Width::bits16   ? shift_left<uint16_t>
                        : width == Width::bits32 ? shift_left<uint32_t>
                                                 : shift_left<uint64_t>;
    return;
  }
  switch (type) {
    case Type::s16: d.instruction.run = shift_right<int16_t>; break;
    case Type::b16: case Type::u16: d.instruction.run = shift_right<uint16_t>; break;
    case Type::s32: d.instruction.run = shift_right<int32_t>; break;
    case Type::b32: case Type::u32: d.instruction.run = shift_right<uint32_t>; break;
    case Type::s64: d.instruction.run = shift_right<int64_t>; break;
    case Type::b64: case Type::u64: d.instruction.run = shift_right<uint64_t>; break;
    default: d.unknown("type");
  }
}

// shf: 64 bits of two registers shifted, of which one half is kept.
template <bool LEFT, bool CLAMPED>
void funnel_shift(Warp &warp, const Instruction &i) {
  const uint32_t *low = warp.row<uint32_t>(i.operand[1]), *high = warp.row<uint32_t>(i.operand[2]);
  const uint32_t *n = warp.row<uint32_t>(i.operand[3]);
  each_lane(warp, warp.row<uint32_t>(i.operand[0]), [&](int l) {
    const uint64_t both = (uint64_t)high[l] << 32 | low[l];
    const uint32_t count = CLAMPED ? std::min(n[l], 32u) : n[l] & 31;
    return (uint32_t)(LEFT ? both << count >> 32 : both >> count);
  });
}

void decode_funnel_shift(Decoder &d) {
  const bool left = d.take("l");
  if (!left && !d.take("r")) d.unknown("direction");
  const bool clamped = d.take("clamp");
  if (!clamped && !d.take("wrap")) d.unknown("form");
  if (d.type() != Type::b32) d.unknown("type");
  d.expect_arguments(4, 4);
  d.result(0, Width::bits32);
  for (int n = 1; n < 4; n++) d.source(n, Width::bits32);
  d.instruction.run = left ? (clamped ? funnel_shift<true, true> : funnel_shift<true, false>)
                           : (clamped ? funnel_shift<false, true> : funnel_shift<false, false>);
}

template <bool SIGNED>
void extract_bits(Warp &warp, const Instruction &i) {
  const uint32_t *a = warp.row<uint32_t>(i.operand[1]), *from = warp.row<uint32_t>(i.operand[2]);
  const uint32_t *length = warp.row<uint32_t>(i.operand[3]);
  each_lane(warp, warp.row<uint32_t>(i.operand[0]), [&](int l) {
    const uint32_t first = from[l] & 255, bits = length[l] & 255;
    const uint64_t mask = bits >= 32 ? 0xffffffffull : (1ull << bits) - 1;
    const uint32_t last = std::min(first + bits - 1, 31u);
    const bool sign = SIGNED && bits && (a[l] >> last & 1);
    const uint64_t extended = sign ? a[l] | 0xffffffff00000000ull : a[l];
    const uint64_t moved = (uint64_t)((int64_t)extended >> std::min(first, 63u)) & mask;
    return (uint32_t)(moved | (sign ? ~mask : 0));
  });
}

void decode_extract(Decoder &d) {
  Type type = d.type();
  if (type != Type::u32 && type != Type::s32) d.unknown("type");
  d.expect_arguments(4, 4);
  d.result(0, Width::bits32);
  for (int n = 1; n < 4; n++) d.source(n, Width::bits32);
  d.instruction.run = type == Type::s32 ? extract_bits<true> : extract_bits<false>;
}

// Four bytes chosen out of eight; bit 3 of a choice repeats the sign of its byte.
void permute_bytes(Warp &warp, const Instruction &i) {
  const uint32_t *a = warp.row<uint32_t>(i.operand[1]), *b = warp.row<uint32_t>(i.operand[2]);
  const uint32_t *choice = warp.row<uint32_t>(i.operand[3]);
  each_lane(warp, warp.row<uint32_t>(i.operand[0]), [&](int l) {
    const uint64_t bytes = (uint64_t)b[l] << 32 | a[l];
    uint32_t value = 0;
    for (int n = 0; n < 4; n++) {
      const uint32_t chosen = choice[l] >> (4 * n) & 15;
      const uint32_t byte = (uint32_t)(bytes >> (8 * (chosen & 7))) & 255;
      value |= (chosen & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * n);
    }
    return value;
  });
}

template <class T>
void select(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]), *b = warp.row<T>(i.operand[2]);
  const uint32_t predicate = warp.predicate(i.operand[3]);
  each_lane(warp, warp.row<T>(i.operand[0]), [&](int l) { return predicate & LANE_BIT[l] ? a[l] : b[l]; });
}

void decode_select(Decoder &d) {
  const Width width = width_of(d.type());
  if (width == Width::predicate) d.unknown("type");
  d.expect_arguments(4, 4);
  d.result(0, width);
  d.source(1, width);
  d.source(2, width);
  d.source(3, Width::predicate);
  d.instruction.run = width == Width::bits16   ? select<uint16_t>
                      : width == Width::bits32 ? select<uint32_t>
                                               : select<uint64_t>;
}

struct Equal { template <class T> static bool of(T a, T b) { return a == b; } };
struct Less { template <class T> static bool of(T a, T b) { return a < b; } };
struct LessOrEqual { template <class T> static bool of(T a, T b) { return a <= b; } };
struct Greater { template <class T> static bool of(T a, T b) { return a > b; } };
struct GreaterOrEqual { template <class T> static bool of(T a, T b) { return a >= b; } };
struct NotEqual { template <class T> static bool of(T a, T b) { return a < b || a > b; } };
struct Ordered { template <class T> static bool of(T a, T b) { return a == a && b == b; } };
template <class F> struct Not { template <class T> static bool of(T a, T b) { return !F::of(a, b); } };

struct AsIs { template <class T> static T of(T a) { return a; } };
struct Float16 { static float of(uint16_t a) { return from_float16(a); } };
struct Bfloat16 { static float of(uint16_t a) { return from_bfloat16(a); } };

template <class T, class F, class Convert>
void compare(Warp &warp, const Instruction &i) {
  const T *a = warp.row<T>(i.operand[1]), *b = warp.row<T>(i.operand[2]);
  each_predicate(warp, warp.predicate(i.operand[0]),
                 [&](int l) { return F::of(Convert::of(a[l]), Convert::of(b[l])); });
}

// Two halves of a register each; the second predicate is that of the upper ones.
template <class F, class Convert>
void compare_pairs(Warp &warp, const Instruction &i) {
  const uint32_t *a = warp.row<uint32_t>(i.operand[2]), *b = warp.row<uint32_t>(i.operand[3]);
  for (int half = 0; half < 2; half++)
    each_predicate(warp, warp.predicate(i.operand[half]), [&](int l) {
      const int shift = 16 * half;
      return F::of(Convert::of(uint16_t(a[l] >> shift)), Convert::of(uint16_t(b[l] >> shift)));
    });
}

template <class F>
Handler compare_handler(Type type) {
  switch (type) {
    case Type::b16: case Type::u16: return compare<uint16_t, F, AsIs>;
    case Type::s16: return compare<int16_t, F, AsIs>;
    case Type::b32: case Type::u32: return compare<uint32_t, F, AsIs>;
    case Type::s32: return compare<int32_t, F, AsIs>;
    case Type::b64: case Type::u64: return compare<uint64_t, F, AsIs>;
    case Type::s64: return compare<int64_t, F, AsIs>;
    case Type::f32: return compare<float, F, AsIs>;
    case Type::f16: return compare<uint16_t, F, Float16>;
    case Type::bf16: return compare<uint16_t, F, Bfloat16>;
    case Type::f16x2: return compare_pairs<F, Float16>;
    case Type::bf16x2: return compare_pairs<F, Bfloat16>;
    default: return nullptr;
  }
}

// The unordered forms (of floats) hold where the opposite does not.
Handler comparison(const std::string &name, Type type) {
  if (name == "eq") return compare_handler<Equal>(type);
  if (name == "ne") return compare_handler<NotEqual>(type);
  if (name == "lt" || name == "lo") return compare_handler<Less>(type);
  if (name == "le" || name == "ls") return compare_handler<LessOrEqual>(type);
  if (name == "gt" || name == "hi") return compare_handler<Greater>(type);
  if (name == "ge" || name == "hs") return compare_handler<GreaterOrEqual>(type);
  if (name == "equ") return compare_handler<Not<NotEqual>>(type);
  if (name == "neu") return compare_handler<Not<Equal>>(type);
  if (name == "ltu") return compare_handler<Not<GreaterOrEqual>>(type);
  if (name == "leu") return compare_handler<Not<Greater>>(type);
  if (name == "gtu") return compare_handler<Not<LessOrEqual>>(type);
  if (name == "geu") return compare_handler<Not<Less>>(type);
  if (name == "num") return compare_handler<Ordered>(type);
  if (name == "nan") return compare_handler<Not<Ordered>>(type);
  return nullptr;
}

void decode_compare(Decoder &d) {
  const std::string name = d.next();
  Type type = d.type();
  d.instruction.run = comparison(name, type);
  if (!d.instruction.run) d.unknown("comparison ." + name);
  d.expect_arguments(3, 3);
  const bool pairs = type == Type::f16x2 || type == Type::bf16x2;
  if (pairs) d.pair_of_results(0, Width::predicate, Width::predicate);
  else d.result(0, Width::predicate);
  d.source(1, width_of(type));
  d.source(2, width_of(type));
}

void decode_permute(Decoder &d) {
  if (d.type() != Type::b32) d.unknown("type");
  d.expect_arguments(4, 4);
  d.result(0, Width::bits32);
  for (int n = 1; n < 4; n++) d.source(n, Width::bits32);
  d.instruction.run = permute_bytes;
}

// A generic address is one of the host; one of a parameter counts from where they are kept.
void to_generic(Warp &warp, const Instruction &i) {
  const uint64_t *a = warp.row<uint64_t>(i.operand[1]), *begin = warp.row<uint64_t>(i.operand[2]);
  each_lane(warp, warp.row<uint64_t>(i.operand[0]), [&](int l) { return a[l] + begin[l]; });
}

void decode_address(Decoder &d) {
  if (!d.take("param") || d.type() != Type::u64) d.unknown("form of cvta");
  d.expect_arguments(2, 2);
  d.result(0, Width::bits64);
  d.source(1, Width::bits64);
  d.constant_source(d.parser().kernel().memory);
  d.instruction.run = to_generic;
}

}  // namespace

bool decode_bits(Decoder &d) {
  const std::string &base = d.base();
  if (base == "mov") decode_move(d);
  else if (base == "cvta") decode_address(d);
  else if (base == "and") decode_logic<And>(d);
  else if (base == "or") decode_logic<Or>(d);
  else if (base == "xor") decode_logic<Xor>(d);
  else if (base == "not") decode_not(d);
  else if (base == "popc") decode_count(d);
  else if (base == "shl") decode_shift(d, true);
  else if (base == "shr") decode_shift(d, false);
  else if (base == "shf") decode_funnel_shift(d);
  else if (base == "bfe") decode_extract(d);
  else if (base == "prmt") decode_permute(d);
  else if (base == "selp") decode_select(d);
  else if (base == "setp") decode_compare(d);
  else return false;
  return true;
}

}  // namespace emulator
