#include "global.h"

#include <sys/mman.h>

#include <algorithm>

namespace emulator {

GlobalMemory global_memory;

namespace {

uint32_t *reserve(uint64_t entries) {
  void *memory = mmap(nullptr, entries * 4, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("no memory for the shadow of an allocation");
  return static_cast<uint32_t *>(memory);
}

uint64_t entries_of(const Allocation &allocation) {
  return (allocation.bytes + 3) / 4 * 4 >> allocation.shift;
}

void release(uint32_t *memory, uint64_t entries) {
  if (memory) munmap(memory, entries * 4);
}

std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)value);
  return text;
}

}  // namespace

Allocation::~Allocation() {
  release(writers, entries_of(*this));
  release(readers, entries_of(*this));
}

void Allocation::refine(int to) {
  const uint64_t before = entries_of(*this);
  const int factor = 1 << (shift - to);
  shift = to;
  for (uint32_t **stamps : {&writers, &readers}) {
    uint32_t *finer = reserve(before * factor);
    for (uint64_t i = 0; i < before; i++) {
      if (!(*stamps)[i]) continue;
      for (int part = 0; part < factor; part++) finer[i * factor + part] = (*stamps)[i];
    }
    release(*stamps, before);
    *stamps = finer;
  }
}

void GlobalMemory::allocate(uint64_t base, uint64_t bytes) {
  auto allocation = std::make_unique<Allocation>();
  allocation->base = base;
  allocation->bytes = bytes;
  allocations_[base] = std::move(allocation);
}

void GlobalMemory::free(uint64_t base) { allocations_.erase(base); }

Allocation *GlobalMemory::find(uint64_t address, uint64_t bytes) const {
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation *found = std::prev(after)->second.get();
  return found->holds(address, bytes) ? found : nullptr;
}

uint32_t GlobalMemory::begin_launch(uint64_t blocks) {
  if (next_stamp_ + blocks + 1 > 0xffffff00ull) {
    for (auto &each : allocations_) {
      Allocation &allocation = *each.second;
      release(allocation.writers, entries_of(allocation));
      release(allocation.readers, entries_of(allocation));
      allocation.writers = allocation.readers = nullptr;
    }
    next_stamp_ = 1;
  }
  uint32_t first = next_stamp_;
  next_stamp_ += (uint32_t)blocks + 1;
  return first;
}

namespace {

// Whether a stamp is another block's of this launch.
struct Other {
  uint32_t first, me;
  uint32_t operator()(uint32_t stamp) const { return (stamp >= first) & (stamp != me); }
};

// The same where blocks tell each other what is done, which then is no race.
struct OtherNotDone {
  const Launch &launch;
  const Block &block;
  uint32_t operator()(uint32_t stamp) const {
    return stamp >= launch.first_stamp && !launch.is_done(block, stamp);
  }
};

// Note a run of entries; true if another block of this launch wrote there.
template <class T>
bool note_read(uint32_t *writers, uint32_t *readers, uint64_t count, T other, uint32_t me,
               uint32_t several) {
  uint32_t others = 0;
  for (uint64_t i = 0; i < count; i++) {
    others |= other(writers[i]);
    readers[i] = other(readers[i]) ? several : me;
  }
  return others;
}

template <class T>
bool others_were_there(const uint32_t *writers, const uint32_t *readers, uint64_t count, T other) {
  uint32_t others = 0;
  for (uint64_t i = 0; i < count; i++) others |= other(writers[i]) | other(readers[i]);
  return others;
}

// Lanes whose memory lies side by side.
struct Run {
  uint64_t address = 0, bytes = 0;
  int first = 0, last = 0;
};

template <class T>
void check_run(Warp &warp, const Instruction &instruction, Allocation &allocation, const Run &run,
               uint32_t bytes, bool writes, const uint8_t *values, T other) {
  const uint32_t me = warp.block->stamp;
  const uint64_t parts = run.address | run.bytes;
  const int narrowest = parts & 1 ? 0 : parts & 2 ? 1 : 2;
  if (!allocation.writers) {
    allocation.shift = narrowest < allocation.shift ? narrowest : allocation.shift;
    allocation.writers = reserve(entries_of(allocation));
    allocation.readers = reserve(entries_of(allocation));
  }
  if (narrowest < allocation.shift) allocation.refine(narrowest);
  const uint64_t at = (run.address - allocation.base) >> allocation.shift;
  const uint64_t count = run.bytes >> allocation.shift;
  uint32_t *writers = allocation.writers + at, *readers = allocation.readers + at;
  if (!writes) {
    if (note_read(writers, readers, count, other, me, warp.launch->shared_stamp()))
      report(warp, instruction, run.first, "global-race",
             "reads at " + hex(run.address) + " what another block of the launch writes");
    return;
  }
  if (others_were_there(writers, readers, count, other)) {
    // Only bytes that change: a value written twice is no fault.
    const uint8_t *value = values + (uint64_t)run.first * bytes;
    for (uint64_t i = 0; i < count; i++) {
      if (!others_were_there(writers + i, readers + i, 1, other)) continue;
      const uint64_t offset = i << allocation.shift;
      const uint8_t *there = reinterpret_cast<uint8_t *>(run.address + offset);
      if (!memcmp(there, value + offset, 1u << allocation.shift)) continue;
      report(warp, instruction, run.first + (int)(offset / bytes), "global-race",
             "writes at " + hex(run.address + offset) + " what another block of the launch " +
                 (other(writers[i]) ? "writes" : "reads"));
      break;
    }
  }
  for (uint64_t i = 0; i < count; i++) writers[i] = me;
}

}  // namespace

uint32_t check_global(Warp &warp, const Instruction &instruction, uint32_t mask,
                      const uint64_t *addresses, uint32_t bytes, bool writes,
                      const uint8_t *values, const uint8_t *lane_bytes) {
  if (warp.kernel->overlaps && !warp.waited)
    report(warp, instruction, first_lane(mask), "early",
           "uses global memory before it waits for the launch before");
  Allocation *&recent = warp.launch->recent[warp.kernel->index(instruction)];
  uint32_t there = 0;
  Run run;
  bool open = false;
  auto close = [&] {
    if (!open) return;
    open = false;
    if (!settings.check) return;
    const Launch &launch = *warp.launch;
    if (launch.epochs.empty())
      check_run(warp, instruction, *recent, run, bytes, writes, values,
                Other{launch.first_stamp, warp.block->stamp});
    else
      check_run(warp, instruction, *recent, run, bytes, writes, values,
                OtherNotDone{launch, *warp.block});
  };
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) {
      close();
      continue;
    }
    const uint64_t address = addresses[lane], taken = lane_bytes ? lane_bytes[lane] : bytes;
    if (!taken) {
      there |= 1u << lane;
      close();
      continue;
    }
    if (address & (bytes - 1)) {
      report(warp, instruction, lane, "misaligned",
             std::to_string(bytes) + " bytes of global memory at " + hex(address));
      close();
      continue;
    }
    if (!recent || !recent->holds(address, taken)) {
      close();
      Allocation *found = global_memory.find(address, taken);
      if (!found) {
        report(warp, instruction, lane, "out-of-bounds",
               std::string(writes ? "writes " : "reads ") + std::to_string(taken) +
                   " bytes of global memory at " + hex(address) + ", which no allocation holds");
        continue;
      }
      recent = found;
    }
    there |= 1u << lane;
    if (open && address == run.address + run.bytes && lane == run.last + 1) {
      run.bytes += taken;
      run.last = lane;
    } else if (!writes && open && address >= run.address && address + taken <= run.address + run.bytes) {
      run.last = lane;  // a read of what is read already
      if (address + taken != run.address + run.bytes) close();
    } else {
      close();
      run = {address, taken, lane, lane};
      open = true;
    }
  }
  close();
  return there;
}

}  // namespace emulator
