// What the code for a CPU is made of: vectors; for attention small products in cache, the softmax
// of a row, arguments.
//
// Products work on units of 32 bits: a float, or where the CPU multiplies bfloat16, a pair of
// them, of two neighbours along the sum. Sums and the softmax are float.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <vector>

#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, COLUMNS = 4;  // COLUMNS vectors of ROWS sums fill the registers
#else
constexpr int64_t LANES = 8, COLUMNS = 2;
#endif
constexpr int64_t ROWS = 6;

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

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

inline void widened(const float* from, Vector& to) { std::memcpy(&to, from, sizeof(to)); }
inline void narrow(Vector x, float* to) { std::memcpy(to, &x, sizeof(x)); }

inline void widened(const bfloat16* from, Vector& to) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  to = (Vector)(__builtin_convertvector(bits, Words) << 16);
}

inline void narrow(Vector x, bfloat16* to) {  // to the nearest, ties to even
  const Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words found = x != x ? Words{} + 0x7fc0 : rounded;
  const Halves halves = __builtin_convertvector(found, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

#ifdef __F16C__
struct float16 {
  uint16_t bits;
};

inline void widened(const float16* from, Vector& to) {
#ifdef __AVX512F__
  to = (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  to = (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

inline void narrow(Vector x, float16* to) {
#ifdef __AVX512F__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

// `some` elements as floats, with zeros behind them, and back.
template <class T>
inline Vector loaded(const T* from, int64_t some) {
  Vector found;
  if (some == LANES) {
    widened(from, found);
    return found;
  }
  T whole[LANES] = {};
  std::memcpy(whole, from, some * sizeof(T));
  widened(whole, found);
  return found;
}

template <class T>
inline void stored(Vector x, T* to, int64_t some) {
  if (some == LANES) return narrow(x, to);
  T whole[LANES];
  narrow(x, whole);
  std::memcpy(to, whole, some * sizeof(T));
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

// out[ROWS][C * LANES] = a[ROWS][depth] b[depth][C * LANES], or added to it, with how far the next
// row of each is, and the next column of a.
template <class How, bool ADDED, int64_t C>
void tile(const typename How::Unit* a, int64_t a_row, int64_t a_column,
          const typename How::Unit* b, int64_t b_row, int64_t depth, float* out, int64_t out_row) {
  Vector sums[ROWS][C] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Unaligned own[C];
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c) std::memcpy(&own[c], b + p * b_row + c * LANES, LANES * 4);
#pragma GCC unroll 6
    for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int64_t c = 0; c < C; ++c)
        sums[r][c] = How::add(sums[r][c], a[r * a_row + p * a_column], own[c]);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c) {
      float* to = out + r * out_row + c * LANES;
      if (ADDED) sums[r][c] += *reinterpret_cast<Unaligned*>(to);
      std::memcpy(to, &sums[r][c], LANES * 4);
    }
}

// The same for any number of columns, a multiple of LANES.
template <class How, bool ADDED = false>
void product(const typename How::Unit* a, int64_t a_row, int64_t a_column,
             const typename How::Unit* b, int64_t columns, int64_t depth, float* out) {
  int64_t c = 0;
  auto some = [&](auto tile) { tile(a, a_row, a_column, b + c, columns, depth, out + c, columns); };
  for (; c + COLUMNS * LANES <= columns; c += COLUMNS * LANES) some(tile<How, ADDED, COLUMNS>);
  switch ((columns - c) / LANES) {
    case 1: some(tile<How, ADDED, 1>); break;
    case 2: some(tile<How, ADDED, 2>); break;
    case 3: some(tile<How, ADDED, 3>); break;
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

// Multiply `keys` weights by 0 or 1, which are bytes.
inline void drop(float* weights, const uint8_t* kept, int64_t keys) {
  for (int64_t i = 0; i < keys; ++i) weights[i] *= static_cast<float>(kept[i]);
}

// Transpose keys [count][dim], `row` elements from one to the next, to [depth][padded] units, with
// zeros behind the last; `depth` units are the `dim` elements of a key.
template <class How, class T>
void turn(const T* keys, int64_t row, int64_t count, int64_t dim, int64_t depth, int64_t padded,
          typename How::Unit* to) {
  using Unit = typename How::Unit;
  for (int64_t block = 0; block < padded; block += LANES) {
    const int64_t some = std::min(LANES, count - block);
    for (int64_t p = 0; p < depth; p += LANES) {
      Bits square[LANES] = {};
      const int64_t first = p * How::ELEMENTS, n = std::min(LANES * How::ELEMENTS, dim - first);
      for (int64_t j = 0; j < some; ++j) {
        const T* from = keys + (block + j) * row + first;
        if (n == LANES * How::ELEMENTS && sizeof(Unit) == sizeof(T) * How::ELEMENTS) {
          std::memcpy(&square[j], from, LANES * 4);
        } else {
          Unit units[LANES] = {};
          How::along(from, n, units);
          std::memcpy(&square[j], units, LANES * 4);
        }
      }
      transpose(square);
      for (int64_t i = 0; i < std::min(LANES, depth - p); ++i)
        std::memcpy(to + (p + i) * padded + block, &square[i], LANES * 4);
    }
  }
}

// Rows of one head of one sequence, and how far the next is, in elements.
template <class T>
struct Rows {
  T* first;
  int64_t row, count;
};

// What dropout keeps of the scores of one head of one sequence: bytes of 0 and 1, or null.
struct Kept {
  const uint8_t* first;
  int64_t row;

  const uint8_t* of(int64_t query) const { return first ? first + query * row : nullptr; }
};

// A tensor [rows, heads, dim]: how far the next row and the next head are, in elements; the last
// dimension is contiguous. Null where it is not wanted.
struct Heads {
  void* first;
  int64_t row, head;

  template <class T>
  Rows<T> of(int64_t begin, int64_t count, int64_t which) const {
    T* own = static_cast<T*>(first);
    return {own ? own + begin * row + which * head : nullptr, row, count};
  }
};

// What one call is about; attention.py lays it out the same.
struct Attention {
  Heads q, k, v;
  const int64_t *starts_q, *starts_k;  // of sequences, and the end of the last; they fit
  const uint8_t* kept;                 // of dropout, or null
  const int64_t* places;  // in `kept`: where a sequence begins, the next head, the next query
  int64_t sequences, heads, queries, keys, dim, value_dim;
  float scale, factor;  // `factor` multiplies the weights that dropout keeps
  int32_t is_bfloat16, threads;

  int64_t longest() const {
    int64_t found = 0;
    for (int64_t s = 0; s < sequences; ++s) found = std::max(found, starts_k[s + 1] - starts_k[s]);
    return found;
  }
  // Of the queries of a sequence from `first` on.
  Kept kept_of(int64_t s, int64_t head, int64_t first) const {
    if (!kept) return {nullptr, 0};
    const int64_t* own = places + 3 * s;
    return {kept + own[0] + head * own[1] + first * own[2], own[2]};
  }
};

}  // namespace
