// The C interface of the PTX emulator: kernels are loaded, memory is named, launches are run.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// Parse one kernel out of PTX. 0, or nonzero where emulator_error says what it does not know.
int emulator_load(uint64_t handle, const char *ptx, const char *name);

// Global memory that kernels may touch: [base, base + bytes).
void emulator_allocate(uint64_t base, uint64_t bytes);
void emulator_free(uint64_t base);

// Run a kernel. `parameters` points to each argument, as the driver's kernelParams does.
// 0, or nonzero where the launch could not go on to its end.
int emulator_launch(uint64_t handle, const uint32_t grid[3], uint32_t threads,
                    uint32_t shared_bytes, void **parameters);

// Why the last call returned nonzero.
const char *emulator_error(void);

// Write the findings since the last call, one a line:
//   KIND kernel file:line (block x,y,z; thread t): what [N times]
// Returns how many there were, also of those that `size` had no room for.
int emulator_report(char *text, int size);

// Settings, of all launches that follow:
//   check   1 (default): report findings; 0: run only
//   order   0 (default): blocks and warps run first to last; 1: last to first; 2: shuffled
//   budget  warp instructions after which a launch is given up; 0 (default): none
//   late    1 (default): wgmma reads and computes at its wait; 0: where it is issued
//   fenced_copies  1 (default): what cp.async wrote needs a fence.proxy.async before wgmma reads it,
//           as PTX says; 0: it does not, as Triton before 3.7 and others have it
//   fenced_operands  1: registers that wgmma multiplies need a wgmma.fence after they were written,
//           as PTX says; 0 (default): they do not, since compilers write some later, and ptxas
//           puts the fence where it belongs
// Returns nothing; an unknown name is left for emulator_error and ignored.
void emulator_configure(const char *name, int64_t value);

// Warp instructions run so far.
uint64_t emulator_instructions(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
