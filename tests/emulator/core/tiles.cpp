#include "tiles.h"

#include <algorithm>

namespace emulator {

TileCache tile_cache;

namespace {

// What a descriptor says: PTX's "matrix descriptor" of wgmma.
struct Layout {
  uint32_t start, leading, stride, width;  // width: of a swizzled row, or 16 where there is none

  explicit Layout(uint64_t descriptor) {
    static const uint32_t widths[] = {16, 128, 64, 32};
    start = (uint32_t)(descriptor & 0x3fff) << 4;
    leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    width = widths[descriptor >> 62];
  }
  uint32_t swizzled(uint32_t address) const { return address ^ ((address >> 3) & (width - 16)); }

  // Of a row whose 16 bytes go along k.
  uint32_t along_k(uint32_t row, uint32_t chunk) const {
    const uint32_t step = width == 16 ? leading : 16;
    return swizzled(start + row % 8 * width + row / 8 * stride + chunk * step);
  }
  // Of a step of k whose 16 bytes go along the rows.
  uint32_t along_rows(uint32_t k, uint32_t chunk) const {
    if (width == 16) return start + k % 8 * 16 + k / 8 * leading + chunk * stride;
    const uint32_t chunks = width / 16;
    return swizzled(start + chunk % chunks * 16 + chunk / chunks * leading + k % 8 * width + k / 8 * stride);
  }
};

void place(Tile &tile) {
  const TileName &name = tile.name;
  const Layout layout(name.descriptor);
  const int elements = elements_of(name.format);
  tile.chunks.clear();
  if (name.transposed) {
    for (int k = 0; k < 2 * elements; k++)
      for (int chunk = 0; chunk < name.rows / elements; chunk++)
        tile.chunks.push_back(layout.along_rows(k, name.first_row / elements + chunk));
  } else {
    for (int row = 0; row < name.rows; row++)
      for (int chunk = 0; chunk < 2; chunk++)
        tile.chunks.push_back(layout.along_k(name.first_row + row, chunk));
  }
  tile.begin = *std::min_element(tile.chunks.begin(), tile.chunks.end());
  tile.end = *std::max_element(tile.chunks.begin(), tile.chunks.end()) + 16;
}

template <int32_t FORMAT>
void read_chunk(const uint8_t *bytes, float *values) {
  if (FORMAT == TF32) {
    uint32_t words[4];
    memcpy(words, bytes, 16);
    for (int n = 0; n < 4; n++) values[n] = from_tf32(words[n]);
    return;
  }
  uint16_t halves[8];
  memcpy(halves, bytes, 16);
  for (int n = 0; n < 8; n++)
    values[n] = from_half<FORMAT>(halves[n]);
}

// A tile as dense[k][row].
template <int32_t FORMAT, int STRIDE>
void read_tile(SharedMemory &shared, const Tile &tile, float (*dense)[STRIDE]) {
  constexpr int elements = FORMAT == TF32 ? 4 : 8;
  const uint32_t *chunk = tile.chunks.data();
  float values[8];
  if (tile.name.transposed) {
    for (int k = 0; k < 2 * elements; k++)
      for (int row = 0; row < tile.name.rows; row += elements) {
        read_chunk<FORMAT>(shared.at(*chunk++), values);
        memcpy(dense[k] + row, values, elements * sizeof(float));
      }
    return;
  }
  for (int row = 0; row < tile.name.rows; row++)
    for (int k = 0; k < 2 * elements; k += elements) {
      read_chunk<FORMAT>(shared.at(*chunk++), values);
      for (int n = 0; n < elements; n++) dense[k + n][row] = values[n];
    }
}

template <int STRIDE>
void read_tile(SharedMemory &shared, const Tile &tile, float (*dense)[STRIDE]) {
  if (tile.name.format == FLOAT16) read_tile<FLOAT16>(shared, tile, dense);
  else if (tile.name.format == BFLOAT16) read_tile<BFLOAT16>(shared, tile, dense);
  else read_tile<TF32>(shared, tile, dense);
}

}  // namespace

Tile &TileCache::find(const TileName &name) {
  Tile &tile = tiles_[name];
  if (tile.chunks.empty()) {
    tile.name = name;
    place(tile);
  }
  return tile;
}

void TileCache::new_launch() {
  if (tiles_.size() > 256) tiles_.clear();  // of kernels that ran before
  for (auto &each : tiles_) each.second.checked = each.second.read = 0;
}

uint32_t check_tile(Warp &warp, Tile &tile, bool for_all_warps, uint32_t &where) {
  SharedMemory &shared = warp.block->shared;
  const uint64_t version = shared.version(tile.begin, tile.end);
  const std::vector<uint32_t> &fenced = warp.block->fenced;
  if (!shared.by_steps() && (for_all_warps || tile.checked_by == warp.number) && tile.checked == version && tile.checked_epoch == shared.epoch() &&
      fenced[warp.number] > tile.newest_write)
    return 0;
  uint32_t problems = 0, newest = 0;
  bool written_now = false;
  for (uint32_t address : tile.chunks) {
    const uint32_t found =
        shared.read_for_product(address, warp.number, for_all_warps, fenced, newest, written_now);
    if (found & ~problems) where = address;
    problems |= found;
  }
  tile.checked = problems || written_now ? 0 : version;
  tile.checked_epoch = shared.epoch();
  tile.checked_by = warp.number;
  tile.newest_write = newest;
  return problems;
}

const RightTile &right_values(Warp &warp, Tile &tile) {
  SharedMemory &shared = warp.block->shared;
  const uint64_t version = shared.version(tile.begin, tile.end);
  if (tile.values && tile.read == version) return *tile.values;
  if (!tile.values) tile.values = std::make_unique<RightTile>();
  tile.read = version;
  alignas(64) static thread_local float dense[MOST_K][MOST_N];
  read_tile(shared, tile, dense);
  for (int k = 0; k < 2 * elements_of(tile.name.format); k++)
    place_right(*tile.values, k, dense[k], tile.name.rows);
  return *tile.values;
}

void left_values(Warp &warp, const Tile &tile, LeftTile &left) {
  float rows[MOST_K][16];
  read_tile(warp.block->shared, tile, rows);
  for (int k = 0; k < 2 * elements_of(tile.name.format); k++)
    for (int half = 0; half < 2; half++)
      for (int lane = 0; lane < LANES; lane++) left.at[k][half][lane] = rows[k][lane / 4 + half * 8];
}

}  // namespace emulator
