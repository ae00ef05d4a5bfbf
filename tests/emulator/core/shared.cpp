#include "shared.h"

#include <algorithm>
#include <cstring>

namespace emulator {

void SharedMemory::resize(uint32_t bytes) {
  bytes_ = bytes;
  uint32_t whole = (bytes + 15) / 16 * 16;
  data_.resize(whole);
  words_.resize(whole / 4);
  copies_.assign(whole / 4, 0);
  products_.assign(whole / 16, 0);
}

// What a block finds is a NaN in every 16-bit and 32-bit format.
void SharedMemory::begin_block() {
  std::fill(data_.begin(), data_.end(), 0xff);
  std::fill(copies_.begin(), copies_.end(), 0);
  std::fill(products_.begin(), products_.end(), 0);
  if (epoch_ > 0xf0000000u) {
    std::fill(words_.begin(), words_.end(), Word());
    epoch_ = 0;
  }
  block_epoch_ = ++epoch_;
  clock_ = 1;
}

bool SharedMemory::only(uint32_t who, uint32_t me) {
  for (int byte = 0; byte < 32; byte += 8) {
    uint32_t each = who >> byte & 255;
    if (each != 255 && each != (me & 255)) return false;
  }
  return true;
}

bool SharedMemory::differs(uint32_t offset, uint32_t bytes, const uint8_t *value) const {
  return !value || memcmp(data_.data() + offset, value, bytes) != 0;
}

uint32_t SharedMemory::read_part(uint32_t offset, uint32_t bytes, int warp) {
  Word &word = word_now(offset / 4);
  uint32_t problems = copies_[offset / 4] ? PENDING_COPY : 0u;
  for (uint32_t at = offset % 4; at < offset % 4 + bytes; at++) {
    const uint32_t shift = 8 * at, writer = word.writer >> shift & 255;
    const uint32_t reader = word.reader >> shift & 255;
    if (writer != 255 && writer != (uint32_t)warp) problems |= RACE;
    if (!(word.history >> at & 1)) problems |= UNWRITTEN;
    uint32_t now = reader == 255 || reader == (uint32_t)warp ? warp : MANY & 255;
    word.reader = (word.reader & ~(255u << shift)) | now << shift;
  }
  return problems;
}

uint32_t SharedMemory::write_part(uint32_t offset, uint32_t bytes, int warp, const uint8_t *value) {
  Word &word = word_now(offset / 4);
  uint32_t problems = copies_[offset / 4] ? PENDING_COPY : 0u;
  if (products_[offset / 16]) problems |= PENDING_PRODUCT;
  uint32_t written = word.history & 15;
  for (uint32_t at = offset % 4; at < offset % 4 + bytes; at++) {
    const uint32_t shift = 8 * at, writer = word.writer >> shift & 255;
    const uint32_t reader = word.reader >> shift & 255;
    if ((writer != 255 && writer != (uint32_t)warp) || (reader != 255 && reader != (uint32_t)warp))
      problems |= differs(offset, bytes, value) ? RACE : 0u;
    word.writer = (word.writer & ~(255u << shift)) | (uint32_t)warp << shift;
    written |= 1u << at;
  }
  word.history = clock_ << 12 | (uint32_t)warp << 4 | written;
  return problems;
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes / 4; i++) copies_[(address - SHARED_BASE) / 4 + i]++;
}

void SharedMemory::end_copy(uint32_t address, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes / 4; i++) copies_[(address - SHARED_BASE) / 4 + i]--;
}

uint32_t SharedMemory::begin_product_read(uint32_t address, int warp,
                                          const std::vector<uint32_t> &fenced) {
  uint32_t problems = 0, first = (address - SHARED_BASE) / 4;
  for (uint32_t i = first; i < first + 4; i++) {
    problems |= read_word(i, warp);
    const uint32_t history = words_[i].history, clock = history >> 12;
    if (fenced[warp] <= clock && fenced[history >> 4 & 255] <= clock) problems |= UNFENCED;
  }
  products_[first / 4]++;
  return problems;
}

void SharedMemory::end_product_read(uint32_t address, int warp) {
  uint32_t first = (address - SHARED_BASE) / 4;
  for (uint32_t i = first; i < first + 4; i++) {
    Word &word = word_now(i);
    word.reader = only(word.reader, four(warp)) ? four(warp) : MANY;
  }
  products_[first / 4]--;
}

}  // namespace emulator
