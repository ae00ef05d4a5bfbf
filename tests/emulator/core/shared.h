// The shared memory of a block, with a shadow that knows who wrote and read what, and when.
//
// Time is counted in barrier intervals ("epochs"): two warps that access the same byte in one
// epoch, at least one of them to write, race. The shadow has an entry for every four bytes.
//
// Where warps meet by mbarriers, or some of them by a barrier of their own, there are no intervals
// that hold for all. Then each entry has the step of each warp's last read and write, and an access
// races with those that order.h does not know to come before it.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "order.h"

namespace emulator {

// Where shared memory begins: address 0 is no one's. A multiple of 1024, which swizzles need.
constexpr uint32_t SHARED_BASE = 1024;

// What an access is found to be; flags.
enum Problem : uint32_t {
  RACE = 1,             // with another warp of this barrier interval
  UNWRITTEN = 2,        // nobody wrote it since the block began
  PENDING_COPY = 4,     // a cp.async that has not been waited for writes it
  PENDING_PRODUCT = 8,  // a wgmma that has not been waited for reads it
  UNFENCED = 16,        // no fence.proxy.async between a store and a wgmma that reads it
  UNFENCED_COPY = 32,   // the same of a cp.async
};

class SharedMemory {
 public:
  Order order;  // of the warps' steps, if `by_steps`

  void resize(uint32_t bytes, bool by_steps);
  void begin_block();    // everything is unwritten
  void begin_epoch() { epoch_++; }
  uint32_t bytes() const { return bytes_; }
  uint8_t *at(uint32_t address) { return data_.data() + (address - SHARED_BASE); }
  bool holds(uint32_t address, uint32_t bytes) const {
    return address >= SHARED_BASE && (uint64_t)address + bytes <= (uint64_t)SHARED_BASE + bytes_;
  }

  // Note an access of `warp` and return its problems. Accesses lie within words or fill them.
  uint32_t read(uint32_t address, uint32_t bytes, int warp) {
    if (by_steps_) return read_by_steps(address, bytes, warp);
    if (bytes == 16 && read_again((address - SHARED_BASE) / 4, warp)) return 0;
    if (bytes >= 4) {
      uint32_t problems = 0, first = (address - SHARED_BASE) / 4;
      for (uint32_t i = 0; i < bytes / 4; i++) problems |= read_word(first + i, warp);
      return problems;
    }
    return read_part(address - SHARED_BASE, bytes, warp);
  }
  // `value` is what will be written: a write of what is there already races with nobody.
  uint32_t write(uint32_t address, uint32_t bytes, int warp, const uint8_t *value) {
    if (by_steps_) return write_by_steps(address, bytes, warp, value);
    if (bytes >= 4) {
      uint32_t problems = 0, first = (address - SHARED_BASE) / 4;
      for (uint32_t i = 0; i < bytes / 4; i++)
        problems |= write_word(first + i, warp, value ? value + 4 * i : nullptr);
      return problems;
    }
    return write_part(address - SHARED_BASE, bytes, warp, value);
  }

  // cp.async between its issue and its wait, and then.
  void begin_copy(uint32_t address, uint32_t bytes);
  void end_copy(uint32_t address, uint32_t bytes);
  void by_copy(uint32_t address, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes / 4; i++) words_[(address - SHARED_BASE) / 4 + i].history |= BY_COPY;
  }

  // A bulk copy that `warp` issues, when it is issued and when it is waited for.
  uint32_t begin_bulk_copy(uint32_t address, uint32_t bytes, int warp);
  void end_bulk_copy(uint32_t address, uint32_t bytes, uint32_t step);
  bool by_steps() const { return by_steps_; }

  // wgmma reads 16 bytes at a time: note that `warp` does, or all of its group. `fenced` has the
  // clock at the last fence of each warp; what is known of the last writes goes into the last two.
  uint32_t read_for_product(uint32_t address, int warp, bool all, const std::vector<uint32_t> &fenced,
                            uint32_t &newest_write, bool &written_now) {
    if (by_steps_) return read_by_steps(address, 16, warp) | unfenced_by_steps(address, warp);
    uint32_t problems = 0;
    const uint32_t first = (address - SHARED_BASE) / 4;
    for (uint32_t i = first; i < first + 4; i++) {
      problems |= read_word(i, warp);
      Word &word = words_[i];
      if (all) word.reader = MANY;
      const uint32_t clock = word.history >> 12;
      newest_write = clock > newest_write ? clock : newest_write;
      written_now |= word.writer != NOBODY;
      if (fenced[warp] <= clock && fenced[word.history >> 4 & 127] <= clock)
        problems |= word.history & BY_COPY ? UNFENCED_COPY : UNFENCED;
    }
    return problems;
  }
  // Between the issue and the wait of a wgmma nobody may write what it reads.
  void begin_product(int warp, uint32_t begin, uint32_t end, const std::vector<uint32_t> &chunks) {
    products_.push_back({warp, begin, end, &chunks});
    for (uint32_t page = page_of(begin); page <= page_of(end - 1); page++) reading_[page]++;
  }
  void end_product(int warp, uint32_t begin, uint32_t end);

  // Of the last write within [begin, end); grows with each.
  uint64_t version(uint32_t begin, uint32_t end) const {
    uint64_t newest = 1;
    for (uint32_t page = page_of(begin); page <= page_of(end - 1); page++)
      newest = versions_[page] > newest ? versions_[page] : newest;
    return newest;
  }
  void changed(uint32_t address) { versions_[page_of(address)] = ++version_; }
  uint32_t epoch() const { return epoch_; }

  uint32_t fence() { return ++clock_; }

 private:
  static constexpr uint32_t PAGE = 1024, BY_COPY = 1 << 11;
  static constexpr uint32_t NOBODY = 0xffffffffu, MANY = 0xfefefefeu;
  struct Word {
    uint32_t epoch = 0;    // of writer and reader
    uint32_t writer = 0;   // a warp for each byte, or NOBODY
    uint32_t reader = 0;   // the same, or MANY
    uint32_t history = 0;  // clock of the last write << 12 | by cp.async << 11 | warp << 4 | bytes written
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
  // Whether four words are as `warp` and others left them when they last read them, in this epoch.
  bool read_again(uint32_t index, int warp) const {
    const Word *words = &words_[index];
    const uint32_t me = four(warp);
    uint32_t pending;
    memcpy(&pending, &copies_[index], 4);
    uint32_t other = pending;
    for (int i = 0; i < 4; i++) {
      const uint32_t reader = words[i].reader;
      other |= (words[i].epoch ^ epoch_) | (words[i].writer ^ NOBODY) | (~words[i].history & 15);
      other |= (reader != MANY) & (reader != me);
    }
    return !other;
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
    if (reading_[index * 4 / PAGE] && is_read(index * 4)) problems |= PENDING_PRODUCT;
    word.writer = me;
    word.history = clock_ << 12 | (uint32_t)warp << 4 | 15;
    return problems;
  }
  static bool only(uint32_t who, uint32_t me) {  // each byte is mine or nobody's
    bool all = true;
    for (int byte = 0; byte < 32; byte += 8) {
      const uint32_t each = who >> byte & 255;
      all &= each == 255 || each == (me & 255);
    }
    return all;
  }
  static uint32_t page_of(uint32_t address) { return (address - SHARED_BASE) / PAGE; }
  bool is_read(uint32_t offset) const;  // by a product that has not been waited for
  bool differs(uint32_t offset, uint32_t bytes, const uint8_t *value) const;
  uint32_t read_part(uint32_t offset, uint32_t bytes, int warp);
  uint32_t write_part(uint32_t offset, uint32_t bytes, int warp, const uint8_t *value);

  // The same by steps; what lies in one word counts as one.
  uint32_t read_by_steps(uint32_t address, uint32_t bytes, int warp);
  uint32_t write_by_steps(uint32_t address, uint32_t bytes, int warp, const uint8_t *value);
  uint32_t unfenced_by_steps(uint32_t address, int warp) const;
  bool races(const uint32_t *steps, int warp) const;  // one of them is not before `warp`

  bool by_steps_ = false;
  struct Steps {
    uint32_t at[MOST_WARPS + 1] = {};  // of the last access of each warp and of bulk copies
  };
  std::vector<Steps> reads_, writes_;  // of each word, if `by_steps_`
  uint32_t bytes_ = 0;
  uint32_t epoch_ = 1, block_epoch_ = 1, clock_ = 0;
  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  std::vector<uint8_t> copies_;     // pending, of each word
  std::vector<uint64_t> versions_;  // of every page
  uint64_t version_ = 1;
  struct Reading {
    int warp;
    uint32_t begin, end;
    const std::vector<uint32_t> *chunks;
  };
  std::vector<Reading> products_;   // pending
  std::vector<uint32_t> reading_;   // how many, of every page
};

}  // namespace emulator
