// Broyden step on the CPU. Samples whose vector z fits in cache take the chain form: every step vector is streamed past
// z once, added to it and multiplied with it in one sweep. Larger samples take the Gram form, split over threads: one
// pass of independent products, a small recursion, one pass of combination. N alone decides.
#include "deqfast/broyden.h"

#include "lanes.h"
#include "sample.h"
#include "transpose.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

// Memory of one thread: block buffers, z (chain form), coefficients (Gram form).
template <class A>
struct Scratch {
    A *x, *f, *g, *out, *z;

    Scratch(const BroydenArgs& a, int thread) {
        A* p = reinterpret_cast<A*>(a.scratch + thread * a.scratch_bytes);
        for (A** block : {&x, &f, &g, &out}) {
            *block = p;
            p += kBlock + kTile;
        }
        z = p;
    }
};

template <class A>
class BroydenStep {
    using V = Vec<A>;
    static constexpr int L = kLanes<A>;

   public:
    explicit BroydenStep(const BroydenArgs& args) : a(args), D(2 + args.memory) {}

    void run(int phase) {
        if (a.gram) {
            if (phase & kReduce) reduce();
            if (phase & kApply) apply();
        } else {
            chains();
        }
        if (!(phase & kApply)) return;
        int64_t running = 0;
        for (int64_t b = 0; b < a.B; ++b) running += a.at(kStatus, b) == kRunning;
        *a.running = running;
    }

   private:
    const BroydenArgs& a;
    const int64_t D;

    A* step_at(int64_t b, int j) const { return static_cast<A*>(a.history) + (b * a.memory + j) * a.N; }
    A& norm(int64_t b, int j) const { return static_cast<A*>(a.norms)[b * a.memory + j]; }
    A& gram(int64_t b, int i, int j) const { return static_cast<A*>(a.gram)[(b * a.memory + i) * a.memory + j]; }
    bool first(int64_t b) const { return !(a.at<A>(kUnit, b) > 0); }

    // What a sample that goes on does next: from how many steps, with which H0.
    struct Start {
        int count;
        A scale;
        bool measure;  // H0 is to be measured on the first step
    };
    Start start(int64_t b, const Verdict& v) const {
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
    const A* residual(int64_t b, int l, int64_t at, int64_t count, V unit, Scratch<A>& s, A* out, V* ff, V* gg) const {
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
    bool advance(int64_t b, int l, int64_t at, int64_t count, const A* step, Scratch<A>& s) const {
        const Leaf& leaf = a.leaves[l];
        const A per_unit = A(1) / a.at<A>(kUnit, b);
        const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, at, count, s.x);
        for_registers<A>(count, [&](int64_t i, auto part) {
            write(s.out + i, load<A>(x + i, part) + load<A>(step + i, part) * per_unit);
        });
        return write_block(static_cast<void*>(row_of(leaf.x_prev, a, leaf, b)), a.dtype, at, count, s.out);
    }

    void picard(int64_t b, Scratch<A>& s) const {
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = a.leaves[l];
            for (int64_t at = 0; at < leaf.n; at += kBlock) {
                const int64_t count = std::min<int64_t>(kBlock, leaf.n - at);
                const A* f = read_source(leaf.f, f_row(a, b), at, count, s.f);
                write_block(static_cast<void*>(row_of(leaf.x_prev, a, leaf, b)), a.dtype, at, count, f);
            }
        }
    }

    // ---- chain form ----

    void chains() {
        const bool is_short = a.N <= kShortN && a.n_leaves == 1;
        const int64_t per_unit = is_short ? L : 1, units = (a.B + per_unit - 1) / per_unit;
        const int threads = int(std::min<int64_t>(a.threads, a.B * a.N * 8 < 16384 ? 1 : units));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t u = 0; u < units; ++u) {
            Scratch<A> s(a, thread_index());
            if (is_short)
                short_chains(u * per_unit, int(std::min(per_unit, a.B - u * per_unit)), s);
            else if (a.at(kStatus, u) == kRunning)
                chain(u, s);
        }
    }

    // Residual of the whole sample into z; returns the verdict.
    Verdict open(int64_t b, A* z, Scratch<A>& s, double* g_g) const {
        double ff = 0, gg = 0;
        if (!first(b)) load_residual(b, z, s, &ff, &gg);
        const Verdict v = judge<A>(a, b, ff, gg, s.f);
        if (v.spill || !v.going) spill_and_rest(a, b, v);
        if (v.reset || (v.going && !(gg > 0))) load_residual(b, z, s, &ff, &gg);
        *g_g = gg;
        return v;
    }

    void load_residual(int64_t b, A* z, Scratch<A>& s, double* ff, double* gg) const {
        const V unit = splat<A>(a.at<A>(kUnit, b));
        *ff = *gg = 0;
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t c = 0; c < a.leaves[l].n; c += kChunk) {
                V f_sum = {}, g_sum = {};
                for (int64_t at = c; at < std::min(c + kChunk, a.leaves[l].n); at += kBlock) {
                    const int64_t count = std::min<int64_t>(kBlock, a.leaves[l].n - at);
                    residual(b, l, at, count, unit, s, z + a.leaves[l].offset + at, &f_sum, &g_sum);
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

    void chain(int64_t b, Scratch<A>& s) const {
        A* z = s.z;
        double g_g;
        const Verdict v = open(b, z, s, &g_g);
        if (!v.going) return;
        Start begin = start(b, v);
        if (begin.measure) begin = {0, measured_scale(b, sweep(z, step_at(b, 0), 0), g_g), false};
        if (begin.scale != 1)
            for (int64_t i = 0; i < a.N; ++i) z[i] *= begin.scale;
        A ratio = 0, denominator = 1;
        for (int j = 0; j < begin.count; ++j) ratio = A(sweep(z, step_at(b, j), j ? ratio : A(0))) / norm(b, j);
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
        norm(b, count) = A(squared);
        bool finite = true;
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t at = 0; at < a.leaves[l].n; at += kBlock)
                finite &= advance(b, l, at, std::min<int64_t>(kBlock, a.leaves[l].n - at),
                                  step_at(b, count) + a.leaves[l].offset + at, s);
        if (!finite) picard(b, s);
        commit(b, count, finite);
    }

    // The new step z / denominator into the history; returns its squared norm.
    double finish_chain(int64_t b, const A* z, int count, A denominator, Scratch<A>&) const {
        A* target = step_at(b, count);
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

    // ---- chain form for short samples: kLanes of them at a time, one a lane ----

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

    void short_chains(int64_t b0, int count, Scratch<A>& s) const {
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
            begin[i] = start(b, v);
            if (begin[i].measure) {
                double s_g = 0;
                for (int n = 0; n < N; ++n) s_g += double(step_at(b, 0)[n]) * double(z[n][i]);
                begin[i] = {0, measured_scale(b, s_g, double(gg[i])), false};
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
                inverse[i] = has ? A(1) / norm(b0 + i, j) : A(0);
            }
            V product = {};
            point<L>(rows, static_cast<const A*>(zeros), use, [&](int i) { return step_at(b0 + i, j); });
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
            norm(b0 + i, begin[i].count) = squared_of[i];
        }
        point<L>(out, static_cast<A*>(nowhere), going, [&](int i) { return step_at(b0 + i, begin[i].count); });
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
            if (!finite) picard(b0 + i, s);
            commit(b0 + i, begin[i].count, finite);
        }
    }

    // ---- Gram form ----

    template <class Work>
    void for_chunks(Work&& work) {
        over_chunks(a, [&](int64_t b, int l, int64_t begin, int64_t unit) {
            Scratch<A> s(a, thread_index());
            work(b, l, begin, a.partials + unit * D, s);
        });
    }
    void sum_partials(int64_t b, double* sum) const {
        std::fill_n(sum, D, 0.0);
        for (int64_t c = 0; c < a.chunks; ++c)
            for (int64_t d = 0; d < D; ++d) sum[d] += a.partials[(b * a.chunks + c) * D + d];
    }

    // sums: ff, gg, then s_j . g.
    void reduce() {
        for_chunks([&](int64_t b, int l, int64_t begin, double* partial, Scratch<A>& s) {
            std::fill_n(partial, D, 0.0);
            if (!first(b)) products_with_residual(b, l, begin, a.at(kCount, b), partial, s);
        });
        for (int64_t b = 0; b < a.B; ++b)
            if (a.at(kStatus, b) == kRunning) sum_partials(b, a.sums + b * D);
    }

    __attribute__((noinline)) void products_with_residual(int64_t b, int l, int64_t begin, int count, double* partial,
                                                          Scratch<A>& s) const {
        const V unit = splat<A>(a.at<A>(kUnit, b));
        const int64_t end = std::min(begin + kChunk, a.leaves[l].n);
        V ff = {}, gg = {};
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t size = std::min<int64_t>(kBlock, end - at);
            const A* g = residual(b, l, at, size, unit, s, s.g, &ff, &gg);
            for (int j = 0; j < count; ++j) {
                const A* step = step_at(b, j) + a.leaves[l].offset + at;
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

    void apply() {
        // Per sample: verdict, and the coefficients of g and of the steps, into sums: [new count, of g, of s_1 ...].
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            Scratch<A> s(a, thread_index());
            double* sum = a.sums + b * D;
            const Verdict v = judge<A>(a, b, sum[0], sum[1], s.f);
            if (v.spill || !v.going) spill_and_rest(a, b, v);
            if (v.going) coefficients(b, v, sum);
        }
        for_chunks([&](int64_t b, int l, int64_t begin, double* partial, Scratch<A>& s) {
            combine(b, l, begin, a.sums + b * D, partial, s);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            double* sum = a.sums + b * D;
            const int count = int(sum[0]);
            sum_partials(b, sum);
            const bool finite = sum[0] == 0 && std::isfinite(sum[1]);
            norm(b, count) = A(sum[1]);
            for (int j = 0; j < count; ++j) gram(b, count, j) = A(sum[2 + j]);
            if (!finite) {
                Scratch<A> s(a, 0);
                picard(b, s);
            }
            commit(b, count, finite);
        }
    }

    void coefficients(int64_t b, const Verdict& v, double* sum) const {
        Start begin = start(b, v);
        if (begin.measure) begin = {0, measured_scale(b, sum[2], sum[1]), false};
        double* ratio = sum + 2;  // s_j . g, replaced by c_j / ||s_j||^2 one by one
        double denominator = 1;
        for (int j = 0; j < begin.count; ++j) {
            double c = double(begin.scale) * ratio[j];
            for (int i = 0; i < j; ++i) c += ratio[i] * double(i + 1 == j ? norm(b, j) : gram(b, j, i + 1));
            ratio[j] = c / double(norm(b, j));
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
                                           Scratch<A>& s) const {
        const int count = int(sum[0]);
        const V unit = splat<A>(a.at<A>(kUnit, b)), of_g = splat<A>(A(sum[1]));
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        std::fill_n(partial, D, 0.0);
        bool finite = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t size = std::min<int64_t>(kBlock, end - at);
            V ff = {}, gg = {};
            residual(b, l, at, size, unit, s, s.g, &ff, &gg);
            A* target = step_at(b, count) + leaf.offset + at;
            for_registers<A>(size,
                             [&](int64_t i, auto part) { store<A>(s.g + i, load<A>(s.g + i, part) * of_g, part); });
            for (int j = 1; j < count; j += 4)
                add_steps(b, j, std::min(4, count - j), sum + 1, leaf.offset + at, size, s.g);
            std::memcpy(target, s.g, size_t(size) * sizeof(A));
            partial[1] += double(product(s.g, s.g, size));
            for (int j = 0; j < count; ++j)
                partial[2 + j] += double(product(step_at(b, j) + leaf.offset + at, s.g, size));
            finite &= advance(b, l, at, size, s.g, s);
        }
        partial[0] = finite ? 0 : 1;
    }

    // out += sum over n <= 4 steps from s_j on; weights[j] belongs to s_j.
    void add_steps(int64_t b, int j, int n, const double* weights, int64_t at, int64_t size, A* out) const {
        const A* steps[4];
        V weight[4];
        for (int k = 0; k < 4; ++k) {
            steps[k] = step_at(b, j + (k < n ? k : 0)) + at;
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

}  // namespace

void broyden_step(const BroydenArgs& args, int phase) {
    if (args.dtype == DType::f64)
        BroydenStep<double>(args).run(phase);
    else
        BroydenStep<float>(args).run(phase);
}

}  // namespace deqfast::cpu::DEQFAST_ISA
