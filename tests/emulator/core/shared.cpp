#include "shared.h"

#include <algorithm>
#include <cstring>

namespace emulator {

void SharedMemory::resize(uint32_t bytes, bool by_steps) {
  bytes_ = bytes;
  by_steps_ = by_steps;
  uint32_t whole = (bytes + 15) / 16 * 16;
  data_.resize(whole);
  words_.resize(whole / 4);
  copies_.assign(whole / 4, 0);
  versions_.resize(whole / PAGE + 1);
  reading_.assign(whole / PAGE + 1, 0);
  if (by_steps && reads_.size() < whole / 4) {
    reads_.resize(whole / 4);
    writes_.resize(whole / 4);
  }
}

// What a block finds is a NaN in every 16-bit and 32-bit format.
void SharedMemory::begin_block() {
  std::fill(data_.begin(), data_.end(), 0xff);
  std::fill(copies_.begin(), copies_.end(), 0);
  products_.clear();
  std::fill(reading_.begin(), reading_.end(), 0);
  std::fill(versions_.begin(), versions_.end(), ++version_);
  if (epoch_ > 0xf0000000u) {
    std::fill(words_.begin(), words_.end(), Word());
    epoch_ = 0;
  }
  block_epoch_ = ++epoch_;
  clock_ = 1;
  order.begin_block();
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
  if (reading_[offset / PAGE] && is_read(offset)) problems |= PENDING_PRODUCT;
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

bool SharedMemory::races(const uint32_t *steps, int warp) const {
  const uint32_t *seen = order.seen(warp).step.data();
  uint32_t found = 0;
  for (int other = 0; other <= MOST_WARPS; other++) found |= steps[other] > seen[other];
  return found;
}

uint32_t SharedMemory::read_by_steps(uint32_t address, uint32_t bytes, int warp) {
  const uint32_t offset = address - SHARED_BASE;
  uint32_t problems = 0;
  for (uint32_t index = offset / 4; index <= (offset + bytes - 1) / 4; index++) {
    const Word &word = word_now(index);
    const uint32_t parts = bytes >= 4 ? 15u : ((1u << bytes) - 1) << offset % 4;
    if ((word.history & parts) != parts) problems |= UNWRITTEN;
    if (copies_[index]) problems |= PENDING_COPY;
    if (races(writes_[index].at, warp)) problems |= RACE;
    reads_[index].at[warp] = order.now(warp);
  }
  return problems;
}

uint32_t SharedMemory::write_by_steps(uint32_t address, uint32_t bytes, int warp, const uint8_t *value) {
  const uint32_t offset = address - SHARED_BASE;
  uint32_t problems = 0;
  for (uint32_t index = offset / 4; index <= (offset + bytes - 1) / 4; index++) {
    Word &word = word_now(index);
    if (copies_[index]) problems |= PENDING_COPY;
    if (reading_[index * 4 / PAGE] && is_read(index * 4)) problems |= PENDING_PRODUCT;
    if (races(reads_[index].at, warp) || races(writes_[index].at, warp))
      if (bytes < 4 ? differs(offset, bytes, value) : differs(index * 4, 4, value ? value + index * 4 - offset : nullptr))
        problems |= RACE;
    writes_[index].at[warp] = order.now(warp);
    const uint32_t parts = bytes >= 4 ? 15u : ((1u << bytes) - 1) << offset % 4;
    word.history = (uint32_t)warp << 4 | (word.history & 15) | parts;
  }
  return problems;
}

uint32_t SharedMemory::unfenced_by_steps(uint32_t address, int warp) const {
  uint32_t problems = 0;
  for (uint32_t index = (address - SHARED_BASE) / 4; index < (address - SHARED_BASE) / 4 + 4; index++) {
    const uint32_t history = words_[index].history;
    const int writer = history >> 4 & 127;
    if (writer == TENSOR_COPIES || order.is_fenced(writer, writes_[index].at[writer], warp)) continue;
    problems |= history & BY_COPY ? UNFENCED_COPY : UNFENCED;
  }
  return problems;
}

uint32_t SharedMemory::begin_bulk_copy(uint32_t address, uint32_t bytes, int warp) {
  uint32_t problems = 0;
  for (uint32_t index = (address - SHARED_BASE) / 4; index < (address + bytes - SHARED_BASE) / 4; index++) {
    if (copies_[index]++) problems |= PENDING_COPY;
    if (reading_[index * 4 / PAGE] && is_read(index * 4)) problems |= PENDING_PRODUCT;
    if (races(reads_[index].at, warp) || races(writes_[index].at, warp)) problems |= RACE;
  }
  return problems;
}

void SharedMemory::end_bulk_copy(uint32_t address, uint32_t bytes, uint32_t step) {
  end_copy(address, bytes);
  for (uint32_t index = (address - SHARED_BASE) / 4; index < (address + bytes - SHARED_BASE) / 4; index++) {
    writes_[index].at[TENSOR_COPIES] = step;
    word_now(index).history = (uint32_t)TENSOR_COPIES << 4 | 15;
  }
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes / 4; i++) copies_[(address - SHARED_BASE) / 4 + i]++;
}

void SharedMemory::end_copy(uint32_t address, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes / 4; i++) copies_[(address - SHARED_BASE) / 4 + i]--;
}

bool SharedMemory::is_read(uint32_t offset) const {
  const uint32_t chunk = SHARED_BASE + offset / 16 * 16;
  for (const Reading &reading : products_)
    if (chunk >= reading.begin && chunk < reading.end &&
        std::find(reading.chunks->begin(), reading.chunks->end(), chunk) != reading.chunks->end())
      return true;
  return false;
}

void SharedMemory::end_product(int warp, uint32_t begin, uint32_t end) {
  for (size_t i = 0; i < products_.size(); i++) {
    const Reading &reading = products_[i];
    if (reading.warp != warp || reading.begin != begin || reading.end != end) continue;
    products_.erase(products_.begin() + i);
    for (uint32_t page = page_of(begin); page <= page_of(end - 1); page++) reading_[page]--;
    return;
  }
}

}  // namespace emulator
