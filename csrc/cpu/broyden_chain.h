// Broyden's chain form: every step vector is streamed past z once, added to it and multiplied with it in one sweep.
// A thread a sample, whose z stays in its cache.
#pragma once

#include "broyden_sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A>
class BroydenChain {
    using V = Vec<A>;
    using Start = BroydenStart<A>;
    static constexpr int L = kLanes<A>;

   public:
    explicit BroydenChain(const BroydenArgs& args) : sample{args}, a(args) {}

    // The step of running sample b.
    void step(int64_t b, BroydenScratch<A>& s) const {
        A* z = s.z;
        double g_g;
        const Verdict v = open(b, z, s, &g_g);
        if (!v.going) return;
        Start begin = sample.begin(b, v);
        if (begin.measure) begin = {0, sample.measured_scale(b, sweep(z, sample.step_at(b, 0), 0), g_g), false};
        if (begin.scale != 1)
            for (int64_t i = 0; i < a.N; ++i) z[i] *= begin.scale;
        A ratio = 0, denominator = 1;
        for (int j = 0; j < begin.count; ++j)
            ratio = A(sweep(z, sample.step_at(b, j), j ? ratio : A(0))) / sample.norm(b, j);
        if (begin.count) denominator = A(1) - ratio;
        int count = begin.count;
        double squared = finish_chain(b, z, count, denominator, s);
        if (!(std::abs(denominator) >= A(kMinDenominator)) || !std::isfinite(squared)) {
            a.at(kDenominatorRestarts, b)++;
            count = 0;
            double ff;
            load_residual(b, z, s, &ff, &g_g);
            squared = finish_chain(b, z, count, A(1) / begin.scale, s);
        }
        sample.norm(b, count) = A(squared);
        bool finite = true;
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t at = 0; at < a.leaves[l].n; at += kBlock)
                finite &= sample.advance(b, l, at, std::min<int64_t>(kBlock, a.leaves[l].n - at),
                                         sample.step_at(b, count) + a.leaves[l].offset + at, s);
        if (!finite) sample.picard(b, s);
        sample.commit(b, count, finite);
    }

   private:
    const BroydenSample<A> sample;
    const BroydenArgs& a;

    // Residual of the whole sample into z; returns the verdict.
    Verdict open(int64_t b, A* z, BroydenScratch<A>& s, double* g_g) const {
        double ff = 0, gg = 0;
        if (!sample.first(b)) load_residual(b, z, s, &ff, &gg);
        const Verdict v = judge<A>(a, b, ff, gg, s.f);
        if (v.spill || !v.going) spill_and_rest(a, b, v);
        if (v.reset || (v.going && !(gg > 0))) load_residual(b, z, s, &ff, &gg);
        *g_g = gg;
        return v;
    }

    void load_residual(int64_t b, A* z, BroydenScratch<A>& s, double* ff, double* gg) const {
        const V unit = splat<A>(a.at<A>(kUnit, b));
        *ff = *gg = 0;
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t c = 0; c < a.leaves[l].n; c += kChunk) {
                V f_sum = {}, g_sum = {};
                for (int64_t at = c; at < std::min(c + kChunk, a.leaves[l].n); at += kBlock) {
                    const int64_t count = std::min<int64_t>(kBlock, a.leaves[l].n - at);
                    sample.residual(b, l, at, count, unit, s, z + a.leaves[l].offset + at, &f_sum, &g_sum);
                }
                *ff += double(sum_lanes<A>(f_sum));
                *gg += double(sum_lanes<A>(g_sum));
            }
    }

    // z += weight * s, and the product of s with the result; weight 0 adds nothing.
    __attribute__((noinline)) double sweep(A* z, const A* s, A weight) const {
        const V w = splat<A>(weight);
        double sum = 0;
        for (int64_t c = 0; c < a.N; c += kChunk) {
            const int64_t end = std::min(c + kChunk, a.N);
            V part[4] = {};
            int64_t i = c;
            for (; i + 4 * L <= end; i += 4 * L)
                for (int k = 0; k < 4; ++k) {
                    const V si = read<V>(s + i + k * L);
                    const V zi = read<V>(z + i + k * L) + w * si;
                    write(z + i + k * L, zi);
                    part[k] += si * zi;
                }
            for_registers<A>(end - i, [&](int64_t k, auto rest) {
                const V si = load<A>(s + i + k, rest);
                const V zi = load<A>(z + i + k, rest) + w * si;
                store<A>(z + i + k, zi, rest);
                part[0] += si * zi;
            });
            sum += double(sum_lanes<A>((part[0] + part[1]) + (part[2] + part[3])));
        }
        return sum;
    }

    // The new step z / denominator into the history; returns its squared norm.
    double finish_chain(int64_t b, const A* z, int count, A denominator, BroydenScratch<A>&) const {
        A* target = sample.step_at(b, count);
        const V by = splat<A>(A(1) / denominator);
        double sum = 0;
        for (int64_t c = 0; c < a.N; c += kChunk) {
            const int64_t end = std::min(c + kChunk, a.N);
            V part = {};
            for_registers<A>(end - c, [&](int64_t i, auto rest) {
                const V v = load<A>(z + c + i, rest) * by;
                store<A>(target + c + i, v, rest);
                part += v * v;
            });
            sum += double(sum_lanes<A>(part));
        }
        return sum;
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
