#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

namespace depthwise {
namespace {

struct InstructionSet {
  const char* name;
  bool (*available)();
  Loops (*loops)(Dtype);
};

// From the widest vectors to the narrowest. A new one also needs a row in CMakeLists.txt and a declaration in loops.h.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     avx512::loops},
    // Every processor with AVX2 and FMA has F16C.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::loops},
#endif
#if defined(__aarch64__)
    {"neon", [] { return true; }, neon::loops},
#else
    {"baseline", [] { return true; }, baseline::loops},
#endif
};

const InstructionSet* selected() {
  static const InstructionSet* const result = []() -> const InstructionSet* {
    const char* asked = std::getenv("DEPTHWISE_JAX_ISA");
    for (const InstructionSet& set : kInstructionSets) {
      if ((!asked || !*asked || std::strcmp(asked, set.name) == 0) && set.available()) return &set;
    }
    return nullptr;
  }();
  return result;
}

}  // namespace

Loops loops_for(Dtype dtype, Index channels) {
  const InstructionSet* set = selected();
  while (set + 1 != std::end(kInstructionSets) && channels < set->loops(dtype).lanes) ++set;
  return set->loops(dtype);
}

const char* instruction_set() { return selected() ? selected()->name : nullptr; }

}  // namespace depthwise
