// Attention of packed sequences on a CPU: softmax(scale * q k^T) v, for each sequence and head.
//
// One parallel region computes all of them. An item of work is some queries of one head of one
// sequence: its keys and values are packed once, and then ROWS queries at a time have all of their
// scores, the softmax of these and the sum of values, in cache. What a sequence gets depends on
// nothing but itself.
//
// Products work on units of 32 bits: a float, or where the CPU multiplies bfloat16, a pair of
// them, of two neighbours along the sum. Sums and the softmax are float.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, COLUMNS = 4;  // COLUMNS vectors of ROWS sums fill the registers
#else
constexpr int64_t LANES = 8, COLUMNS = 2;
#endif
constexpr int64_t ROWS = 6;
constexpr int64_t QUERIES = 240;  // of an item, for which keys and values are packed once
constexpr int64_t WORTH_THREADS = 1 << 18;  // multiplications in the time that waking them takes

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(LANES * 4)));

struct bfloat16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }

inline float widened(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, bfloat16& to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Units of one element.
template <class T>
struct Wide {
  using Unit = float;
  static constexpr int64_t ELEMENTS = 1;
  static Vector add(Vector sum, Unit a, Unaligned b) { return sum + a * b; }
  // Units along a row of `n` elements.
  static void along(const T* row, int64_t n, Unit* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = widened(row[i]);
  }
  // Units across rows, `ELEMENTS` of them.
  static void across(const T* row, int64_t, bool, int64_t n, Unit* to) { along(row, n, to); }
  static void weights(const float* from, int64_t n, Unit* to) { std::memcpy(to, from, n * 4); }
};

template <class T>
struct Chosen {
  using Type = Wide<T>;
};

#ifdef __AVX512BF16__
// Units of two elements.
struct Pairs {
  using Unit = uint32_t;
  static constexpr int64_t ELEMENTS = 2;
  static Vector add(Vector sum, Unit a, Unaligned b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
  static void along(const bfloat16* row, int64_t n, Unit* to) {
    std::memcpy(to, row, n / 2 * 4);
    if (n % 2) to[n / 2] = row[n - 1].bits;
  }
  static void across(const bfloat16* row, int64_t step, bool has_second, int64_t n, Unit* to) {
    if (has_second)
      for (int64_t i = 0; i < n; ++i)
        to[i] = row[i].bits | static_cast<Unit>(row[step + i].bits) << 16;
    else
      for (int64_t i = 0; i < n; ++i) to[i] = row[i].bits;
  }
  static void weights(const float* from, int64_t n, Unit* to) {
    for (int64_t i = 0; i < n; i += LANES) {
      __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      std::memcpy(to + i / 2, &half, 32);
    }
  }
};

template <>
struct Chosen<bfloat16> {
  using Type = Pairs;
};
#endif

inline int64_t ceiling(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// out[ROWS][C * LANES] = a[ROWS][depth] b[depth][C * LANES], with the distances of rows.
template <class How, int64_t C>
void tile(const typename How::Unit* a, int64_t a_row, const typename How::Unit* b, int64_t b_row,
          int64_t depth, float* out, int64_t out_row) {
  Vector sums[ROWS][C] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Unaligned own[C];
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c) std::memcpy(&own[c], b + p * b_row + c * LANES, LANES * 4);
#pragma GCC unroll 6
    for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int64_t c = 0; c < C; ++c)
        sums[r][c] = How::add(sums[r][c], a[r * a_row + p], own[c]);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c)
      std::memcpy(out + r * out_row + c * LANES, &sums[r][c], LANES * 4);
}

// The same for any number of columns, a multiple of LANES.
template <class How>
void product(const typename How::Unit* a, int64_t a_row, const typename How::Unit* b,
             int64_t columns, int64_t depth, float* out) {
  int64_t c = 0;
  for (; c + COLUMNS * LANES <= columns; c += COLUMNS * LANES)
    tile<How, COLUMNS>(a, a_row, b + c, columns, depth, out + c, columns);
  switch ((columns - c) / LANES) {
    case 1: tile<How, 1>(a, a_row, b + c, columns, depth, out + c, columns); break;
    case 2: tile<How, 2>(a, a_row, b + c, columns, depth, out + c, columns); break;
    case 3: tile<How, 3>(a, a_row, b + c, columns, depth, out + c, columns); break;
  }
}

inline Bits lanes() {
  Bits found;
  for (int32_t lane = 0; lane < LANES; ++lane) found[lane] = lane;
  return found;
}

// Combine all lanes, each with the one half as far away at a time.
template <class How>
float reduced(Vector x, How how) {
#pragma GCC unroll 4
  for (int32_t step = LANES / 2; step > 0; step /= 2)
    x = how(x, __builtin_shuffle(x, lanes() ^ step));
  return x[0];
}

// Transpose a square of units, in memory as `rows` of LANES.
inline void transpose(Bits* rows) {
  const Bits own = lanes();
#pragma GCC unroll 4
  for (int32_t step = 1; step < LANES; step *= 2) {
    const Bits is_second = (own & step) != 0;
    const Bits upper = is_second ? own - step + LANES : own;
    const Bits lower = is_second ? own + LANES : own + step;
#pragma GCC unroll 16
    for (int32_t i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const Bits a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

// exp(x) for x <= 0, to about a unit in the last place; NaN stays NaN.
Vector exponential(Vector x) {
  const Vector least = Vector{} - 87.0f;
  x = x < least ? least : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: a sum with it has an integer in its last bits
  Vector shifted = x * 1.44269504f + shift;
  Vector n = shifted - shift;
  Vector f = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vector found = f * (1.0f / 5040.0f) + 1.0f / 720.0f;
  found = found * f + 1.0f / 120.0f;
  found = found * f + 1.0f / 24.0f;
  found = found * f + 1.0f / 6.0f;
  found = found * f + 0.5f;
  found = found * f + 1.0f;
  found = found * f + 1.0f;
  Bits power = ((Bits)shifted << 23) + (127 << 23);
  return found * (Vector)power;
}

// Turn `keys` scores into exp(scale * (score - largest)), with zeros up to `padded`; return the sum.
float exponentials(float* scores, int64_t keys, int64_t padded, float scale) {
  for (int64_t i = keys; i < padded; ++i) scores[i] = scores[0];
  Vector most, x;
  std::memcpy(&most, scores, sizeof(x));
  for (int64_t i = LANES; i < padded; i += LANES) {
    std::memcpy(&x, scores + i, sizeof(x));
    most = x > most ? x : most;
  }
  const float top = reduced(most, [](Vector a, Vector b) { return a > b ? a : b; });
  Vector sums = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    std::memcpy(&x, scores + i, sizeof(x));
    x = exponential((x - top) * scale);
    if (i + LANES > keys)
      x = lanes() < static_cast<int32_t>(keys - i) ? x : Vector{};
    sums += x;
    std::memcpy(scores + i, &x, sizeof(x));
  }
  return reduced(sums, [](Vector a, Vector b) { return a + b; });
}

// Rows of one head of one sequence, and how far the next is, in elements.
template <class T>
struct Rows {
  T* first;
  int64_t row, count;
};

template <class T>
class Worker {
  using How = typename Chosen<T>::Type;
  using Unit = typename How::Unit;
  static constexpr int64_t ELEMENTS = How::ELEMENTS;

 public:
  Worker(int64_t dim, int64_t value_dim, int64_t longest, float scale)
      : dim_(dim), value_dim_(value_dim), scale_(scale),
        depth_((dim + ELEMENTS - 1) / ELEMENTS), width_(ceiling(value_dim, LANES)),
        keys_(depth_ * ceiling(longest, LANES)),
        values_(ceiling(longest, LANES) / ELEMENTS * width_),
        queries_(ROWS * depth_), weights_(ROWS * ceiling(longest, LANES)),
        scores_(ROWS * ceiling(longest, LANES)), output_(ROWS * width_) {}

  void attend(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out) {
    const int64_t padded = ceiling(k.count, LANES), dim = value_dim_;
    pack(k, v, padded);
    for (int64_t start = 0; start < q.count; start += ROWS) {
      const int64_t rows = std::min(ROWS, q.count - start);
      for (int64_t r = 0; r < rows; ++r)
        How::along(q.first + (start + r) * q.row, dim_, queries_.data() + r * depth_);
      product<How>(queries_.data(), depth_, keys_.data(), padded, depth_, scores_.data());
      float sums[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float* own = scores_.data() + r * padded;
        sums[r] = exponentials(own, k.count, padded, scale_);
        How::weights(own, padded, weights_.data() + r * (padded / ELEMENTS));
      }
      product<How>(weights_.data(), padded / ELEMENTS, values_.data(), width_, padded / ELEMENTS,
                   output_.data());
      for (int64_t r = 0; r < rows; ++r) {
        const float factor = 1.0f / sums[r], *from = output_.data() + r * width_;
        T* to = out.first + (start + r) * out.row;
        for (int64_t d = 0; d < dim; ++d) narrow(from[d] * factor, to[d]);
      }
    }
  }

 private:
  // Keys as [depth][padded], values as [padded / ELEMENTS][width], zeros where there is nothing.
  void pack(Rows<const T> k, Rows<const T> v, int64_t padded) {
    for (int64_t block = 0; block < padded; block += LANES) {
      const int64_t some = std::min(LANES, k.count - block);
      for (int64_t p = 0; p < depth_; p += LANES) {
        Bits square[LANES] = {};
        const int64_t first = p * ELEMENTS, n = std::min(LANES * ELEMENTS, dim_ - first);
        for (int64_t j = 0; j < some; ++j) {
          const T* row = k.first + (block + j) * k.row + first;
          if (n == LANES * ELEMENTS && sizeof(Unit) == sizeof(T) * ELEMENTS) {
            std::memcpy(&square[j], row, LANES * 4);
          } else {
            Unit units[LANES] = {};
            How::along(row, n, units);
            std::memcpy(&square[j], units, LANES * 4);
          }
        }
        transpose(square);
        for (int64_t i = 0; i < std::min(LANES, depth_ - p); ++i)
          std::memcpy(keys_.data() + (p + i) * padded + block, &square[i], LANES * 4);
      }
    }
    for (int64_t j = 0; j < padded; j += ELEMENTS) {
      Unit* to = values_.data() + j / ELEMENTS * width_;
      const int64_t used = j < v.count ? value_dim_ : 0;
      if (used) How::across(v.first + j * v.row, v.row, j + 1 < v.count, used, to);
      std::fill(to + used, to + width_, Unit{});
    }
  }

  int64_t dim_, value_dim_;
  float scale_;
  int64_t depth_, width_;
  std::vector<Unit> keys_, values_, queries_, weights_;
  std::vector<float> scores_, output_;
};

// Where the rows and the heads of a tensor are: how far the next one is, in elements.
struct Steps {
  int64_t row, head;
};

template <class T>
void attend(const T* q, const T* k, const T* v, T* out, const std::vector<int64_t>& starts_q,
            const std::vector<int64_t>& starts_k, int64_t heads, Steps of_q, Steps of_k, Steps of_v,
            int64_t dim, int64_t value_dim, float scale, int threads) {
  const int64_t sequences = starts_q.size() - 1;
  const Steps of_out = {heads * value_dim, value_dim};
  std::vector<int64_t> items(sequences + 1, 0);  // of all sequences before
  int64_t longest = 0, scores = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t queries = starts_q[s + 1] - starts_q[s], keys = starts_k[s + 1] - starts_k[s];
    items[s + 1] = items[s] + (queries + QUERIES - 1) / QUERIES * heads;
    longest = std::max(longest, keys);
    scores += queries * keys * heads;
  }
#pragma omp parallel num_threads(threads) if (scores * (dim + value_dim) >= WORTH_THREADS)
  {
    Worker<T> worker(dim, value_dim, longest, scale);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items[sequences]; ++item) {
      const int64_t s = std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
      const int64_t head = (item - items[s]) % heads;
      const int64_t first = starts_q[s] + (item - items[s]) / heads * QUERIES;
      const int64_t count = std::min(QUERIES, starts_q[s + 1] - first);
      const int64_t key = starts_k[s], keys = starts_k[s + 1] - key;
      T* to = out + first * of_out.row + head * of_out.head;
      if (keys == 0) {
        for (int64_t r = 0; r < count; ++r)
          std::memset(static_cast<void*>(to + r * of_out.row), 0, value_dim * sizeof(T));
        continue;
      }
      worker.attend({q + first * of_q.row + head * of_q.head, of_q.row, count},
                    {k + key * of_k.row + head * of_k.head, of_k.row, keys},
                    {v + key * of_v.row + head * of_v.head, of_v.row, keys},
                    {to, of_out.row, count});
    }
  }
}

std::vector<int64_t> starts_of(const void* given, bool are_wide, int64_t count) {
  if (are_wide) {
    const int64_t* starts = static_cast<const int64_t*>(given);
    return {starts, starts + count};
  }
  const int32_t* starts = static_cast<const int32_t*>(given);
  return {starts, starts + count};
}

// Whether these are starts of sequences within `rows` rows.
bool fit(const std::vector<int64_t>& starts, int64_t rows) {
  return starts.front() == 0 && starts.back() == rows &&
         std::is_sorted(starts.begin(), starts.end());
}

}  // namespace

// Tensors are [rows, heads, dim], `out` contiguous and of others the last dimension; starts are
// int64 if they are wide, else int32. Returns 0 if starts do not fit.
extern "C" int fusedformer_attend(int is_bfloat16, const void* q, const void* k, const void* v,
                                  void* out, int are_wide, const void* starts_q,
                                  const void* starts_k, int64_t sequences, int64_t heads,
                                  int64_t rows_q, int64_t rows_k, int64_t q_row, int64_t q_head,
                                  int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,
                                  int64_t dim, int64_t value_dim, float scale, int threads) {
  const std::vector<int64_t> queries = starts_of(starts_q, are_wide, sequences + 1);
  const std::vector<int64_t> keys = starts_of(starts_k, are_wide, sequences + 1);
  if (!fit(queries, rows_q) || !fit(keys, rows_k)) return 0;
  const Steps of_q = {q_row, q_head}, of_k = {k_row, k_head}, of_v = {v_row, v_head};
  if (is_bfloat16)
    attend(static_cast<const bfloat16*>(q), static_cast<const bfloat16*>(k),
           static_cast<const bfloat16*>(v), static_cast<bfloat16*>(out), queries, keys, heads,
           of_q, of_k, of_v, dim, value_dim, scale, threads);
  else
    attend(static_cast<const float*>(q), static_cast<const float*>(k),
           static_cast<const float*>(v), static_cast<float*>(out), queries, keys, heads, of_q,
           of_k, of_v, dim, value_dim, scale, threads);
  return 1;
}
