// Broyden's Gram form, a block a chunk, two launches: independent products of every step with g, a small recursion by
// the last block of a sample to arrive, and one combination. What moves, per number: the first launch reads x, f and k
// steps; the second reads them again, writes a step and x, and multiplies the new step with the k older ones, which it
// has just read: 5s + (2k+1)h where these are still in cache.
#pragma once

#include "broyden_sample.cuh"
#include "launch.cuh"
#include "split.cuh"

namespace deqfast::cuda {

constexpr int kGramThreads = 256;
constexpr int kTogether = 4;  // steps read at a time

// Between reduce and apply `sums` holds ff, gg, s_0.g, s_1.g, ...; between apply's launches the number of steps in use,
// the weight of g, those of s_1, s_2, ...
template <class A, class S, int leaves>
class Gram {
   public:
    static __host__ __device__ int64_t bytes(int memory) { return gram_shared(memory, kGramThreads / kWarpSize); }
    __device__ Gram(const BroydenParams<leaves>& p, int64_t b, char* memory)
        : s(p, b),
          a(p.a),
          D(int(broyden_products(p.a.memory))),
          sums(reinterpret_cast<double*>(memory)),
          warp_sums(sums + D) {}

    // Products of a chunk with g into `partials`; true in the last block of the sample, where `sums` holds the totals.
    __device__ bool reduce(int64_t index, int64_t chunks) {
        const int count = s.unit > 0 ? a.at(kCount, s.b) : 0;
        const Chunk chunk(s.p, index);
        const Leaf& leaf = s.p.leaf[chunk.leaf];
        clear();
        const int64_t end = min(chunk.begin + kSplitChunk, leaf.n);
        for (int64_t at = chunk.begin; at < end; at += int64_t(blockDim.x) * kItems) {
            const Tile<V> tile = tile_of<V>(a, leaf, at, end);
            double ff = 0, gg = 0;
            A g[kItems];
            s.residual(leaf, tile, s.unit, g, &ff, &gg);
            ff = warp_sum(ff);
            gg = warp_sum(gg);
            if (lane_of() == 0) add(0, ff), add(1, gg);
            products(2, count, Tile<V>{leaf.offset + at, tile.count, tile.neighbours}, g);
        }
        return total(2 + count, index, Adding(s.p.work, a.B, s.b, false, chunks, D));
    }

    // By one warp: the verdict, and from the products the weights.
    __device__ int32_t decide() {
        int32_t outcome = 0;
        Start<A> begin = {0, A(1), false};
        if (lane_of() == 0) {
            outcome = judge<A>(a, s.p.work, s.b, sums[0], sums[1]);
            s.p.work.outcomes[s.b] = outcome;
            if (outcome & kGoing) {
                begin = s.start(outcome);
                if (begin.measure) begin = s.measured(sums[2], sums[1]);
            }
        }
        outcome = __shfl_sync(kAll, outcome, 0);
        if (!(outcome & kGoing)) return outcome;
        int count = __shfl_sync(kAll, begin.count, 0);
        const double scale = double(__shfl_sync(kAll, begin.scale, 0));
        double* ratio = sums + 2;
        recursion(ratio, count, scale);
        bool usable = true;
        for (int j = lane_of(); j < count; j += kWarpSize) usable = usable && isfinite(ratio[j]);
        double denominator = count ? 1 - ratio[count - 1] : 1.0;
        if (__any_sync(kAll, !(usable && fabs(denominator) >= kMinDenominator))) {
            if (lane_of() == 0) a.at(kDenominatorRestarts, s.b)++;
            count = 0;
            denominator = 1;
        }
        double* out = a.sums + s.b * D;
        for (int j = lane_of(); j + 1 < count; j += kWarpSize) out[2 + j] = ratio[j] / denominator;
        if (lane_of() == 0) out[0] = count, out[1] = scale / denominator;
        return outcome;
    }

    __device__ void load_sums() {
        for (int d = int(threadIdx.x); d < D; d += int(blockDim.x)) sums[d] = a.sums[s.b * D + d];
        __syncthreads();
    }
    __device__ void save_sums() const {
        for (int d = int(threadIdx.x); d < D; d += int(blockDim.x)) a.sums[s.b * D + d] = sums[d];
    }

    // The new step and the next iterate for one chunk; the last block of the sample enters the new step.
    __device__ void apply(int64_t index, int64_t chunks, int32_t outcome) {
        const DeviceWork& work = s.p.work;
        const Adding adding(work, a.B, s.b, true, chunks, D);
        const Chunk chunk(s.p, index);
        const Leaf& leaf = s.p.leaf[chunk.leaf];
        const int64_t end = min(chunk.begin + kSplitChunk, leaf.n);
        spill_and_rest<S>(leaf, s.b, outcome, chunk.begin, end);
        __syncthreads();
        if (!(outcome & kGoing)) {
            if (last_to_arrive(adding.arrivals, chunks) && threadIdx.x == 0) work.outcomes[s.b] = 0;
            return;
        }
        load_sums();
        clear();
        const int count = int(sums[0]);
        bool finite = true;
        for (int64_t at = chunk.begin; at < end; at += int64_t(blockDim.x) * kItems)
            finite &= combine(leaf, tile_of<V>(a, leaf, at, end), count);
        if (__syncthreads_or(!finite) && threadIdx.x == 0) atomicOr(&work.infinite[s.b], 1);
        if (!total(1 + count, index, adding)) return;
        const bool failed = atomicOr(&work.infinite[s.b], 0) || !isfinite(sums[0]);
        if (failed) s.picard();
        for (int j = int(threadIdx.x); j < count; j += int(blockDim.x)) s.gram(count, j) = A(sums[1 + j]);
        __syncthreads();
        if (threadIdx.x != 0) return;
        s.norm(count) = A(sums[0]);
        s.commit(count, !failed);
        work.outcomes[s.b] = work.infinite[s.b] = 0;
    }

   private:
    static constexpr int V = kGroup<A, S>;

    BroydenSample<A, S, leaves> s;
    const BroydenArgs& a;
    const int D;
    double *const sums, *const warp_sums;  // (D), (warps, D)

    __device__ void clear() {
        for (int i = int(threadIdx.x); i < D * (int(blockDim.x) / kWarpSize); i += int(blockDim.x)) warp_sums[i] = 0;
        __syncthreads();
    }
    __device__ __forceinline__ void add(int product, double value) { warp_sums[warp_of() * D + product] += value; }

    // Products of `count` steps with v, to the sums from `base` on.
    __device__ __forceinline__ void products(int base, int count, const Tile<V>& column, const A* v) {
        for (int j = 0; j < count; j += kTogether) {
            A step[kTogether][kItems], sum[kTogether];
            DEQFAST_UNROLL
            for (int i = 0; i < kTogether; ++i) read_tile(s.step_at(min(j + i, count - 1)), column, step[i]);
            DEQFAST_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                sum[i] = 0;
                for (int k = 0; k < kItems; ++k) sum[i] += step[i][k] * v[k];
            }
            const A of_lanes = warp_sum_4(sum[0], sum[1], sum[2], sum[3]);
            const int mine = lane_of() / 8;
            if (lane_of() % 8 == 0 && j + mine < count) add(base + j + mine, double(of_lanes));
        }
    }

    __device__ bool combine(const Leaf& leaf, const Tile<V>& tile, int count) {
        const A unit = a.template at<A>(kUnit, s.b), of_g = A(sums[1]);
        const Tile<V> column{leaf.offset + tile.begin, tile.count, tile.neighbours};
        double ff = 0, gg = 0;
        A out[kItems];
        s.residual(leaf, tile, unit, out, &ff, &gg);
        for (int k = 0; k < kItems; ++k) out[k] *= of_g;
        for (int j = 1; j < count; j += kTogether) {
            A step[kTogether][kItems];
            DEQFAST_UNROLL
            for (int i = 0; i < kTogether; ++i) read_tile(s.step_at(min(j + i, count - 1)), column, step[i]);
            DEQFAST_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                const A weight = j + i < count ? A(sums[1 + j + i]) : A(0);
                if (j + i < count)
                    for (int k = 0; k < kItems; ++k) out[k] += weight * step[i][k];
            }
        }
        write_tile(s.step_at(count), column, out);
        A squared = 0;
        for (int k = 0; k < kItems; ++k) squared += out[k] * out[k];
        squared = warp_sum(squared);
        if (lane_of() == 0) add(0, double(squared));
        products(1, count, column, out);
        return s.advance(leaf, tile, A(1) / unit, out);
    }

    // Adds up the block's first n sums and, in the last block of the sample to arrive, the blocks'. Then every thread
    // of that block may read `sums`.
    __device__ bool total(int n, int64_t index, const Adding& adding) {
        __syncthreads();
        for (int d = int(threadIdx.x); d < n; d += int(blockDim.x)) {
            double sum = 0;
            for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) sum += warp_sums[w * D + d];
            adding.of(d, index) = sum;
        }
        return adding.up(index, n, sums);
    }

    // s_j.s_i
    __device__ __forceinline__ double entry(int j, int i) const { return double(i == j ? s.norm(j) : s.gram(j, i)); }

    // By one warp: from the products s_j.g the ratios c_j / ||s_j||^2, in place. A lane has a row of the triangle:
    // first what the ratios of earlier rows add to it, 32 rows at a time, then those of its own 32 one after another.
    __device__ void recursion(double* ratio, int count, double scale) const {
        for (int first = 0; first < count; first += kWarpSize) {
            const int j = first + lane_of(), rows = min(kWarpSize, count - first);
            const bool mine = j < count;
            const double inverse = mine ? 1 / double(s.norm(j)) : 0;
            double c = mine ? scale * ratio[j] : 0;
            if (mine)
                for (int i = 0; i < first; ++i) c += ratio[i] * entry(j, i + 1);
            for (int l = 0; l < rows; ++l) {
                const double from = __shfl_sync(kAll, c * inverse, l);
                if (mine && lane_of() > l) c += from * entry(j, first + l + 1);
            }
            if (mine) ratio[j] = c * inverse;
            __syncwarp();
        }
    }
};

template <class A, class S, int leaves>
__global__ void __launch_bounds__(kGramThreads, sizeof(A) == 8 ? 1 : 2)
    gram_reduce_kernel(const __grid_constant__ BroydenParams<leaves> p) {
    DEQFAST_SHARED(memory);
    const Place place(p, p.a.n_leaves);
    if (p.a.at(kStatus, place.b) != kRunning) return;
    Gram<A, S, leaves> gram(p, place.b, memory);
    if (!gram.reduce(place.index, place.chunks)) return;
    if (!(p.phase & kApply))
        gram.save_sums();
    else if (warp_of() == 0)
        gram.decide();
}

// Between the halves: one warp a sample.
template <class A, class S, int leaves>
__global__ void __launch_bounds__(kWarpSize, 1) gram_decide_kernel(const __grid_constant__ BroydenParams<leaves> p) {
    DEQFAST_SHARED(memory);
    const int64_t b = blockIdx.x;
    if (p.a.at(kStatus, b) != kRunning) return;
    Gram<A, S, leaves> gram(p, b, memory);
    gram.load_sums();
    gram.decide();
}

template <class A, class S, int leaves>
__global__ void __launch_bounds__(kGramThreads, sizeof(A) == 8 ? 1 : 2)
    gram_apply_kernel(const __grid_constant__ BroydenParams<leaves> p) {
    DEQFAST_SHARED(memory);
    const Place place(p, p.a.n_leaves);
    const int32_t outcome = p.work.outcomes[place.b];
    if (outcome & kJudged) Gram<A, S, leaves>(p, place.b, memory).apply(place.index, place.chunks, outcome);
    finish(p.work, gridDim.x);
}

}  // namespace deqfast::cuda
