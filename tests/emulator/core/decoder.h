// What the decoders of each family of instructions share: modifiers, operands, the result.
#pragma once
#include <string>
#include <vector>

#include "kernel.h"

namespace emulator {

class Parser;

// The element types of PTX.
enum class Type : uint8_t {
  b8, u8, s8, b16, u16, s16, f16, bf16, f16x2, bf16x2, b32, u32, s32, f32, tf32, b64, u64, s64, f64, pred, none
};

Type type_named(const std::string &name);  // Type::none if there is none
int size_of(Type type);
Width width_of(Type type);

// One statement while it is turned into an Instruction. Modifiers are taken in order, and each
// has to be: what a decoder leaves is unknown.
class Decoder {
 public:
  Decoder(Parser &parser, std::string text, std::vector<std::string> parts,
          std::vector<std::string> arguments)
      : instruction(), text(std::move(text)), parts_(std::move(parts)),
        arguments_(std::move(arguments)), parser_(parser) {}

  Instruction instruction;
  const std::string text;

  const std::string &base() const { return parts_[0]; }
  bool take(const char *modifier);       // consume the next modifier if it is this one
  std::string next();                    // consume the next modifier, "" at the end
  Type type();                           // consume a type
  void finish();                         // every modifier must have been taken
  [[noreturn]] void unknown(const std::string &what) const;

  size_t arguments() const { return arguments_.size(); }
  const std::string &argument(size_t index) const;
  void expect_arguments(size_t least, size_t most);

  // Add an operand to the instruction. Immediates become constant rows of `width`.
  void result(size_t argument, Width width);
  void results(size_t argument, Width width);  // {a, b, ...} or one
  void pair_of_results(size_t argument, Width first, Width second);  // first|second
  void source(size_t argument, Width width);
  void sources(size_t argument, Width width);
  void address(size_t argument);               // [register + offset]
  void tensor(size_t argument);                // [descriptor, {coordinates}]
  void any_result(size_t argument);            // of whatever width the register has
  void any_results(size_t argument);
  void any_source(size_t argument, Width of_immediate);
  void any_sources(size_t argument, Width of_immediate);
  void swap_operands(int a, int b);
  void constant_source(const Operand &place) { add(place, false); }
  int64_t immediate(size_t argument) const;
  size_t vector_length(size_t argument) const;
  const Operand &operand(int index) const;
  Parser &parser() { return parser_; }

 private:
  void add(const Operand &operand, bool is_result);
  std::vector<std::string> parts_;
  std::vector<std::string> arguments_;
  size_t next_ = 1;
  Parser &parser_;
};

// Each fills in the instruction or reports by Decoder::unknown; false if the opcode is not theirs.
bool decode_arithmetic(Decoder &decoder);
bool decode_bits(Decoder &decoder);
bool decode_conversion(Decoder &decoder);
bool decode_memory(Decoder &decoder);
bool decode_copies(Decoder &decoder);
bool decode_products(Decoder &decoder);
bool decode_mbarriers(Decoder &decoder);
void decode_copies_arrive(Decoder &decoder);  // cp.async.mbarrier, of decode_copies
void decode_bulk_copy(Decoder &decoder);      // cp.async.bulk, of decode_copies
bool decode_control(Decoder &decoder);

}  // namespace emulator
