// Captures of the fake device: everything that runs on it is recorded, and done again by a replay.
//
// Torch's operators have to run to know what they return, so a capture runs everything. Afterwards
// memory and random state are as they were, and what was allocated meanwhile is unwritten.

#include "device.h"

#include <map>
#include <mutex>
#include <vector>

namespace fake {
namespace {

struct Graph {
  std::shared_ptr<Pool> pool;
  std::vector<std::function<void()>> steps;
  std::unique_ptr<Snapshot> before;
  at::Tensor random_state;
  bool is_broken = false;
};

std::map<int64_t, std::unique_ptr<Graph>> graphs;
std::map<int64_t, std::weak_ptr<Pool>> pools;
Graph* capturing = nullptr;
int64_t next_graph = 1;
std::string last_error;
std::mutex replaying;  // graphs of one pool share memory: a device has events to keep them apart

template <typename Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

bool is_capturing() { return capturing != nullptr; }

void record(std::function<void()> step) { capturing->steps.push_back(std::move(step)); }

void forbid_in_capture(const std::string& work) {
  if (capturing == nullptr) return;
  capturing->is_broken = true;
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", work, ")");
}

}  // namespace fake

using namespace fake;

extern "C" {

const char* device_error() { return last_error.c_str(); }
bool device_is_capturing() { return is_capturing(); }

// Begin a capture whose memory is of the pool named so; returns the graph's number, or 0.
int64_t device_begin_capture(int64_t pool) {
  int64_t number = 0;
  guarded([&] {
    TORCH_CHECK(capturing == nullptr,
                "CUDA error: operation not permitted when stream is capturing");
    auto graph = std::make_unique<Graph>();
    graph->pool = pools[pool].lock();
    if (graph->pool == nullptr) pools[pool] = graph->pool = std::make_shared<Pool>();
    graph->before = std::make_unique<Snapshot>();
    graph->random_state = host_generator(std::nullopt).get_state();
    capturing = graph.get();
    number = next_graph++;
    graph->pool->graph = number;
    allocate_from(graph->pool);
    graphs[number] = std::move(graph);
  });
  return number;
}

int device_end_capture() {
  return guarded([&] {
    TORCH_CHECK(capturing != nullptr, "CUDA error: no capture has begun");
    Graph* graph = capturing;
    capturing = nullptr;
    allocate_from(nullptr);
    graph->before->restore();
    graph->before.reset();
    auto generator = host_generator(std::nullopt);
    generator.set_state(graph->random_state);
    TORCH_CHECK(!graph->is_broken,
                "CUDA error: operation failed due to a previous error during capture");
  });
}

int device_replay(int64_t number) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(replaying);
    Graph* graph = graphs.at(number).get();
    TORCH_CHECK(!is_capturing(), "CUDA error: a graph is replayed within a capture");
    graph->pool->forget(number);
    for (const auto& step : graph->steps) step();
  });
}

void device_end_graph(int64_t number) { graphs.erase(number); }

int64_t device_pool_bytes(int64_t number) {
  const auto pool = pools[number].lock();
  return pool == nullptr ? 0 : pool_bytes(*pool);
}

// Let replays call a function with this number: a launch, which is known elsewhere by it.
void device_record(int (*launch)(int64_t), int64_t number) {
  record([=] { TORCH_CHECK(launch(number) == 0, "CUDA error: a launch of a graph failed"); });
}
}
