// Compiled once and without instruction-set flags, so that it runs on every processor; the kernels beside it are
// compiled once per instruction set, each in a namespace of its own. CMake says which ones exist (DEQFAST_HAS_*).
#include "deqfast/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace deqfast::cpu {
namespace {

bool has_baseline() { return true; }

#if defined(DEQFAST_HAS_AVX2) || defined(DEQFAST_HAS_AVX512)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef DEQFAST_HAS_AVX512
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Candidate {
    KernelTable table;
    bool (*supported)();
};

}  // namespace

#define DEQFAST_DECLARE(isa)                                       \
    namespace isa {                                                \
    void anderson_step(const AndersonArgs& args, int phase);       \
    void broyden_step(const BroydenArgs& args, int phase);         \
    int64_t recheck(const SolveArgs& args, const Recheck& rule);   \
    int64_t squares(const SolveArgs& args, const Squares& wanted); \
    void joint_map(const JointArgs& args);                         \
    void joint_finish(const FinishArgs& args);                     \
    }
#define DEQFAST_CANDIDATE(isa)                                                                                     \
    {{#isa, isa::anderson_step, isa::broyden_step, isa::recheck, isa::squares, isa::joint_map, isa::joint_finish}, \
     has_##isa}

#ifdef DEQFAST_HAS_AVX512
DEQFAST_DECLARE(avx512)
#endif
#ifdef DEQFAST_HAS_AVX2
DEQFAST_DECLARE(avx2)
#endif
DEQFAST_DECLARE(baseline)

namespace {

const Candidate candidates[] = {
#ifdef DEQFAST_HAS_AVX512
    DEQFAST_CANDIDATE(avx512),
#endif
#ifdef DEQFAST_HAS_AVX2
    DEQFAST_CANDIDATE(avx2),
#endif
    DEQFAST_CANDIDATE(baseline),
};

const KernelTable& choose() {
    const char* variable = std::getenv("DEQFAST_CPU_ISA");
    const std::string wanted = variable ? variable : "";
    std::string runnable;
    for (const Candidate& candidate : candidates) {
        if (!candidate.supported()) continue;
        if (wanted.empty() || wanted == candidate.table.name) return candidate.table;
        runnable += (runnable.empty() ? "" : ", ") + std::string(candidate.table.name);
    }
    std::string built;
    for (const std::string& name : isas_built()) built += (built.empty() ? "" : ", ") + name;
    throw std::invalid_argument("DEQFAST_CPU_ISA: expected one of " + runnable +
                                " (what this processor runs; built: " + built + "), got '" + wanted + "'");
}

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& chosen = choose();
    return chosen;
}

std::vector<std::string> isas_built() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates) names.emplace_back(candidate.table.name);
    return names;
}

}  // namespace deqfast::cpu
