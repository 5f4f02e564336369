// Kernels of the joint map. What moves, per number: the iterate and what f or its gradient gave are read, the mapped
// state is written: 3s, at once with the norms of the block; x is read once more for each norm its step needs first.
// Two schedules, chosen by the numbers of a sample alone:
//   sample  at most kBlockMaxN: a block a sample, everything in one launch;
//   split   larger: a block a chunk; the last block of a sample to arrive adds up the chunks in order. A launch before
//           it, a block a sample, finds the norms that x's step needs, if any.
// Sums are in double; their order depends on the tensors' sizes alone.
#pragma once

#include "joint_work.h"
#include "launch.cuh"
#include "source.cuh"
#include "split.cuh"

namespace deqfast::cuda {

constexpr int kJointThreads = 256;

template <int parts>
struct JointParams {
    JointArgs a;
    JointWork work;
    JointPart leaf[parts];
};

// ---- sums over a block ----

struct Squares {
    double moved = 0, size = 0;
};

// Totals over the block, for every thread of it.
__device__ inline Squares block_sums(Squares mine) {
    DEQFAST_BLOCK_SHARED double sums[2][kJointThreads / kWarpSize];
    mine.moved = warp_sum(mine.moved);
    mine.size = warp_sum(mine.size);
    if (lane_of() == 0) {
        sums[0][warp_of()] = mine.moved;
        sums[1][warp_of()] = mine.size;
    }
    __syncthreads();
    Squares all;
    for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) {
        all.moved += sums[0][w];
        all.size += sums[1][w];
    }
    __syncthreads();
    return all;
}

// ---- tiles ----

// use(tile) for the tiles of numbers [begin, end) of a tensor.
template <int V, class Use>
__device__ __forceinline__ void over_tiles(const JointPart& part, int64_t begin, int64_t end, Use&& use) {
    const int64_t step = int64_t(blockDim.x) * kItems;
    for (int64_t at = begin; at < end; at += step) use(Tile<V>{at, int(min(step, end - at)), part.n % kItems == 0});
}

template <class A, class S, int V>
__device__ __forceinline__ void read_both(const JointPart& part, int64_t b, const Tile<V>& tile, A* v, A* value) {
    read_tile<A>(static_cast<const S*>(part.v) + b * part.n, tile, v);
    read_source<A, S>(part.value, b, tile, value);
}

template <class A, int V>
__device__ __forceinline__ void read_center(const JointPart& part, int64_t b, const Tile<V>& tile, A* center) {
    if (part.center) return read_tile<A>(static_cast<const A*>(part.center) + b * part.n, tile, center);
    for (int k = 0; k < kItems; ++k) center[k] = A(0);
}

// Maps numbers [begin, end) of a tensor of sample b; this thread's share of the squares.
template <class A, class S>
__device__ inline Squares map_numbers(const JointArgs& a, const JointPart& part, int64_t b, int64_t begin, int64_t end,
                                      const InputStep<A>& input) {
    constexpr int V = kGroup<S>;
    Squares found;
    over_tiles<V>(part, begin, end, [&](const Tile<V>& tile) {
        A v[kItems], value[kItems], next[kItems];
        read_both<A, S>(part, b, tile, v, value);
        if (part.block == kInputBlock) {
            read_center(part, b, tile, next);
            DEQFAST_UNROLL
            for (int k = 0; k < kItems; ++k)
                value[k] = next[k] = input.projected(input.stepped(v[k], value[k]), next[k]);
        } else {
            const A rate = A(a.damping[part.block]);
            DEQFAST_UNROLL
            for (int k = 0; k < kItems; ++k) next[k] = rate == A(1) ? value[k] : v[k] + rate * (value[k] - v[k]);
        }
        write_state<A>(static_cast<S*>(part.mapped) + b * part.n, tile, next);
        DEQFAST_UNROLL
        for (int k = 0; k < kItems; ++k) {
            if (tile.at(k) >= tile.count) continue;
            const double moved = double(value[k] - v[k]), size = double(value[k]);
            found.moved += moved * moved;
            found.size += size * size;
        }
    });
    return found;
}

// The factors of x's step for sample b, the same for every thread; the whole block.
template <class A, class S, int parts>
__device__ inline void find_factors(const JointParams<parts>& p, int64_t b, double* rate, double* shrink) {
    constexpr int V = kGroup<S>;
    const JointArgs& a = p.a;
    *rate = a.step_size;
    *shrink = 1;
    if (a.normalize) {
        Squares gradient;
        for (int i = 0; i < a.n_parts; ++i) {
            const JointPart& part = p.leaf[i];
            if (part.block != kInputBlock) continue;
            over_tiles<V>(part, 0, part.n, [&](const Tile<V>& tile) {
                A q[kItems];
                read_source<A, S>(part.value, b, tile, q);
                for (int k = 0; k < kItems; ++k) gradient.size += double(q[k]) * double(q[k]);  // zeros beyond the end
            });
        }
        *rate = gradient_factor(a, sqrt(block_sums(gradient).size));
    }
    if (a.ball != Ball::l2) return;
    Squares away;
    const InputStep<A> input(a, *rate, 1);
    for (int i = 0; i < a.n_parts; ++i) {
        const JointPart& part = p.leaf[i];
        if (part.block != kInputBlock) continue;
        over_tiles<V>(part, 0, part.n, [&](const Tile<V>& tile) {
            A v[kItems], q[kItems], center[kItems];
            read_both<A, S>(part, b, tile, v, q);
            read_center(part, b, tile, center);
            for (int k = 0; k < kItems; ++k) {
                const double t = double(input.stepped(v[k], q[k]) - center[k]);
                away.size += t * t;
            }
        });
    }
    *shrink = shrink_factor(a, sqrt(block_sums(away).size));
}

// ---- a block a sample ----

template <class A, class S, int parts>
__global__ void __launch_bounds__(kJointThreads, 2) joint_sample_kernel(const __grid_constant__ JointParams<parts> p) {
    const JointArgs& a = p.a;
    const int64_t b = blockIdx.x;
    if (a.status[b] != kRunning) return;
    double rate, shrink;
    find_factors<A, S>(p, b, &rate, &shrink);
    const InputStep<A> input(a, rate, shrink);
    int i = 0;
    for (int block = 0; block < a.n_blocks; ++block) {
        Squares found;
        for (; i < a.n_parts && p.leaf[i].block == block; ++i) {
            const Squares more = map_numbers<A, S>(a, p.leaf[i], b, 0, p.leaf[i].n, input);
            found.moved += more.moved;
            found.size += more.size;
        }
        found = block_sums(found);
        if (threadIdx.x == 0) {
            a.norm(block, 0, b) = sqrt(found.moved) + a.doubt<A>(block, 0, b);
            a.norm(block, 1, b) = sqrt(found.size);
        }
    }
}

// ---- a block a chunk ----

template <class A, class S, int parts>
__global__ void __launch_bounds__(kJointThreads, 2) joint_factors_kernel(const __grid_constant__ JointParams<parts> p) {
    const int64_t b = blockIdx.x;
    if (p.a.status[b] != kRunning) return;
    double rate, shrink;
    find_factors<A, S>(p, b, &rate, &shrink);
    if (threadIdx.x == 0) {
        p.a.factors[2 * b] = rate;
        p.a.factors[2 * b + 1] = shrink;
    }
}

template <class A, class S, int parts>
__global__ void __launch_bounds__(kJointThreads, 2) joint_chunk_kernel(const __grid_constant__ JointParams<parts> p) {
    const JointArgs& a = p.a;
    const Place place(p, a.n_parts);
    const int64_t b = place.b, chunks = place.chunks;
    if (a.status[b] != kRunning) return;
    const bool given = a.needs_factors();
    const InputStep<A> input(a, given ? a.factors[2 * b] : a.step_size, given ? a.factors[2 * b + 1] : 1);
    const Chunk chunk(p, place.index);
    const JointPart& part = p.leaf[chunk.leaf];
    const int64_t end = min(chunk.begin + kSplitChunk, part.n);
    const Squares found = block_sums(map_numbers<A, S>(a, part, b, chunk.begin, end, input));
    double* partials = a.partials + b * 2 * chunks;  // (2, chunks)
    if (threadIdx.x == 0) {
        partials[place.index] = found.moved;
        partials[chunks + place.index] = found.size;
    }
    if (!last_to_arrive(&p.work.arrivals[b], chunks)) return;
    int64_t first = 0;
    int i = 0;
    for (int block = 0; block < a.n_blocks; ++block) {
        int64_t beyond = first;
        for (; i < a.n_parts && p.leaf[i].block == block; ++i) beyond += Chunk::chunks_in(p.leaf[i].n);
        if (warp_of() < 2) {  // a warp for each of the two norms
            double sum = 0;
            for (int64_t c = first + lane_of(); c < beyond; c += kWarpSize)
                sum += __ldcg(&partials[warp_of() * chunks + c]);
            sum = warp_sum(sum);
            if (lane_of() == 0) a.norm(block, warp_of(), b) = sqrt(sum) + a.doubt<A>(block, warp_of(), b);
        }
        first = beyond;
    }
}

template <class A, class S, int parts>
void run_joint(const JointArgs& a, const JointWork& work, int64_t numbers, int64_t chunks) {
    JointParams<parts> p;
    p.a = a;
    p.work = work;
    for (int i = 0; i < a.n_parts; ++i) p.leaf[i] = a.parts[i];
    p.a.parts = nullptr;
    const dim3 samples{unsigned(a.B)};
    if (numbers <= kBlockMaxN) {
        int threads = kJointThreads;
        while (threads > kWarpSize && numbers <= threads / 2 * kItems) threads /= 2;
        return launch(joint_sample_kernel<A, S, parts>, samples, threads, 0, work.stream, p);
    }
    if (a.needs_factors()) launch(joint_factors_kernel<A, S, parts>, samples, kJointThreads, 0, work.stream, p);
    launch(joint_chunk_kernel<A, S, parts>, grid_of(a.B, chunks), kJointThreads, 0, work.stream, p);
}

}  // namespace deqfast::cuda
