// The backward of LayerNorm and RMSNorm on a CPU, with the sum before them, in one pass over rows:
// with n = (x - mean) * rstd and g = grad * weight,
// dx = (g - mean(g) - n * mean(g * n)) * rstd + grad_total, dweight = sum(grad * n), dbias = sum(grad).
//
// Rows are dealt to blocks whose number depends on nothing but the rows, and a block adds them up
// in floats for a few rows, in doubles from there on: no row is lost in a sum of thousands, and the
// number of threads changes no bit.

#include "rows.h"

namespace {

constexpr int64_t IN_FLOATS = 32;  // rows
constexpr int64_t MOST_BLOCKS = 128;

// Tensors as in norm.cpp. `sums` are [blocks, 2, columns], of weight and bias; they, `dx` and
// `grad_total` may be null.
struct Backward {
  const void *grad, *grad_total, *x, *weight;
  const float* statistics;
  void* dx;
  double* sums;
  int64_t rows, columns, blocks;
  bool is_rms;
  int threads;
};

template <class T, class P>
class Rower {
 public:
  explicit Rower(const Backward& all)
      : all_(all), width_(ceiling(all.columns, LANES)), some_(2 * width_) {}

  void block(int64_t which) {
    const int64_t end = all_.rows * (which + 1) / all_.blocks;
    double* sums = all_.sums ? all_.sums + which * 2 * all_.columns : nullptr;
    if (sums) std::fill(sums, sums + 2 * all_.columns, 0.0);
    for (int64_t row = all_.rows * which / all_.blocks; row < end;) {
      const int64_t last = std::min(end, row + IN_FLOATS);
      std::fill(some_.begin(), some_.end(), 0.0f);
      for (; row < last; ++row) one(row);
      if (sums)
        for (int64_t i = 0; i < all_.columns; ++i) {
          sums[i] += some_[i];
          sums[all_.columns + i] += some_[width_ + i];
        }
    }
  }

 private:
  void one(int64_t row) {
    const int64_t columns = all_.columns, first = row * columns;
    const float mean = all_.is_rms ? 0.0f : all_.statistics[row];
    const float factor = all_.statistics[all_.rows + row];
    const T *grad = static_cast<const T*>(all_.grad) + first;
    const T *x = static_cast<const T*>(all_.x) + first;
    const P* weight = static_cast<const P*>(all_.weight);
    float *dweight = some_.data(), *dbias = dweight + width_;
    const auto normed = [&](int64_t i, int64_t some) {
      const Vector n = (loaded(x + i, some) - mean) * factor;
      return some == LANES ? n : lanes() < static_cast<int32_t>(some) ? n : Vector{};
    };
    Vector products[AT_ONCE] = {}, plain[AT_ONCE] = {};
    each(columns, [&](int64_t i, int64_t k, int64_t some) {
      Vector own = loaded(grad + i, some);
      const Vector n = normed(i, some);
      if (all_.sums) {
        stored(loaded(dweight + i, LANES) + own * n, dweight + i, LANES);
        stored(loaded(dbias + i, LANES) + own, dbias + i, LANES);
      }
      if (weight) own *= loaded(weight + i, some);
      products[k] += own * n;
      plain[k] += own;
    });
    if (!all_.dx) return;
    const float along = total_of(products) / columns;
    const float shift = all_.is_rms ? 0.0f : total_of(plain) / columns;
    T* dx = static_cast<T*>(all_.dx) + first;
    const T* grad_total = all_.grad_total ? static_cast<const T*>(all_.grad_total) + first : nullptr;
    each(columns, [&](int64_t i, int64_t, int64_t some) {
      Vector own = loaded(grad + i, some);
      if (weight) own *= loaded(weight + i, some);
      own = (own - shift - normed(i, some) * along) * factor;
      if (grad_total) own += loaded(grad_total + i, some);
      stored(own, dx + i, some);
    });
  }

  const Backward& all_;
  const int64_t width_;
  std::vector<float> some_;  // the sums of some rows, of weight and bias
};

template <class T, class P>
void backward(const Backward& all) {
#pragma omp parallel num_threads(all.threads) if (all.rows * all.columns >= WORTH_THREADS)
  {
    Rower<T, P> rower(all);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < all.blocks; ++block) rower.block(block);
  }
}

}  // namespace

// How many blocks `sums` has to hold.
extern "C" int64_t fusedformer_norm_blocks(int64_t rows) {
  return std::min(MOST_BLOCKS, (rows + IN_FLOATS - 1) / IN_FLOATS);
}

// The sums over blocks are added to the first of them. By arguments, as in norm.cpp.
extern "C" void fusedformer_norm_backward(int dtype, int are_parameters_float, int is_rms,
                                          const void* grad, const void* grad_total, const void* x,
                                          const void* weight, const float* statistics, void* dx,
                                          double* sums, int64_t rows, int64_t columns,
                                          int threads) {
  const Backward all = {grad, grad_total, x, weight, statistics, dx, sums, rows, columns,
                        fusedformer_norm_blocks(rows), is_rms != 0, threads};
  const bool wide = are_parameters_float != 0;
  switch (dtype) {
    case 0: backward<float, float>(all); break;
    case 1: wide ? backward<bfloat16, float>(all) : backward<bfloat16, bfloat16>(all); break;
#ifdef __F16C__
    case 2: wide ? backward<float16, float>(all) : backward<float16, float16>(all); break;
#endif
  }
  if (sums)
    for (int64_t block = 1; block < all.blocks; ++block)
      for (int64_t i = 0; i < 2 * columns; ++i) sums[i] += sums[block * 2 * columns + i];
}
