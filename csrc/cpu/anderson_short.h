// Anderson steps of samples of a few numbers, kLanes at a time, one a lane: every sum over a sample is then a sum over
// registers, and nothing is done one sample at a time but what is rare.
#pragma once

#include "anderson_columns.h"
#include "transpose.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A, class H>
class AndersonShort {
    using V = Vec<A>;
    using Ints = IntVec<A>;

   public:
    explicit AndersonShort(const AndersonArgs& args) : columns(args), sample(columns.sample), a(args) {}

    void run() const {
        constexpr int L = kLanes<A>;
        const int64_t units = (a.B + L - 1) / L;
        const int threads = int(std::min<int64_t>(a.threads, a.B * a.N * (a.m + 1) < 16384 ? 1 : units));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t u = 0; u < units; ++u) {
            Scratch<A> s(a, thread_index());
            prefetch_group((u + 1) * L);
            short_group(u * L, int(std::min<int64_t>(L, a.B - u * L)), s);
        }
    }

   private:
    const AndersonColumns<A, H> columns;
    const AndersonSample<A, H>& sample;
    const AndersonArgs& a;

    // Rows of column j of a history whose first rows are given, for the lanes in `use`; else a row of zeros.
    static void point_column(const H** rows, const H* const* first_rows, const H* zeros, uint32_t use, int64_t at) {
        for (int i = 0; i < kLanes<A>; ++i) rows[i] = first_rows[i] + at;
        if (use == kAllLanes<A>) return;
        for (int i = 0; i < kLanes<A>; ++i)
            if (!(use >> i & 1)) rows[i] = zeros;
    }
    template <class T, class Body>
    void strips(const T* const* rows, Body&& body) const {
        for (int at = 0; at < a.N; at += kStrip) {
            V part[kStrip];
            const int width = int(std::min<int64_t>(kStrip, a.N - at));
            transpose_in<A, T>(rows, at, width, part);
            for (int k = 0; k < width; ++k) body(at + k, part[k]);
        }
    }
    template <class T>
    void strips_out(T* const* rows, const V* from) const {
        for (int at = 0; at < a.N; at += kStrip)
            transpose_out<A, T>(rows, at, int(std::min<int64_t>(kStrip, a.N - at)), from + at);
    }
    // One number of the history as it will be read back.
    static V as_stored(V v) {
        H part[kLanes<A>];
        Codec<A, H>::store(part, v);
        return Codec<A, H>::load(part);
    }

    // c of W_j = dF_j - c dG_j: 0 for turned columns.
    V test_space(const A* norms, int j) const {
        const V c = splat<A>(A(a.test_space)), zero = splat<A>(0);
        return a.turn > 0 ? select(read<V>(norms + (a.m + j) * kTile) < zero, zero, c) : c;
    }

    // What the passes over a group of short samples share.
    struct Short {
        int64_t b0;
        int count, lane0;
        const H* d_f[kLanes<A>];  // first column of each lane
        const H* d_g[kLanes<A>];
        alignas(64) H zeros[kShortN] = {};
        V *f, *x, *g, *w, *v, *d_f_new, *out;
    };

    void short_group(int64_t b0, int count, Scratch<A>& s) const {
        constexpr int L = kLanes<A>;
        const int N = int(a.N);
        const Leaf& leaf = a.leaves[0];
        Short t;
        t.b0 = b0;
        t.count = count;
        t.lane0 = int(b0 % kTile);
        const uint32_t present = count == L ? kAllLanes<A> : (1u << count) - 1;
        const V units = read<V>(sample.real_row(kUnit) + b0);
        const Ints steps = read<Ints>(sample.int_row(kSteps) + b0);
        const auto started = units > splat<A>(0);
        // Lanes that are evaluated, that read older columns, that get a new one.
        const uint32_t running = bits(read<Ints>(sample.int_row(kStatus) + b0) == int32_t(kRunning)) & present;
        const uint32_t out_of_steps = a.max_iter ? bits(steps + 1 >= a.max_iter) : 0;
        const uint32_t looking = running & bits(started) & ~out_of_steps;
        const uint32_t adding = a.has_previous && a.m > 0 ? looking : 0;
        if (!running) return;
        const V unit = select(started, units, splat<A>(1));
        const V slots = select(lanes_of<A>(adding), __builtin_convertvector(read<Ints>(sample.int_row(kSlot) + b0), V),
                               splat<A>(-1));
        A slot_of[L];
        write(slot_of, slots);
        t.f = s.short_sample;
        t.x = t.f + N;
        t.g = t.x + N;
        t.w = t.g + N;
        t.v = t.w + N;
        t.d_f_new = t.v + N;
        t.out = t.d_f_new + N;
        alignas(64) A zeros[kShortN] = {};
        alignas(64) H nowhere[kShortN];
        A *const stage_f = s.rows, *const stage_x = s.f;
        const A* rows[L];
        const auto state_row = [&](void* base, int i) {
            return read_block(row_of(base, a, leaf, b0 + i), a.dtype, 0, N, stage_x + i * kShortN);
        };

        V head[kHeadProducts] = {};
        const auto source_rows = [&](const Source& source, const int32_t* map, uint32_t use) {
            if (use == kAllLanes<A> && source.dense && source.dtype == kDTypeOf<A> && !map) {
                const A* base = static_cast<const A*>(source.data) + b0 * source.batch_stride;
                for (int i = 0; i < L; ++i) rows[i] = base + i * source.batch_stride;
            } else {
                point<L>(rows, static_cast<const A*>(zeros), use, [&](int i) {
                    return read_source(source, map ? map[b0 + i] : b0 + i, 0, N, stage_f + i * kShortN);
                });
            }
        };
        source_rows(leaf.f, a.f_rows, running);
        strips(rows, [&](int n, V value) { t.f[n] = value; });
        point<L>(rows, static_cast<const A*>(zeros), running, [&](int i) { return state_row(leaf.x, i); });
        strips(rows, [&](int n, V value) {
            t.x[n] = value;
            const V scaled_f = t.f[n] * unit;
            t.g[n] = scaled_f - value * unit;
            head[kFF] += scaled_f * scaled_f;
            head[kGG] += t.g[n] * t.g[n];
        });
        if (a.gram)
            for (int i = 0; i < L; ++i) {
                const int64_t b = b0 + (i < count ? i : 0);
                t.d_f[i] = sample.column(0, b, 0);
                t.d_g[i] = sample.column(1, b, 0);
            }
        const V c = splat<A>(A(a.test_space));
        if (adding) {
            source_rows(leaf.f_prev, a.f_prev_rows, adding);
            strips(rows, [&](int n, V value) { t.d_f_new[n] = t.f[n] * unit - value * unit; });
            point<L>(rows, static_cast<const A*>(zeros), adding, [&](int i) { return state_row(leaf.x_prev, i); });
            strips(rows, [&](int n, V value) {
                const V v = as_stored(t.d_f_new[n] - (t.x[n] * unit - value * unit));
                t.v[n] = v;
                t.d_f_new[n] = as_stored(t.d_f_new[n]);
                t.w[n] = t.d_f_new[n] - c * v;
                head[kQQ] += v * v;
                head[kWW] += t.w[n] * t.w[n];
                head[kWG] += t.w[n] * t.g[n];
                head[kVG] += v * t.g[n];
                head[kWV] += t.w[n] * v;
            });
            H* columns[L];
            for (int which = 0; a.gram && which < 2; ++which) {
                point<L>(columns, nowhere, adding,
                         [&](int i) { return sample.column(which, b0 + i, int(slot_of[i])); });
                strips_out<H>(columns, which ? t.v : t.d_f_new);
            }
        } else {
            std::fill_n(t.w, N, V{});
            std::fill_n(t.v, N, V{});
        }
        const A* norms = a.m ? sample.tile(b0 / kTile).norms + t.lane0 : nullptr;
        const auto older = [&](int j) {
            const auto old = (read<V>(norms + j * kTile) > splat<A>(0)) & (slots != splat<A>(A(j)));
            return bits(old) & looking;
        };
        const Tiny tiny(s.tiny);
        if (a.gram) {
            for (int j = 0; j < a.m; ++j)
                if (const uint32_t use = older(j)) short_products(t, j, use, test_space(norms, j), s);
        } else if (a.m > 0) {
            const auto turned = turns<V>(splat<A>(A(a.turn)), head[kWV], head[kQQ]);
            const V c_new = a.turn > 0 ? select(turned, splat<A>(0), c) : c;
            for (int j = 0; j < a.m; ++j) tiny_column(t, j, older(j), adding, slots, test_space(norms, j), c_new, tiny);
            tiny_products(t, tiny, s);
        }
        for (int p = 0; p < kHeadProducts; ++p) write(s.products + p * kTile + t.lane0, head[p]);
        Lanes<A> lanes;
        const uint32_t going = short_verdict(t, head[kFF], head[kGG], looking, running, slot_of, lanes, s);
        if (!going) return;
        const AllProducts<A> all{tiny.matrix, tiny.gram};
        if (a.m > 0) sample.solve_lanes(b0, count, true, lanes, s, a.gram ? nullptr : &all);
        short_mix(t, tiny, going, select(lanes_of<A>(going), read<V>(sample.real_row(kUnit) + b0), splat<A>(1)), s);
    }

    // ---- up to kTinyN numbers: the small matrices would be larger than the history that they are made of ----

    // All columns of a group, the new one among them, padded with zeros to kTinyN numbers, and their products.
    struct Tiny {
        V *d_f, *d_g, *w, *gram, *matrix;
        explicit Tiny(V* base)
            : d_f(base),
              d_g(base + kTinyN * kTinyN),
              w(base + 2 * kTinyN * kTinyN),
              gram(base + 3 * kTinyN * kTinyN),
              matrix(base + 4 * kTinyN * kTinyN) {}
    };

    H* tiny_history(int which, int64_t b, int j) const {
        const int64_t tiles = (a.B + kTile - 1) / kTile;
        return static_cast<H*>(a.history) + ((which * tiles + b / kTile) * a.m + j) * a.N * kTile + b % kTile;
    }

    // Column j as it will be used: the older lanes, the new ones, zeros elsewhere; writes the new ones.
    void tiny_column(const Short& t, int j, uint32_t use, uint32_t adding, V slots, V c_old, V c_new,
                     const Tiny& tiny) const {
        V *d_f = tiny.d_f + j * kTinyN, *d_g = tiny.d_g + j * kTinyN, *w = tiny.w + j * kTinyN;
        H *from_f = tiny_history(0, t.b0, j), *from_g = tiny_history(1, t.b0, j);
        const auto old = lanes_of<A>(use), is_new = lanes_of<A>(adding) & (slots == splat<A>(A(j)));
        const bool writes = any(is_new);
        const V c = select(is_new, c_new, c_old);
        const V zero = splat<A>(0);
        int n = 0;
        for (; n < a.N; ++n, from_f += kTile, from_g += kTile) {
            const V f = select(is_new, t.d_f_new[n], load<A>(from_f, Whole{}));
            const V g = select(is_new, t.v[n], load<A>(from_g, Whole{}));
            if (writes) {
                store<A>(from_f, f, Whole{});
                store<A>(from_g, g, Whole{});
            }
            d_f[n] = select(old | is_new, f, zero);
            d_g[n] = select(old | is_new, g, zero);
            w[n] = d_f[n] - c * d_g[n];
        }
        for (; n < kTinyN; ++n) d_f[n] = d_g[n] = w[n] = zero;
    }

    static V tiny_dot(const V* u, const V* v) {
        V even = u[0] * v[0], odd = u[1] * v[1];
        for (int n = 2; n < kTinyN; n += 2) {
            even += u[n] * v[n];
            odd += u[n + 1] * v[n + 1];
        }
        return even + odd;
    }

    __attribute__((noinline)) void tiny_products(const Short& t, const Tiny& tiny, Scratch<A>& s) const {
        const int m = a.m;
        V g[kTinyN], row[kTinyN];
        for (int n = 0; n < kTinyN; ++n) g[n] = n < a.N ? t.g[n] : splat<A>(0);
        for (int i = 0; i < m; ++i) {
            const V* test = sample.type2 ? tiny.d_g : tiny.w;
            for (int n = 0; n < kTinyN; ++n) row[n] = tiny.d_g[i * kTinyN + n];
            for (int j = 0; j <= i; ++j) tiny.gram[i * m + j] = tiny_dot(row, tiny.d_g + j * kTinyN);
            for (int n = 0; n < kTinyN; ++n) row[n] = test[i * kTinyN + n];
            write(s.products + (kHeadProducts + i * kColumnProducts + kRhs) * kTile + t.lane0, tiny_dot(row, g));
            if (sample.type2) continue;
            for (int j = 0; j < m; ++j) tiny.matrix[i * m + j] = tiny_dot(row, tiny.d_g + j * kTinyN);
        }
    }

    uint32_t short_verdict(const Short& t, V ff, V gg, uint32_t ordinary, uint32_t running, const A* slot_of,
                           Lanes<A>& lanes, Scratch<A>& s) const {
        const Judged<A> j = judge_lanes<A>(a, t.b0, t.count, ff, gg, ordinary);
        const V one = splat<A>(1), zero = splat<A>(0), growth = splat<A>(A(kGrowthLimit));
        auto grew = lanes_of<A>(j.going) & (j.norm > growth * j.previous_norm);
        if (a.m == 0) grew = zero > zero;
        if (!sample.type2 && any(grew)) {
            auto turned = zero > zero;
            const A* norms = sample.tile(t.b0 / kTile).norms + t.lane0;
            for (int k = 0; a.turn > 0 && k < a.m; ++k)
                turned |= (read<V>(norms + k * kTile) > zero) & (read<V>(norms + (a.m + k) * kTile) < zero);
            grew &= turned;
        }
        write(lanes.going + t.lane0, select(lanes_of<A>(j.going), one, zero));
        write(lanes.slot + t.lane0, read<V>(slot_of));
        write(lanes.reset + t.lane0, zero);
        write(lanes.grew + t.lane0, select(grew, one, zero));
        write(lanes.steps + t.lane0, __builtin_convertvector(j.steps, V));
        if (const uint32_t growing = bits(grew))
            for (int i = 0; i < t.count; ++i) a.at(kGrowthRestarts, t.b0 + i) += growing >> i & 1;
        uint32_t going = j.going;
        if (const uint32_t rest = running & ~j.going)
            for (int i = 0; i < t.count; ++i)
                if (rest >> i & 1) {
                    const int slot = int(slot_of[i]);
                    const bool goes =
                        sample.verdict(t.b0 + i, slot, t.lane0 + i, double(ff[i]), double(gg[i]), lanes, s);
                    going |= uint32_t(goes) << i;
                }
        return going;
    }

    // Products of column j with g and with the new column.
    void short_products(const Short& t, int j, uint32_t use, V c, Scratch<A>& s) const {
        const H* rows[kLanes<A>];
        point_column(rows, t.d_g, t.zeros, use, j * a.N);
        V rhs = {}, gram = {}, row = {}, col = {};
        if (sample.type2) {
            strips<H>(rows, [&](int n, V value) {
                rhs += value * t.g[n];
                gram += value * t.v[n];
            });
        } else {
            V older[kShortN];
            strips<H>(rows, [&](int n, V value) { older[n] = value; });
            point_column(rows, t.d_f, t.zeros, use, j * a.N);
            strips<H>(rows, [&](int n, V value) {
                const V test = value - c * older[n];
                rhs += test * t.g[n];
                gram += older[n] * t.v[n];
                row += older[n] * t.w[n];
                col += test * t.v[n];
            });
        }
        A* products = s.products + (kHeadProducts + j * kColumnProducts) * kTile + t.lane0;
        write(products + kRhs * kTile, rhs);
        write(products + kGramRow * kTile, gram);
        write(products + kRow * kTile, row);
        write(products + kCol * kTile, col);
    }

    void short_mix(const Short& t, const Tiny& tiny, uint32_t going, V unit, Scratch<A>& s) const {
        constexpr int L = kLanes<A>;
        const Leaf& leaf = a.leaves[0];
        const int N = int(a.N);
        const A beta = A(a.mixing);
        V* out = t.out;
        for (int n = 0; n < N; ++n) out[n] = beta == 1 ? t.f[n] : t.x[n] + beta * (t.f[n] - t.x[n]);
        for (int j = 0; j < a.m; ++j) {
            const V gamma = read<V>(s.gamma + j * kTile + t.lane0);
            const uint32_t use = bits(gamma != splat<A>(0)) & going;
            if (!use) continue;
            const V weight = gamma / unit;
            if (!a.gram) {
                for (int n = 0; n < N; ++n) {
                    out[n] -= weight * tiny.d_f[j * kTinyN + n];
                    if (beta != 1) out[n] += (1 - beta) * weight * tiny.d_g[j * kTinyN + n];
                }
                continue;
            }
            const H* rows[L];
            point_column(rows, t.d_f, t.zeros, use, j * a.N);
            strips<H>(rows, [&](int n, V value) { out[n] -= weight * value; });
            if (beta == 1) continue;
            point_column(rows, t.d_g, t.zeros, use, j * a.N);
            strips<H>(rows, [&](int n, V value) { out[n] += (1 - beta) * weight * value; });
        }
        uint32_t bad = 0;
        A* rows[L];
        if (a.dtype == kDTypeOf<A>) {
            alignas(64) A nowhere[kShortN];
            point<L>(rows, nowhere, going, [&](int i) { return static_cast<A*>(leaf.x_prev) + (t.b0 + i) * N; });
            auto infinite = Vec<A>{} != Vec<A>{};
            for (int n = 0; n < N; ++n) infinite |= ~(absolute(out[n]) < splat<A>(A(INFINITY)));
            bad = bits(infinite) & going;
            strips_out<A>(rows, out);
        } else {
            for (int i = 0; i < L; ++i) rows[i] = s.rows + i * kShortN;
            strips_out<A>(rows, out);
            for (int i = 0; i < t.count; ++i)
                if (going >> i & 1) {
                    void* target = row_of(leaf.x_prev, a, leaf, t.b0 + i);
                    bad |= uint32_t(!write_block(target, a.dtype, 0, N, rows[i])) << i;
                }
        }
        if (bad)
            for (int i = 0; i < t.count; ++i)
                if (bad >> i & 1) columns.picard(t.b0 + i, s);
        after_steps<A>(a, t.b0, going);
    }

    // Asks for what short_group will read of the samples from b0 on.
    void prefetch_group(int64_t b0) const {
        if (b0 >= a.B) return;
        const int64_t count = std::min<int64_t>(kLanes<A>, a.B - b0), m = a.m;
        const Leaf& leaf = a.leaves[0];
        const auto fetch = [](const void* from, int64_t bytes) {
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
        };
        const int64_t state = count * a.N * size_of(a.dtype);
        fetch(row_of(leaf.x, a, leaf, b0), state);
        fetch(row_of(leaf.x_prev, a, leaf, b0), state);
        if (leaf.f.dense && !a.f_rows)
            fetch(static_cast<const char*>(leaf.f.data) + b0 * a.N * size_of(leaf.f.dtype), state);
        if (m == 0) return;
        for (int which = 0; which < 2; ++which)
            if (a.gram)
                fetch(sample.column(which, b0, 0), count * m * a.N * int64_t(sizeof(H)));
            else
                fetch(tiny_history(which, b0, 0), kTile * m * a.N * int64_t(sizeof(H)));
        const Tile<A> t = sample.tile(b0 / kTile);
        if (a.gram && !sample.type2) fetch(t.matrix, m * m * kTile * int64_t(sizeof(A)));
        if (a.gram) fetch(t.gram, m * m * kTile * int64_t(sizeof(A)));
        fetch(t.norms, 2 * m * kTile * int64_t(sizeof(A)));
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
