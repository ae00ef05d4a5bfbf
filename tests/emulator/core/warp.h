// What runs: a launch of blocks of warps, with their registers and shared memory.
#pragma once
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "kernel.h"
#include "report.h"
#include "shared.h"

namespace emulator {

struct Allocation;
struct Block;
struct Tile;

struct Settings {
  bool check = true;
  int order = 0;
  uint64_t budget = 0;
  bool late = true;
  bool fenced_copies = true;
  bool fenced_operands = false;
};
extern Settings settings;
extern uint64_t instructions_run;

// Everything that the blocks of a launch have in common.
struct Launch {
  const Kernel *kernel = nullptr;
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 0, shared_bytes = 0;
  Lines constants;
  Lines memory;                      // of the parameters that are arrays
  std::vector<Allocation *> recent;  // by instruction: where its last access fell
  uint32_t first_stamp = 0;          // of its blocks, in the shadow of global memory
  uint32_t shared_stamp() const { return first_stamp + grid[0] * grid[1] * grid[2]; }
  uint64_t run = 0;                  // warp instructions

  // Of blocks that told others what is done (atomics.cpp): whose each later stamp is, from
  // shared_stamp() + 1 on, and what was told at an address, in epochs of each block.
  std::vector<std::pair<uint32_t, uint32_t>> epochs;  // (block, epoch)
  struct Told {
    std::vector<uint32_t> epochs, epochs_before;
    uint32_t before = 0;  // what was there before the last change
  };
  std::map<uint64_t, Told> told;
  uint32_t new_epoch(uint32_t block, uint32_t before);
  bool is_done(const Block &block, uint32_t stamp) const;  // for `block`, or by itself
};

constexpr uint32_t REGISTERS = 65536;  // of a multiprocessor

// Each number of `to` becomes at least that of `from`.
inline void raise_to(std::vector<uint32_t> &to, const std::vector<uint32_t> &from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = to[i] < from[i] ? from[i] : to[i];
}

// One cp.async of a warp, done at its wait.
struct Copy {
  uint32_t mask = 0;
  uint32_t bytes = 0;
  uint32_t to[LANES];
  uint64_t from[LANES];
  uint8_t taken[LANES];  // bytes that are read; the rest becomes zero
  const Instruction *instruction = nullptr;
};

// One wgmma of a warp, done at its wait.
struct Product {
  const Instruction *instruction = nullptr;
  Tile *left = nullptr, *right = nullptr;  // no left one where it is in registers
  bool accumulate = true;
};

// Operations in groups that are waited for oldest first.
template <class T>
struct Groups {
  std::vector<T> waiting;
  std::vector<size_t> ends;  // of the committed groups in `waiting`
  void add(const T &item) { waiting.push_back(item); }
  void commit() { ends.push_back(waiting.size()); }
  // Do and drop all groups but the youngest `keep`.
  template <class F>
  void wait(size_t keep, F &&finish) {
    if (ends.size() <= keep) return;
    size_t last = ends.size() - keep, count = ends[last - 1];
    for (size_t i = 0; i < count; i++) finish(waiting[i]);
    waiting.erase(waiting.begin(), waiting.begin() + count);
    ends.erase(ends.begin(), ends.begin() + last);
    for (size_t &end : ends) end -= count;
  }
  void clear() {
    waiting.clear();
    ends.clear();
  }
};

// `blocked`: its instruction could not be done, and is tried again once others have gone on.
enum class State : uint8_t { running, at_barrier, blocked, done };

struct Warp {
  uint8_t *bases[2] = {nullptr, nullptr};  // of registers, of constants
  uint32_t exec = 0;                       // lanes that run the current instruction
  uint32_t active = 0;                     // lanes at `pc`
  uint32_t alive = 0;                      // lanes that have not ended
  int32_t pc = 0;
  State state = State::running;
  bool special = false;    // the loop must look at more than the next instruction
  bool tracking = false;   // of registers that wgmma uses
  int number = 0;
  bool waited = false;      // for the launch before, where the kernel does
  bool forced = false;      // blocked for good: the instruction is to be done whatever holds it up
  const Instruction *asked = nullptr;  // the mbarrier.try_wait that it was last told "not yet" by
  uint32_t registers = 0;   // of each thread, as setmaxnreg counts them
  int barrier = 0;          // that it waits at, and for how many threads
  uint32_t barrier_threads = 0;
  Block *block = nullptr;
  Launch *launch = nullptr;
  const Kernel *kernel = nullptr;

  // Lanes that wait at other instructions, while lanes differ in where they are.
  struct Group {
    int32_t pc;
    uint32_t mask;
  };
  std::vector<Group> others;
  int32_t lowest_other = 0;

  Groups<Copy> copies;
  Groups<Product> products;
  std::vector<uint8_t> uses;      // of every 64 bytes of registers, as products.h says
  std::vector<uint32_t> used;     // those that are not 0
  bool products_fenced = false;   // a wgmma.fence came since the last wait for all

  void look_again() { special = tracking || !others.empty() || state != State::running; }
  template <class T>
  T *row(Operand operand) const {
    return reinterpret_cast<T *>(bases[operand.where >> 31] + operand.offset());
  }
  uint32_t &predicate(Operand operand) const { return *row<uint32_t>(operand); }
};

// One mbarrier of a block, by its address.
struct Mbarrier {
  uint32_t count = 0;      // of arrivals that a phase takes
  int64_t pending = 0;     // that are missing yet,
  int64_t bytes = 0;       // and bytes of bulk copies, below 0 where more came than were expected
  uint32_t phase = 0;      // that is not complete
  Seen arrived, complete;  // what comes before the end of this phase, of the last one
};

// One cp.async.bulk.tensor, done when its mbarrier is waited for.
struct BulkCopy {
  const Instruction *instruction = nullptr;
  int warp = 0;
  uint32_t to = 0, bytes = 0, barrier = 0, step = 0;
  // Of every 16 bytes; those that are not taken, outside of the tensor, become zero.
  std::vector<uint64_t> from;
  std::vector<uint8_t> taken;
  std::vector<uint32_t> places;
};

struct Block {
  Launch *launch = nullptr;
  uint32_t at[3] = {0, 0, 0};
  uint32_t index = 0;  // in the grid
  uint32_t stamp = 0;  // in the shadow of global memory
  uint32_t epoch = 0;  // how often it released
  std::vector<uint32_t> done, told, tells;  // epochs of others: acquired, read, and to be told
  uint64_t looked_at = 0;                   // by the last ordered load, how often, and what it saw
  uint32_t looks = 0, saw = 0;
  std::vector<Warp> warps;
  std::vector<uint32_t> fenced;  // the clock at each warp's last fence.proxy.async
  Lines registers;
  SharedMemory shared;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
};

// Fill a row with one value.
inline void fill_row(uint8_t *row, Width width, uint64_t value) {
  if (width == Width::predicate) {
    uint32_t mask = value ? ALL : 0;
    memcpy(row, &mask, 4);
    return;
  }
  size_t bytes = row_bytes(width) / LANES;
  for (int lane = 0; lane < LANES; lane++) memcpy(row + lane * bytes, &value, bytes);
}

// Run a whole launch; throws Error where it cannot go on.
void run_launch(Launch &launch, void **parameters);

void exit_lanes(Warp &warp, const Instruction &instruction);

// Where lanes part, end and meet; of control.cpp.
void branch(Warp &warp, const Instruction &instruction);
void next_group(Warp &warp);

// Report if fewer lanes than the warp has run an instruction that is for all of them.
void whole_warp(Warp &warp, const Instruction &instruction, const char *what);

// Leave an instruction to be tried again.
void block(Warp &warp);

// What arrives at an mbarrier when it is done; of copies.cpp and bulk_copies.cpp.
void finish_copies(Warp &warp);
void finish_bulk_copies(Block &block, uint32_t barrier);

// Let a bulk copy's bytes count at an mbarrier; of mbarriers.cpp.
void complete_bytes(Block &block, uint32_t barrier, const BulkCopy &copy);

// Note a finding of the current block; `lane` -1 stands for all.
void report(const Warp &warp, const Instruction &instruction, int lane, const char *kind,
            const std::string &what);

// Note what the shadow of shared memory says of an access, `problems` as Problem.
void report_shared(const Warp &warp, const Instruction &instruction, int lane, uint32_t problems,
                   uint32_t address, bool writes);

inline int first_lane(uint32_t mask) { return mask ? __builtin_ctz(mask) : 0; }

}  // namespace emulator
