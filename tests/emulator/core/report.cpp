#include "report.h"

#include <cstring>
#include <map>
#include <utility>
#include <vector>

namespace emulator {

namespace {
struct Finding {
  std::string line;
  uint64_t times;
};
std::vector<Finding> findings;
std::map<std::pair<const void *, std::string>, size_t> places;
}  // namespace

bool count_again(const void *instruction, const char *kind) {
  auto found = places.find({instruction, kind});
  if (found == places.end()) return false;
  findings[found->second].times++;
  return true;
}

void add_finding(const void *instruction, const char *kind, const std::string &line) {
  places[{instruction, kind}] = findings.size();
  findings.push_back({line, 1});
}

int take_findings(char *text, int size) {
  int count = (int)findings.size(), used = 0;
  for (const Finding &finding : findings) {
    std::string line = finding.line;
    if (finding.times > 1) line += " [" + std::to_string(finding.times) + " times]";
    line += "\n";
    if (used + (int)line.size() >= size) break;
    memcpy(text + used, line.data(), line.size());
    used += (int)line.size();
  }
  if (size > 0) text[used] = 0;
  findings.clear();
  places.clear();
  return count;
}

}  // namespace emulator
