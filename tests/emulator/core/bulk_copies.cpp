// cp.async.bulk.tensor: a box of a tensor, which a descriptor describes, to shared memory.
#include <algorithm>

#include "global.h"
#include "lanes.h"
#include "tensor_map.h"

namespace emulator {

namespace {

constexpr uint32_t CHUNK = 16;       // bytes that swizzles move together
constexpr uint32_t ALIGNMENT = 128;  // of where a box begins in shared memory
static_assert(sizeof(TensorMap) == 112, "a descriptor has at most 128 bytes");

void issue(Warp &warp, const Instruction &i) {
  const int dimensions = i.count;
  for_lanes(warp.exec, [&](int lane) {
    const Operand *operand = i.operand;
    TensorMap map;
    memcpy(&map, reinterpret_cast<const void *>(warp.row<uint64_t>(operand[1])[lane]), sizeof map);
    if (map.magic != TENSOR_MAP_MAGIC || (int)map.dimensions != dimensions)
      return report(warp, i, lane, "bulk-copy", "no descriptor of a tensor of that many dimensions");
    int32_t at[MOST_DIMENSIONS] = {};
    for (int n = 0; n < dimensions; n++) at[n] = (int32_t)warp.row<uint32_t>(operand[2 + n])[lane];

    BulkCopy copy;
    copy.instruction = &i;
    copy.warp = warp.number;
    copy.to = warp.row<uint32_t>(operand[0])[lane];
    copy.barrier = warp.row<uint32_t>(operand[2 + dimensions])[lane] + (uint32_t)i.offset;
    uint32_t rows = 1;
    for (int n = 1; n < dimensions; n++) rows *= map.box[n];
    const uint32_t row_bytes = map.box[0] * map.element;
    copy.bytes = rows * row_bytes;
    SharedMemory &shared = warp.block->shared;
    if (copy.to % ALIGNMENT || !shared.holds(copy.to, copy.bytes))
      return report(warp, i, lane, copy.to % ALIGNMENT ? "misaligned" : "out-of-bounds",
                    "a bulk copy of " + std::to_string(copy.bytes) + " bytes to shared memory at " +
                        std::to_string((int64_t)copy.to - SHARED_BASE));
    for (uint32_t row = 0; row < rows; row++) {
      uint64_t from = map.base;
      uint32_t rest = row;
      bool inside = true;
      for (int n = 1; n < dimensions; n++) {
        const int64_t index = at[n] + (int64_t)(rest % map.box[n]);
        rest /= map.box[n];
        inside &= index >= 0 && index < map.sizes[n];
        from += index * map.strides[n];
      }
      for (uint32_t byte = 0; byte < row_bytes; byte += CHUNK) {
        const int64_t first = at[0] + (int64_t)(byte / map.element);
        const int64_t left = inside && first >= 0 ? (map.sizes[0] - first) * map.element : 0;
        const uint32_t place = copy.to + row * row_bytes + byte;
        copy.from.push_back(from + first * map.element);
        copy.taken.push_back((uint8_t)std::clamp<int64_t>(left, 0, CHUNK));
        copy.places.push_back(map.swizzle ? place ^ ((place >> 3) & (map.swizzle - 16)) : place);
      }
    }
    copy.step = shared.order.begin_copy();
    if (settings.check) {
      const uint32_t problems = shared.begin_bulk_copy(copy.to, copy.bytes, warp.number);
      if (problems) report_shared(warp, i, lane, problems, copy.to, true);
    }
    warp.block->bulk_copies.push_back(copy);
  });
}

// Check what is read, 32 chunks at a time, as if each lane read one.
void check_source(Warp &warp, BulkCopy &copy) {
  for (size_t first = 0; first < copy.from.size(); first += LANES) {
    const size_t count = std::min<size_t>(LANES, copy.from.size() - first);
    uint64_t addresses[LANES] = {};
    memcpy(addresses, &copy.from[first], count * sizeof addresses[0]);
    const uint32_t mask = (uint32_t)((1ull << count) - 1);
    const uint32_t good = check_global(warp, *copy.instruction, mask, addresses, CHUNK, false, nullptr,
                                       &copy.taken[first]);
    for_lanes(mask & ~good, [&](int lane) { copy.taken[first + lane] = 0; });
  }
}

void finish(Block &block, BulkCopy &copy) {
  Warp &warp = block.warps[copy.warp];
  check_source(warp, copy);
  if (settings.check) block.shared.end_bulk_copy(copy.to, copy.bytes, copy.step);
  for (size_t n = 0; n < copy.from.size(); n++) {
    uint8_t bytes[CHUNK] = {};
    memcpy(bytes, reinterpret_cast<const void *>(copy.from[n]), copy.taken[n]);
    block.shared.changed(copy.places[n]);
    memcpy(block.shared.at(copy.places[n]), bytes, CHUNK);
  }
  complete_bytes(block, copy.barrier, copy);
}

}  // namespace

void finish_bulk_copies(Block &block, uint32_t barrier) {
  std::vector<BulkCopy> others;
  std::vector<BulkCopy> all = std::move(block.bulk_copies);
  for (BulkCopy &copy : all) {
    if (copy.barrier == barrier) finish(block, copy);
    else others.push_back(std::move(copy));
  }
  block.bulk_copies = std::move(others);
}

// "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [to], [map, {x, y}], [barrier]"
void decode_bulk_copy(Decoder &d) {
  if (!d.take("tensor")) d.unknown("form of cp.async.bulk");
  const std::string dimensions = d.next();
  const bool sizes = dimensions.size() == 2 && dimensions[0] >= '1' && dimensions[0] <= '5' && dimensions[1] == 'd';
  if (!sizes || !(d.take("shared::cta") || d.take("shared::cluster")) || !d.take("global"))
    d.unknown("form of cp.async.bulk");
  d.take("tile");
  if (!d.take("mbarrier::complete_tx::bytes")) d.unknown("form of cp.async.bulk");
  d.expect_arguments(3, 3);
  d.instruction.count = dimensions[0] - '0';
  d.address(0);
  if (d.instruction.offset) d.unknown("address");
  d.tensor(1);
  d.address(2);
  d.instruction.run = issue;
}

}  // namespace emulator
