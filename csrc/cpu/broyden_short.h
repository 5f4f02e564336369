// Broyden's chain form for short samples: kLanes of them at a time, one a lane.
#pragma once

#include "broyden_sample.h"
#include "transpose.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A>
class BroydenShort {
    using V = Vec<A>;
    using Start = BroydenStart<A>;
    static constexpr int L = kLanes<A>;

   public:
    explicit BroydenShort(const BroydenArgs& args) : sample{args}, a(args) {}

    // The steps of samples b0 ... b0 + count - 1, those of them that run.
    void step(int64_t b0, int count, BroydenScratch<A>& s) const {
        const int N = int(a.N);
        const Leaf& leaf = a.leaves[0];
        const uint32_t present = count == L ? kAllLanes<A> : (1u << count) - 1;
        const V units = read<V>(static_cast<A*>(a.reals) + kUnit * a.padded + b0);
        const auto started = units > splat<A>(0);
        const IntVec<A> steps = read<IntVec<A>>(a.ints + kSteps * a.padded + b0);
        const uint32_t running = bits(read<IntVec<A>>(a.ints + kStatus * a.padded + b0) == int32_t(kRunning)) & present;
        const uint32_t out_of_steps = a.max_iter ? bits(steps + 1 >= a.max_iter) : 0;
        if (!running) return;

        alignas(64) A zeros[kShortN] = {};
        const A* rows[L];
        V f[kShortN], x[kShortN], z[kShortN], ff = {}, gg = {};
        const V unit = select(started, units, splat<A>(1));
        point<L>(rows, static_cast<const A*>(zeros), running,
                 [&](int i) { return read_source(leaf.f, f_row(a, b0 + i), 0, N, s.f + i * kShortN); });
        strips(rows, [&](int n, V value) { f[n] = value; });
        point<L>(rows, static_cast<const A*>(zeros), running,
                 [&](int i) { return read_block(row_of(leaf.x, a, leaf, b0 + i), a.dtype, 0, N, s.x + i * kShortN); });
        strips(rows, [&](int n, V value) {
            x[n] = value;
            z[n] = f[n] * unit - value * unit;
            ff += f[n] * unit * (f[n] * unit);
            gg += z[n] * z[n];
        });

        const Judged<A> judged = judge_lanes<A>(a, b0, count, ff, gg, running & bits(started) & ~out_of_steps);
        uint32_t going = judged.going;
        Start begin[L] = {};
        A scale_of[L], unit_of[L], squared_of[L];
        int longest = 0;
        for (int i = 0; i < L; ++i) {
            scale_of[i] = unit_of[i] = 1;
            if (!(running >> i & 1)) continue;
            const int64_t b = b0 + i;
            Verdict v;
            v.going = going >> i & 1;
            if (!v.going) {
                v = judge<A>(a, b, double(ff[i]), double(gg[i]), s.f);
                if (v.spill || !v.going) spill_and_rest(a, b, v);
            }
            if (!v.going) continue;
            going |= 1u << i;
            unit_of[i] = a.at<A>(kUnit, b);
            begin[i] = sample.begin(b, v);
            if (begin[i].measure) {
                double s_g = 0;
                for (int n = 0; n < N; ++n) s_g += double(sample.step_at(b, 0)[n]) * double(z[n][i]);
                begin[i] = {0, sample.measured_scale(b, s_g, double(gg[i])), false};
            }
            scale_of[i] = begin[i].scale;
            longest = std::max(longest, begin[i].count);
        }
        if (!going) return;
        const V new_unit = read<V>(unit_of), scale = read<V>(scale_of);
        const auto residual = [&](int n) { return (f[n] * new_unit - x[n] * new_unit) * scale; };
        for (int n = 0; n < N; ++n) z[n] = residual(n);

        V ratio = {}, denominator = splat<A>(1);
        for (int j = 0; j < longest; ++j) {
            uint32_t use = 0;
            A inverse[L];
            for (int i = 0; i < L; ++i) {
                const bool has = j < begin[i].count;
                use |= uint32_t(has) << i;
                inverse[i] = has ? A(1) / sample.norm(b0 + i, j) : A(0);
            }
            V product = {};
            point<L>(rows, static_cast<const A*>(zeros), use, [&](int i) { return sample.step_at(b0 + i, j); });
            strips(rows, [&](int n, V step) {
                z[n] += ratio * step;
                product += step * z[n];
            });
            const auto mask = lanes_of<A>(use);
            ratio = select(mask, product * read<V>(inverse), splat<A>(0));
            denominator = select(mask, splat<A>(1) - ratio, denominator);
        }
        const V by = splat<A>(1) / denominator;
        V squared = {};
        for (int n = 0; n < N; ++n) {
            z[n] *= by;
            squared += z[n] * z[n];
        }
        const V infinity = splat<A>(A(INFINITY));
        const auto usable = (absolute(denominator) >= splat<A>(A(kMinDenominator))) & (absolute(squared) < infinity);
        const uint32_t restart = going & ~bits(usable);
        if (restart) {
            const auto mask = lanes_of<A>(restart);
            V again = {};
            for (int n = 0; n < N; ++n) {
                z[n] = select(mask, residual(n), z[n]);
                again += z[n] * z[n];
            }
            squared = select(mask, again, squared);
        }
        write(squared_of, squared);

        A* out[L];
        alignas(64) A nowhere[kShortN];
        V next[kShortN];
        auto bad = V{} != V{};
        for (int n = 0; n < N; ++n) {
            next[n] = x[n] + z[n] / new_unit;
            bad |= ~(absolute(next[n]) < infinity);
        }
        for (int i = 0; i < L; ++i) {
            if (!(going >> i & 1)) continue;
            if (restart >> i & 1) {
                a.at(kDenominatorRestarts, b0 + i)++;
                begin[i].count = 0;
            }
            sample.norm(b0 + i, begin[i].count) = squared_of[i];
        }
        point<L>(out, static_cast<A*>(nowhere), going, [&](int i) { return sample.step_at(b0 + i, begin[i].count); });
        for (int at = 0; at < N; at += kStrip) transpose_out<A, A>(out, at, std::min(kStrip, N - at), z + at);
        uint32_t infinite = bits(bad) & going;
        if (a.dtype == kDTypeOf<A>) {
            point<L>(out, static_cast<A*>(nowhere), going,
                     [&](int i) { return static_cast<A*>(leaf.x_prev) + (b0 + i) * N; });
        } else {
            for (int i = 0; i < L; ++i) out[i] = s.out + i * kShortN;
        }
        for (int at = 0; at < N; at += kStrip) transpose_out<A, A>(out, at, std::min(kStrip, N - at), next + at);
        for (int i = 0; i < count; ++i) {
            if (!(going >> i & 1)) continue;
            bool finite = !(infinite >> i & 1);
            if (a.dtype != kDTypeOf<A>)
                finite = write_block(static_cast<void*>(row_of(leaf.x_prev, a, leaf, b0 + i)), a.dtype, 0, N, out[i]);
            if (!finite) sample.picard(b0 + i, s);
            sample.commit(b0 + i, begin[i].count, finite);
        }
    }

   private:
    const BroydenSample<A> sample;
    const BroydenArgs& a;

    // Numbers of one row a lane, in order.
    template <class Body>
    void strips(const A* const* rows, Body&& body) const {
        for (int at = 0; at < a.N; at += kStrip) {
            V part[kStrip];
            const int width = int(std::min<int64_t>(kStrip, a.N - at));
            transpose_in<A, A>(rows, at, width, part);
            for (int k = 0; k < width; ++k) body(at + k, part[k]);
        }
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
