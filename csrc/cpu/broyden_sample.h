// One sample of a Broyden step: its place in the workspace, and what every schedule does with it.
#pragma once

#include "deqfast/broyden.h"
#include "lanes.h"
#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

// Memory of one thread: block buffers, z (chain form), coefficients (Gram form).
template <class A>
struct BroydenScratch {
    A *x, *f, *g, *out, *z;

    BroydenScratch(const BroydenArgs& a, int thread) {
        A* p = reinterpret_cast<A*>(a.scratch + thread * a.scratch_bytes);
        for (A** block : {&x, &f, &g, &out}) {
            *block = p;
            p += kBlock + kTile;
        }
        z = p;
    }
};

// What a sample that goes on does next: from how many steps, with which H0.
template <class A>
struct BroydenStart {
    int count;
    A scale;
    bool measure;  // H0 is to be measured on the first step
};

template <class A>
struct BroydenSample {
    using V = Vec<A>;
    using Start = BroydenStart<A>;

    const BroydenArgs& a;

    A* step_at(int64_t b, int j) const { return static_cast<A*>(a.history) + (b * a.memory + j) * a.N; }
    A& norm(int64_t b, int j) const { return static_cast<A*>(a.norms)[b * a.memory + j]; }
    A& gram(int64_t b, int i, int j) const { return static_cast<A*>(a.gram)[(b * a.memory + i) * a.memory + j]; }
    bool first(int64_t b) const { return !(a.at<A>(kUnit, b) > 0); }

    Start begin(int64_t b, const Verdict& v) const {
        int count = v.reset ? 0 : a.at(kCount, b);
        const A scale = a.at<A>(kScale, b);
        const bool measure = a.scale_first && count == 1 && scale == 0;
        if (!measure && count == a.memory) {
            a.at(kFullRestarts, b)++;
            count = 0;
        }
        return {count, scale > 0 ? scale : A(1), measure};
    }

    // H0 from the first step s = g_0: y = g_0 - g, so that s.y = s.s - s.g and y.y = s.s - 2 s.g + g.g.
    A measured_scale(int64_t b, double s_g, double g_g) const {
        const double s_s = double(norm(b, 0));
        double scale = (s_s - s_g) / (s_s - 2 * s_g + g_g);
        scale = !std::isfinite(scale) ? 1.0 : scale < 0.2 ? 0.2 : scale > 5.0 ? 5.0 : scale;
        return a.at<A>(kScale, b) = A(scale);
    }

    void commit(int64_t b, int count, bool finite) const {
        a.at(kCount, b) = finite ? count + 1 : 0;
        a.at(kStepFallbacks, b) += !finite;
        after_step(a, b);
    }

    // ---- reading the residual ----

    // g in the sample's unit for numbers [at, at + count) of leaf l, padded with zeros to whole registers.
    const A* residual(int64_t b, int l, int64_t at, int64_t count, V unit, BroydenScratch<A>& s, A* out, V* ff,
                      V* gg) const {
        const Leaf& leaf = a.leaves[l];
        const A* f = read_source(leaf.f, f_row(a, b), at, count, s.f);
        const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, at, count, s.x);
        V f_sum = *ff, g_sum = *gg;
        for_registers<A>(count, [&](int64_t i, auto part) {
            const V fi = load<A>(f + i, part) * unit;
            const V gi = fi - load<A>(x + i, part) * unit;
            f_sum += fi * fi;
            g_sum += gi * gi;
            store<A>(out + i, gi, part);
        });
        *ff = f_sum;
        *gg = g_sum;
        return out;
    }

    // x' = x + step / unit for numbers [at, at + count) of leaf l; false if not finite.
    bool advance(int64_t b, int l, int64_t at, int64_t count, const A* step, BroydenScratch<A>& s) const {
        const Leaf& leaf = a.leaves[l];
        const A per_unit = A(1) / a.at<A>(kUnit, b);
        const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, at, count, s.x);
        for_registers<A>(count, [&](int64_t i, auto part) {
            write(s.out + i, load<A>(x + i, part) + load<A>(step + i, part) * per_unit);
        });
        return write_block(static_cast<void*>(row_of(leaf.x_prev, a, leaf, b)), a.dtype, at, count, s.out);
    }

    void picard(int64_t b, BroydenScratch<A>& s) const {
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = a.leaves[l];
            for (int64_t at = 0; at < leaf.n; at += kBlock) {
                const int64_t count = std::min<int64_t>(kBlock, leaf.n - at);
                const A* f = read_source(leaf.f, f_row(a, b), at, count, s.f);
                write_block(static_cast<void*>(row_of(leaf.x_prev, a, leaf, b)), a.dtype, at, count, f);
            }
        }
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
