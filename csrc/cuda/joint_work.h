// What the CUDA kernels of the joint map need beside their args. No CUDA header, so that the bindings can read it.
//
// Every pointer of the args is a device pointer here, except `parts`, which is read on the host; `partials` and
// `factors` have the sizes that JointSizes asks for. `threads` and `chunks` are not read.
#pragma once

#include <stdexcept>
#include <string>

#include "deqfast/joint.h"
#include "deqfast/joint_finish.h"

namespace deqfast::cuda {

constexpr int kMaxParts = 32;  // tensors of z, mu and x together

inline void check_parts(int parts) {
    if (parts > kMaxParts)
        throw std::invalid_argument("z0 and x0: the CUDA kernels of a joint solve take at most " +
                                    std::to_string(kMaxParts) + " tensors of z, mu and x, got " +
                                    std::to_string(parts));
}

struct JointWork {
    int32_t* arrivals = nullptr;  // (B), zeroed when allocated: blocks of a sample that have finished
    void* stream = nullptr;       // cudaStream_t
};

struct JointSizes {  // in bytes
    int64_t arrivals, partials, factors;
};

JointSizes joint_sizes(const JointArgs& args);

// In order on `stream`; returns without waiting. std::invalid_argument for more than kMaxParts tensors.
void joint_map(const JointArgs& args, const JointWork& work);

// The same; `parts` is read on the host, every other pointer is a device pointer.
void joint_finish(const FinishArgs& args, void* stream);

}  // namespace deqfast::cuda
