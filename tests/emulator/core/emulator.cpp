// The C interface, as emulator.h describes it.
#include "emulator.h"

#include <memory>
#include <mutex>
#include <unordered_map>

#include "global.h"

using namespace emulator;

namespace {
std::unordered_map<uint64_t, std::unique_ptr<Kernel>> kernels;
std::string error;
std::mutex busy;  // other threads allocate while a kernel runs
}  // namespace

int emulator_load(uint64_t handle, const char *ptx, const char *name) {
  try {
    kernels[handle].reset(parse(ptx, name ? name : ""));
    return 0;
  } catch (const std::exception &failure) {
    kernels.erase(handle);
    error = failure.what();
    return 1;
  }
}

void emulator_allocate(uint64_t base, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(busy);
  global_memory.allocate(base, bytes);
}

void emulator_free(uint64_t base) {
  std::lock_guard<std::mutex> lock(busy);
  global_memory.free(base);
}

int emulator_launch(uint64_t handle, const uint32_t grid[3], uint32_t threads, uint32_t shared_bytes,
                    void **parameters) {
  std::lock_guard<std::mutex> lock(busy);
  try {
    auto found = kernels.find(handle);
    if (found == kernels.end()) throw Error("no kernel was loaded as " + std::to_string(handle));
    Launch launch;
    launch.kernel = found->second.get();
    for (int axis = 0; axis < 3; axis++) launch.grid[axis] = grid[axis];
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    run_launch(launch, parameters);
    return 0;
  } catch (const std::exception &failure) {
    error = failure.what();
    return 1;
  }
}

const char *emulator_error(void) { return error.c_str(); }

int emulator_report(char *text, int size) { return take_findings(text, size); }

void emulator_configure(const char *name, int64_t value) {
  const std::string setting = name;
  if (setting == "check") settings.check = value != 0;
  else if (setting == "order") settings.order = (int)value;
  else if (setting == "budget") settings.budget = (uint64_t)value;
  else if (setting == "late") settings.late = value != 0;
  else if (setting == "fenced_copies") settings.fenced_copies = value != 0;
  else if (setting == "fenced_operands") settings.fenced_operands = value != 0;
  else error = "unknown setting " + setting;
}

uint64_t emulator_instructions(void) { return instructions_run; }
