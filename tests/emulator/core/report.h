// Findings: what a kernel does that it must not, each place once with a count.
#pragma once
#include <cstdint>
#include <string>

namespace emulator {

// The same finding is the same instruction and kind.
bool count_again(const void *instruction, const char *kind);
void add_finding(const void *instruction, const char *kind, const std::string &line);

// Write all findings, one a line, and forget them.
int take_findings(char *text, int size);

}  // namespace emulator
