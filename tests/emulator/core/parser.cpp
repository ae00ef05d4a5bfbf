#include "parser.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "decoder.h"
#include "warp.h"

namespace emulator {

std::string trimmed(const std::string &text) {
  size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

std::vector<std::string> split_at_commas(const std::string &text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  part = trimmed(part);
  if (!part.empty() || !parts.empty()) parts.push_back(part);
  return parts;
}

Kernel *Parser::parse(const std::string &name) {
  const std::string mark = ".visible .entry ";
  size_t entry = ptx_.find(name.empty() ? mark : mark + name + "(");
  if (entry == std::string::npos) throw Error("no entry " + name + " in the PTX");
  auto kernel = std::make_unique<Kernel>();
  kernel_ = kernel.get();
  kernel_->thread = new_register(Width::bits32);
  kernel_->lane = new_register(Width::bits32);
  kernel_->warp = new_register(Width::bits32);
  for (int axis = 0; axis < 3; axis++) {
    kernel_->block[axis] = new_constant(Width::bits32);
    kernel_->blocks[axis] = new_constant(Width::bits32);
  }
  kernel_->thread_count = new_constant(Width::bits32);
  kernel_->memory = new_constant(Width::bits64);
  size_t begin = 0;
  header(entry + mark.size(), begin);
  body(begin);
  files();
  link();
  return kernel.release();
}

// The name, the parameters and .reqntid; `body` is what follows the opening brace.
void Parser::header(size_t entry, size_t &body) {
  size_t open = ptx_.find('(', entry), close = ptx_.find(')', open);
  body = ptx_.find('{', close);
  if (body == std::string::npos) throw Error("an entry without a body");
  kernel_->name = trimmed(ptx_.substr(entry, open - entry));
  for (const std::string &text : split_at_commas(ptx_.substr(open + 1, close - open - 1))) {
    // ".param .u64 .ptr .global .align 1 name" or ".param .u32 name"
    size_t dot = text.find('.', 1);
    if (text.compare(dot, 7, ".align ") == 0) dot = text.find('.', dot + 1);
    size_t end = text.find_first_of(" \t", dot);
    Type type = type_named(text.substr(dot + 1, end - dot - 1));
    if (type == Type::none) throw Error("parameter " + text);
    std::string name = text.substr(text.find_last_of(" \t") + 1);
    Parameter parameter;
    parameter.size = size_of(type);
    size_t bracket = name.find('[');
    if (bracket != std::string::npos) {  // ".param .align 64 .b8 name[128]"
      parameter.size *= (uint32_t)integer(name.substr(bracket + 1, name.size() - bracket - 2));
      parameter.is_memory = true;
      parameter.address = kernel_->memory_bytes;
      kernel_->memory_bytes += (parameter.size + 63) / 64 * 64;
      name.resize(bracket);
    }
    parameters_[name] = (int)kernel_->parameters.size();
    kernel_->parameters.push_back(parameter);
  }
  std::string directives = ptx_.substr(close + 1, body - close - 1);
  size_t threads = directives.find(".reqntid");
  if (threads != std::string::npos) kernel_->threads = atoi(directives.c_str() + threads + 8);
  body++;
}

void Parser::body(size_t at) {
  scopes_.emplace_back();
  scope_numbers_.push_back(0);
  std::string pending;
  depth_ = 1;
  while (!ended_) {
    if (at >= ptx_.size()) throw Error("the body of " + kernel_->name + " does not end");
    size_t end = ptx_.find('\n', at);
    if (end == std::string::npos) end = ptx_.size();
    std::string line = ptx_.substr(at, end - at);
    at = end + 1;
    line = trimmed(line.substr(0, line.find("//")));
    if (line.rfind(".loc", 0) == 0) {
      source_line(line);
    } else if (!line.empty()) {
      pending += line + " ";
      statements(pending);
    }
  }
  Instruction end;
  end.run = exit_lanes;
  kernel_->code.push_back(end);
  kernel_->lines.push_back(line_);
  kernel_->texts.emplace_back("end");
}

void Parser::source_line(const std::string &line) {
  unsigned file = 0, number = 0;
  if (sscanf(line.c_str(), ".loc %u %u", &file, &number) != 2) throw Error(line);
  if (number) line_ = {file, number};  // line 0 is what the compiler made up
}

// Take whole statements, labels and braces off the front of `pending`.
void Parser::statements(std::string &pending) {
  for (;;) {
    pending = pending.substr(std::min(pending.find_first_not_of(" \t"), pending.size()));
    if (pending.empty()) return;
    if (pending[0] == '{') {
      scopes_.emplace_back();
      scope_numbers_.push_back(++scopes_seen_);
      pending.erase(0, 1);
      continue;
    }
    if (pending[0] == '}') {
      scopes_.pop_back();
      scope_numbers_.pop_back();
      pending.erase(0, 1);
      ended_ = scopes_.empty();
      if (ended_) return;
      continue;
    }
    size_t word = pending.find_first_of(" \t:;");
    if (word != std::string::npos && pending[word] == ':' && pending[word + 1] != ':') {
      last_label_ = pending.substr(0, word);
      labels_[{scope_numbers_.back(), last_label_}] = (int)kernel_->code.size();
      pending.erase(0, word + 1);
      continue;
    }
    size_t end = pending.find(';');
    if (end == std::string::npos) return;
    statement(trimmed(pending.substr(0, end)));
    pending.erase(0, end + 1);
  }
}

void Parser::statement(std::string text) {
  if (text.empty()) return;
  if (text.rfind(".reg", 0) == 0) return declare(text);
  if (sscanf(text.c_str(), ".pragma \"used_bytes_mask %x", &used_bytes_) == 1) return;
  if (text.rfind(".branchtargets", 0) == 0) {
    tables_[last_label_] = split_at_commas(text.substr(strlen(".branchtargets")));
    return;
  }
  if (text[0] == '.') throw Error("directive " + text);
  std::string whole = text, guard;
  if (text[0] == '@') {
    size_t end = text.find_first_of(" \t");
    guard = text.substr(1, end - 1);
    text = trimmed(text.substr(end));
  }
  size_t space = text.find_first_of(" \t");
  std::string opcode = text.substr(0, space);
  std::vector<std::string> parts(1);
  for (char c : opcode) {
    if (c == '.') parts.emplace_back();
    else parts.back() += c;
  }
  auto arguments = split_at_commas(space == std::string::npos ? "" : text.substr(space));
  Decoder decoder(*this, whole, parts, arguments);
  decoder.instruction.first = (uint32_t)kernel_->operands.size();
  if (!decode_arithmetic(decoder) && !decode_bits(decoder) && !decode_conversion(decoder) &&
      !decode_memory(decoder) && !decode_atomics(decoder) && !decode_copies(decoder) &&
      !decode_products(decoder) && !decode_mbarriers(decoder) && !decode_control(decoder))
    throw Error("unknown opcode " + opcode + " in: " + whole);
  if (!decoder.instruction.run) throw Error("undecoded " + whole);
  decoder.finish();
  Instruction &instruction = decoder.instruction;
  instruction.used_bytes = used_bytes_;
  used_bytes_ = ALL;
  if (!guard.empty()) {
    instruction.guarded = true;
    instruction.negated = guard[0] == '!';
    Operand place = named(guard.substr(instruction.negated), Width::predicate);
    if (place.width != Width::predicate) throw Error("guard of " + whole);
    instruction.guard = place.offset();
  }
  if (decoder.base() == "bra" || decoder.base() == "brx")
    branches_.push_back({(int)kernel_->code.size(), arguments.back(), scope_numbers_});
  kernel_->code.push_back(instruction);
  kernel_->lines.push_back(line_);
  kernel_->texts.push_back(whole);
}

// ".reg .b32 %r<748>" or ".reg .pred p, q"
void Parser::declare(const std::string &text) {
  size_t dot = text.find('.', 4), end = text.find_first_of(" \t", dot);
  Type type = type_named(text.substr(dot + 1, end - dot - 1));
  if (type == Type::none) throw Error("register type of " + text);
  for (const std::string &name : split_at_commas(text.substr(end))) {
    size_t bracket = name.find('<');
    std::string key = bracket == std::string::npos ? name : name.substr(0, bracket) + "<";
    scopes_.back()[key] = width_of(type);
  }
}

// Find the declaration of a name, innermost first; `scope` becomes the number of its scope.
const Width *Parser::declared(const std::string &name, size_t &scope) const {
  size_t digits = name.size();
  while (digits && isdigit((unsigned char)name[digits - 1])) digits--;
  std::string prefix = name.substr(0, digits) + "<";
  for (size_t i = scopes_.size(); i-- > 0;) {
    auto found = scopes_[i].find(name);
    if (found == scopes_[i].end()) found = scopes_[i].find(prefix);
    if (found == scopes_[i].end()) continue;
    scope = scope_numbers_[i];
    return &found->second;
  }
  return nullptr;
}

Operand Parser::named(const std::string &name, Width of_immediate) {
  if (name == "_") return Operand{Operand::SINK, of_immediate};
  size_t scope = 0;
  if (const Width *width = declared(name, scope)) {
    std::string key = std::to_string(scope) + ":" + name;
    auto found = registers_.find(key);
    if (found == registers_.end()) found = registers_.emplace(key, new_register(*width)).first;
    return found->second;
  }
  auto parameter = parameters_.find(name);
  if (parameter != parameters_.end()) {
    Parameter &found = kernel_->parameters[parameter->second];
    if (!found.is_memory) throw Error("the address of parameter " + name);
    return constant(found.address, of_immediate);
  }
  if (name == "global_smem") return constant(SHARED_BASE, of_immediate);
  if (!name.empty() && (isdigit((unsigned char)name[0]) || name[0] == '-'))
    return constant((uint64_t)integer(name), of_immediate);
  return special(name);
}

Operand Parser::special(const std::string &name) {
  static const char *axes[] = {"x", "y", "z"};
  for (int axis = 0; axis < 3; axis++) {
    if (name == std::string("%ctaid.") + axes[axis]) return kernel_->block[axis];
    if (name == std::string("%nctaid.") + axes[axis]) return kernel_->blocks[axis];
  }
  if (name == "%tid.x") return kernel_->thread;
  if (name == "%ntid.x") return kernel_->thread_count;
  if (name == "%laneid") return kernel_->lane;
  if (name == "%warpid") return kernel_->warp;
  if (name == "%tid.y" || name == "%tid.z") return constant(0, Width::bits32);
  if (name == "%ntid.y" || name == "%ntid.z") return constant(1, Width::bits32);
  throw Error("unknown operand or special register " + name);
}

int64_t Parser::integer(const std::string &text) const {
  if (text.rfind("0f", 0) == 0 || text.rfind("0F", 0) == 0)
    return (int64_t)strtoul(text.c_str() + 2, nullptr, 16);
  if (text.rfind("0d", 0) == 0 || text.rfind("0D", 0) == 0)
    return (int64_t)strtoull(text.c_str() + 2, nullptr, 16);
  char *end = nullptr;
  int64_t value = text[0] == '-' ? strtoll(text.c_str(), &end, 0)
                                 : (int64_t)strtoull(text.c_str(), &end, 0);
  if (*end == 'U') end++;
  if (text.empty() || *end) throw Error("not a number: " + text);
  return value;
}

Operand Parser::new_register(Width width) {
  uint32_t bytes = row_bytes(width);
  if (width != Width::predicate) kernel_->register_bytes = (kernel_->register_bytes + 63) & ~63u;
  Operand place{kernel_->register_bytes, width};
  kernel_->register_bytes += bytes;
  return place;
}

Operand Parser::new_constant(Width width) {
  Operand place{Operand::CONSTANT | (uint32_t)kernel_->constants.size(), width};
  kernel_->constants.resize(kernel_->constants.size() + std::max(row_bytes(width), 64u));
  return place;
}

Operand Parser::constant(uint64_t value, Width width) {
  auto found = immediates_.find({value, width});
  if (found != immediates_.end()) return found->second;
  Operand place = new_constant(width);
  fill_row(kernel_->constants.data() + place.offset(), width, value);
  immediates_[{value, width}] = place;
  return place;
}

Operand Parser::parameter(const std::string &name, Width width, bool is_signed) {
  auto found = parameters_.find(name);
  if (found == parameters_.end()) throw Error("unknown parameter " + name);
  Parameter &parameter = kernel_->parameters[found->second];
  for (size_t i = 0; i < parameter.rows.size(); i++)
    if (parameter.rows[i].width == width && parameter.is_signed[i] == is_signed)
      return parameter.rows[i];
  parameter.rows.push_back(new_constant(width));
  parameter.is_signed.push_back(is_signed);
  return parameter.rows.back();
}

// The names of source files, which come after the code.
void Parser::files() {
  for (size_t at = ptx_.find(".file"); at != std::string::npos; at = ptx_.find(".file", at + 1)) {
    unsigned number = 0;
    char name[1024];
    if (sscanf(ptx_.c_str() + at, ".file %u \"%1023[^\"]\"", &number, name) != 2) continue;
    if (kernel_->files.size() <= number) kernel_->files.resize(number + 1);
    const char *slash = strrchr(name, '/');
    kernel_->files[number] = slash ? slash + 1 : name;
  }
}

// Where a branch goes: the label of its name in the innermost scope.
int Parser::find_label(const Branch &branch) const {
  for (size_t i = branch.scopes.size(); i-- > 0;) {
    auto found = labels_.find({branch.scopes[i], branch.label});
    if (found != labels_.end()) return found->second;
  }
  throw Error("unknown label " + branch.label);
}

void Parser::link() {
  for (const Branch &branch : branches_) {
    Instruction &instruction = kernel_->code[branch.at];
    auto table = tables_.find(branch.label);
    if (table == tables_.end()) {
      instruction.target = find_label(branch);
      continue;
    }
    instruction.target = (int)kernel_->targets.size();
    instruction.count = (int)table->second.size();
    for (const std::string &label : table->second)
      kernel_->targets.push_back(find_label({branch.at, label, branch.scopes}));
  }
  for (Instruction &instruction : kernel_->code)
    instruction.operand = kernel_->operands.data() + instruction.first;
}

Kernel *parse(const std::string &ptx, const std::string &name) { return Parser(ptx).parse(name); }

}  // namespace emulator
