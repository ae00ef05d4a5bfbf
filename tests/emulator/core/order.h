// What comes before what in a block whose warps meet by mbarriers or by barriers of a few of them.
//
// Every warp counts its steps, and knows of each other one up to which step it has seen it: what
// that one did until then comes before all that the warp does now. Whoever arrives at a barrier
// gives what it has seen, and who waits there takes it. Bulk copies are done by no warp: they have a
// place of their own, TENSOR_COPIES, and a step each.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr int MOST_WARPS = 32, TENSOR_COPIES = MOST_WARPS;

// Up to which step each warp, and the bulk copies, are seen.
struct Seen {
  std::array<uint32_t, MOST_WARPS + 1> step{};
  void take(const Seen &other) {
    for (size_t i = 0; i < step.size(); i++) step[i] = std::max(step[i], other.step[i]);
  }
};

class Order {
 public:
  // Steps go on from block to block, so that what an earlier one did comes before everything.
  void begin_block() {
    for (int i = 0; i <= MOST_WARPS; i++) begin_.step[i] = now_[i]++;
    seen_.fill(begin_);
    at_fence_.fill(begin_);
    for (int warp = 0; warp < MOST_WARPS; warp++) seen_[warp].step[warp] = 0xffffffffu;
  }
  uint32_t now(int warp) const { return now_[warp]; }
  const Seen &seen(int warp) const { return seen_[warp]; }  // all of its own

  // What a warp did so far, for those who will wait for it; what it does next is not in it.
  Seen given(int warp) {
    Seen all = seen_[warp];
    all.step[warp] = now_[warp]++;
    return all;
  }
  void take(int warp, const Seen &given) { seen_[warp].take(given); }
  void meet(const std::vector<int> &warps) {
    Seen all;
    for (int warp : warps) all.take(given(warp));
    for (int warp : warps) take(warp, all);
  }
  uint32_t begin_copy() { return ++now_[TENSOR_COPIES]; }

  // fence.proxy.async: what a warp has seen by then, tensor cores and bulk copies may read.
  void fence(int warp) {
    at_fence_[warp] = seen_[warp];
    at_fence_[warp].step[warp] = now_[warp]++;
  }
  bool is_fenced(int writer, uint32_t step, int reader) const {
    return step <= at_fence_[reader].step[writer] || step <= at_fence_[writer].step[writer];
  }

 private:
  std::array<uint32_t, MOST_WARPS + 1> now_{};
  std::array<Seen, MOST_WARPS> seen_, at_fence_;
  Seen begin_;
};

}  // namespace emulator
