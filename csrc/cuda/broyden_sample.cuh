// What both forms of a Broyden step share: a sample's place in the workspace, its residual, the start of its chain, the
// next iterate.
#pragma once

#include "deqfast/broyden.h"
#include "source.cuh"
#include "verdict.cuh"

namespace deqfast::cuda {

template <int leaves>
struct BroydenParams {
    BroydenArgs a;
    DeviceWork work;
    int phase;
    Leaf leaf[leaves];
};

// How a sample goes on: from how many steps, with which multiple of the identity as H0.
template <class A>
struct Start {
    int count;
    A scale;
    bool measure;  // H0 is to be measured on the first step
};

template <class A, class S, int leaves>
class BroydenSample {
   public:
    static constexpr int V = kGroup<A, S>;

    __device__ BroydenSample(const BroydenParams<leaves>& params, int64_t sample)
        : p(params), a(params.a), b(sample), unit(a.template at<A>(kUnit, sample)) {}

    __device__ A* step_at(int j) const { return static_cast<A*>(a.history) + (b * a.memory + j) * a.N; }
    __device__ A& norm(int j) const { return static_cast<A*>(a.norms)[b * a.memory + j]; }
    __device__ A& gram(int i, int j) const { return static_cast<A*>(a.gram)[(b * a.memory + i) * a.memory + j]; }

    // By one thread, after the verdict.
    __device__ Start<A> start(int32_t outcome) const {
        int count = outcome & kReset ? 0 : a.at(kCount, b);
        const A scale = a.template at<A>(kScale, b);
        const bool measure = a.scale_first && count == 1 && scale == 0;
        if (!measure && count == a.memory) {
            a.at(kFullRestarts, b)++;
            count = 0;
        }
        return {count, scale > 0 ? scale : A(1), measure};
    }

    // By one thread: H0 from the first step s = g_0: y = g_0 - g, so that s.y = s.s - s.g and y.y = s.s - 2 s.g + g.g.
    // `gg` is the squared norm of g outside its unit. That step is forgotten.
    __device__ Start<A> measured(double s_g, double gg) const {
        const double s_s = double(norm(0)), g_g = gg * double(unit) * double(unit);
        double scale = (s_s - s_g) / (s_s - 2 * s_g + g_g);
        scale = !isfinite(scale) ? 1.0 : scale < 0.2 ? 0.2 : scale > 5.0 ? 5.0 : scale;
        a.template at<A>(kScale, b) = A(scale);
        return {0, A(scale), false};
    }

    __device__ void commit(int count, bool finite) const {
        a.at(kCount, b) = finite ? count + 1 : 0;
        a.at(kStepFallbacks, b) += !finite;
        after_step(a, b);
    }

    // g in `in_unit` for the thread's numbers of a tile; adds the true squared norms of f and g.
    __device__ __forceinline__ void residual(const Leaf& leaf, const Tile<V>& tile, A in_unit, A* g, double* ff,
                                             double* gg) const {
        A f[kItems], x[kItems];
        read_source<A, S>(leaf.f, f_row(a, b), tile, f);
        read_tile(row_of<S>(leaf.x, leaf, b), tile, x);
        for (int k = 0; k < kItems; ++k) {
            const double difference = double(f[k]) - double(x[k]);
            *ff += double(f[k]) * double(f[k]);
            *gg += difference * difference;
            g[k] = f[k] * in_unit - x[k] * in_unit;
        }
    }

    // x' = x + step / unit for the thread's numbers of a tile; false if not finite.
    __device__ __forceinline__ bool advance(const Leaf& leaf, const Tile<V>& tile, A per_unit, const A* step) const {
        A x[kItems];
        read_tile(row_of<S>(leaf.x, leaf, b), tile, x);
        for (int k = 0; k < kItems; ++k) x[k] += step[k] * per_unit;
        return write_state(row_of<S>(leaf.x_prev, leaf, b), tile, x);
    }

    // The step did not stay finite: x' = f; the whole block.
    __device__ void picard() const {
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = p.leaf[l];
            for (int64_t at = 0; at < leaf.n; at += int64_t(blockDim.x) * kItems) {
                const Tile<V> tile = tile_of<V>(a, leaf, at, leaf.n);
                A f[kItems];
                read_source<A, S>(leaf.f, f_row(a, b), tile, f);
                write_state(row_of<S>(leaf.x_prev, leaf, b), tile, f);
            }
        }
    }

    const BroydenParams<leaves>& p;
    const BroydenArgs& a;
    const int64_t b;
    const A unit;  // before the verdict; 0 at the first evaluation
};

}  // namespace deqfast::cuda
