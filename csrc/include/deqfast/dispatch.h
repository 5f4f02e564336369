// Which build of the CPU kernels runs on this processor.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deqfast {

struct SolveArgs;     // args.h
struct Recheck;       // args.h
struct Squares;       // args.h
struct AndersonArgs;  // anderson.h
struct BroydenArgs;   // broyden.h
struct JointArgs;     // joint.h
struct FinishArgs;    // joint_finish.h

namespace cpu {

// The kernels of one instruction set. `phase` says which half of a step to run; see the args' headers.
struct KernelTable {
    const char* name;
    void (*anderson_step)(const AndersonArgs& args, int phase);
    void (*broyden_step)(const BroydenArgs& args, int phase);
    // How many samples that converged earlier are outside their tolerance; the residuals of the others become new.
    int64_t (*recheck)(const SolveArgs& args, const Recheck& rule);
    // Of spread samples, between reduce and apply: how many have norms to be added up for themselves.
    int64_t (*squares)(const SolveArgs& args, const Squares& wanted);
    void (*joint_map)(const JointArgs& args);
    void (*joint_finish)(const FinishArgs& args);
};

// The kernels of the best instruction set that was built and that this processor has, or of the one that
// DEQFAST_CPU_ISA names. Chosen at the first call; std::invalid_argument if DEQFAST_CPU_ISA names none that can run.
const KernelTable& kernels();

// Names of the instruction sets in this build, fastest first.
std::vector<std::string> isas_built();

}  // namespace cpu
}  // namespace deqfast
