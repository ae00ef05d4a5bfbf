// LayerNorm and RMSNorm on a CPU, with the sum before them: (x - mean) * rstd * weight + bias.
//
// A row is added up, normed and written while it is in cache, in one parallel region for all. The
// sum stays float between; what a row gets depends on nothing but itself.

#include "rows.h"

namespace {

// Tensors [rows, columns], one row after another, and parameters [columns]; null where there is
// none. `statistics` are what the backward takes: means, then reciprocals of standard deviations.
struct Norm {
  const void *x, *residual, *weight, *bias;
  void *total, *out;
  float* statistics;
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
    T* out = static_cast<T*>(all_.out) + first;
    const Statistics found = normed(
        values, sums, columns, all_.is_rms, all_.eps, static_cast<const P*>(all_.weight),
        static_cast<const P*>(all_.bias),
        [&](Vector own, int64_t i, int64_t some) { stored(own, out + i, some); });
    if (all_.statistics) {
      all_.statistics[row] = found.mean;
      all_.statistics[all_.rows + row] = found.factor;
    }
  }

 private:
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

// Whether this processor turns float16 into floats.
extern "C" int fusedformer_has_float16() {
#ifdef __F16C__
  return 1;
#else
  return 0;
#endif
}

// By arguments that take the caller little time.
extern "C" void fusedformer_norm(int dtype, int are_parameters_float, int is_rms, const void* x,
                                const void* residual, const void* weight, const void* bias,
                                void* total, void* out, float* statistics, int64_t rows,
                                int64_t columns, float eps, int threads) {
  const Norm all = {x,    residual, weight, bias, total, out, statistics, rows, columns, eps,
                    are_parameters_float != 0, is_rms != 0, threads};
  switch (dtype) {
    case 0: norm_of<float>(all); break;
    case 1: norm_of<bfloat16>(all); break;
#ifdef __F16C__
    case 2: norm_of<float16>(all); break;
#endif
  }
}
