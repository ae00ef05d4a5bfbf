// Attention of packed sequences on a CPU: softmax(scale * q k^T) v, for each sequence and head.
//
// One parallel region computes all of them. An item of work is some queries of one head of one
// sequence: its keys and values are packed once, and then ROWS queries at a time have all of their
// scores, the softmax of these and the sum of values, in cache. What a sequence gets depends on
// nothing but itself, and on what dropout keeps of its weights.

#include "vectors.h"

namespace {

constexpr int64_t QUERIES = 240;  // of an item, for which keys and values are packed once
constexpr int64_t WORTH_THREADS = 1 << 18;  // multiplications in the time that waking them takes

template <class T>
class Worker {
  using How = typename Chosen<T>::Type;
  using Unit = typename How::Unit;
  static constexpr int64_t ELEMENTS = How::ELEMENTS;

 public:
  Worker(const Attention& all, int64_t longest)
      : dim_(all.dim), value_dim_(all.value_dim), scale_(all.scale), factor_(all.factor),
        depth_((dim_ + ELEMENTS - 1) / ELEMENTS), width_(ceiling(value_dim_, LANES)),
        keys_(depth_ * ceiling(longest, LANES)),
        values_(ceiling(longest, LANES) / ELEMENTS * width_),
        queries_(ROWS * depth_), weights_(ROWS * ceiling(longest, LANES)),
        scores_(ROWS * ceiling(longest, LANES)), output_(ROWS * width_) {}

  void attend(Rows<const T> q, Rows<const T> k, Rows<const T> v, Kept kept, Rows<T> out) {
    const int64_t padded = ceiling(k.count, LANES);
    turn<How>(k.first, k.row, k.count, dim_, depth_, padded, keys_.data());
    pack(v, padded);
    for (int64_t start = 0; start < q.count; start += ROWS) {
      const int64_t rows = std::min(ROWS, q.count - start);
      for (int64_t r = 0; r < rows; ++r)
        How::along(q.first + (start + r) * q.row, dim_, queries_.data() + r * depth_);
      product<How>(queries_.data(), depth_, 1, keys_.data(), padded, depth_, scores_.data());
      float factors[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float* own = scores_.data() + r * padded;
        factors[r] = 1.0f / exponentials(own, k.count, padded, scale_);
        if (kept.first) {
          factors[r] *= factor_;
          drop(own, kept.of(start + r), k.count);
        }
        How::weights(own, padded, weights_.data() + r * (padded / ELEMENTS));
      }
      product<How>(weights_.data(), padded / ELEMENTS, 1, values_.data(), width_,
                   padded / ELEMENTS, output_.data());
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = output_.data() + r * width_;
        T* to = out.first + (start + r) * out.row;
        for (int64_t d = 0; d < value_dim_; ++d) narrow(from[d] * factors[r], to[d]);
      }
    }
  }

 private:
  // Values as [padded / ELEMENTS][width], with zeros where there is nothing.
  void pack(Rows<const T> v, int64_t padded) {
    for (int64_t j = 0; j < padded; j += ELEMENTS) {
      Unit* to = values_.data() + j / ELEMENTS * width_;
      const int64_t used = j < v.count ? value_dim_ : 0;
      if (used) How::across(v.first + j * v.row, v.row, j + 1 < v.count, used, to);
      std::fill(to + used, to + width_, Unit{});
    }
  }

  int64_t dim_, value_dim_;
  float scale_, factor_;
  int64_t depth_, width_;
  std::vector<Unit> keys_, values_, queries_, weights_;
  std::vector<float> scores_, output_;
};

template <class T>
void attend(const Attention& all, const Heads& out) {
  std::vector<int64_t> items(all.sequences + 1, 0);  // of all sequences before
  int64_t scores = 0;
  for (int64_t s = 0; s < all.sequences; ++s) {
    const int64_t queries = all.starts_q[s + 1] - all.starts_q[s];
    items[s + 1] = items[s] + ceiling(queries, QUERIES) / QUERIES * all.heads;
    scores += queries * (all.starts_k[s + 1] - all.starts_k[s]) * all.heads;
  }
  const int64_t longest = all.longest();
  const bool is_worth_threads = scores * (all.dim + all.value_dim) >= WORTH_THREADS;
#pragma omp parallel num_threads(all.threads) if (is_worth_threads)
  {
    Worker<T> worker(all, longest);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items[all.sequences]; ++item) {
      const int64_t s = std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
      const int64_t head = (item - items[s]) % all.heads;
      const int64_t skipped = (item - items[s]) / all.heads * QUERIES;
      const int64_t first = all.starts_q[s] + skipped;
      const int64_t count = std::min(QUERIES, all.starts_q[s + 1] - first);
      const int64_t key = all.starts_k[s], keys = all.starts_k[s + 1] - key;
      const Rows<T> to = out.of<T>(first, count, head);
      if (keys == 0) {
        for (int64_t r = 0; r < count; ++r)
          std::memset(static_cast<void*>(to.first + r * to.row), 0, all.value_dim * sizeof(T));
        continue;
      }
      worker.attend(all.q.of<const T>(first, count, head), all.k.of<const T>(key, keys, head),
                    all.v.of<const T>(key, keys, head), all.kept_of(s, head, skipped), to);
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

extern "C" void fusedformer_attend(const Attention* all, const Heads* out) {
  all->is_bfloat16 ? attend<bfloat16>(*all, *out) : attend<float>(*all, *out);
}

// The same without dropout, by arguments that take the caller little time: `out` is contiguous,
// starts are int64 if they are wide, else int32. Returns 0 if they do not fit.
extern "C" int fusedformer_attend_at_once(
    int is_bfloat16, void* q, void* k, void* v, void* out, int are_wide, const void* starts_q,
    const void* starts_k, int64_t sequences, int64_t heads, int64_t queries, int64_t keys,
    int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,
    int64_t dim, int64_t value_dim, float scale, int threads) {
  const std::vector<int64_t> of_q = starts_of(starts_q, are_wide, sequences + 1);
  const std::vector<int64_t> of_k = starts_of(starts_k, are_wide, sequences + 1);
  if (!fit(of_q, queries) || !fit(of_k, keys)) return 0;
  const Attention all = {{q, q_row, q_head}, {k, k_row, k_head}, {v, v_row, v_head}, of_q.data(),
                         of_k.data(), nullptr, nullptr, sequences, heads, queries, keys, dim,
                         value_dim, scale, 1.0f, is_bfloat16, threads};
  const Heads to = {out, heads * value_dim, value_dim};
  fusedformer_attend(&all, &to);
  return 1;
}
