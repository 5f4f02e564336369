// Broyden's chain form, a block a sample: every step vector is read once, added to z and multiplied with it. z lies in
// registers where a block holds the sample in one tile, else in shared memory.
// What moves, per number: x, f and k steps are read, one step and x written: 3s + (k+1)h, with x read again from cache.
#pragma once

#include "broyden_sample.cuh"
#include "launch.cuh"

namespace deqfast::cuda {

constexpr int kChainThreads = 512;

// Sums over a block, to every thread. Two slots take turns, so that one barrier a sum is enough.
class BlockSum {
   public:
    static constexpr int64_t bytes = kBlockSumBytes;
    __device__ explicit BlockSum(double* slots) : slots_(slots) {}

    __device__ __forceinline__ double operator()(double v) {
        v = warp_sum(v);
        const int warps = int(blockDim.x) / kWarpSize;
        if (warps == 1) return v;
        turn_ ^= 1;
        double* slot = slots_ + turn_ * kWarpSize;
        if (lane_of() == 0) slot[warp_of()] = v;
        __syncthreads();
        return warp_sum(lane_of() < warps ? slot[lane_of()] : 0.0);
    }

   private:
    double* slots_;
    int turn_ = 0;
};

template <class A, class S, int leaves>
class Chain {
   public:
    __device__ Chain(const BroydenParams<leaves>& p, int64_t b, char* memory)
        : s(p, b),
          a(p.a),
          sum(reinterpret_cast<double*>(memory)),
          z(reinterpret_cast<A*>(memory + BlockSum::bytes)),
          stride(int64_t(blockDim.x) * kItems) {}

    __device__ void run() {
        DEQFAST_BLOCK_SHARED int32_t outcome;
        DEQFAST_BLOCK_SHARED Start<A> begin;
        double ff, gg;
        load_residual(s.unit, &ff, &gg);
        if (threadIdx.x == 0) {
            outcome = judge<A>(a, s.p.work, s.b, ff, gg);
            if (outcome & kGoing) begin = s.start(outcome);
        }
        __syncthreads();
        for (int l = 0; l < a.n_leaves; ++l) spill_and_rest<S>(s.p.leaf[l], s.b, outcome, 0, s.p.leaf[l].n);
        if (!(outcome & kGoing)) return;
        const A unit = a.template at<A>(kUnit, s.b);
        if (unit != s.unit) load_residual(unit, &ff, &gg);
        if (begin.measure) {
            const double s_g = first_product();
            __syncthreads();
            if (threadIdx.x == 0) begin = s.measured(s_g, gg);
            __syncthreads();
        }
        int count = begin.count;
        const A ratio = count == 0 ? A(0) : a.N <= stride ? chain_in_registers(begin) : chain_in_memory(begin);
        const A denominator = A(1) - ratio;
        double squared = new_step(count, (count ? A(1) : begin.scale) / denominator);
        if (!(fabs(denominator) >= A(kMinDenominator)) || !isfinite(squared)) {
            count = 0;
            load_residual(unit, &ff, &gg);
            squared = new_step(count, begin.scale);
            if (threadIdx.x == 0) a.at(kDenominatorRestarts, s.b)++;
        }
        __syncthreads();
        const bool failed = __syncthreads_or(!advance(A(1) / unit));
        if (failed) s.picard();
        if (threadIdx.x != 0) return;
        s.norm(count) = A(squared);
        s.commit(count, !failed);
    }

   private:
    static constexpr int V = kGroup<A, S>;

    BroydenSample<A, S, leaves> s;
    const BroydenArgs& a;
    BlockSum sum;
    A* const z;
    const int64_t stride;  // numbers in a tile

    // Tiles of the whole sample, whichever leaf they belong to.
    __device__ __forceinline__ Tile<V> flat(int64_t at) const {
        return {at, int(min(stride, a.N - at)), a.N % kItems == 0};
    }

    // g in `unit` into z; the true squared norms.
    __device__ void load_residual(A unit, double* ff, double* gg) {
        double f_sum = 0, g_sum = 0;
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = s.p.leaf[l];
            for (int64_t at = 0; at < leaf.n; at += stride) {
                const Tile<V> tile = tile_of<V>(a, leaf, at, leaf.n);
                A g[kItems];
                s.residual(leaf, tile, unit, g, &f_sum, &g_sum);
                write_tile<ToShared>(z + leaf.offset, tile, g);
            }
        }
        *ff = sum(f_sum);
        *gg = sum(g_sum);
        __syncthreads();
    }

    static __device__ __forceinline__ A product(const A* u, const A* v) {
        A total = 0;
        for (int k = 0; k < kItems; ++k) total += u[k] * v[k];
        return total;
    }

    // s_0 . z
    __device__ double first_product() {
        double total = 0;
        for (int64_t at = 0; at < a.N; at += stride) {
            const Tile<V> tile = flat(at);
            A step[kItems], part[kItems];
            read_tile(s.step_at(0), tile, step);
            read_tile(z, tile, part);
            total += double(product(step, part));
        }
        return sum(total);
    }

    // z_j for every step but the last, with z_0 = H0 g; returns the last c_j / ||s_j||^2. The step after the one in use
    // is already being read while the block adds up.
    __device__ A chain_in_registers(const Start<A>& begin) {
        const Tile<V> tile = flat(0);
        A mine[kItems], step[kItems], ahead[kItems];
        read_tile(z, tile, mine);
        read_tile(s.step_at(0), tile, ahead);
        for (int k = 0; k < kItems; ++k) mine[k] *= begin.scale;
        const int count = begin.count;
        A ratio = 0, norm_ahead = s.norm(0);
        for (int j = 0; j < count; ++j) {
            const A norm = norm_ahead;
            for (int k = 0; k < kItems; ++k) step[k] = ahead[k];
            if (j + 1 < count) {
                read_tile(s.step_at(j + 1), tile, ahead);
                norm_ahead = s.norm(j + 1);
            }
            for (int k = 0; k < kItems; ++k) mine[k] += ratio * step[k];
            ratio = A(sum(double(product(step, mine)))) / norm;
        }
        write_tile<ToShared>(z, tile, mine);
        return ratio;
    }
    __device__ A chain_in_memory(const Start<A>& begin) {
        A ratio = 0, factor = begin.scale;
        for (int j = 0; j < begin.count; ++j) {
            const A norm = s.norm(j);
            double total = 0;
            for (int64_t at = 0; at < a.N; at += stride) {
                const Tile<V> tile = flat(at);
                A mine[kItems], step[kItems];
                read_tile(s.step_at(j), tile, step);
                read_tile(z, tile, mine);
                for (int k = 0; k < kItems; ++k) mine[k] = factor * mine[k] + ratio * step[k];
                total += double(product(step, mine));
                write_tile<ToShared>(z, tile, mine);
            }
            factor = 1;
            ratio = A(sum(total)) / norm;
        }
        return ratio;
    }

    // z times `by` becomes step number `count`; returns its squared norm.
    __device__ double new_step(int count, A by) {
        double total = 0;
        for (int64_t at = 0; at < a.N; at += stride) {
            const Tile<V> tile = flat(at);
            A mine[kItems];
            read_tile(z, tile, mine);
            for (int k = 0; k < kItems; ++k) mine[k] *= by;
            total += double(product(mine, mine));
            write_tile<ToShared>(z, tile, mine);
            write_tile(s.step_at(count), tile, mine);
        }
        return sum(total);
    }

    __device__ bool advance(A per_unit) {
        bool finite = true;
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = s.p.leaf[l];
            for (int64_t at = 0; at < leaf.n; at += stride) {
                const Tile<V> tile = tile_of<V>(a, leaf, at, leaf.n);
                A step[kItems];
                read_tile(z + leaf.offset, tile, step);
                finite &= s.advance(leaf, tile, per_unit, step);
            }
        }
        return finite;
    }
};

template <class A, class S, int leaves>
__global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ BroydenParams<leaves> p) {
    DEQFAST_SHARED(memory);
    const int64_t b = blockIdx.x;
    if (p.a.at(kStatus, b) == kRunning) Chain<A, S, leaves>(p, b, memory).run();
    finish(p.work, gridDim.x);
}

}  // namespace deqfast::cuda
