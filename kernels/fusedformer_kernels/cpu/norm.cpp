// LayerNorm and RMSNorm on a CPU, with the sum before them: (x - mean) * rstd * weight + bias.
//
// A row is added up, normed and written while it is in cache, in one parallel region for all. The
// sum stays float between; what a row gets depends on nothing but itself.

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

// Tensors [rows, columns], one row after another, and parameters [columns]; null where there is
// none.
struct Norm {
  const void *x, *residual, *weight, *bias;
  void *total, *out;
  int64_t rows, columns;
  float eps;
  bool are_parameters_float, is_rms;
  int threads;
};

template <class T, class P>
class Rower {
 public:
  explicit Rower(const Norm& all) : all_(all), values_(ceiling(all.columns, LANES)) {}

  void norm(int64_t row) {
    const int64_t columns = all_.columns, first = row * columns;
    const T *x = static_cast<const T*>(all_.x) + first;
    const T *residual = all_.residual ? static_cast<const T*>(all_.residual) + first : nullptr;
    T* total = all_.total ? static_cast<T*>(all_.total) + first : nullptr;
    float* values = values_.data();
    Vector sums[AT_ONCE] = {};
    each(columns, [&](int64_t i, int64_t k, int64_t some) {
      Vector own = loaded(x + i, some);
      if (residual) own += loaded(residual + i, some);
      if (total) stored(own, total + i, some);
      stored(own, values + i, LANES);
      sums[k] += own;
    });
    const float mean = all_.is_rms ? 0.0f : total_of(sums) / columns;
    Vector squares[AT_ONCE] = {};
    each(columns, [&](int64_t i, int64_t k, int64_t some) {
      Vector own = loaded(values + i, LANES) - mean;
      if (some < LANES) own = lanes() < static_cast<int32_t>(some) ? own : Vector{};
      stored(own, values + i, LANES);
      squares[k] += own * own;
    });
    write(1.0f / std::sqrt(total_of(squares) / columns + all_.eps),
          static_cast<T*>(all_.out) + first);
  }

 private:
  void write(float factor, T* out) {
    const P *weight = static_cast<const P*>(all_.weight), *bias = static_cast<const P*>(all_.bias);
    const float* values = values_.data();
    each(all_.columns, [&](int64_t i, int64_t, int64_t some) {
      Vector own = loaded(values + i, LANES) * factor;
      if (weight) own *= loaded(weight + i, some);
      if (bias) own += loaded(bias + i, some);
      stored(own, out + i, some);
    });
  }

  const Norm& all_;
  std::vector<float> values_;
};

template <class T, class P>
void norm(const Norm& all) {
#pragma omp parallel num_threads(all.threads) if (all.rows * all.columns >= WORTH_THREADS)
  {
    Rower<T, P> rower(all);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all.rows; ++row) rower.norm(row);
  }
}

template <class T>
void norm_of(const Norm& all) {
  all.are_parameters_float ? norm<T, float>(all) : norm<T, T>(all);
}

}  // namespace

// By arguments that take the caller little time. Returns 0 where the dtype is none that is known on
// this processor.
extern "C" int fusedformer_norm(int dtype, int are_parameters_float, int is_rms, const void* x,
                                const void* residual, const void* weight, const void* bias,
                                void* total, void* out, int64_t rows, int64_t columns, float eps,
                                int threads) {
  const Norm all = {x,    residual, weight, bias, total, out, rows, columns, eps,
                    are_parameters_float != 0, is_rms != 0, threads};
  switch (dtype) {
    case 0: norm_of<float>(all); return 1;
    case 1: norm_of<bfloat16>(all); return 1;
#ifdef __F16C__
    case 2: norm_of<float16>(all); return 1;
#endif
  }
  return 0;
}
