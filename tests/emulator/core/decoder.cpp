#include "decoder.h"

#include <algorithm>

#include "parser.h"

namespace emulator {

namespace {
struct Named {
  const char *name;
  Type type;
  int size;
};
const Named TYPES[] = {
    {"b8", Type::b8, 1},       {"u8", Type::u8, 1},         {"s8", Type::s8, 1},
    {"b16", Type::b16, 2},     {"u16", Type::u16, 2},       {"s16", Type::s16, 2},
    {"f16", Type::f16, 2},     {"bf16", Type::bf16, 2},     {"f16x2", Type::f16x2, 4},
    {"bf16x2", Type::bf16x2, 4}, {"b32", Type::b32, 4},     {"u32", Type::u32, 4},
    {"s32", Type::s32, 4},     {"f32", Type::f32, 4},       {"tf32", Type::tf32, 4},
    {"b64", Type::b64, 8},     {"u64", Type::u64, 8},       {"s64", Type::s64, 8},
    {"f64", Type::f64, 8},     {"pred", Type::pred, 4},
};

std::vector<std::string> members(const std::string &argument) {
  if (argument.empty() || argument[0] != '{') return {argument};
  return split_at_commas(argument.substr(1, argument.rfind('}') - 1));
}
}  // namespace

Type type_named(const std::string &name) {
  for (const Named &each : TYPES)
    if (name == each.name) return each.type;
  return Type::none;
}

int size_of(Type type) {
  for (const Named &each : TYPES)
    if (type == each.type) return each.size;
  return 0;
}

Width width_of(Type type) {
  if (type == Type::pred) return Width::predicate;
  int size = size_of(type);
  return size == 8 ? Width::bits64 : size == 4 ? Width::bits32 : Width::bits16;
}

bool Decoder::take(const char *modifier) {
  if (next_ >= parts_.size() || parts_[next_] != modifier) return false;
  next_++;
  return true;
}

std::string Decoder::next() { return next_ < parts_.size() ? parts_[next_++] : ""; }

Type Decoder::type() {
  std::string name = next();
  Type found = type_named(name);
  if (found == Type::none) unknown("modifier ." + name);
  return found;
}

void Decoder::finish() {
  if (next_ < parts_.size()) unknown("modifier ." + parts_[next_]);
}

void Decoder::unknown(const std::string &what) const { throw Error("unknown " + what + " in: " + text); }

const std::string &Decoder::argument(size_t index) const {
  if (index >= arguments_.size()) unknown("form, an argument is missing");
  return arguments_[index];
}

void Decoder::expect_arguments(size_t least, size_t most) {
  if (arguments_.size() < least || arguments_.size() > most) unknown("number of arguments");
}

const Operand &Decoder::operand(int index) const {
  return parser_.kernel().operands[instruction.first + index];
}

void Decoder::add(const Operand &operand, bool is_result) {
  if (is_result) {
    if (operand.is_constant()) unknown("form, a result that is no register");
    if (instruction.results != instruction.operands) unknown("order of operands");
    instruction.results++;
  }
  if (instruction.operands == 255) unknown("number of operands");
  instruction.operands++;
  parser_.kernel().operands.push_back(operand);
}

void Decoder::result(size_t index, Width width) {
  Operand place = parser_.named(argument(index), width);
  if (place.width != width) unknown("width of result " + argument(index));
  add(place, true);
}

void Decoder::results(size_t index, Width width) {
  for (const std::string &name : members(argument(index))) {
    Operand place = parser_.named(name, width);
    if (place.width != width) unknown("width of result " + name);
    add(place, true);
  }
}

void Decoder::pair_of_results(size_t index, Width first, Width second) {
  const std::string &whole = argument(index);
  const size_t bar = whole.find('|');
  if (bar == std::string::npos) unknown("pair " + whole);
  Operand a = parser_.named(trimmed(whole.substr(0, bar)), first);
  Operand b = parser_.named(trimmed(whole.substr(bar + 1)), second);
  if (a.width != first || b.width != second) unknown("width of pair " + whole);
  add(a, true);
  add(b, true);
}

void Decoder::source(size_t index, Width width) {
  Operand place = parser_.named(argument(index), width);
  if (place.width != width) unknown("width of operand " + argument(index));
  add(place, false);
}

void Decoder::sources(size_t index, Width width) {
  for (const std::string &name : members(argument(index))) {
    Operand place = parser_.named(name, width);
    if (place.width != width) unknown("width of operand " + name);
    add(place, false);
  }
}

void Decoder::any_result(size_t index) { add(parser_.named(argument(index), Width::bits32), true); }

void Decoder::any_results(size_t index) {
  for (const std::string &name : members(argument(index)))
    add(parser_.named(name, Width::bits32), true);
}

void Decoder::any_source(size_t index, Width of_immediate) {
  add(parser_.named(argument(index), of_immediate), false);
}

void Decoder::any_sources(size_t index, Width of_immediate) {
  for (const std::string &name : members(argument(index)))
    add(parser_.named(name, of_immediate), false);
}

void Decoder::address(size_t index) {
  const std::string &whole = argument(index);
  if (whole.size() < 3 || whole[0] != '[' || whole.back() != ']') unknown("address " + whole);
  std::string inner = whole.substr(1, whole.size() - 2);
  size_t sign = inner.find_first_of("+");
  instruction.offset = sign == std::string::npos ? 0 : parser_.integer(trimmed(inner.substr(sign + 1)));
  add(parser_.named(trimmed(inner.substr(0, sign)), Width::bits32), false);
}

void Decoder::tensor(size_t index) {
  const std::string &whole = argument(index);
  if (whole.size() < 3 || whole[0] != '[' || whole.back() != ']') unknown("tensor " + whole);
  const auto parts = split_at_commas(whole.substr(1, whole.size() - 2));
  if (parts.size() != 2) unknown("tensor " + whole);
  add(parser_.named(parts[0], Width::bits64), false);
  for (const std::string &name : members(parts[1])) add(parser_.named(name, Width::bits32), false);
}

int64_t Decoder::immediate(size_t index) const { return parser_.integer(argument(index)); }

void Decoder::swap_operands(int a, int b) {
  auto &all = parser_.kernel().operands;
  std::swap(all[instruction.first + a], all[instruction.first + b]);
}

size_t Decoder::vector_length(size_t index) const { return members(argument(index)).size(); }

}  // namespace emulator
