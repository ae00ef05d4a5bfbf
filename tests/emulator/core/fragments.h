// Tiles of a product in the order in which the lanes of a warp hold them.
//
// Lane l holds of a 16 x 8 accumulator the rows l/4 and l/4 + 8, and the columns l%4 * 2 and the
// next. So the left tile is kept as one row of lanes for each step of k and half of the rows, and
// the right tile as one for each step of k and parity of the column: all the lanes of one vector.
#pragma once
#include <cstdint>
#include <cstring>

#include "warp.h"

namespace emulator {

constexpr int MOST_K = 16, MOST_N = 256;

// Sixteen lanes. Compilers make of it what the machine has.
typedef float Sixteen __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));

struct LeftTile {
  alignas(64) float at[MOST_K][2][LANES];
};

// Columns 8n to 8n + 7, of which each vector repeats the even or the odd ones.
struct RightTile {
  alignas(64) float at[MOST_N / 8][MOST_K][2][16];
};

// `values` has the columns of one step of k, one after the other.
inline void place_right(RightTile &tile, int k, const float *values, int columns) {
  for (int n = 0; n < columns / 8; n++) {
    const float *v = values + 8 * n;
    const Four even = {v[0], v[2], v[4], v[6]}, odd = {v[1], v[3], v[5], v[7]};
    Four *to = reinterpret_cast<Four *>(tile.at[n][k][0]);
    for (int copy = 0; copy < 4; copy++) to[copy] = even;
    for (int copy = 4; copy < 8; copy++) to[copy] = odd;
  }
}

// results[j] = sums[j] + left times right, of the n-th eight columns. Sums are taken in float, k by
// k; the products of halves and of tf32 are exact.
inline void multiply(const LeftTile &left, const RightTile &right, int n, int steps,
                     float *const results[4], const float *const sums[4]) {
  for (int j = 0; j < 4; j++) {
    const int half = j / 2, parity = j % 2;
    Sixteen low, high;
    memcpy(&low, sums[j], 64);
    memcpy(&high, sums[j] + 16, 64);
    for (int k = 0; k < steps; k++) {
      const Sixteen *a = reinterpret_cast<const Sixteen *>(left.at[k][half]);
      const Sixteen b = *reinterpret_cast<const Sixteen *>(right.at[n][k][parity]);
      low += a[0] * b;
      high += a[1] * b;
    }
    memcpy(results[j], &low, 64);
    memcpy(results[j] + 16, &high, 64);
  }
}

}  // namespace emulator
