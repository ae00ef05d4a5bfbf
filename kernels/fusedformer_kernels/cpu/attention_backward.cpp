// Gradients of packed attention on a CPU, for each sequence and head.
//
// One parallel region computes all of them. An item of work is one head of one sequence, which no
// other adds to: sums have one order, whatever the number of threads. Of QUERIES queries at a time
// the scores and their softmax are computed again, and the gradients of both, in cache. All
// products are of floats.

#include "vectors.h"

namespace {

constexpr int64_t QUERIES = 8 * ROWS;  // whose weights are there at once

template <class T>
class Worker {
  using How = Wide<T>;

 public:
  Worker(const Attention& all, int64_t longest)
      : dim_(all.dim), value_dim_(all.value_dim), scale_(all.scale), factor_(all.factor),
        width_(ceiling(dim_, LANES)), value_width_(ceiling(value_dim_, LANES)),
        most_(ceiling(longest, LANES) + LANES),
        turned_keys_(dim_ * most_), turned_values_(value_dim_ * most_), keys_(most_ * width_),
        dkeys_(most_ * width_), dvalues_(most_ * value_width_), queries_(QUERIES * width_),
        grads_(QUERIES * value_width_), dqueries_(ROWS * width_),
        // Tiles of keys read beyond the last query's end.
        weights_(QUERIES * most_ + ROWS), dscores_(QUERIES * most_ + ROWS) {}

  // Those of `dq`, `dk` and `dv` that are not null.
  void differentiate(Rows<const T> grad, Rows<const T> q, Rows<const T> k, Rows<const T> v,
                     Kept kept, Rows<T> dq, Rows<T> dk, Rows<T> dv) {
    const int64_t padded = ceiling(k.count, LANES);
    turn<How>(k.first, k.row, k.count, dim_, dim_, padded, turned_keys_.data());
    turn<How>(v.first, v.row, v.count, value_dim_, value_dim_, padded, turned_values_.data());
    copy(k, 0, k.count, padded, dim_, width_, keys_);
    std::fill_n(dkeys_.begin(), (padded + LANES) * width_, 0.0f);
    std::fill_n(dvalues_.begin(), (padded + LANES) * value_width_, 0.0f);
    for (int64_t start = 0; start < q.count; start += QUERIES) {
      const int64_t count = std::min(QUERIES, q.count - start);
      copy(q, start, count, ceiling(count, ROWS), dim_, width_, queries_);
      copy(grad, start, count, ceiling(count, ROWS), value_dim_, value_width_, grads_);
      for (int64_t row = 0; row < count; row += ROWS) {
        const int64_t rows = std::min(ROWS, count - row);
        differentiate_scores(row, rows, start, k.count, padded, kept);
        if (!dq.first) continue;
        product<How>(dscores_.data() + row * padded, padded, 1, keys_.data(), width_, padded,
                     dqueries_.data());
        for (int64_t r = 0; r < rows; ++r)
          write(dqueries_.data() + r * width_, dim_, dq.first + (start + row + r) * dq.row);
      }
      if (dv.first) sum(weights_, grads_, k.count, padded, count, value_width_, dvalues_);
      if (dk.first) sum(dscores_, queries_, k.count, padded, count, width_, dkeys_);
    }
    for (int64_t j = 0; j < k.count; ++j) {
      if (dk.first) write(dkeys_.data() + j * width_, dim_, dk.first + j * dk.row);
      if (dv.first) write(dvalues_.data() + j * value_width_, value_dim_, dv.first + j * dv.row);
    }
  }

 private:
  // The weights that values had, and the gradients of scores, of some rows of the block of queries.
  void differentiate_scores(int64_t row, int64_t rows, int64_t start, int64_t keys, int64_t padded,
                            Kept kept) {
    float* weights = weights_.data() + row * padded;
    float* dscores = dscores_.data() + row * padded;
    product<How>(queries_.data() + row * width_, width_, 1, turned_keys_.data(), padded, dim_,
                 weights);
    product<How>(grads_.data() + row * value_width_, value_width_, 1, turned_values_.data(),
                 padded, value_dim_, dscores);
    for (int64_t r = 0; r < rows; ++r, weights += padded, dscores += padded) {
      const float sum = exponentials(weights, keys, padded, scale_);
      const uint8_t* own = kept.of(start + row + r);
      if (own) drop(dscores, own, keys);
      soften(weights, dscores, padded, 1.0f / sum, own ? factor_ : 1.0f);
      if (own) drop(weights, own, keys);
    }
  }

  // Of exponentials and gradients of weights, make weights times `factor` and gradients of scores.
  void soften(float* weights, float* dscores, int64_t padded, float over_sum, float factor) {
    Vector sums = {}, p, d;
    for (int64_t i = 0; i < padded; i += LANES) {
      std::memcpy(&p, weights + i, sizeof(p));
      std::memcpy(&d, dscores + i, sizeof(d));
      sums += p * d;
    }
    const float mean = reduced(sums, [](Vector a, Vector b) { return a + b; }) * over_sum;
    for (int64_t i = 0; i < padded; i += LANES) {
      std::memcpy(&p, weights + i, sizeof(p));
      std::memcpy(&d, dscores + i, sizeof(d));
      p *= over_sum;
      d = p * (d - mean) * (factor * scale_);
      p *= factor;
      std::memcpy(weights + i, &p, sizeof(p));
      std::memcpy(dscores + i, &d, sizeof(d));
    }
  }

  // Add to each key's row of `out` what `count` queries have for it.
  static void sum(const std::vector<float>& of_keys, const std::vector<float>& rows, int64_t keys,
                  int64_t padded, int64_t count, int64_t width, std::vector<float>& out) {
    for (int64_t j = 0; j < keys; j += ROWS)
      product<How, true>(of_keys.data() + j, 1, padded, rows.data(), width, count,
                         out.data() + j * width);
  }

  // Rows as [padded][width] floats, with zeros where there is nothing.
  static void copy(Rows<const T> rows, int64_t start, int64_t count, int64_t padded, int64_t dim,
                   int64_t width, std::vector<float>& found) {
    for (int64_t j = 0; j < padded; ++j) {
      float* to = found.data() + j * width;
      const int64_t used = j < count ? dim : 0;
      if (used) How::along(rows.first + (start + j) * rows.row, used, to);
      std::fill(to + used, to + width, 0.0f);
    }
  }

  static void write(const float* from, int64_t dim, T* to) {
    for (int64_t d = 0; d < dim; ++d) narrow(from[d], to[d]);
  }

  int64_t dim_, value_dim_;
  float scale_, factor_;
  int64_t width_, value_width_, most_;
  std::vector<float> turned_keys_, turned_values_, keys_, dkeys_, dvalues_, queries_, grads_;
  std::vector<float> dqueries_, weights_, dscores_;
};

template <class T>
void differentiate(const Attention& all, const Heads& grad, const Heads& dq, const Heads& dk,
                   const Heads& dv) {
  const int64_t longest = all.longest();
#pragma omp parallel num_threads(all.threads)
  {
    Worker<T> worker(all, longest);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < all.sequences * all.heads; ++item) {
      const int64_t s = item / all.heads, head = item % all.heads;
      const int64_t query = all.starts_q[s], queries = all.starts_q[s + 1] - query;
      const int64_t key = all.starts_k[s], keys = all.starts_k[s + 1] - key;
      worker.differentiate(
          grad.of<const T>(query, queries, head), all.q.of<const T>(query, queries, head),
          all.k.of<const T>(key, keys, head), all.v.of<const T>(key, keys, head),
          all.kept_of(s, head, 0), dq.of<T>(query, queries, head), dk.of<T>(key, keys, head),
          dv.of<T>(key, keys, head));
    }
  }
}

}  // namespace

// `grad` is that of the output.
extern "C" void fusedformer_attend_backward(const Attention* all, const Heads* grad,
                                            const Heads* dq, const Heads* dk, const Heads* dv) {
  all->is_bfloat16 ? differentiate<bfloat16>(*all, *grad, *dq, *dk, *dv)
                   : differentiate<float>(*all, *grad, *dq, *dk, *dv);
}
