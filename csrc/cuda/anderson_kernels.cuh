// The kernels of an Anderson step and what starts them. Two schedules, chosen by N alone (and a third, for tiny
// samples, in anderson_tiny.cuh):
//   block   N <= kBlockMaxN: a block a sample, everything in one launch;
//   split   larger, and the halves of a step: a block a chunk. The last block of a sample to arrive adds up the chunks
//           in order and solves; a second launch mixes.
// What moves, per number: x, f and the previous ones are read once, the two new columns written, the older columns of
// dG (Type II) or of both read for their products and dF read again for the mix, from L2 where a sample fits there.
#pragma once

#include "anderson_sample.cuh"
#include "anderson_tiny.cuh"
#include "launch.cuh"
#include "split.cuh"

namespace deqfast::cuda {

// Blocks of a multiprocessor, at least: left to itself ptxas aims for more, and spills to get there.
constexpr int kThreads = 256, kScaledThreads = 128;  // 128 * 8 numbers share one scale
template <class H>
constexpr int kMostThreads = kScaled<H> ? kScaledThreads : kThreads;
template <class A, class H>
constexpr int kBlocks = sizeof(A) == 8 ? 1
                        : kScaled<H>   ? 3
                                       : 2;

// ---- a block a sample ----

template <class A, class S, class H, int leaves>
__global__ void __launch_bounds__(kMostThreads<H>, kBlocks<A, H>)
    sample_kernel(const __grid_constant__ Params<leaves> p) {
    DEQFAST_SHARED(memory);
    DEQFAST_BLOCK_SHARED int32_t outcome;
    const AndersonArgs& a = p.a;
    const int64_t b = blockIdx.x;
    if (a.at(kStatus, b) == kRunning) {
        Step<A, S, H, leaves> step(p, b, memory);
        const int slot = step.new_slot(), n = step.open(slot);
        for (int l = 0; l < a.n_leaves; ++l) step.reduce(l, 0, p.leaf[l].n, slot, n);
        step.close();
        if (threadIdx.x == 0) outcome = judge<A>(a, p.work, b, step.shared().sums[kFF], step.shared().sums[kGG]);
        __syncthreads();
        for (int l = 0; l < a.n_leaves; ++l) spill_and_rest<S>(p.leaf[l], b, outcome, 0, p.leaf[l].n);
        if (outcome & kGoing) {
            if (a.m > 0 && warp_of() == 0) step.decide(slot, outcome);
            __syncthreads();
            bool finite = true;
            for (int l = 0; l < a.n_leaves; ++l) finite &= step.mix(l, 0, p.leaf[l].n);
            if (__syncthreads_or(!finite)) step.picard();
            if (threadIdx.x == 0) after_step(a, b);
        }
    }
    finish(p.work, gridDim.x);
}

// ---- a block a chunk ----

// By one warp: the verdict and the weights of a sample that is split over blocks, for those that mix it.
template <class A, class S, class H, int leaves>
__device__ void judge_and_decide(const Params<leaves>& p, int64_t b, Step<A, S, H, leaves>& step) {
    const AndersonArgs& a = p.a;
    const int slot = step.new_slot();
    __syncwarp();  // the verdict counts the step that the slot depends on
    int32_t outcome = 0;
    if (lane_of() == 0) {
        outcome = judge<A>(a, p.work, b, step.shared().sums[kFF], step.shared().sums[kGG]);
        p.work.outcomes[b] = outcome;
    }
    outcome = __shfl_sync(kAll, outcome, 0);
    __syncwarp();
    if (!(outcome & kGoing) || a.m == 0) return;
    step.decide(slot, outcome);
    __syncwarp();
    for (int j = lane_of(); j < a.m; j += kWarpSize)
        static_cast<A*>(p.work.coefficients)[b * a.m + j] = step.shared().gamma[j];
}

template <class A, class S, class H, int leaves>
__global__ void __launch_bounds__(kMostThreads<H>, kBlocks<A, H>)
    reduce_kernel(const __grid_constant__ Params<leaves> p) {
    DEQFAST_SHARED(memory);
    const AndersonArgs& a = p.a;
    const Place place(p, a.n_leaves);
    const int64_t b = place.b;
    if (a.at(kStatus, b) != kRunning) return;
    Step<A, S, H, leaves> step(p, b, memory);
    const int D = int(anderson_products(a.m)), slot = step.new_slot(), n = step.open(slot);
    const Chunk chunk(p, place.index);
    step.reduce(chunk.leaf, chunk.begin, kSplitChunk, slot, n);
    step.close();
    const Adding adding(p.work, a.B, b, false, place.chunks, D);
    for (int d = int(threadIdx.x); d < D; d += int(blockDim.x)) adding.of(d, place.index) = step.shared().sums[d];
    if (!adding.up(place.index, D, step.shared().sums)) return;
    if (!(p.phase & kApply)) {
        for (int d = int(threadIdx.x); d < D; d += int(blockDim.x)) a.sums[b * D + d] = step.shared().sums[d];
    } else if (warp_of() == 0) {
        judge_and_decide(p, b, step);
    }
}

// Between the halves: one warp a sample.
template <class A, class S, class H, int leaves>
__global__ void __launch_bounds__(kWarpSize, 1) decide_kernel(const __grid_constant__ Params<leaves> p) {
    DEQFAST_SHARED(memory);
    const AndersonArgs& a = p.a;
    const int64_t b = blockIdx.x;
    if (a.at(kStatus, b) != kRunning) return;
    Step<A, S, H, leaves> step(p, b, memory);
    const int D = int(anderson_products(a.m));
    for (int d = lane_of(); d < D; d += kWarpSize) step.shared().sums[d] = a.sums[b * D + d];
    __syncwarp();
    judge_and_decide(p, b, step);
}

template <class A, class S, class H, int leaves>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(const __grid_constant__ Params<leaves> p) {
    DEQFAST_SHARED(memory);
    const AndersonArgs& a = p.a;
    const Place place(p, a.n_leaves);
    const int64_t b = place.b, chunks = place.chunks;
    const int32_t outcome = p.work.outcomes[b];
    if (outcome & kJudged) {
        Step<A, S, H, leaves> step(p, b, memory);
        for (int j = int(threadIdx.x); j < a.m; j += int(blockDim.x))
            step.shared().gamma[j] = static_cast<const A*>(p.work.coefficients)[b * a.m + j];
        __syncthreads();
        const Chunk chunk(p, place.index);
        const Leaf& leaf = p.leaf[chunk.leaf];
        const int64_t end = min(chunk.begin + kSplitChunk, leaf.n);
        spill_and_rest<S>(leaf, b, outcome, chunk.begin, end);
        __syncthreads();
        if (outcome & kGoing) {
            const bool finite = step.mix(chunk.leaf, chunk.begin, kSplitChunk);
            if (__syncthreads_or(!finite) && threadIdx.x == 0) atomicOr(&p.work.infinite[b], 1);
        }
        if (last_to_arrive(Adding(p.work, a.B, b, true, chunks, 0).arrivals, chunks)) {
            if (outcome & kGoing) {
                if (p.work.infinite[b]) step.picard();
                if (threadIdx.x == 0) after_step(a, b);
            }
            __syncthreads();
            if (threadIdx.x == 0) p.work.outcomes[b] = p.work.infinite[b] = 0;
        }
    }
    finish(p.work, gridDim.x);
}

template <class A, class S, class H, int leaves>
void run(const AndersonArgs& a, const DeviceWork& work, int phase) {
    Params<leaves> p;
    p.a = a;
    p.work = work;
    p.phase = phase;
    for (int l = 0; l < a.n_leaves; ++l) p.leaf[l] = a.leaves[l];
    p.a.leaves = nullptr;
    int threads = kScaled<H> ? kScaledThreads : kThreads;
    if (!kScaled<H>)
        while (threads > kWarpSize && a.N <= threads / 2 * kItems) threads /= 2;
    const int64_t shared = Shared<A>::bytes(a.m, threads / kWarpSize);
    if (a.N <= kBlockMaxN && phase == kStep)
        return launch(sample_kernel<A, S, H, leaves>, dim3(unsigned(a.B)), threads, shared, work.stream, p);
    const dim3 grid = grid_of(a.B, split_chunks(a));
    if (phase & kReduce) launch(reduce_kernel<A, S, H, leaves>, grid, threads, shared, work.stream, p);
    if (phase == kApply)
        launch(decide_kernel<A, S, H, leaves>, dim3(unsigned(a.B)), kWarpSize, Shared<A>::bytes(a.m, 1), work.stream,
               p);
    if (phase & kApply) launch(mix_kernel<A, S, H, leaves>, grid, threads, shared, work.stream, p);
}

template <class A, class S, class H>
void with_history(const AndersonArgs& a, const DeviceWork& work, int phase) {
    if (a.m > 0 && !a.gram) {
        if constexpr (kScaled<H>)
            throw std::invalid_argument("a history that carries scales needs a workspace that keeps small matrices");
        else
            return run_tiny<A, S, H>(a, work, phase);
    }
    if (a.n_leaves == 1) return run<A, S, H, 1>(a, work, phase);
    return run<A, S, H, kMaxLeaves>(a, work, phase);
}

template <class A, class S>
void anderson_step_of(const AndersonArgs& a, const DeviceWork& work, int phase) {
    check_leaves<S>(a);
    switch (a.history_dtype) {
        case DType::f64:
            if constexpr (sizeof(A) == 8) return with_history<A, S, double>(a, work, phase);
            break;
        case DType::f32:
            return with_history<A, S, float>(a, work, phase);
        case DType::bf16:
            return with_history<A, S, Bf16>(a, work, phase);
        case DType::f16:
            return with_history<A, S, F16>(a, work, phase);
        case DType::i8:
            return with_history<A, S, int8_t>(a, work, phase);
    }
    throw std::invalid_argument("history_dtype: float64 needs a float64 state");
}

}  // namespace deqfast::cuda
