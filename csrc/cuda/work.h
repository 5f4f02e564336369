// What the CUDA kernels need besides a workspace: device memory, a stream, and a ring in host memory through which the
// host learns how many samples still run. No CUDA header: whoever allocates it is compiled as plain C++.
//
// Every pointer of the args (leaves' x, x_prev, saved, f, f_prev; ints, reals, history, norms, ...) is a device pointer
// here, except `leaves` itself, which is read on the host; so is `sums`, (B, products) doubles where WorkSizes asks for
// it. `scratch`, `partials`, `chunks`, `threads` and `running` of the args are not read. f and f_prev are read in
// place, dense or through strides, in the state's dtype or a narrower one.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "deqfast/anderson.h"
#include "deqfast/broyden.h"

namespace deqfast::cuda {

constexpr int kMaxLeaves = 16;  // tensors of a state
// Shared memory of a block in bytes, from compute capability 8.0 on: what there is at most, what there is without
// asking for it, and how much of both is left to what kernels declare themselves (`make check-cuda` compares).
constexpr int64_t kMaxShared = 101376, kFreeShared = 49152, kStaticShared = 1024;
constexpr int64_t kMaxDynamic = kMaxShared - kStaticShared;
inline bool must_ask(int64_t dynamic) { return dynamic + kStaticShared > kFreeShared; }

constexpr int kGroupChunks = 32;  // chunks that are added up together where a sample has more

// Zeroed when allocated; WorkSizes says how many bytes each needs. Arrays of size 0 may be null.
struct DeviceWork {
    int32_t* counters = nullptr;   // [0]: samples still running, to be set before the first step and whenever the host
                                   // changes a status; [1]: blocks that have finished; [2]: samples stopped without
                                   // converging
    int32_t* arrivals = nullptr;   // (2, B, 1 + groups): blocks of a sample that have reduced, that have mixed; of the
                                   // sample first, then of each group of its chunks, see groups_of
    int32_t* outcomes = nullptr;   // (B): what was decided for a sample that is split over blocks
    int32_t* infinite = nullptr;   // (B): some block mixed a number that is not finite
    double* partials = nullptr;    // (B, products * (chunks + groups)): sums of every chunk, then of every group
    void* coefficients = nullptr;  // Anderson (B, m): gamma, of the accumulation type

    // Pinned host memory mapped to the device, 2 words an entry, `ring_size` entries, a power of two. The last block of
    // step number `step` (counted from 1, set before each call) writes entry step % ring_size: first word 1, how many
    // samples have stopped without converging, then word 0 = step << 32 | samples still running. Null: nobody asks.
    volatile int64_t* ring = nullptr;
    int64_t ring_size = 0;
    int64_t step = 0;

    void* stream = nullptr;  // cudaStream_t
};

struct WorkSizes {  // in bytes; `sums` is the args' field of that name
    int64_t counters, arrivals, outcomes, infinite, partials, sums, coefficients;
};

inline int64_t split_chunks(const SolveArgs& a) {
    int64_t chunks = 0;
    for (int l = 0; l < a.n_leaves; ++l) chunks += (a.leaves[l].n + kSplitChunk - 1) / kSplitChunk;
    return chunks;
}

// Groups that the chunks of a sample are added up in first; 0: all at once.
DEQFAST_HD inline int64_t groups_of(int64_t chunks) {
    return chunks > kGroupChunks ? (chunks + kGroupChunks - 1) / kGroupChunks : 0;
}

inline WorkSizes split_sizes(const SolveArgs& a, int64_t products) {
    const int64_t chunks = split_chunks(a), groups = groups_of(chunks);
    return {3 * 4, 8 * a.B * (1 + groups), 4 * a.B, 4 * a.B, 8 * a.B * products * (chunks + groups), 8 * a.B * products,
            0};
}

inline int64_t accumulation_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// From args whose sizes, dtype, leaves and method are set. `halves`: reduce and apply will be called apart.
inline WorkSizes work_sizes(const AndersonArgs& a, bool halves) {
    if (a.N <= kBlockMaxN && !halves) return {3 * 4, 0, 0, 0, 0, 0, 0};
    WorkSizes sizes = split_sizes(a, anderson_products(a.m));
    sizes.coefficients = a.B * a.m * accumulation_size(a.dtype);
    return sizes;
}

// Shared memory of a block of so many warps.
DEQFAST_HD inline int64_t anderson_shared(int columns, int warps, int64_t number) {
    const int64_t m = columns, d = anderson_products(columns);
    return 8 * (d * (warps + 1)) + number * (m * m + 5 * m + 2 * warps) + 4 * m + 64;
}
DEQFAST_HD inline int64_t gram_shared(int memory, int warps) { return 8 * broyden_products(memory) * (warps + 1); }
DEQFAST_HD inline int64_t tiny_shared(int64_t m, int64_t N, int64_t threads, int64_t number) {
    return threads * number * (2 * m * N + m * m + 4 * m);
}

// z of Broyden's chain, beside what a block's sums take.
constexpr int64_t kBlockSumBytes = 2 * 32 * 8;
DEQFAST_HD inline int64_t chain_shared(int64_t N, int64_t number) { return kBlockSumBytes + N * number; }

// std::invalid_argument for what the kernels do not take, before anything is evaluated.
inline void check_supported(const SolveArgs& a, int64_t shared, const std::string& columns) {
    const std::string otherwise = "; use backend='triton'";
    if (a.n_leaves > kMaxLeaves)
        throw std::invalid_argument("z0: the CUDA kernels take at most " + std::to_string(kMaxLeaves) +
                                    " tensors, got " + std::to_string(a.n_leaves) + otherwise);
    if (shared > kMaxDynamic)
        throw std::invalid_argument(columns + " is more than the CUDA kernels have room for" + otherwise);
}
inline void check_supported(const AndersonArgs& a) {
    check_supported(a, anderson_shared(a.m, 8, a.dtype == DType::f64 ? 8 : 4), "m=" + std::to_string(a.m));
}
inline void check_supported(const BroydenArgs& a) {
    if (a.gram) return check_supported(a, gram_shared(a.memory, 8), "memory=" + std::to_string(a.memory));
    check_supported(a, chain_shared(a.N, accumulation_size(a.dtype)),
                    "a chain of steps of " + std::to_string(a.N) + " numbers");
}

inline WorkSizes work_sizes(const BroydenArgs& a, bool) {
    if (a.gram) return split_sizes(a, broyden_products(a.memory));
    return {3 * 4, 0, 0, 0, 0, 0, 0};
}

// One step, or with kReduce and kApply its halves, in order on `stream`; returns without waiting. kReduce leaves the
// products of every running sample in `sums`, which the caller may change (an all-reduce) before kApply; it writes no
// entry of the ring. Squared norms among them are of f and of f - x as they are, the other products in the sample's
// unit. std::invalid_argument for what is not supported: more than kMaxLeaves tensors, halves of a workspace that keeps
// no small matrices, more columns than fit in shared memory. std::runtime_error with CUDA's own words if a launch
// fails.
void anderson_step(const AndersonArgs& args, const DeviceWork& work, int phase);
void broyden_step(const BroydenArgs& args, const DeviceWork& work, int phase);

// Writes the entry of step `work.step` alone: what a step does at its end, for steps that were captured without a ring.
void report(const DeviceWork& work);

}  // namespace deqfast::cuda
