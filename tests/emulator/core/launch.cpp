// Runs the blocks of a launch one after another, and their warps by turns.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "global.h"
#include "lanes.h"
#include "products.h"
#include "tiles.h"

namespace emulator {

Settings settings;
uint64_t instructions_run = 0;

void report(const Warp &warp, const Instruction &i, int lane, const char *kind, const std::string &what) {
  if (!settings.check || count_again(&i, kind)) return;
  const Kernel &kernel = *warp.kernel;
  const SourceLine line = kernel.lines[kernel.index(i)];
  const uint32_t *at = warp.block->at;
  std::string file = line.file < kernel.files.size() ? kernel.files[line.file] : "";
  std::string text = std::string(kind) + " " + kernel.name + " " + (file.empty() ? "?" : file) + ":" +
                     std::to_string(line.line) + " (block " + std::to_string(at[0]) + "," +
                     std::to_string(at[1]) + "," + std::to_string(at[2]) + "; ";
  if (lane < 0) text += "warp " + std::to_string(warp.number);
  else text += "thread " + std::to_string(warp.number * LANES + lane);
  add_finding(&i, kind, text + "): " + what + ", in " + kernel.texts[kernel.index(i)].substr(0, 120));
}

namespace {

// A permutation that is the same each time.
std::vector<uint32_t> order_of(size_t count, uint64_t seed) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  if (settings.order == 2) {
    uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
    for (size_t i = count; i > 1; i--) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }
  return order;
}

// Run a warp until it ends or waits at a barrier.
void run_warp(Warp &warp) {
  const Instruction *code = warp.kernel->code.data();
  uint64_t &run = warp.launch->run;
  warp.state = State::running;
  warp.look_again();
  for (;;) {
    const Instruction &i = code[warp.pc++];
    uint32_t exec = warp.active;
    if (i.guarded) {
      const uint32_t guard = *reinterpret_cast<uint32_t *>(warp.bases[0] + i.guard);
      exec &= i.negated ? ~guard : guard;
    }
    run++;
    if (exec) {
      warp.exec = exec;
      i.run(warp, i);
    }
    if (!warp.special) continue;
    if (warp.tracking && exec) track(warp, i);
    if (warp.state == State::blocked) run--;
    if (warp.state != State::running) return;
    if (!warp.others.empty() && warp.pc >= warp.lowest_other) next_group(warp);
  }
}

void begin_block(Block &block, uint32_t index) {
  Launch &launch = *block.launch;
  const uint32_t *grid = launch.grid;
  block.at[0] = index % grid[0];
  block.at[1] = index / grid[0] % grid[1];
  block.at[2] = index / grid[0] / grid[1];
  block.index = index;
  block.stamp = launch.first_stamp + index;
  block.epoch = block.looks = 0;
  for (auto *epochs : {&block.done, &block.told, &block.tells}) epochs->clear();
  block.shared.begin_block();
  block.mbarriers.clear();
  block.bulk_copies.clear();
  std::fill(block.fenced.begin(), block.fenced.end(), 0);
  for (int axis = 0; axis < 3; axis++)
    fill_row(launch.constants[0].bytes + launch.kernel->block[axis].offset(), Width::bits32, block.at[axis]);
  for (Warp &warp : block.warps) {
    warp.pc = 0;
    warp.active = warp.alive = ALL;
    warp.state = State::running;
    warp.tracking = warp.products_fenced = warp.forced = warp.waited = false;
    warp.asked = nullptr;
    warp.registers = std::min(REGISTERS / launch.threads / 8 * 8, 255u);  // as ptxas spreads them
    warp.others.clear();
    warp.copies.clear();
    warp.products.clear();
    for (uint32_t at : warp.used) warp.uses[at] = 0;
    warp.used.clear();
  }
}

void end_warp(Warp &warp) {
  const Instruction &last = warp.kernel->code.back();
  if (!warp.copies.waiting.empty())
    report(warp, last, -1, "pending-copy", "ends with a cp.async that is not waited for");
  if (!warp.products.waiting.empty())
    report(warp, last, -1, "wgmma-register", "ends with a wgmma that is not waited for");
  if (warp.kernel->overlaps && !warp.waited)
    report(warp, last, -1, "early", "ends, perhaps before the launch that it should have waited for");
}

// What these warps did until now comes before all that they do next.
void meet(Block &block, const std::vector<int> &warps) {
  if (block.shared.by_steps()) block.shared.order.meet(warps);
  else block.shared.begin_epoch();
}

// Run a warp; false if it is where it was.
bool moves(Warp &warp) {
  const uint64_t before = warp.launch->run;
  warp.state = State::running;
  run_warp(warp);
  if (warp.state == State::done) end_warp(warp);
  return warp.state != State::blocked || warp.launch->run > before;
}

// Nothing moves: report who waits for what never comes, and let them go on.
bool force(Block &block) {
  std::vector<int> waiting;
  for (Warp &warp : block.warps) {
    const bool at_barrier = warp.state == State::at_barrier;
    if (!at_barrier && warp.state != State::blocked) continue;
    if (waiting.empty() || !at_barrier)
      report(warp, warp.kernel->code[at_barrier ? warp.pc - 1 : warp.pc], -1,
             at_barrier ? "partial-barrier" : "deadlock",
             at_barrier ? "a warp waits at a barrier that others, which ended or wait elsewhere, never reach"
                        : "a warp waits for what never comes: arrivals, bytes or registers");
    waiting.push_back(warp.number);
    warp.forced = !at_barrier;
    if (at_barrier) warp.state = State::running;
  }
  if (!waiting.empty()) meet(block, waiting);
  return !waiting.empty();
}

// Let the warps go on that wait at a barrier which enough have reached; false if there are none.
bool release(Block &block) {
  bool released = false;
  for (size_t w = 0; w < block.warps.size(); w++) {
    if (block.warps[w].state != State::at_barrier) continue;
    const int barrier = block.warps[w].barrier;
    auto waits = [&](const Warp &warp) { return warp.state == State::at_barrier && warp.barrier == barrier; };
    uint32_t threads = 0;
    for (const Warp &warp : block.warps) threads += waits(warp) ? LANES : 0;
    if (threads < block.warps[w].barrier_threads) continue;
    std::vector<int> together;
    for (Warp &warp : block.warps) {
      if (!waits(warp)) continue;
      warp.state = State::running;
      together.push_back(warp.number);
    }
    meet(block, together);
    released = true;
  }
  return released;
}

void run_block(Block &block, uint32_t index) {
  begin_block(block, index);
  for (uint64_t round = 0;; round++) {
    bool moved = false;
    for (uint32_t w : order_of(block.warps.size(), round + index)) {
      Warp &warp = block.warps[w];
      if (warp.state == State::running || warp.state == State::blocked) moved |= moves(warp);
    }
    if (release(block) || moved) continue;
    if (!force(block)) break;
  }
  for (const BulkCopy &copy : block.bulk_copies)
    report(block.warps[copy.warp], *copy.instruction, -1, "pending-copy",
           "a bulk copy is not waited for before the block ends");
}

void prepare(Block &block, Launch &launch) {
  const Kernel &kernel = *launch.kernel;
  const size_t count = (launch.threads + LANES - 1) / LANES;
  const size_t lines = (kernel.register_bytes + 63) / 64 + 1;
  block.launch = &launch;
  block.warps.resize(count);
  block.fenced.assign(count, 0);
  block.registers.resize(std::max(block.registers.size(), count * lines));
  block.shared.resize(launch.shared_bytes, kernel.has_mbarriers);
  for (size_t w = 0; w < count; w++) {
    Warp &warp = block.warps[w];
    warp.number = (int)w;
    warp.block = &block;
    warp.launch = &launch;
    warp.kernel = &kernel;
    warp.bases[0] = block.registers[w * lines].bytes;
    warp.bases[1] = launch.constants[0].bytes;
    warp.used.clear();
    warp.uses.assign(lines, 0);
    uint32_t *thread = warp.row<uint32_t>(kernel.thread), *lane = warp.row<uint32_t>(kernel.lane);
    for (int l = 0; l < LANES; l++) {
      thread[l] = (uint32_t)(w * LANES + l);
      lane[l] = (uint32_t)l;
    }
    fill_row(warp.bases[0] + kernel.warp.offset(), Width::bits32, w);
  }
}

void fill_constants(Launch &launch, void **parameters) {
  const Kernel &kernel = *launch.kernel;
  launch.constants.resize(kernel.constants.size() / 64 + 1);
  uint8_t *constants = launch.constants[0].bytes;
  memcpy(constants, kernel.constants.data(), kernel.constants.size());
  for (int axis = 0; axis < 3; axis++)
    fill_row(constants + kernel.blocks[axis].offset(), Width::bits32, launch.grid[axis]);
  fill_row(constants + kernel.thread_count.offset(), Width::bits32, launch.threads);
  launch.memory.resize(kernel.memory_bytes / 64 + 1);
  fill_row(constants + kernel.memory.offset(), Width::bits64, (uint64_t)launch.memory[0].bytes);
  for (size_t p = 0; p < kernel.parameters.size(); p++) {
    const Parameter &parameter = kernel.parameters[p];
    if (parameter.is_memory) {
      memcpy(launch.memory[0].bytes + parameter.address, parameters[p], parameter.size);
      continue;
    }
    uint64_t value = 0;
    if (!parameter.rows.empty()) memcpy(&value, parameters[p], parameter.size);
    const int unused = 64 - 8 * (int)parameter.size;
    for (size_t r = 0; r < parameter.rows.size(); r++) {
      const uint64_t extended = parameter.is_signed[r] ? (uint64_t)((int64_t)(value << unused) >> unused) : value;
      fill_row(constants + parameter.rows[r].offset(), parameter.rows[r].width, extended);
    }
  }
}

}  // namespace

uint32_t Launch::new_epoch(uint32_t block, uint32_t before) {
  epochs.emplace_back(block, before + 1);
  return global_memory.next_stamp();
}

bool Launch::is_done(const Block &block, uint32_t stamp) const {
  if (stamp == shared_stamp()) return false;  // of several
  uint32_t whose = stamp - first_stamp, epoch = 0;
  if (stamp > shared_stamp()) std::tie(whose, epoch) = epochs[stamp - shared_stamp() - 1];
  return whose == block.index || (whose < block.done.size() && epoch < block.done[whose]);
}

void run_launch(Launch &launch, void **parameters) {
  static Block block;
  const Kernel &kernel = *launch.kernel;
  const uint64_t blocks = (uint64_t)launch.grid[0] * launch.grid[1] * launch.grid[2];
  if (launch.threads == 0 || launch.threads % LANES || launch.threads > 1024)
    throw Error("a block of " + std::to_string(launch.threads) + " threads");
  if (kernel.threads && launch.threads != kernel.threads)
    throw Error(kernel.name + " is for " + std::to_string(kernel.threads) + " threads, not " +
                std::to_string(launch.threads));
  if (blocks > 0x7fffffffull) throw Error("a grid of too many blocks");
  launch.recent.assign(kernel.code.size(), nullptr);
  launch.first_stamp = global_memory.begin_launch(blocks);
  fill_constants(launch, parameters);
  prepare(block, launch);
  tile_cache.new_launch();
  struct Count {
    Launch &launch;
    ~Count() { instructions_run += launch.run; }
  } count{launch};
  for (uint32_t index : order_of(blocks, launch.first_stamp)) run_block(block, index);
}

}  // namespace emulator
