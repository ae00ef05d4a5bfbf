// What a descriptor of a tensor is here, in place of NVIDIA's 128 bytes: who makes one fills it in
// (machine.py, device/driver.c), bulk_copies.cpp reads it. The first dimension is the one whose
// elements lie side by side. Triton clears bit 21 of the second word where a tensor is small.
#pragma once
#include <stdint.h>

#define TENSOR_MAP_MAGIC 0x70616d20726f736eull
#define MOST_DIMENSIONS 5

struct TensorMap {
  uint64_t magic;
  uint32_t dimensions, element;  // bytes of an element
  uint64_t base;
  uint32_t swizzle;              // bytes of a row that is swizzled, 0: none
  uint32_t box[MOST_DIMENSIONS];
  int32_t sizes[MOST_DIMENSIONS];
  uint32_t padding;
  uint64_t strides[MOST_DIMENSIONS];  // in bytes
};
