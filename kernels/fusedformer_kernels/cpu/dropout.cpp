// Dropout on a CPU: which elements are kept, by the numbers of torch's generator, and what they are.
//
// The generator is a Mersenne Twister, which renews 624 words at once. Here that takes vectors; the
// numbers and the state behind them are torch's.

#include "vectors.h"

namespace {

constexpr int64_t WORDS = 624, AHEAD = 397;
constexpr int64_t BLOCK = 16384;  // elements that a thread takes at once

// The first bytes of torch.get_rng_state().
struct State {
  uint64_t seed;
  int32_t left, seeded;  // `left` - 1 words are unused
  uint64_t next;
  uint64_t words[WORDS];
};

class Twister {
 public:
  explicit Twister(State& state) : state_(state) {
    for (int64_t i = 0; i < WORDS; ++i) words_[i] = static_cast<uint32_t>(state.words[i]);
  }
  ~Twister() {
    for (int64_t i = 0; i < WORDS; ++i) state_.words[i] = words_[i];
  }

  void fill(uint32_t* to, int64_t count) {
    while (count > 0) {
      if (state_.left == 1) renew();
      const int64_t some = std::min<int64_t>(count, state_.left - 1);
      temper(words_ + state_.next, some, to);
      state_.next += some;
      state_.left -= some;
      to += some;
      count -= some;
    }
  }

 private:
  static uint32_t twisted(uint32_t first, uint32_t second) {
    const uint32_t mixed = (first & 0x80000000u) | (second & 0x7fffffffu);
    return mixed >> 1 ^ (second & 1 ? 0x9908b0dfu : 0u);
  }

  void renew() {
    constexpr int64_t BEHIND = WORDS - AHEAD;
    for (int64_t i = 0; i < BEHIND; ++i)
      words_[i] = words_[i + AHEAD] ^ twisted(words_[i], words_[i + 1]);
    for (int64_t i = BEHIND; i < WORDS - 1; ++i)
      words_[i] = words_[i - BEHIND] ^ twisted(words_[i], words_[i + 1]);
    words_[WORDS - 1] = words_[AHEAD - 1] ^ twisted(words_[WORDS - 1], words_[0]);
    state_.left = WORDS + 1;
    state_.next = 0;
  }

  static void temper(const uint32_t* words, int64_t count, uint32_t* to) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t y = words[i];
      y ^= y >> 11;
      y ^= y << 7 & 0x9d2c5680u;
      y ^= y << 15 & 0xefc60000u;
      to[i] = y ^ y >> 18;
    }
  }

  State& state_;
  uint32_t words_[WORDS];
};

// out = residual + factor * x where it is kept, residual elsewhere; without a residual, of 0.
template <class T>
void drop(const T* x, const T* residual, const uint8_t* kept, T* out, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    const float own = widened(x[i]) * factor * static_cast<float>(kept[i]);
    narrow(residual ? widened(residual[i]) + own : own, out[i]);
  }
}

template <class T>
void drop_all(const void* x, const void* residual, const uint8_t* kept, void* out, int64_t count,
              float factor, int threads) {
  const T *from = static_cast<const T*>(x), *others = static_cast<const T*>(residual);
  T* to = static_cast<T*>(out);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; i += BLOCK) {
    const int64_t some = std::min(BLOCK, count - i);
    if (others)
      drop<T>(from + i, others + i, kept + i, to + i, some, factor);
    else
      drop<T>(from + i, nullptr, kept + i, to + i, some, factor);
  }
}

}  // namespace

// An element takes 16 bits of a draw of 64, as random_() fills int64, and is kept if these, as a
// number with a sign, are at least `least`.
extern "C" void fusedformer_draw(void* state, uint8_t* kept, int64_t count, int32_t least) {
  constexpr int64_t SOME = 1024;
  uint32_t words[SOME];
  int16_t values[2 * SOME];
  Twister twister(*static_cast<State*>(state));
  const int16_t bound = static_cast<int16_t>(least);
  for (int64_t begin = 0; begin < count; begin += 2 * SOME) {
    const int64_t some = std::min(2 * SOME, count - begin);
    const int64_t drawn = ceiling(some, 4) / 2;
    twister.fill(words, drawn);
    for (int64_t i = 0; i < drawn; i += 2) {  // the first word is the upper half of 64 bits
      const uint32_t pair[2] = {words[i + 1], words[i]};
      std::memcpy(values + 2 * i, pair, 8);
    }
    for (int64_t i = 0; i < some; ++i) kept[begin + i] = values[i] >= bound;
  }
}

// `residual` may be null, and `out` one of the others.
extern "C" void fusedformer_drop(int is_bfloat16, const void* x, const void* residual,
                                 const uint8_t* kept, void* out, int64_t count, float factor,
                                 int threads) {
  const int used = count <= BLOCK ? 1 : threads;
  if (is_bfloat16)
    drop_all<bfloat16>(x, residual, kept, out, count, factor, used);
  else
    drop_all<float>(x, residual, kept, out, count, factor, used);
}
