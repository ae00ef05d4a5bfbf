// The steps of an encoder's layer that compute each row by itself, in inference: products from one
// source; and what follows attention: its last product, the sum, a norm, the feed-forward block.
//
// A parallel region packs the weights, and then its threads take some rows at a time through all
// steps, in cache. A thread that the system has put aside keeps nobody waiting but for the rows
// that it has. What a row gets depends on nothing but itself. Sums stay float from the products to
// the norms; what the next product reads is rounded to the dtype of the weights.

#include "rows.h"

namespace {

constexpr int64_t PANEL = COLUMNS * LANES;  // results of a product that registers hold at once
constexpr int64_t DEPTH = 192;              // units of a panel that the next cache holds
constexpr int64_t MOST = 16 * ROWS;         // rows at a time
constexpr int64_t LEAST = 4 * ROWS;

// x @ weight.T + bias; layer.py lays it out the same.
struct Product {
  const void *weight, *bias;  // [out, in], [out] or null
  void* packed;               // memory for the weight, by panels
  int64_t in, out;
};

struct Norm {
  const void *weight, *bias;  // null where there is none
  float eps;
};

struct Block {
  const void *heads, *residual;  // [rows, heads.in], [rows, width]
  void* out;
  Product last, first, second;
  Norm middle, end;  // `end` is none where norms come first
  int64_t rows;
  int32_t activation, norms_first, threads;
};

struct Projections {
  const void* x;
  const Product* products;
  void* const* outs;
  int64_t count, rows;
  int32_t threads;
};

// 1 / (1 + exp(-x))
inline Vector sigmoid(Vector x) {
  const Vector e = exponential(x < 0 ? x : -x), found = 1.0f / (1.0f + e);
  return x < 0 ? e * found : found;
}

// x (1 + erf(x / sqrt(2))) / 2. With t = 1 / (1 + 0.45 z), erfc(z) exp(z^2) is a polynomial of t to
// 6e-9 (least squares, weighted by exp(-z^2) towards the least largest error), and so to the last
// digit of a float.
inline Vector gelu(Vector x) {
  const Vector z = (x < 0 ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.45f * z);
  Vector found = 0.0884113613f * t - 0.473980065f;
  found = found * t + 0.816864558f;
  found = found * t - 0.333060519f;
  found = found * t + 0.434861925f;
  found = found * t + 0.208940308f;
  found = (found * t + 0.257962429f) * t * exponential(-z * z);
  return 0.5f * x * (x < 0 ? found : 2.0f - found);
}

inline Vector activated(Vector x, int32_t activation) {
  switch (activation) {
    case 0: return x < 0 ? Vector{} : x;
    case 1: return x * sigmoid(x);
    case 2: return gelu(x);
    case 3: return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));  // GELU by tanh
    default: return x * sigmoid(1.702f * x);
  }
}

template <class T>
class Worker {
  using How = typename Chosen<T>::Type;
  using Unit = typename How::Unit;
  static constexpr int64_t ELEMENTS = How::ELEMENTS;

 public:
  // For `rows` at a time, and as many elements of each: in products, between them, hidden.
  Worker(int64_t rows, int64_t source, int64_t width, int64_t hidden)
      : source_(rows * source / ELEMENTS), hidden_(rows * hidden / ELEMENTS), kept_(rows * width),
        values_(ceiling(width, LANES)), sums_(rows * PANEL) {}

  static void pack(const Product& of, int64_t panel) {
    const int64_t depth = of.in / ELEMENTS, first = panel * PANEL;
    turn<How>(static_cast<const T*>(of.weight) + first * of.in, of.in,
              std::min(PANEL, of.out - first), of.in, depth, PANEL,
              static_cast<Unit*>(of.packed) + first * depth);
  }

  void project(const Projections& all, int64_t first, int64_t rows) {
    read(all.x, all.products[0].in, first, rows);
    for (int64_t p = 0; p < all.count; ++p) {
      const Product& of = all.products[p];
      T* out = static_cast<T*>(all.outs[p]) + first * of.out;
      multiply(of, source_, rows, [&](Vector own, int64_t r, int64_t c, int64_t some) {
        stored(own, out + r * of.out + c, some);
      });
    }
  }

  void block(const Block& all, int64_t first, int64_t rows) {
    const int64_t width = all.last.out;
    const T* residual = static_cast<const T*>(all.residual) + first * width;
    T *out = static_cast<T*>(all.out) + first * width, *source = elements(source_);
    float* kept = kept_.data();
    read(all.heads, all.last.in, first, rows);
    multiply(all.last, source_, rows, [&](Vector own, int64_t r, int64_t c, int64_t some) {
      stored(own + loaded(residual + r * width + c, some), kept + r * width + c, some);
    });
    for (int64_t r = 0; r < rows; ++r)
      norm(all.middle, r, width, [&](Vector own, int64_t i, int64_t some) {
        stored(own, source + r * width + i, some);
        if (!all.norms_first) stored(own, kept + r * width + i, some);
      });
    T* hidden = elements(hidden_);
    multiply(all.first, source_, rows, [&](Vector own, int64_t r, int64_t c, int64_t some) {
      stored(activated(own, all.activation), hidden + r * all.first.out + c, some);
    });
    multiply(all.second, hidden_, rows, [&](Vector own, int64_t r, int64_t c, int64_t some) {
      float* to = kept + r * width + c;
      const Vector sum = own + loaded(to, some);
      all.norms_first ? stored(sum, out + r * width + c, some) : stored(sum, to, some);
    });
    if (all.norms_first) return;
    for (int64_t r = 0; r < rows; ++r)
      norm(all.end, r, width, [&](Vector own, int64_t i, int64_t some) {
        stored(own, out + r * width + i, some);
      });
  }

 private:
  // What is written by copies alone may be read as units.
  static T* elements(std::vector<Unit>& units) { return reinterpret_cast<T*>(units.data()); }

  void read(const void* from, int64_t width, int64_t first, int64_t rows) {
    std::memcpy(source_.data(), static_cast<const T*>(from) + first * width,
                rows * width * sizeof(T));
  }

  // Hand `use` the vectors of x @ weight.T + bias: of which row, where they begin, their elements.
  template <class Use>
  void multiply(const Product& of, const std::vector<Unit>& x, int64_t rows, Use use) {
    const int64_t depth = of.in / ELEMENTS;
    const Unit* panel = static_cast<const Unit*>(of.packed);
    const T* bias = static_cast<const T*>(of.bias);
    float* sums = sums_.data();
    for (int64_t first = 0; first < of.out; first += PANEL, panel += depth * PANEL) {
      for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t some = std::min(DEPTH, depth - k);
        const auto how = k ? tile<How, true, COLUMNS> : tile<How, false, COLUMNS>;
        for (int64_t r = 0; r < rows; r += ROWS)
          how(x.data() + r * depth + k, depth, 1, panel + k * PANEL, PANEL, some, sums + r * PANEL,
              PANEL);
      }
      for (int64_t c = first; c < std::min(first + PANEL, of.out); c += LANES) {
        const int64_t some = std::min(LANES, of.out - c);
        const Vector added = bias ? loaded(bias + c, some) : Vector{};
        for (int64_t r = 0; r < rows; ++r)
          use(loaded(sums + r * PANEL + c - first, LANES) + added, r, c, some);
      }
    }
  }

  template <class Write>
  void norm(const Norm& of, int64_t row, int64_t width, Write write) {
    const float* kept = kept_.data() + row * width;
    float* values = values_.data();
    Vector sums[AT_ONCE] = {};
    each(width, [&](int64_t i, int64_t k, int64_t some) {
      const Vector own = loaded(kept + i, some);
      stored(own, values + i, LANES);
      sums[k] += own;
    });
    normed(values, sums, width, false, of.eps, static_cast<const T*>(of.weight),
           static_cast<const T*>(of.bias), write);
  }

  std::vector<Unit> source_, hidden_;
  std::vector<float> kept_, values_, sums_;
};

// In one parallel region pack the weights, and hand `work` some rows at a time.
template <class T, class Make, class Work>
void by_rows(const Product* products, int64_t count, int64_t rows, int threads, Make make,
             Work work) {
  const int64_t at_once =
      std::min(MOST, std::max(LEAST, ceiling(rows / (4 * threads) + 1, ROWS)));
#pragma omp parallel num_threads(threads)
  {
    for (int64_t p = 0; p < count; ++p)
#pragma omp for schedule(dynamic) nowait
      for (int64_t panel = 0; panel < (products[p].out + PANEL - 1) / PANEL; ++panel)
        Worker<T>::pack(products[p], panel);
    Worker<T> worker = make(at_once);
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += at_once)
      work(worker, first, std::min(at_once, rows - first));
  }
}

template <class T>
void project(const Projections& all) {
  by_rows<T>(
      all.products, all.count, all.rows, all.threads,
      [&](int64_t at_once) { return Worker<T>(at_once, all.products[0].in, 0, 0); },
      [&](Worker<T>& worker, int64_t first, int64_t rows) { worker.project(all, first, rows); });
}

template <class T>
void block(const Block& all) {
  const Product products[] = {all.last, all.first, all.second};
  by_rows<T>(
      products, 3, all.rows, all.threads,
      [&](int64_t at_once) {
        return Worker<T>(at_once, std::max(all.last.in, all.first.in), all.last.out,
                         all.first.out);
      },
      [&](Worker<T>& worker, int64_t first, int64_t rows) { worker.block(all, first, rows); });
}

}  // namespace

// How many results a packed weight is filled up to; 0 where others multiply faster.
extern "C" int64_t fusedformer_panel(int is_bfloat16) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  return PANEL;
#elif defined(__AVX512F__)
  return is_bfloat16 ? 0 : PANEL;
#else
  return 0;
#endif
}

extern "C" void fusedformer_project(int is_bfloat16, const Projections* all) {
  is_bfloat16 ? project<bfloat16>(*all) : project<float>(*all);
}

extern "C" void fusedformer_block(int is_bfloat16, const Block* all) {
  is_bfloat16 ? block<bfloat16>(*all) : block<float>(*all);
}
