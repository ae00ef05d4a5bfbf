// A kernel in the compact form that is run: instructions whose operands are places in memory.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffffu;  // the mask of a whole warp

// What stops a load or a launch; the text names what was not understood.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp &, const Instruction &);

// The width of a register. A predicate is one mask of 32 bits, any other a row of 32 lanes.
enum class Width : uint8_t { predicate, bits16, bits32, bits64 };

constexpr uint32_t row_bytes(Width width) {
  return width == Width::predicate ? 4 : width == Width::bits16 ? 64 : width == Width::bits32 ? 128 : 256;
}

// Where an operand lies: a byte offset into the warp's registers, or into the launch's constants.
struct Operand {
  static constexpr uint32_t CONSTANT = 1u << 31, SINK = 0x7fffffffu;
  uint32_t where = SINK;
  Width width = Width::bits32;
  bool is_constant() const { return where & CONSTANT; }
  bool is_sink() const { return where == SINK; }
  uint32_t offset() const { return where & ~CONSTANT; }
};

struct Instruction {
  Handler run = nullptr;
  uint32_t first = 0;        // of its operands in Kernel::operands; results come first
  uint8_t results = 0;
  uint8_t operands = 0;
  bool guarded = false, negated = false;
  bool of_wgmma = false;     // follows the rules of wgmma itself
  uint32_t guard = 0;        // offset of the predicate
  int64_t offset = 0;        // added to the address, or an immediate
  int64_t from_offset = 0;   // the same of a second address
  int32_t size = 0;          // bytes an element
  int32_t count = 0;         // elements, or what the instruction counts
  int32_t target = 0;        // of a branch; of brx.idx the first of `count` in Kernel::targets
  uint32_t used_bytes = ALL; // of those a load reads, a bit each
  uint32_t flags = 0;        // as each handler defines them
  const Operand *operand = nullptr;  // = &Kernel::operands[first], once all are there
};

struct SourceLine {
  uint32_t file = 0, line = 0;
};

struct Parameter {
  uint32_t size = 0;
  bool is_memory = false;          // an array, which lies at `address` of the parameters' memory
  uint32_t address = 0;
  std::vector<Operand> rows;       // constants that hold it, one for each width that is loaded
  std::vector<bool> is_signed;
};

// 64 bytes that a vector register is loaded from at once.
struct alignas(64) Line {
  uint8_t bytes[64];
};
using Lines = std::vector<Line>;

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<SourceLine> lines;   // of each instruction
  std::vector<std::string> texts;  // of each instruction
  std::vector<Operand> operands;
  std::vector<int32_t> targets;    // of all brx.idx
  std::vector<uint8_t> constants;  // rows of immediates, parameters and the block's place
  uint32_t register_bytes = 0;
  std::vector<Parameter> parameters;
  std::vector<std::string> files;  // by the number that .loc gives
  uint32_t threads = 0;            // .reqntid, or 0
  bool has_mbarriers = false;      // warps meet by them, so that accesses are ordered by steps
  bool overlaps = false;           // it waits for the launch before it, by griddepcontrol.wait
  uint32_t memory_bytes = 0;       // of parameters that are arrays,
  Operand memory;                  // and a constant that says where it begins in a launch
  Operand block[3], blocks[3], thread_count;  // constants filled at each launch or block
  Operand thread, lane, warp;                 // registers filled at each launch

  size_t index(const Instruction &instruction) const { return &instruction - code.data(); }
};

// Read one kernel (the first if `name` is empty) out of PTX.
Kernel *parse(const std::string &ptx, const std::string &name);

}  // namespace emulator
