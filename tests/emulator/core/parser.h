// Reads the text of a kernel: registers, labels, source lines, statements.
#pragma once
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernel.h"

namespace emulator {

std::string trimmed(const std::string &text);
std::vector<std::string> split_at_commas(const std::string &text);  // outside {} and []

class Parser {
 public:
  explicit Parser(const std::string &ptx) : ptx_(ptx) {}
  Kernel *parse(const std::string &name);

  // Places of operands; for the decoders.
  Operand named(const std::string &name, Width of_immediate);
  Operand constant(uint64_t value, Width width);
  Operand parameter(const std::string &name, Width width, bool is_signed);
  int64_t integer(const std::string &text) const;
  Kernel &kernel() { return *kernel_; }

 private:
  struct Branch {
    int at;
    std::string label;
    std::vector<int> scopes;
  };
  using Scope = std::unordered_map<std::string, Width>;  // a name, or a prefix before digits

  void header(size_t entry, size_t &body);
  void body(size_t begin);
  void files();
  void source_line(const std::string &line);
  void statements(std::string &pending);
  void statement(std::string text);
  void declare(const std::string &text);
  void link();
  int find_label(const Branch &branch) const;
  const Width *declared(const std::string &name, size_t &scope) const;
  Operand new_constant(Width width);
  Operand new_register(Width width);
  Operand special(const std::string &name);

  const std::string &ptx_;
  Kernel *kernel_ = nullptr;
  std::vector<Scope> scopes_;
  std::vector<int> scope_numbers_;
  int scopes_seen_ = 0;
  std::unordered_map<std::string, Operand> registers_;
  std::map<std::pair<uint64_t, Width>, Operand> immediates_;
  std::map<std::pair<int, std::string>, int> labels_;  // by the scope that they are in
  std::vector<Branch> branches_;
  std::string last_label_;
  std::unordered_map<std::string, std::vector<std::string>> tables_;  // of brx.idx, by their label
  std::unordered_map<std::string, int> parameters_;
  SourceLine line_;
  uint32_t used_bytes_ = ALL;  // of the next load, by a .pragma
  bool ended_ = false;
  int depth_ = 0;
};

}  // namespace emulator
