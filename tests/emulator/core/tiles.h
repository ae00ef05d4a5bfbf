// The tiles of shared memory that wgmma's descriptors name: where their bytes lie, what is in them.
//
// Each warp of a group reads the same right tile, so what was found of one is kept: its chunks of
// 16 bytes, whether they were checked, and its values in the order in which products need them.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "fragments.h"
#include "halves.h"
#include "warp.h"

namespace emulator {

enum Format : int32_t { FLOAT16, BFLOAT16, TF32 };

// tf32 is a float whose last 13 bits are not looked at.
inline float from_tf32(uint32_t bits) { return as_float(bits & ~0x1fffu); }

template <int32_t FORMAT>
inline float from_half(uint32_t bits) {
  return FORMAT == FLOAT16 ? from_float16(bits) : from_bfloat16(bits);
}

inline int elements_of(int32_t format) { return format == TF32 ? 4 : 8; }  // of 16 bytes

struct TileName {
  uint64_t descriptor = 0;
  int32_t format = 0, first_row = 0, rows = 0;  // rows of the left tile, columns of the right one
  bool transposed = false;                      // rows, not k, lie side by side
  bool operator==(const TileName &other) const {
    return descriptor == other.descriptor && format == other.format && rows == other.rows &&
           first_row == other.first_row && transposed == other.transposed;
  }
};

struct Tile {
  TileName name;
  std::vector<uint32_t> chunks;  // addresses, k by k where transposed, else row by row
  uint32_t begin = 0, end = 0;   // which all lie within

  // Of the last check: it holds for other warps while nothing is written there.
  uint64_t checked = 0;          // the version of what was checked
  uint32_t checked_epoch = 0, newest_write = 0;
  int checked_by = -1;           // the warp; of a right tile it holds for all of them

  uint64_t read = 0;             // the version that `values` holds
  std::unique_ptr<RightTile> values;
};

// All tiles of a launch; a tile stays where it is until the next.
class TileCache {
 public:
  Tile &find(const TileName &name);
  void new_launch();

 private:
  struct Hash {
    size_t operator()(const TileName &name) const {
      return (name.descriptor * 2 + name.first_row + name.transposed) * 0x9e3779b97f4a7c15ull >> 20;
    }
  };
  std::unordered_map<TileName, Tile, Hash> tiles_;
};

extern TileCache tile_cache;

// Note that a warp reads a tile, and return its problems; one with some is put into `where`.
uint32_t check_tile(Warp &warp, Tile &tile, bool for_all_warps, uint32_t &where);

// The values of a right tile, read anew if something was written there.
const RightTile &right_values(Warp &warp, Tile &tile);

// The 16 rows of a left tile that a warp multiplies.
void left_values(Warp &warp, const Tile &tile, LeftTile &left);

}  // namespace emulator
