// Samples that are split over blocks: which chunk a block has, and adding up what the blocks of a sample found, in an
// order that depends on the sample's size alone.
#pragma once

#include <stdexcept>

#include "verdict.cuh"

namespace deqfast::cuda {

// The chunk that a block works on.
struct Chunk {
    int leaf = 0;
    int64_t begin;

    template <class Params>
    __device__ Chunk(const Params& p, int64_t index) {
        for (; index >= chunks_in(p.leaf[leaf].n); ++leaf) index -= chunks_in(p.leaf[leaf].n);
        begin = index * kSplitChunk;
    }
    static __device__ int64_t chunks_in(int64_t n) { return (n + kSplitChunk - 1) / kSplitChunk; }
};

// Which sample and which of its chunks a block has. Grids are one-dimensional: the second dimension ends at 65,535.
struct Place {
    int64_t chunks = 0, b, index;

    template <class Params>
    __device__ Place(const Params& p, int tensors) {
        for (int i = 0; i < tensors; ++i) chunks += Chunk::chunks_in(p.leaf[i].n);
        b = int64_t(blockIdx.x) / chunks;
        index = int64_t(blockIdx.x) % chunks;
    }
};

inline dim3 grid_of(int64_t B, int64_t chunks) {
    if (B * chunks > 0x7fffffff) throw std::invalid_argument("z0: too large for one launch; solve a smaller batch");
    return dim3(unsigned(B * chunks));
}

// Sums of `n` products over `count` of the numbers that each has in a row of `from`, `stride` apart; a warp four of
// them, whose loads are under way together. `put(d, sum)` by one thread.
template <class Put>
__device__ __forceinline__ void add_rows(const double* from, int64_t stride, int64_t count, int n, Put&& put) {
    for (int first = warp_of() * 4; first < n; first += int(blockDim.x) / kWarpSize * 4) {
        double sum[4] = {};
        for (int64_t c = lane_of(); c < count; c += kWarpSize) DEQFAST_UNROLL
        for (int i = 0; i < 4; ++i)
            if (first + i < n) sum[i] += __ldcg(&from[(first + i) * stride + c]);
        const double total = warp_sum_4(sum[0], sum[1], sum[2], sum[3]);
        const int d = first + lane_of() / 8;
        if (lane_of() % 8 == 0 && d < n) put(d, total);
    }
}

// What the blocks of a sample add up through: its part of the work's partials and arrivals.
struct Adding {
    double* partials;   // (D, chunks), then (D, groups)
    int32_t* arrivals;  // of the sample, then of each group
    int64_t chunks, groups;
    int D;  // products a sample

    __device__ Adding(const DeviceWork& work, int64_t B, int64_t b, bool applies, int64_t chunk_count, int products)
        : chunks(chunk_count), groups(groups_of(chunk_count)), D(products) {
        partials = work.partials + b * D * (chunks + groups);
        arrivals = work.arrivals + ((applies ? B : 0) + b) * (1 + groups);
    }

    __device__ __forceinline__ double& of(int d, int64_t index) const { return partials[d * chunks + index]; }

    // After a block has entered its `n` products: true in the last block of the sample to arrive, where `totals` then
    // holds the sums. Many chunks are added up in groups first, each by the last of its blocks.
    __device__ bool up(int64_t index, int n, double* totals) const {
        double* of_groups = partials + D * chunks;
        if (groups) {
            const int64_t group = index / kGroupChunks, first = group * kGroupChunks;
            const int64_t size = min(int64_t(kGroupChunks), chunks - first);
            if (!last_to_arrive(&arrivals[1 + group], size)) return false;
            add_rows(partials + first, chunks, size, n,
                     [&](int d, double sum) { of_groups[d * groups + group] = sum; });
        }
        const int64_t count = groups ? groups : chunks;
        if (!last_to_arrive(arrivals, count)) return false;
        add_rows(groups ? of_groups : partials, count, count, n, [&](int d, double sum) { totals[d] = sum; });
        __syncthreads();
        return true;
    }
};

}  // namespace deqfast::cuda
