// Loops over the lanes of a warp, in a form that compilers vectorize.
#pragma once
#include "decoder.h"
#include "warp.h"

namespace emulator {

// The bit of each lane, as a table: a vector that masks are put together from.
extern const uint32_t LANE_BIT[LANES];

// row[lane] = f(lane) for the lanes that run. Rows overlap wholly or not at all.
template <class T, class F>
inline void each_lane(const Warp &warp, T *row, F &&f) {
  const uint32_t exec = warp.exec;
  if (exec == ALL) {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; lane++) row[lane] = f(lane);
  } else {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; lane++)
      row[lane] = exec & LANE_BIT[lane] ? (T)f(lane) : row[lane];
  }
}

// A predicate of the lanes that run; others keep theirs.
template <class F>
inline void each_predicate(const Warp &warp, uint32_t &predicate, F &&f) {
  uint32_t mask = 0;
  for (int lane = 0; lane < LANES; lane++) mask |= f(lane) ? LANE_BIT[lane] : 0;
  predicate = (predicate & ~warp.exec) | (mask & warp.exec);
}

template <class F>
inline void for_lanes(uint32_t mask, F &&f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Floating-point results that are NaN have one pattern on a GPU.
constexpr uint32_t NAN_BITS = 0x7fffffffu;
inline float canonical(float value) { return value != value ? as_float(NAN_BITS) : value; }

// Subnormals become zeros of their sign.
inline float flushed(float value) {
  uint32_t bits = as_bits(value);
  return as_float(bits & 0x7f800000u ? bits : bits & 0x80000000u);
}

}  // namespace emulator
