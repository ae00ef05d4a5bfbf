// The shared memory of a block, with a shadow that knows who wrote and read what, and when.
//
// Time is counted in barrier intervals ("epochs"): two warps that access the same byte in one
// epoch, at least one of them to write, race. The shadow has an entry for every four bytes.
#pragma once
#include <cstdint>
#include <vector>

namespace emulator {

// Where shared memory begins: address 0 is no one's. A multiple of 1024, which swizzles need.
constexpr uint32_t SHARED_BASE = 1024;

// What an access is found to be; flags.
enum Problem : uint32_t {
  RACE = 1,             // with another warp of this barrier interval
  UNWRITTEN = 2,        // nobody wrote it since the block began
  PENDING_COPY = 4,     // a cp.async that has not been waited for writes it
  PENDING_PRODUCT = 8,  // a wgmma that has not been waited for reads it
  UNFENCED = 16,        // no fence.proxy.async between a generic write and wgmma
};

class SharedMemory {
 public:
  void resize(uint32_t bytes);
  void begin_block();    // everything is unwritten
  void begin_epoch() { epoch_++; }
  uint32_t bytes() const { return bytes_; }
  uint8_t *at(uint32_t address) { return data_.data() + (address - SHARED_BASE); }
  bool holds(uint32_t address, uint32_t bytes) const {
    return address >= SHARED_BASE && (uint64_t)address + bytes <= (uint64_t)SHARED_BASE + bytes_;
  }

  // Note an access of `warp` and return its problems. Accesses lie within words or fill them.
  uint32_t read(uint32_t address, uint32_t bytes, int warp) {
    if (bytes >= 4) {
      uint32_t problems = 0, first = (address - SHARED_BASE) / 4;
      for (uint32_t i = 0; i < bytes / 4; i++) problems |= read_word(first + i, warp);
      return problems;
    }
    return read_part(address - SHARED_BASE, bytes, warp);
  }
  // `value` is what will be written: a write of what is there already races with nobody.
  uint32_t write(uint32_t address, uint32_t bytes, int warp, const uint8_t *value) {
    if (bytes >= 4) {
      uint32_t problems = 0, first = (address - SHARED_BASE) / 4;
      for (uint32_t i = 0; i < bytes / 4; i++)
        problems |= write_word(first + i, warp, value ? value + 4 * i : nullptr);
      return problems;
    }
    return write_part(address - SHARED_BASE, bytes, warp, value);
  }

  // cp.async between its issue and its wait.
  void begin_copy(uint32_t address, uint32_t bytes);
  void end_copy(uint32_t address, uint32_t bytes);

  // wgmma between its issue and its wait, 16 bytes at a time. `fenced` has the clock at the last
  // fence of each warp.
  uint32_t begin_product_read(uint32_t address, int warp, const std::vector<uint32_t> &fenced);
  void end_product_read(uint32_t address, int warp);

  uint32_t fence() { return ++clock_; }

 private:
  static constexpr uint32_t NOBODY = 0xffffffffu, MANY = 0xfefefefeu;
  struct Word {
    uint32_t epoch = 0;    // of writer and reader
    uint32_t writer = 0;   // a warp for each byte, or NOBODY
    uint32_t reader = 0;   // the same, or MANY
    uint32_t history = 0;  // clock of the last write << 12 | its warp << 4 | bytes written
  };
  static uint32_t four(int warp) { return (uint32_t)warp * 0x01010101u; }

  Word &word_now(uint32_t index) {
    Word &word = words_[index];
    if (word.epoch != epoch_) {
      if (word.epoch < block_epoch_) word.history = 0;
      word.epoch = epoch_;
      word.writer = word.reader = NOBODY;
    }
    return word;
  }
  uint32_t read_word(uint32_t index, int warp) {
    Word &word = word_now(index);
    const uint32_t me = four(warp);
    uint32_t problems = 0;
    if (word.writer != NOBODY && word.writer != me && !only(word.writer, me)) problems |= RACE;
    if ((word.history & 15) != 15) problems |= UNWRITTEN;
    if (copies_[index]) problems |= PENDING_COPY;
    word.reader = word.reader == NOBODY || word.reader == me || only(word.reader, me) ? me : MANY;
    return problems;
  }
  uint32_t write_word(uint32_t index, int warp, const uint8_t *value) {
    Word &word = word_now(index);
    const uint32_t me = four(warp);
    uint32_t problems = 0;
    if ((word.writer != NOBODY && word.writer != me && !only(word.writer, me)) ||
        (word.reader != NOBODY && word.reader != me && !only(word.reader, me)))
      problems |= differs(index * 4, 4, value) ? RACE : 0u;
    if (copies_[index]) problems |= PENDING_COPY;
    if (products_[index / 4]) problems |= PENDING_PRODUCT;
    word.writer = me;
    word.history = clock_ << 12 | (uint32_t)warp << 4 | 15;
    return problems;
  }
  static bool only(uint32_t who, uint32_t me);  // each byte is mine or nobody's
  bool differs(uint32_t offset, uint32_t bytes, const uint8_t *value) const;
  uint32_t read_part(uint32_t offset, uint32_t bytes, int warp);
  uint32_t write_part(uint32_t offset, uint32_t bytes, int warp, const uint8_t *value);

  uint32_t bytes_ = 0;
  uint32_t epoch_ = 1, block_epoch_ = 1, clock_ = 0;
  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  std::vector<uint8_t> copies_;     // pending, of each word
  std::vector<uint16_t> products_;  // pending, of every 16 bytes
};

}  // namespace emulator
