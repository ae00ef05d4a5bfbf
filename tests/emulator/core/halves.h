// float16 and bfloat16 as bits, to and from float, in arithmetic that compilers vectorize.
#pragma once
#include "lanes.h"

namespace emulator {

inline float from_bfloat16(uint32_t bits) { return as_float(bits << 16); }

// To nearest, ties to even.
inline uint32_t to_bfloat16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return value != value ? 0x7fffu : rounded;
}

inline float from_float16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  const float normal = as_float((rest << 13) + (112u << 23));
  const float subnormal = (float)(int32_t)rest * 0x1p-24f;
  const float special = as_float((rest << 13) | 0x7f800000u);
  const float magnitude = rest >= 0x7c00u ? special : rest < 0x400u ? subnormal : normal;
  return as_float(as_bits(magnitude) | sign);
}

// To nearest, ties to even.
inline uint32_t to_float16(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  // Adding 0.5 leaves a subnormal's digits, rounded, at the end of the mantissa.
  const uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1)) >> 13;
  const uint32_t finite = rest < 0x38800000u ? subnormal : normal;
  const uint32_t magnitude = rest > 0x7f800000u ? 0x7fffu : rest >= 0x477ff000u ? 0x7c00u : finite;
  return rest > 0x7f800000u ? 0x7fffu : magnitude | sign;
}

}  // namespace emulator
