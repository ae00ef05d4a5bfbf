// add, sub, mul, mad, fma, div, rem, min, max, abs, neg, and the approximate functions.
#include <cmath>
#include <type_traits>

#include "halves.h"
#include "lanes.h"

namespace emulator {

namespace {

// One operand to one result, and so on; F has a static `of`.
template <class R, class A, class F>
void unary(Warp &warp, const Instruction &i) {
  const A *a = warp.row<A>(i.operand[1]);
  each_lane(warp, warp.row<R>(i.operand[0]), [&](int l) { return F::of(a[l]); });
}

template <class R, class A, class F>
void binary(Warp &warp, const Instruction &i) {
  const A *a = warp.row<A>(i.operand[1]), *b = warp.row<A>(i.operand[2]);
  each_lane(warp, warp.row<R>(i.operand[0]), [&](int l) { return F::of(a[l], b[l]); });
}

template <class R, class A, class F>
void ternary(Warp &warp, const Instruction &i) {
  const A *a = warp.row<A>(i.operand[1]), *b = warp.row<A>(i.operand[2]);
  const R *c = warp.row<R>(i.operand[3]);
  each_lane(warp, warp.row<R>(i.operand[0]), [&](int l) { return F::of(a[l], b[l], c[l]); });
}

// Integers wrap (-fwrapv); floats round once and have one NaN.
template <class T>
T result(T value) {
  if constexpr (std::is_same_v<T, float>) return canonical(value);
  else return value;
}

struct Add { template <class T> static T of(T a, T b) { return result<T>(a + b); } };
struct Subtract { template <class T> static T of(T a, T b) { return result<T>(a - b); } };
struct Multiply { template <class T> static T of(T a, T b) { return result<T>(a * b); } };
struct FlushedAdd { static float of(float a, float b) { return canonical(flushed(flushed(a) + flushed(b))); } };
struct FlushedSubtract { static float of(float a, float b) { return canonical(flushed(flushed(a) - flushed(b))); } };
struct FlushedMultiply { static float of(float a, float b) { return canonical(flushed(flushed(a) * flushed(b))); } };

// float16 and bfloat16: a float holds the sum of two exactly enough to round once.
template <class F>
struct InFloat16 {
  static uint16_t of(uint16_t a, uint16_t b) { return (uint16_t)to_float16(F::of(from_float16(a), from_float16(b))); }
};
template <class F>
struct InBfloat16 {
  static uint16_t of(uint16_t a, uint16_t b) { return (uint16_t)to_bfloat16(F::of(from_bfloat16(a), from_bfloat16(b))); }
};

struct Fma { static float of(float a, float b, float c) { return canonical(__builtin_fmaf(a, b, c)); } };
struct FlushedFma {
  static float of(float a, float b, float c) {
    return canonical(flushed(__builtin_fmaf(flushed(a), flushed(b), flushed(c))));
  }
};
struct MultiplyAdd { template <class T> static T of(T a, T b, T c) { return a * b + c; } };
struct HighProduct {
  static uint32_t of(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
  static int32_t of(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
  static uint64_t of(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
  static int64_t of(int64_t a, int64_t b) { return (int64_t)((__int128)a * b >> 64); }
};
struct WideProduct {
  static int64_t of(int32_t a, int32_t b) { return (int64_t)a * b; }
  static uint64_t of(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
  static int64_t of(int32_t a, int32_t b, int64_t c) { return (int64_t)a * b + c; }
  static uint64_t of(uint32_t a, uint32_t b, uint64_t c) { return (uint64_t)a * b + c; }
};

// Division by zero gives all ones, as GPUs do; the least number by -1 wraps.
struct Quotient {
  template <class T> static T of(T a, T b) {
    if (b == 0) return (T)-1;
    if constexpr (std::is_signed_v<T>) if (b == (T)-1) return -a;
    return a / b;
  }
  static float of(float a, float b) { return canonical(a / b); }
};
struct Remainder {
  template <class T> static T of(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) if (b == (T)-1) return 0;
    return a % b;
  }
};

// Of a number and a NaN the number; -0 is less than +0.
struct Minimum {
  template <class T> static T of(T a, T b) { return a < b ? a : b; }
  static float of(float a, float b) {
    const float smaller = a == b ? as_float(as_bits(a) | as_bits(b)) : a < b ? a : b;
    return a != a ? (b != b ? as_float(NAN_BITS) : b) : b != b ? a : smaller;
  }
};
struct Maximum {
  template <class T> static T of(T a, T b) { return a > b ? a : b; }
  static float of(float a, float b) {
    const float larger = a == b ? as_float(as_bits(a) & as_bits(b)) : a > b ? a : b;
    return a != a ? (b != b ? as_float(NAN_BITS) : b) : b != b ? a : larger;
  }
};
// Of a number and a NaN the NaN.
struct MinimumOrNan {
  static float of(float a, float b) { return a != a || b != b ? as_float(NAN_BITS) : Minimum::of(a, b); }
};
struct MaximumOrNan {
  static float of(float a, float b) { return a != a || b != b ? as_float(NAN_BITS) : Maximum::of(a, b); }
};

struct Absolute {
  template <class T> static T of(T a) { return a < 0 ? -a : a; }
  static float of(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
};
struct Negative {
  template <class T> static T of(T a) { return -a; }
  static float of(float a) { return as_float(as_bits(a) ^ 0x80000000u); }
};

// 2**x: a polynomial in double, whose error is far below that of rounding to float.
inline float exp2_of(float x) {
  const double clamped = x > 200.0f ? 200.0 : x < -200.0f ? -200.0 : (double)x;
  const double shifted = clamped + 0x1.8p52;  // the nearest integer, in the last bits
  const double f = (clamped - (shifted - 0x1.8p52)) * 0.6931471805599453094;
  double p = 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  uint64_t bits, power;
  memcpy(&bits, &shifted, 8);
  memcpy(&power, &p, 8);
  power += bits << 52;
  memcpy(&p, &power, 8);
  return canonical(x != x ? x : (float)p);
}

struct Exp2 { static float of(float a) { return exp2_of(a); } };
struct FlushedExp2 { static float of(float a) { return flushed(exp2_of(flushed(a))); } };
struct Log2 { static float of(float a) { return canonical((float)std::log2((double)a)); } };
struct FlushedLog2 { static float of(float a) { return Log2::of(flushed(a)); } };
struct Root { static float of(float a) { return canonical(std::sqrt(a)); } };
struct FlushedRoot { static float of(float a) { return flushed(Root::of(flushed(a))); } };
struct InverseRoot { static float of(float a) { return canonical((float)(1.0 / std::sqrt((double)a))); } };
struct FlushedInverseRoot { static float of(float a) { return flushed(InverseRoot::of(flushed(a))); } };
struct Inverse { static float of(float a) { return canonical(1.0f / a); } };
struct FlushedInverse { static float of(float a) { return flushed(Inverse::of(flushed(a))); } };
struct HyperbolicTangent { static float of(float a) { return canonical((float)std::tanh((double)a)); } };

template <class F>
Handler integer_handler(Type type) {
  switch (type) {
    case Type::s16: return binary<int16_t, int16_t, F>;
    case Type::u16: return binary<uint16_t, uint16_t, F>;
    case Type::s32: return binary<int32_t, int32_t, F>;
    case Type::u32: return binary<uint32_t, uint32_t, F>;
    case Type::s64: return binary<int64_t, int64_t, F>;
    case Type::u64: return binary<uint64_t, uint64_t, F>;
    default: return nullptr;
  }
}

void operands_of(Decoder &d, Width result, Width width, int sources) {
  d.expect_arguments(1 + sources, 1 + sources);
  d.result(0, result);
  for (int n = 1; n <= sources; n++) d.source(n, width);
}

// add, sub and mul of floats, and of integers the low half.
template <class F, class FlushedF>
void decode_sum(Decoder &d) {
  const bool nearest = d.take("rn"), flush = d.take("ftz");
  Type type = d.type();
  Handler run = nullptr;
  if (type == Type::f32) run = flush ? binary<float, float, FlushedF> : binary<float, float, F>;
  else if (type == Type::f16 && !flush) run = binary<uint16_t, uint16_t, InFloat16<F>>;
  else if (type == Type::bf16 && !flush) run = binary<uint16_t, uint16_t, InBfloat16<F>>;
  else if (!nearest && !flush) run = integer_handler<F>(type);
  if (!run) d.unknown("type");
  operands_of(d, width_of(type), width_of(type), 2);
  d.instruction.run = run;
}

void decode_multiply(Decoder &d) {
  if (d.take("wide")) {
    Type type = d.type();
    d.instruction.run = type == Type::s32   ? binary<int64_t, int32_t, WideProduct>
                        : type == Type::u32 ? binary<uint64_t, uint32_t, WideProduct>
                        : type == Type::s16 ? binary<int32_t, int16_t, WideProduct>
                        : type == Type::u16 ? binary<uint32_t, uint16_t, WideProduct>
                                            : nullptr;
    if (!d.instruction.run) d.unknown("type");
    const Width twice = size_of(type) == 2 ? Width::bits32 : Width::bits64;
    return operands_of(d, twice, width_of(type), 2);
  }
  if (d.take("hi")) {
    Type type = d.type();
    d.instruction.run = type == Type::s32   ? binary<int32_t, int32_t, HighProduct>
                        : type == Type::u32 ? binary<uint32_t, uint32_t, HighProduct>
                        : type == Type::s64 ? binary<int64_t, int64_t, HighProduct>
                        : type == Type::u64 ? binary<uint64_t, uint64_t, HighProduct>
                                            : nullptr;
    if (!d.instruction.run) d.unknown("type");
    return operands_of(d, width_of(type), width_of(type), 2);
  }
  d.take("lo");
  decode_sum<Multiply, FlushedMultiply>(d);
}

void decode_multiply_add(Decoder &d) {
  const bool wide = d.take("wide");
  if (!wide && !d.take("lo")) d.unknown("form");
  Type type = d.type();
  Handler run = nullptr;
  if (wide)
    run = type == Type::s32   ? ternary<int64_t, int32_t, WideProduct>
          : type == Type::u32 ? ternary<uint64_t, uint32_t, WideProduct>
          : type == Type::s16 ? ternary<int32_t, int16_t, WideProduct>
          : type == Type::u16 ? ternary<uint32_t, uint16_t, WideProduct>
                              : nullptr;
  else
    run = type == Type::s16 || type == Type::u16   ? ternary<uint16_t, uint16_t, MultiplyAdd>
          : type == Type::s32 || type == Type::u32 ? ternary<uint32_t, uint32_t, MultiplyAdd>
          : type == Type::s64 || type == Type::u64 ? ternary<uint64_t, uint64_t, MultiplyAdd>
                                                   : nullptr;
  if (!run) d.unknown("type");
  d.expect_arguments(4, 4);
  const Width twice = size_of(type) == 2 ? Width::bits32 : Width::bits64;
  const Width width = wide ? twice : width_of(type);
  d.result(0, width);
  d.source(1, width_of(type));
  d.source(2, width_of(type));
  d.source(3, width);
  d.instruction.run = run;
}

void decode_fma(Decoder &d) {
  if (!d.take("rn")) d.unknown("rounding");
  const bool flush = d.take("ftz");
  if (d.type() != Type::f32) d.unknown("type");
  operands_of(d, Width::bits32, Width::bits32, 3);
  d.instruction.run = flush ? ternary<float, float, FlushedFma> : ternary<float, float, Fma>;
}

void decode_divide(Decoder &d) {
  const bool approximate = d.take("full") || d.take("rn") || d.take("approx");
  Type type = d.type();
  d.instruction.run = type == Type::f32 ? binary<float, float, Quotient>
                      : approximate     ? nullptr
                                        : integer_handler<Quotient>(type);
  if (!d.instruction.run) d.unknown("type");
  operands_of(d, width_of(type), width_of(type), 2);
}

void decode_remainder(Decoder &d) {
  Type type = d.type();
  d.instruction.run = integer_handler<Remainder>(type);
  if (!d.instruction.run) d.unknown("type");
  operands_of(d, width_of(type), width_of(type), 2);
}

template <class F, class OrNan>
void decode_extreme(Decoder &d) {
  const bool nan = d.take("NaN");
  Type type = d.type();
  d.instruction.run = type == Type::f32 ? (nan ? binary<float, float, OrNan> : binary<float, float, F>)
                      : nan             ? nullptr
                                        : integer_handler<F>(type);
  if (!d.instruction.run) d.unknown("type");
  operands_of(d, width_of(type), width_of(type), 2);
}

template <class F>
void decode_sign(Decoder &d) {
  Type type = d.type();
  d.instruction.run = type == Type::f32   ? unary<float, float, F>
                      : type == Type::s16 ? unary<int16_t, int16_t, F>
                      : type == Type::s32 ? unary<int32_t, int32_t, F>
                      : type == Type::s64 ? unary<int64_t, int64_t, F>
                                          : nullptr;
  if (!d.instruction.run) d.unknown("type");
  operands_of(d, width_of(type), width_of(type), 1);
}

template <class F, class FlushedF>
void decode_function(Decoder &d) {
  if (!d.take("approx") && !d.take("rn")) d.unknown("rounding");
  const bool flush = d.take("ftz");
  if (d.type() != Type::f32) d.unknown("type");
  operands_of(d, Width::bits32, Width::bits32, 1);
  d.instruction.run = flush ? unary<float, float, FlushedF> : unary<float, float, F>;
}

}  // namespace

const uint32_t LANE_BIT[LANES] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
    1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
    1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

bool decode_arithmetic(Decoder &d) {
  const std::string &base = d.base();
  if (base == "add") decode_sum<Add, FlushedAdd>(d);
  else if (base == "sub") decode_sum<Subtract, FlushedSubtract>(d);
  else if (base == "mul") decode_multiply(d);
  else if (base == "mad") decode_multiply_add(d);
  else if (base == "fma") decode_fma(d);
  else if (base == "div") decode_divide(d);
  else if (base == "rem") decode_remainder(d);
  else if (base == "min") decode_extreme<Minimum, MinimumOrNan>(d);
  else if (base == "max") decode_extreme<Maximum, MaximumOrNan>(d);
  else if (base == "abs") decode_sign<Absolute>(d);
  else if (base == "neg") decode_sign<Negative>(d);
  else if (base == "ex2") decode_function<Exp2, FlushedExp2>(d);
  else if (base == "lg2") decode_function<Log2, FlushedLog2>(d);
  else if (base == "sqrt") decode_function<Root, FlushedRoot>(d);
  else if (base == "rsqrt") decode_function<InverseRoot, FlushedInverseRoot>(d);
  else if (base == "rcp") decode_function<Inverse, FlushedInverse>(d);
  else if (base == "tanh") decode_function<HyperbolicTangent, HyperbolicTangent>(d);
  else return false;
  return true;
}

}  // namespace emulator
