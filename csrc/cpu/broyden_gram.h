// Broyden's Gram form for large samples, split over threads: one pass of independent products, a small recursion, one
// pass of combination.
#pragma once

#include "broyden_sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A>
class BroydenGram {
    using V = Vec<A>;
    using Start = BroydenStart<A>;
    static constexpr int L = kLanes<A>;

   public:
    explicit BroydenGram(const BroydenArgs& args) : sample{args}, a(args), D(broyden_products(args.memory)) {}

    // sums: ff, gg, then s_j . g.
    void reduce() {
        for_chunks([&](int64_t b, int l, int64_t begin, double* partial, BroydenScratch<A>& s) {
            std::fill_n(partial, D, 0.0);
            if (!sample.first(b)) products_with_residual(b, l, begin, a.at(kCount, b), partial, s);
        });
        for (int64_t b = 0; b < a.B; ++b)
            if (a.at(kStatus, b) == kRunning) sum_partials(b, a.sums + b * D);
    }

    void apply() {
        // Per sample: verdict, and the coefficients of g and of the steps, into sums: [new count, of g, of s_1 ...].
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            BroydenScratch<A> s(a, thread_index());
            double* sum = a.sums + b * D;
            if (a.carry) take_carried(b, sum);
            const Verdict v = judge<A>(a, b, sum[0], sum[1], s.f);
            if (v.spill || !v.going) spill_and_rest(a, b, v);
            if (v.going) coefficients(b, v, sum);
        }
        for_chunks([&](int64_t b, int l, int64_t begin, double* partial, BroydenScratch<A>& s) {
            combine(b, l, begin, a.sums + b * D, partial, s);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            double* sum = a.sums + b * D;
            const int count = int(sum[0]);
            sum_partials(b, sum);
            const bool finite = sum[0] == 0 && std::isfinite(sum[1]);
            if (!finite) {
                BroydenScratch<A> s(a, 0);
                sample.picard(b, s);
            }
            if (a.carry) {
                std::copy_n(sum, D, a.carry + b * broyden_carried(a.memory));
                a.carry[b * broyden_carried(a.memory)] = finite ? 0 : 1;
                sample.commit(b, count, true);
            } else {
                enter(b, count, sum);
                sample.commit(b, count, finite);
            }
        }
    }

   private:
    const BroydenSample<A> sample;
    const BroydenArgs& a;
    const int64_t D;

    // The squared norm and the products of step `count`.
    void enter(int64_t b, int count, const double* found) const {
        sample.norm(b, count) = A(found[1]);
        for (int j = 0; j < count; ++j) sample.gram(b, count, j) = A(found[2 + j]);
    }

    // Of a spread sample, before its verdict: the newest step on all ranks. Where it was not finite on one of them no
    // step counts any more, and the products with them are none. (A sample that goes on after it had stopped has none.)
    void take_carried(int64_t b, double* sum) const {
        double* found = a.carry + b * broyden_carried(a.memory);
        const int count = a.at(kCount, b);
        if (count > 0 && found[0] >= 0) {
            if (found[0] == 0 && std::isfinite(found[1])) {
                enter(b, count - 1, found);
            } else {
                a.at(kStepFallbacks, b)++;
                a.at(kCount, b) = 0;
                std::fill_n(sum + 2, D - 2, 0.0);
            }
        }
        std::fill_n(found, broyden_carried(a.memory), 0.0);
        found[0] = -1;  // entered
    }

    template <class Work>
    void for_chunks(Work&& work) {
        over_chunks(a, [&](int64_t b, int l, int64_t begin, int64_t unit) {
            BroydenScratch<A> s(a, thread_index());
            work(b, l, begin, a.partials + unit * D, s);
        });
    }
    void sum_partials(int64_t b, double* sum) const {
        std::fill_n(sum, D, 0.0);
        for (int64_t c = 0; c < a.chunks; ++c)
            for (int64_t d = 0; d < D; ++d) sum[d] += a.partials[(b * a.chunks + c) * D + d];
    }

    __attribute__((noinline)) void products_with_residual(int64_t b, int l, int64_t begin, int count, double* partial,
                                                          BroydenScratch<A>& s) const {
        const V unit = splat<A>(a.at<A>(kUnit, b));
        const int64_t end = std::min(begin + kChunk, a.leaves[l].n);
        V ff = {}, gg = {};
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t size = std::min<int64_t>(kBlock, end - at);
            const A* g = sample.residual(b, l, at, size, unit, s, s.g, &ff, &gg);
            for (int j = 0; j < count; ++j) {
                const A* step = sample.step_at(b, j) + a.leaves[l].offset + at;
                partial[2 + j] += double(product(step, g, size));
            }
        }
        partial[0] = double(sum_lanes<A>(ff));
        partial[1] = double(sum_lanes<A>(gg));
    }

    static A product(const A* p, const A* q, int64_t count) {
        V part[4] = {};
        int64_t i = 0;
        for (; i + 4 * L <= count; i += 4 * L)
            for (int k = 0; k < 4; ++k) part[k] += read<V>(p + i + k * L) * read<V>(q + i + k * L);
        for_registers<A>(count - i,
                         [&](int64_t k, auto rest) { part[0] += load<A>(p + i + k, rest) * load<A>(q + i + k, rest); });
        return sum_lanes<A>((part[0] + part[1]) + (part[2] + part[3]));
    }

    void coefficients(int64_t b, const Verdict& v, double* sum) const {
        Start begin = sample.begin(b, v);
        if (begin.measure) begin = {0, sample.measured_scale(b, sum[2], sum[1]), false};
        double* ratio = sum + 2;  // s_j . g, replaced by c_j / ||s_j||^2 one by one
        double denominator = 1;
        for (int j = 0; j < begin.count; ++j) {
            double c = double(begin.scale) * ratio[j];
            for (int i = 0; i < j; ++i)
                c += ratio[i] * double(i + 1 == j ? sample.norm(b, j) : sample.gram(b, j, i + 1));
            ratio[j] = c / double(sample.norm(b, j));
        }
        if (begin.count) denominator = 1 - ratio[begin.count - 1];
        bool usable = std::abs(denominator) >= kMinDenominator;
        for (int j = 0; j < begin.count; ++j) usable &= std::isfinite(ratio[j]);
        if (!usable) {
            a.at(kDenominatorRestarts, b)++;
            begin.count = 0;
            denominator = 1;
        }
        sum[0] = begin.count;
        sum[1] = double(begin.scale) / denominator;
        for (int j = 0; j + 1 < begin.count; ++j) ratio[j] /= denominator;
    }

    // step = sum[1] g + sum_j sum[2 + j] s_{j+1} for one chunk, into the history and the next iterate. partial: 0 if
    // finite, the step's squared norm, its products with the older steps.
    __attribute__((noinline)) void combine(int64_t b, int l, int64_t begin, const double* sum, double* partial,
                                           BroydenScratch<A>& s) const {
        const int count = int(sum[0]);
        const V unit = splat<A>(a.at<A>(kUnit, b)), of_g = splat<A>(A(sum[1]));
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        std::fill_n(partial, D, 0.0);
        bool finite = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t size = std::min<int64_t>(kBlock, end - at);
            V ff = {}, gg = {};
            sample.residual(b, l, at, size, unit, s, s.g, &ff, &gg);
            A* target = sample.step_at(b, count) + leaf.offset + at;
            for_registers<A>(size,
                             [&](int64_t i, auto part) { store<A>(s.g + i, load<A>(s.g + i, part) * of_g, part); });
            for (int j = 1; j < count; j += 4)
                add_steps(b, j, std::min(4, count - j), sum + 1, leaf.offset + at, size, s.g);
            std::memcpy(target, s.g, size_t(size) * sizeof(A));
            partial[1] += double(product(s.g, s.g, size));
            for (int j = 0; j < count; ++j)
                partial[2 + j] += double(product(sample.step_at(b, j) + leaf.offset + at, s.g, size));
            finite &= sample.advance(b, l, at, size, s.g, s);
        }
        partial[0] = finite ? 0 : 1;
    }

    // out += sum over n <= 4 steps from s_j on; weights[j] belongs to s_j.
    void add_steps(int64_t b, int j, int n, const double* weights, int64_t at, int64_t size, A* out) const {
        const A* steps[4];
        V weight[4];
        for (int k = 0; k < 4; ++k) {
            steps[k] = sample.step_at(b, j + (k < n ? k : 0)) + at;
            weight[k] = splat<A>(k < n ? A(weights[j + k]) : A(0));
        }
        for_registers<A>(size, [&](int64_t i, auto part) {
            V sum = load<A>(out + i, part);
            for (int k = 0; k < 4; ++k)
                if (k < n) sum += weight[k] * load<A>(steps[k] + i, part);
            store<A>(out + i, sum, part);
        });
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
