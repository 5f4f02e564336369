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

// The last block of a sample: totals of `n` products, (n, chunks), over its chunks; the whole block.
__device__ inline void add_chunks(const double* partials, int64_t chunks, int n, double* totals) {
    for (int d = warp_of(); d < n; d += int(blockDim.x) / kWarpSize) {
        double sum = 0;
        for (int64_t c = lane_of(); c < chunks; c += kWarpSize) sum += __ldcg(&partials[d * chunks + c]);
        sum = warp_sum(sum);
        if (lane_of() == 0) totals[d] = sum;
    }
    __syncthreads();
}

}  // namespace deqfast::cuda
