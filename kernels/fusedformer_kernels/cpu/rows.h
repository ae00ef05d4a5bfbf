// What norms are made of, forward and backward: rows by vectors, several sums at a time.

#pragma once

#include "vectors.h"

#include <cmath>

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

struct Statistics {
  float mean, factor;
};

// Hand the norm of `values`, whose sums are given, to `write`: its vectors, where they begin, how
// many elements they have. What is left of the values are their distances from the mean.
template <class P, class Write>
inline Statistics normed(float* values, const Vector (&sums)[AT_ONCE], int64_t columns, bool is_rms,
                         float eps, const P* weight, const P* bias, Write write) {
  // What a rounded mean leaves is the mean of the distances to it.
  const float about = is_rms ? 0.0f : total_of(sums) / columns;
  Vector squares[AT_ONCE] = {}, left[AT_ONCE] = {};
  each(columns, [&](int64_t i, int64_t k, int64_t some) {
    Vector own = loaded(values + i, LANES) - about;
    if (some < LANES) own = lanes() < static_cast<int32_t>(some) ? own : Vector{};
    stored(own, values + i, LANES);
    squares[k] += own * own;
    left[k] += own;
  });
  const float shift = is_rms ? 0.0f : total_of(left) / columns;
  const float variance = total_of(squares) / columns - shift * shift;
  // As ATen: a variance that overflows leaves no number, a mean of squares leaves 0.
  const bool is_lost = !is_rms && !(variance < INFINITY);
  const float factor = is_lost ? NAN : 1.0f / std::sqrt(variance + eps);
  each(columns, [&](int64_t i, int64_t, int64_t some) {
    Vector own = (loaded(values + i, LANES) - shift) * factor;
    if (weight) own *= loaded(weight + i, some);
    if (bias) own += loaded(bias + i, some);
    write(own, i, some);
  });
  return {about + shift, factor};
}

}  // namespace
