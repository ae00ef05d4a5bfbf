// What norms are made of, forward and backward: rows by vectors, several sums at a time.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // elements in the time that waking them takes
constexpr int64_t AT_ONCE = 4;              // vectors, each with sums of its own

// `work` on each vector of `count` elements: where it begins, which sum is its own, its elements.
template <class Work>
inline void each(int64_t count, Work work) {
  int64_t i = 0;
  for (; i + AT_ONCE * LANES <= count; i += AT_ONCE * LANES)
#pragma GCC unroll 4
    for (int64_t k = 0; k < AT_ONCE; ++k) work(i + k * LANES, k, LANES);
  for (; i < count; i += LANES) work(i, int64_t{0}, std::min(LANES, count - i));
}

// The sum over the lanes of all.
inline float total_of(const Vector (&sums)[AT_ONCE]) {
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return reduced(all, [](Vector a, Vector b) { return a + b; });
}

}  // namespace
