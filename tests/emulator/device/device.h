// What the parts of the fake device share: memory, recorded graphs, and host views of tensors.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace fake {

inline c10::Device cuda() { return {c10::DeviceType::CUDA, 0}; }

// Two bytes of it are a NaN in float16 and bfloat16, four in float32.
constexpr uint16_t kUnwritten = 0x7FA5;

// --- memory.cpp: allocations, with guards around them -------------------------------------------

// Keeps the memory that a capture allocates for as long as its graph lives.
class Pool {
 public:
  ~Pool();
  void adopt(void* block);
  void discard(void* block);  // torch has let it go; the graph writes to it still
  void forget(int64_t graph);  // makes what that graph's capture made and let go unwritten again
  int64_t graph = 0;           // whose capture allocates
 private:
  struct Kept {
    void* block;
    int64_t graph;
    bool is_discarded;
  };
  std::vector<Kept> kept_;
  friend int64_t pool_bytes(const Pool&);
};

int64_t pool_bytes(const Pool& pool);
c10::Allocator* allocator();

// Every allocation made from here on belongs to the pool; null: to nobody.
void allocate_from(std::shared_ptr<Pool> pool);

// Holds the contents of all memory; restores what is still allocated, and forgets what is new.
class Snapshot {
 public:
  Snapshot();
  void restore() const;

 private:
  std::vector<std::pair<void*, std::vector<char>>> contents_;
};

// --- graph.cpp: what a capture records ----------------------------------------------------------

bool is_capturing();
void record(std::function<void()> step);
// Raises, as the driver does, if the work cannot be part of a graph.
void forbid_in_capture(const std::string& work);

// --- runtime.cpp: random numbers ----------------------------------------------------------------

// The host's generator behind one of the device; the device's default if none is given.
at::Generator host_generator(const std::optional<at::Generator>& generator);

// The host's default generator stands in the state of the device's while this lives.
class HostDrawsAsDevice {
 public:
  HostDrawsAsDevice();
  ~HostDrawsAsDevice();

 private:
  at::Tensor before_;
};

}  // namespace fake
