// cvt, and cvt of two floats to a pair of halves.
#include <cmath>

#include "halves.h"
#include "lanes.h"

namespace emulator {

namespace {

struct AsIs { template <class T> static T of(T a) { return a; } };
struct FromFloat16 { static float of(uint16_t a) { return from_float16(a); } };
struct FromBfloat16 { static float of(uint16_t a) { return from_bfloat16(a); } };
struct ToFloat16 { static uint16_t of(float a) { return (uint16_t)to_float16(a); } };
struct ToBfloat16 { static uint16_t of(float a) { return (uint16_t)to_bfloat16(a); } };

// Of a float toward zero to what the integer can hold; NaN gives 0.
template <class T>
struct Truncate {
  static T of(float a) {
    constexpr float top = sizeof(T) == 8 ? (T(-1) < T(0) ? 0x1p63f : 0x1p64f)
                                         : (T(-1) < T(0) ? 0x1p31f : 0x1p32f);
    constexpr T most = T(-1) < T(0) ? T((1ull << (8 * sizeof(T) - 1)) - 1) : T(-1);
    constexpr float bottom = T(-1) < T(0) ? -top : 0.0f;
    if (a != a) return 0;
    return a >= top ? most : a <= bottom ? (T(-1) < T(0) ? T(-most - 1) : T(0)) : (T)a;
  }
};

template <class R, class A>
struct Cast { static R of(A a) { return (R)a; } };

// tf32: 10 bits of mantissa, to nearest with ties away.
struct ToTf32 {
  static float of(float a) {
    const uint32_t bits = as_bits(a);
    const bool special = (bits & 0x7f800000u) == 0x7f800000u;
    return as_float(special ? bits : (bits + 0x1000u) & ~0x1fffu);
  }
};

template <class R, class A, class F>
void convert(Warp &warp, const Instruction &i) {
  const A *a = warp.row<A>(i.operand[1]);
  each_lane(warp, warp.row<R>(i.operand[0]), [&](int l) { return F::of(a[l]); });
}

template <class Half>
void convert_pair(Warp &warp, const Instruction &i) {
  const float *high = warp.row<float>(i.operand[1]), *low = warp.row<float>(i.operand[2]);
  each_lane(warp, warp.row<uint32_t>(i.operand[0]),
            [&](int l) { return (uint32_t)Half::of(high[l]) << 16 | Half::of(low[l]); });
}

// Integers: the sign is extended as the source's type says, the result cut to its width.
template <class A>
Handler integer_to(Type to) {
  switch (to) {
    case Type::u16: case Type::s16: return convert<uint16_t, A, Cast<uint16_t, A>>;
    case Type::u32: case Type::s32: return convert<uint32_t, A, Cast<uint32_t, A>>;
    case Type::u64: case Type::s64: return convert<uint64_t, A, Cast<uint64_t, A>>;
    case Type::f32: return convert<float, A, Cast<float, A>>;
    default: return nullptr;
  }
}

// A byte in a register that is wider.
template <class A>
struct Byte {
  template <class R> struct To { static R of(uint16_t a) { return (R)(A)a; } };
};

// The lower half of a register that is wider, which cvt may be given.
struct LowHalf {
  static int64_t of(uint64_t a) { return (int32_t)a; }
};

Handler handler(Type to, Type from, const std::string &rounding) {
  if (from == Type::f32 && to == Type::f16) return rounding == "rn" ? convert<uint16_t, float, ToFloat16> : nullptr;
  if (from == Type::f32 && to == Type::bf16) return rounding == "rn" ? convert<uint16_t, float, ToBfloat16> : nullptr;
  if (from == Type::f32 && to == Type::tf32) return rounding == "rna" ? convert<float, float, ToTf32> : nullptr;
  if (from == Type::f16 && to == Type::f32) return convert<float, uint16_t, FromFloat16>;
  if (from == Type::bf16 && to == Type::f32) return convert<float, uint16_t, FromBfloat16>;
  if (from == Type::f32) {
    if (rounding != "rzi") return nullptr;
    switch (to) {
      case Type::s32: return convert<int32_t, float, Truncate<int32_t>>;
      case Type::u32: return convert<uint32_t, float, Truncate<uint32_t>>;
      case Type::s64: return convert<int64_t, float, Truncate<int64_t>>;
      case Type::u64: return convert<uint64_t, float, Truncate<uint64_t>>;
      default: return nullptr;
    }
  }
  if ((to == Type::f32) != (rounding == "rn")) return nullptr;
  switch (from) {
    case Type::u8: return to == Type::f32 ? convert<float, uint16_t, Byte<uint8_t>::To<float>> : nullptr;
    case Type::s8:
      return to == Type::s16   ? convert<uint16_t, uint16_t, Byte<int8_t>::To<uint16_t>>
             : to == Type::s32 ? convert<uint32_t, uint16_t, Byte<int8_t>::To<uint32_t>>
             : to == Type::s64 ? convert<uint64_t, uint16_t, Byte<int8_t>::To<uint64_t>>
             : to == Type::f32 ? convert<float, uint16_t, Byte<int8_t>::To<float>>
                               : nullptr;
    case Type::u16: return integer_to<uint16_t>(to);
    case Type::s16: return integer_to<int16_t>(to);
    case Type::u32: return integer_to<uint32_t>(to);
    case Type::s32: return integer_to<int32_t>(to);
    case Type::u64: return integer_to<uint64_t>(to);
    case Type::s64: return integer_to<int64_t>(to);
    default: return nullptr;
  }
}

}  // namespace

bool decode_conversion(Decoder &d) {
  if (d.base() != "cvt") return false;
  std::string rounding;
  for (const char *name : {"rn", "rzi", "rna"})
    if (d.take(name)) rounding = name;
  Type to = d.type(), from = d.type();
  if (to == Type::f16x2 || to == Type::bf16x2) {
    if (from != Type::f32 || rounding != "rn") d.unknown("conversion");
    d.expect_arguments(3, 3);
    d.result(0, Width::bits32);
    d.source(1, Width::bits32);
    d.source(2, Width::bits32);
    d.instruction.run = to == Type::f16x2 ? convert_pair<ToFloat16> : convert_pair<ToBfloat16>;
    return true;
  }
  d.instruction.run = handler(to, from, rounding);
  if (!d.instruction.run) d.unknown("conversion");
  d.expect_arguments(2, 2);
  d.result(0, width_of(to));
  d.any_source(1, width_of(from));
  const Width given = d.operand(1).width;
  if (given == Width::bits64 && to == Type::s64 && from == Type::s32)
    d.instruction.run = convert<int64_t, uint64_t, LowHalf>;
  else if (given != width_of(from))
    d.unknown("width of operand " + d.argument(1));
  return true;
}

}  // namespace emulator
