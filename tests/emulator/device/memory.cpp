// Memory of the fake device: the host's, between guards, filled with a pattern that nobody writes.
//
// Each allocation is announced to the emulator to the byte, though torch's own allocator for CUDA
// rounds up: an access behind the last element is a fault here.

#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace fake {
namespace {

constexpr size_t kAlignment = 512;  // of torch's allocator for CUDA
constexpr size_t kGuard = 512;      // bytes on either side
constexpr size_t kMost = 1u << 30;  // bytes of one allocation: all of it is filled

struct Block {
  char* whole;
  size_t bytes;  // asked for
  size_t total;  // with guards
  std::weak_ptr<Pool> pool;
};

struct State {
  std::mutex mutex;
  std::map<void*, Block> blocks;
  std::shared_ptr<Pool> pool;
  std::string damage;
  size_t in_use = 0;
  size_t peak = 0;
  void (*announce)(uint64_t, uint64_t) = nullptr;
  void (*withdraw)(uint64_t) = nullptr;
};

State& state() {
  static State* all = new State;  // never destroyed: tensors may outlive static objects
  return *all;
}

void fill(char* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    begin[i] = static_cast<char>(i & 1 ? kUnwritten >> 8 : kUnwritten & 255);
}

// The guards begin at even addresses, as what they surround does.
bool is_filled(const char* begin, size_t bytes, bool odd) {
  for (size_t i = 0; i < bytes; i++) {
    const bool high = (i & 1) != odd;
    if (static_cast<unsigned char>(begin[i]) != (high ? kUnwritten >> 8 : kUnwritten & 255))
      return false;
  }
  return true;
}

void check_guards(const Block& block) {
  const char* user = block.whole + kGuard;
  const char* name = nullptr;
  if (!is_filled(block.whole, kGuard, false)) name = "before";
  const size_t behind = block.total - kGuard - block.bytes;
  if (!is_filled(user + block.bytes, behind, block.bytes & 1)) name = "behind";
  if (name == nullptr) return;
  char line[128];
  std::snprintf(line, sizeof line, "bytes %s an allocation of %zu bytes were written\n", name,
                block.bytes);
  state().damage += line;
}

void release(void* pointer) {
  State& all = state();
  const auto found = all.blocks.find(pointer);
  const Block block = found->second;
  check_guards(block);
  all.in_use -= block.bytes;
  all.blocks.erase(found);
  if (all.withdraw != nullptr) all.withdraw(reinterpret_cast<uint64_t>(pointer));
  std::free(block.whole);
}

void give_back(void* pointer) {
  std::unique_lock<std::mutex> lock(state().mutex);
  const auto found = state().blocks.find(pointer);
  if (found == state().blocks.end()) return;
  if (auto pool = found->second.pool.lock()) {
    pool->discard(pointer);
    lock.unlock();  // before the pool may end, which takes the lock
    return;
  }
  release(pointer);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, cuda()};
    TORCH_CHECK_WITH(OutOfMemoryError, bytes <= kMost, "CUDA out of memory: ", bytes,
                     " bytes on the fake device");
    Block block;
    block.bytes = bytes;
    block.total = kGuard + (bytes + kAlignment - 1) / kAlignment * kAlignment + kGuard;
    void* whole = nullptr;
    if (posix_memalign(&whole, kAlignment, block.total) != 0) throw std::bad_alloc();
    block.whole = static_cast<char*>(whole);
    fill(block.whole, block.total);
    void* user = block.whole + kGuard;
    State& all = state();
    std::lock_guard<std::mutex> lock(all.mutex);
    if (all.pool != nullptr) {
      all.pool->adopt(user);
      block.pool = all.pool;
    }
    all.blocks[user] = block;
    all.in_use += bytes;
    all.peak = std::max(all.peak, all.in_use);
    if (all.announce != nullptr) all.announce(reinterpret_cast<uint64_t>(user), bytes);
    return {user, user, &give_back, cuda()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

c10::Allocator* allocator() {
  static Allocator* one = new Allocator;
  return one;
}

void allocate_from(std::shared_ptr<Pool> pool) {
  std::shared_ptr<Pool> before;  // ends after the lock does
  std::lock_guard<std::mutex> lock(state().mutex);
  before = std::move(state().pool);
  state().pool = std::move(pool);
}

Pool::~Pool() {
  std::lock_guard<std::mutex> lock(state().mutex);
  for (const Kept& kept : kept_)
    if (kept.is_discarded) release(kept.block);
}

void Pool::adopt(void* block) { kept_.push_back({block, graph, false}); }

void Pool::discard(void* block) {
  for (Kept& kept : kept_)
    if (kept.block == block) kept.is_discarded = true;
}

void Pool::forget(int64_t graph) {
  std::lock_guard<std::mutex> lock(state().mutex);
  for (const Kept& kept : kept_)
    if (kept.is_discarded && kept.graph == graph)
      fill(static_cast<char*>(kept.block), state().blocks.at(kept.block).bytes);
}

int64_t pool_bytes(const Pool& pool) {
  std::lock_guard<std::mutex> lock(state().mutex);
  int64_t bytes = 0;
  for (const auto& kept : pool.kept_) bytes += state().blocks.at(kept.block).bytes;
  return bytes;
}

Snapshot::Snapshot() {
  std::lock_guard<std::mutex> lock(state().mutex);
  for (const auto& [pointer, block] : state().blocks) {
    const char* begin = static_cast<const char*>(pointer);
    contents_.emplace_back(pointer, std::vector<char>(begin, begin + block.bytes));
  }
}

void Snapshot::restore() const {
  std::lock_guard<std::mutex> lock(state().mutex);
  std::map<void*, const std::vector<char>*> known;
  for (const auto& [pointer, bytes] : contents_) known[pointer] = &bytes;
  for (const auto& [pointer, block] : state().blocks) {
    const auto found = known.find(pointer);
    if (found != known.end() && found->second->size() == block.bytes)
      std::memcpy(pointer, found->second->data(), block.bytes);
    else
      fill(static_cast<char*>(pointer), block.bytes);
  }
}

}  // namespace fake

extern "C" {

// Tell the emulator, by functions of its own, what is allocated from now on.
void device_announce_to(void (*announce)(uint64_t, uint64_t), void (*withdraw)(uint64_t)) {
  std::lock_guard<std::mutex> lock(fake::state().mutex);
  fake::state().announce = announce;
  fake::state().withdraw = withdraw;
}

bool device_owns(uint64_t address) {
  auto& all = fake::state();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto next = all.blocks.upper_bound(reinterpret_cast<void*>(address));
  if (next == all.blocks.begin()) return false;
  const auto& [pointer, block] = *std::prev(next);
  // One past the last byte is what a tensor without elements may point to.
  return address <= reinterpret_cast<uint64_t>(pointer) + block.bytes;
}

int64_t device_bytes_in_use() { return static_cast<int64_t>(fake::state().in_use); }
int64_t device_peak_bytes() { return static_cast<int64_t>(fake::state().peak); }
void device_reset_peak() { fake::state().peak = fake::state().in_use; }

// Guards that were found overwritten since the last call, one a line; looks at live ones too.
int device_damage(char* text, int size) {
  auto& all = fake::state();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (const auto& [pointer, block] : all.blocks) {
    fake::check_guards(block);
    fake::fill(block.whole, fake::kGuard);
    const size_t behind = fake::kGuard + block.bytes;
    for (size_t i = behind; i < block.total; i++)
      block.whole[i] = static_cast<char>(i & 1 ? fake::kUnwritten >> 8 : fake::kUnwritten & 255);
  }
  std::snprintf(text, size, "%s", all.damage.c_str());
  const int found = static_cast<int>(all.damage.size());
  all.damage.clear();
  return found;
}
}
