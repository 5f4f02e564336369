// What a block does around the arithmetic of a step: judging the evaluation, saving the best iterate, putting a stopped
// sample to rest, counting what still runs.
#pragma once

#include "deqfast/measure.h"
#include "device.cuh"
#include "work.h"

namespace deqfast::cuda {

enum Outcome : int32_t { kGoing = 1, kReset = 2, kSpill = 4, kUseSaved = 8, kGrew = 16, kJudged = 32 };

// By one thread: the verdict on sample b from its squared norms.
template <class A>
__device__ inline int32_t judge(const SolveArgs& a, const DeviceWork& work, int64_t b, double ff, double gg) {
    const Verdict v = measure<A>(a, b, sqrt(ff), sqrt(gg));
    if (!v.going) {
        atomicAdd(&work.counters[0], -1);
        if (a.at(kStatus, b) != kConverged) atomicAdd(&work.counters[2], 1);
    }
    const bool grew =
        v.going && !v.reset && a.at(kSteps, b) > 1 && a.at<A>(kNorm, b) > A(kGrowthLimit) * A(v.previous_norm);
    return kJudged | (v.going ? kGoing : 0) | (v.reset ? kReset : 0) | (v.spill ? kSpill : 0) |
           (v.use_saved ? kUseSaved : 0) | (grew ? kGrew : 0);
}

template <class S>
__device__ __forceinline__ S* row_of(void* base, const Leaf& leaf, int64_t b) {
    return static_cast<S*>(base) + b * leaf.n;
}

// The tile of a leaf that begins at number `at`. A thread takes neighbours where that keeps rows of the state and of
// the history in step.
template <int V>
__device__ __forceinline__ Tile<V> tile_of(const SolveArgs& a, const Leaf& leaf, int64_t at, int64_t end) {
    const int64_t count = min(int64_t(blockDim.x) * kItems, end - at);
    return {at, int(count), leaf.n % kItems == 0 && leaf.offset % kItems == 0 && a.N % kItems == 0};
}

__device__ __forceinline__ int64_t f_row(const SolveArgs& a, int64_t b) { return a.f_rows ? a.f_rows[b] : b; }
__device__ __forceinline__ int64_t f_prev_row(const SolveArgs& a, int64_t b) {
    return a.f_prev_rows ? a.f_prev_rows[b] : b;
}

// Numbers [begin, end) of a row; the whole block.
template <class S>
__device__ inline void copy_row(S* to, const S* from, int64_t begin, int64_t end) {
    for (int64_t i = begin + int64_t(threadIdx.x); i < end; i += int64_t(blockDim.x)) to[i] = from[i];
}

// Keeps the best iterate before it is overwritten; of a stopped sample, puts the answer into both buffers.
template <class S>
__device__ inline void spill_and_rest(const Leaf& leaf, int64_t b, int32_t outcome, int64_t begin, int64_t end) {
    S *x = row_of<S>(leaf.x, leaf, b), *x_prev = row_of<S>(leaf.x_prev, leaf, b),
      *saved = row_of<S>(leaf.saved, leaf, b);
    if (outcome & kSpill) copy_row(saved, x_prev, begin, end);
    if (outcome & kGoing) return;
    if (outcome & kUseSaved) copy_row(x, saved, begin, end);
    __syncthreads();
    copy_row(x_prev, x, begin, end);
}

inline __device__ void after_step(const SolveArgs& a, int64_t b) {
    int32_t& best_at = a.at(kBestAt, b);
    if (best_at == kCurrent) best_at = kPrevious;
}

inline __device__ void tell_host(const DeviceWork& work) {
    volatile int64_t* entry = work.ring + 2 * (work.step & (work.ring_size - 1));
    entry[1] = atomicAdd(&work.counters[2], 0);
    __threadfence_system();
    entry[0] = (work.step & 0x7fffffff) << 32 | int64_t(uint32_t(atomicAdd(&work.counters[0], 0)));
}

// The last of `blocks` blocks to get here tells the host how many samples still run; every block calls, whole.
inline __device__ void finish(const DeviceWork& work, int64_t blocks) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&work.counters[1], 1) != int32_t(blocks) - 1) return;
    work.counters[1] = 0;
    if (work.ring) tell_host(work);
}

// Whether this block is the last of `blocks` to arrive; the whole block calls, and afterwards sees what the others
// wrote.
inline __device__ bool last_to_arrive(int32_t* arrivals, int64_t blocks) {
    __threadfence();
    __syncthreads();
    int last = 0;
    if (threadIdx.x == 0) {
        last = atomicAdd(arrivals, 1) == int32_t(blocks) - 1;
        if (last) *arrivals = 0;
    }
    last = __syncthreads_or(last);
    if (last) __threadfence();
    return last;
}

}  // namespace deqfast::cuda
