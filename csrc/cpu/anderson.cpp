// Anderson step on the CPU. What moves, per number: x, f, the previous x and f are read once, the two new columns
// written, the older columns of dG (Type II) or of both (mixed, Type I) read in the reducing pass, dF read again in the
// mixing pass. A sample small enough to stay in cache is reduced, solved and mixed by one thread before the next one;
// large samples are split over threads, chunk by chunk. Both add up the same chunks in the same order, so that the
// schedule never changes a bit.
#include "deqfast/anderson.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "anderson_decide.h"
#include "lanes.h"
#include "sample.h"
#include "transpose.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

constexpr int64_t kSplitMinN = 1 << 16;  // samples larger than this are split over threads
constexpr int64_t kTileMaxN = 1024;      // samples up to this share one small solve, up to 16 at a time
constexpr int64_t kGroupBytes = 768 << 10;  // history of the samples that share it: must still be in L2 when mixed

inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// A history column's block of numbers and the scale they carry.
template <class H>
constexpr bool kScaled = std::is_same<H, F16>::value || std::is_same<H, int8_t>::value;

// Memory of one thread.
template <class A>
struct Scratch {
    A *x, *f, *x_prev, *f_prev, *g, *w, *v, *out;
    Vec<A>*sums, *work, *short_sample;
    A *products, *gamma, *rows;
    double* sample;
    int* columns;
    Tile<A> own;

    Scratch(const AndersonArgs& a, int thread) {
        char* p = a.scratch + thread * a.scratch_bytes;
        const int64_t m = a.m, d = anderson_products(a.m);
        const auto carve = [&p](auto*& field, int64_t count) {
            field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(p);
            p += (count * int64_t(sizeof(*field)) + 63) / 64 * 64;
        };
        for (A** block : {&x, &f, &x_prev, &f_prev, &g, &w, &v, &out}) carve(*block, kBlock + kLanes<A>);
        carve(sums, d);
        carve(work, anderson_work(a.m));
        carve(products, d * kTile);
        carve(gamma, m * kTile);
        carve(sample, d);
        carve(columns, m);
        carve(own.matrix, m * m * kTile);
        carve(own.gram, m * m * kTile);
        carve(own.norms, 2 * m * kTile);
        carve(own.ages, m * kTile);
        carve(short_sample, 8 * kShortN);
        carve(rows, kTile * kShortN);
    }
};

template <class A, class H>
class AndersonStep {
    using V = Vec<A>;

  public:
    explicit AndersonStep(const AndersonArgs& args)
        : a(args), D(anderson_products(args.m)), type2(args.test_space == 0) {}

    void run(int phase) {
        if (phase == kStep && a.N <= kSplitMinN)
            by_sample();
        else {
            if (phase & kReduce) reduce();
            if (phase & kApply) apply();
        }
        if (!(phase & kApply)) return;
        int64_t running = 0;
        for (int64_t b = 0; b < a.B; ++b) running += a.at(kStatus, b) == kRunning;
        *a.running = running;
    }

  private:
    const AndersonArgs& a;
    const int64_t D;
    const bool type2;

    using Ints = IntVec<A>;

    int32_t* int_row(IntRow row) const { return a.ints + row * a.padded; }
    A* real_row(RealRow row) const { return static_cast<A*>(a.reals) + row * a.padded; }

    Tile<A> tile(int64_t t) const {
        const int64_t m = a.m, side = m * m * kTile;
        return {static_cast<A*>(a.matrix) + t * side, static_cast<A*>(a.gram) + t * side,
                static_cast<A*>(a.norms) + t * 2 * m * kTile, a.ages + t * m * kTile};
    }
    A& norm(int64_t b, int j) const { return tile(b / kTile).norms[j * kTile + b % kTile]; }
    H* column(int which, int64_t b, int j) const {
        return static_cast<H*>(a.history) + ((which * a.B + b) * a.m + j) * a.N;
    }
    float* scales(int which, int64_t b, int j) const { return a.scales + ((which * a.B + b) * a.m + j) * a.blocks; }

    bool first(int64_t b) const { return !(a.at<A>(kUnit, b) > 0); }
    bool last(int64_t b) const { return a.max_iter && a.at(kSteps, b) + 1 >= a.max_iter; }

    // Slot of the column that this step makes, -1: none.
    int new_slot(int64_t b) const {
        return a.m == 0 || !a.has_previous || first(b) || last(b) ? -1 : a.at(kSlot, b);
    }
    // The older columns in use.
    int list_columns(int64_t b, int slot, int* list) const {
        int n = 0;
        for (int j = 0; j < a.m; ++j)
            if (j != slot && norm(b, j) > 0) list[n++] = j;
        return n;
    }

    // ---- small and middle samples: one thread a sample, or a tile of them ----

    void by_sample() {
        if (!kScaled<H> && a.N <= kShortN && a.n_leaves == 1) return short_samples();
        const bool tiles = a.N <= kTileMaxN && (a.B + kTile - 1) / kTile >= a.threads;
        const int64_t per_unit = tiles ? kTile : 1, units = (a.B + per_unit - 1) / per_unit;
        const int threads = int(std::min<int64_t>(a.threads, a.B * a.N * (a.m + 1) < 16384 ? 1 : units));
        const int64_t bytes = a.N * 2 * int64_t(a.m * sizeof(H) + 3 * sizeof(A));
        int together = 1;
        while (tiles && together < kTile && 2 * together * bytes <= kGroupBytes) together *= 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t u = 0; u < units; ++u) {
            Scratch<A> s(a, thread_index());
            const int64_t end = std::min((u + 1) * per_unit, a.B);
            for (int64_t b = u * per_unit; b < end; b += together)
                group(b, int(std::min<int64_t>(together, end - b)), tiles, s);
        }
    }

    // One reduction, small solve and mixing for samples b0 ... b0 + count - 1 of one tile. `whole`: this thread has the
    // tile to itself.
    void group(int64_t b0, int count, bool whole, Scratch<A>& s) {
        Lanes<A> lanes = {};
        const int lane0 = int(b0 % kTile), first_lane = whole ? lane0 : 0;
        bool any_going = false;
        for (int i = 0; i < count; ++i) {
            const int64_t b = b0 + i;
            if (a.at(kStatus, b) != kRunning) continue;
            const int slot = new_slot(b);
            std::fill_n(s.sample, D, 0.0);
            if (!first(b)) {
                const int n = last(b) ? 0 : list_columns(b, slot, s.columns);
                for (int l = 0; l < a.n_leaves; ++l)
                    for (int64_t c = 0; c < a.leaves[l].n; c += kChunk) reduce_chunk(b, l, c, slot, n, s, s.sample);
            }
            const int lane = first_lane + i;
            any_going |= verdict(b, slot, lane, s.sample[kFF], s.sample[kGG], lanes, s);
            for (int64_t d = 0; d < D; ++d) s.products[d * kTile + lane] = A(s.sample[d]);
        }
        if (any_going && a.m > 0) solve_lanes(b0, count, whole, lanes, s);
        for (int i = 0; i < count; ++i) {
            const int64_t b = b0 + i;
            const int lane = first_lane + i;
            if (!(lanes.going[lane] > 0)) continue;
            int n = 0;
            for (int j = 0; j < a.m; ++j)
                if (s.gamma[j * kTile + lane] != 0) s.columns[n++] = j;
            bool finite = true;
            for (int l = 0; l < a.n_leaves; ++l)
                for (int64_t c = 0; c < a.leaves[l].n; c += kChunk)
                    finite &= mix_chunk(b, l, c, n, s.gamma + lane, kTile, s);
            if (!finite) picard(b, s);
            after_step(a, b);
        }
    }

    // ---- samples of a few numbers: kLanes of them at a time, one a lane ----

    void short_samples() {
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

    // What the passes over a group of short samples share.
    struct Short {
        int64_t b0;
        int count, lane0;
        const H* d_f[kLanes<A>];  // first column of each lane
        const H* d_g[kLanes<A>];
        alignas(64) H zeros[kShortN] = {};
        V *f, *x, *g, *w, *v, *d_f_new, *out;
    };

    void short_group(int64_t b0, int count, Scratch<A>& s) {
        constexpr int L = kLanes<A>;
        const int N = int(a.N);
        const Leaf& leaf = a.leaves[0];
        Short t;
        t.b0 = b0;
        t.count = count;
        t.lane0 = int(b0 % kTile);
        const uint32_t present = count == L ? kAllLanes<A> : (1u << count) - 1;
        const V units = read<V>(real_row(kUnit) + b0);
        const Ints steps = read<Ints>(int_row(kSteps) + b0);
        const auto started = units > splat<A>(0);
        // Lanes that are evaluated, that read older columns, that get a new one.
        const uint32_t running = bits(read<Ints>(int_row(kStatus) + b0) == int32_t(kRunning)) & present;
        const uint32_t out_of_steps = a.max_iter ? bits(steps + 1 >= a.max_iter) : 0;
        const uint32_t looking = running & bits(started) & ~out_of_steps;
        const uint32_t adding = a.has_previous && a.m > 0 ? looking : 0;
        if (!running) return;
        const V unit = select(started, units, splat<A>(1));
        const V slots = select(lanes_of<A>(adding), __builtin_convertvector(read<Ints>(int_row(kSlot) + b0), V), splat<A>(-1));
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
        if (a.m > 0)
            for (int i = 0; i < L; ++i) {
                const int64_t b = b0 + (i < count ? i : 0);
                t.d_f[i] = column(0, b, 0);
                t.d_g[i] = column(1, b, 0);
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
            for (int which = 0; which < 2; ++which) {
                point<L>(columns, nowhere, adding, [&](int i) { return column(which, b0 + i, int(slot_of[i])); });
                strips_out<H>(columns, which ? t.v : t.d_f_new);
            }
        } else {
            std::fill_n(t.w, N, V{});
            std::fill_n(t.v, N, V{});
        }
        const A* norms = a.m ? tile(b0 / kTile).norms + t.lane0 : nullptr;
        for (int j = 0; j < a.m; ++j) {
            const auto old = (read<V>(norms + j * kTile) > splat<A>(0)) & (slots != splat<A>(A(j)));
            if (const uint32_t use = bits(old) & looking) short_products(t, j, use, c, s);
        }
        for (int p = 0; p < kHeadProducts; ++p) write(s.products + p * kTile + t.lane0, head[p]);
        Lanes<A> lanes;
        const uint32_t going = short_verdict(t, head[kFF], head[kGG], looking, running, slot_of, lanes, s);
        if (!going) return;
        if (a.m > 0) solve_lanes(b0, count, true, lanes, s);
        short_mix(t, going, select(lanes_of<A>(going), read<V>(real_row(kUnit) + b0), splat<A>(1)), s);
    }

    uint32_t short_verdict(const Short& t, V ff, V gg, uint32_t ordinary, uint32_t running, const A* slot_of,
                           Lanes<A>& lanes, Scratch<A>& s) {
        const Judged<A> j = judge_lanes<A>(a, t.b0, t.count, ff, gg, ordinary);
        const V one = splat<A>(1), zero = splat<A>(0), growth = splat<A>(A(kGrowthLimit));
        const auto grew = lanes_of<A>(j.going) & (j.norm > growth * j.previous_norm);
        write(lanes.going + t.lane0, select(lanes_of<A>(j.going), one, zero));
        write(lanes.slot + t.lane0, read<V>(slot_of));
        write(lanes.reset + t.lane0, zero);
        write(lanes.grew + t.lane0, type2 ? select(grew, one, zero) : zero);
        write(lanes.steps + t.lane0, __builtin_convertvector(j.steps, V));
        if (const uint32_t growing = type2 ? bits(grew) : 0)
            for (int i = 0; i < t.count; ++i) a.at(kGrowthRestarts, t.b0 + i) += growing >> i & 1;
        uint32_t going = j.going;
        if (const uint32_t rest = running & ~j.going)
            for (int i = 0; i < t.count; ++i)
                if (rest >> i & 1) {
                    const int slot = int(slot_of[i]);
                    const bool goes = verdict(t.b0 + i, slot, t.lane0 + i, double(ff[i]), double(gg[i]), lanes, s);
                    going |= uint32_t(goes) << i;
                }
        return going;
    }

    // Products of column j with g and with the new column.
    void short_products(const Short& t, int j, uint32_t use, V c, Scratch<A>& s) const {
        const H* rows[kLanes<A>];
        point_column(rows, t.d_g, t.zeros, use, j * a.N);
        V rhs = {}, gram = {}, row = {}, col = {};
        if (type2) {
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

    void short_mix(const Short& t, uint32_t going, V unit, Scratch<A>& s) {
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
            const H* rows[L];
            const V weight = gamma / unit;
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
                if (bad >> i & 1) picard(t.b0 + i, s);
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
        if (leaf.f.dense && !a.f_rows) fetch(static_cast<const char*>(leaf.f.data) + b0 * a.N * size_of(leaf.f.dtype), state);
        if (m == 0) return;
        for (int which = 0; which < 2; ++which) fetch(column(which, b0, 0), count * m * a.N * int64_t(sizeof(H)));
        const Tile<A> t = tile(b0 / kTile);
        if (!type2) fetch(t.matrix, m * m * kTile * int64_t(sizeof(A)));
        fetch(t.gram, m * m * kTile * int64_t(sizeof(A)));
        fetch(t.norms, 2 * m * kTile * int64_t(sizeof(A)));
    }

    // Statistics and status of sample b after its reduction; fills lane i. True if the sample goes on.
    bool verdict(int64_t b, int slot, int i, double ff, double gg, Lanes<A>& lanes, Scratch<A>& s) {
        const Verdict v = judge<A>(a, b, ff, gg, s.x);
        if (v.spill || !v.going) spill_and_rest(a, b, v);
        lanes.going[i] = v.going;
        if (!v.going) return false;
        lanes.slot[i] = v.reset ? A(-1) : A(slot);
        lanes.reset[i] = v.reset;
        lanes.steps[i] = A(a.at(kSteps, b));
        const bool grew = type2 && !v.reset && a.at(kSteps, b) > 1 &&
                          a.at<A>(kNorm, b) > A(kGrowthLimit) * A(v.previous_norm);
        lanes.grew[i] = grew;
        if (grew) a.at(kGrowthRestarts, b)++;
        return true;
    }

    // gamma of samples b0 ... b0 + count - 1. Where other threads may be writing the tile's other lanes, a lone sample
    // works on a copy of its own, in lane 0.
    void solve_lanes(int64_t b0, int count, bool whole, Lanes<A>& lanes, Scratch<A>& s) {
        const Tile<A> shared = tile(b0 / kTile);
        const int lane0 = int(b0 % kTile), first_lane = whole ? lane0 : 0;
        const Tile<A>& t = whole ? shared : s.own;
        if (!whole) copy_lane(shared, lane0, s.own, 0);
        for (int lane = first_lane / kLanes<A> * kLanes<A>; lane < first_lane + count; lane += kLanes<A>)
            decide<A>(a, t, lanes, lane, s.products, s.gamma, s.work);
        if (!whole) copy_lane(s.own, 0, shared, lane0);
        for (int i = 0; i < count; ++i) {
            const int lane = first_lane + i;
            const int64_t b = b0 + i;
            const bool going = lanes.going[lane] > 0;
            a.at(kSlot, b) = going ? int32_t(lanes.next_slot[lane]) : a.at(kSlot, b);
            a.at(kCount, b) = going ? int32_t(lanes.count[lane]) : a.at(kCount, b);
            a.at(kEvictions, b) += going && lanes.full[lane] > 0;
            a.at(kSolveFallbacks, b) += going && lanes.failed[lane] > 0;
        }
    }

    void copy_lane(const Tile<A>& from, int from_lane, const Tile<A>& to, int to_lane) const {
        const int64_t m = a.m;
        const auto copy = [&](auto* target, const auto* source, int64_t n) {
            for (int64_t i = 0; i < n; ++i) target[i * kTile + to_lane] = source[i * kTile + from_lane];
        };
        if (!type2) copy(to.matrix, from.matrix, m * m);
        copy(to.gram, from.gram, m * m);
        copy(to.norms, from.norms, 2 * m);
        copy(to.ages, from.ages, m);
    }

    // The step did not stay finite: x' = f, and the history is forgotten.
    void picard(int64_t b, Scratch<A>& s) {
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t c = 0; c < a.leaves[l].n; c += kChunk) mix_chunk(b, l, c, -1, nullptr, 0, s);
        a.at(kStepFallbacks, b)++;
        if (a.m == 0) return;
        for (int j = 0; j < a.m; ++j) norm(b, j) = 0;
        a.at(kSlot, b) = 0;
        a.at(kCount, b) = 0;
    }

    // ---- large samples: chunks over threads ----

    template <class Work>
    void for_chunks(Work&& work) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
        for (int64_t u = 0; u < a.B * a.chunks; ++u) {
            const int64_t b = u / a.chunks;
            if (a.at(kStatus, b) != kRunning) continue;
            int64_t rest = u % a.chunks;
            int l = 0;
            for (; rest >= chunks_of(a.leaves[l].n); ++l) rest -= chunks_of(a.leaves[l].n);
            Scratch<A> s(a, thread_index());
            work(b, l, rest * kChunk, a.partials + u * D, s);
        }
    }

    void reduce() {
        for_chunks([&](int64_t b, int l, int64_t c, double* partial, Scratch<A>& s) {
            std::fill_n(partial, D, 0.0);
            if (first(b)) return;
            const int slot = new_slot(b);
            const int n = last(b) ? 0 : list_columns(b, slot, s.columns);
            reduce_chunk(b, l, c, slot, n, s, partial);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            double* sum = a.sums + b * D;
            std::fill_n(sum, D, 0.0);
            if (a.at(kStatus, b) != kRunning) continue;
            for (int64_t c = 0; c < a.chunks; ++c)
                for (int64_t d = 0; d < D; ++d) sum[d] += a.partials[(b * a.chunks + c) * D + d];
        }
    }

    void apply() {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            Scratch<A> s(a, thread_index());
            Lanes<A> lanes = {};
            double* sum = a.sums + b * D;
            if (!verdict(b, new_slot(b), 0, sum[kFF], sum[kGG], lanes, s) || a.m == 0) continue;
            for (int64_t d = 0; d < D; ++d) s.products[d * kTile] = A(sum[d]);
            solve_lanes(b, 1, false, lanes, s);
            for (int j = 0; j < a.m; ++j) sum[j] = double(s.gamma[j * kTile]);
        }
        for_chunks([&](int64_t b, int l, int64_t c, double* partial, Scratch<A>& s) {
            int n = 0;
            for (int j = 0; j < a.m; ++j) {
                s.gamma[j] = A(a.sums[b * D + j]);
                if (s.gamma[j] != 0) s.columns[n++] = j;
            }
            partial[0] = mix_chunk(b, l, c, n, s.gamma, 1, s);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            bool finite = true;
            for (int64_t c = 0; c < a.chunks; ++c) finite &= a.partials[(b * a.chunks + c) * D] != 0;
            if (!finite) {
                Scratch<A> s(a, 0);
                picard(b, s);
            }
            after_step(a, b);
        }
    }

    // ---- one chunk ----

    // Adds the products of numbers [begin, begin + kChunk) of leaf l to `sums`; writes the new column there.
    __attribute__((noinline)) void reduce_chunk(int64_t b, int l, int64_t begin, int slot, int n_columns,
                                                Scratch<A>& s, double* sums) {
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        const V unit = splat<A>(a.at<A>(kUnit, b));
        const V c = splat<A>(A(a.test_space));
        V head[kHeadProducts] = {};
        const int per_column = type2 ? 2 : 4;
        std::memset(static_cast<void*>(s.sums), 0, size_t(n_columns) * per_column * sizeof(V));
        for (int64_t n = begin; n < end; n += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, end - n);
            const A* f = read_source(leaf.f, f_row(a, b), n, count, s.f);
            const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, n, count, s.x);
            if (slot < 0) {
                for_registers<A>(count, [&](int64_t i, auto part) {
                    const V fi = load<A>(f + i, part) * unit;
                    const V gi = fi - load<A>(x + i, part) * unit;
                    head[kFF] += fi * fi;
                    head[kGG] += gi * gi;
                    write(s.g + i, gi);
                    write(s.w + i, V{});
                    write(s.v + i, V{});
                });
            } else {
                const A* f_prev = read_source(leaf.f_prev, f_prev_row(a, b), n, count, s.f_prev);
                const A* x_prev = read_block(row_of(leaf.x_prev, a, leaf, b), a.dtype, n, count, s.x_prev);
                const int64_t at = leaf.offset + n, block = leaf.block + n / kBlock;
                if (type2)
                    new_column<true>(b, slot, at, block, count, f, x, f_prev, x_prev, unit, c, head, s);
                else
                    new_column<false>(b, slot, at, block, count, f, x, f_prev, x_prev, unit, c, head, s);
            }
            const int64_t at = leaf.offset + n, block = leaf.block + n / kBlock;
            int k = 0;
            for (; k + 2 <= n_columns; k += 2)
                column_products<2>(b, s.columns + k, at, block, count, c, s, s.sums + k * per_column);
            if (k < n_columns) column_products<1>(b, s.columns + k, at, block, count, c, s, s.sums + k * per_column);
        }
        for (int p = 0; p < kHeadProducts; ++p) sums[p] += double(sum_lanes<A>(head[p]));
        for (int k = 0; k < n_columns; ++k) {
            double* column_sums = sums + kHeadProducts + s.columns[k] * kColumnProducts;
            const V* p = s.sums + k * per_column;
            column_sums[kRhs] += double(sum_lanes<A>(p[0]));
            column_sums[kGramRow] += double(sum_lanes<A>(p[1]));
            if (type2) continue;
            column_sums[kRow] += double(sum_lanes<A>(p[2]));
            column_sums[kCol] += double(sum_lanes<A>(p[3]));
        }
    }

    // Makes `count` numbers of the new column, rounds them into the history, and leaves g, dG and (not Type II) W as
    // stored in scratch.
    template <bool second>
    void new_column(int64_t b, int slot, int64_t at, int64_t block, int64_t count, const A* f, const A* x,
                    const A* f_prev, const A* x_prev, V unit, V c, V* head, Scratch<A>& s) {
        H *d_f = column(0, b, slot) + at, *d_g = column(1, b, slot) + at;
        V scale_f = V{} + A(1), scale_g = scale_f;
        if constexpr (kScaled<H>) {
            V largest_f = {}, largest_g = {};
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V fi = load<A>(f + i, part) * unit - load<A>(f_prev + i, part) * unit;
                const V gi = fi - (load<A>(x + i, part) * unit - load<A>(x_prev + i, part) * unit);
                largest_f = select(absolute(fi) > largest_f, absolute(fi), largest_f);
                largest_g = select(absolute(gi) > largest_g, absolute(gi), largest_g);
            });
            scale_f = splat<A>(scale_for(largest_f));
            scale_g = splat<A>(scale_for(largest_g));
            scales(0, b, slot)[block] = float(scale_f[0]);
            scales(1, b, slot)[block] = float(scale_g[0]);
        }
        const V back_f = V{} + A(1) / scale_f, back_g = V{} + A(1) / scale_g;
        V sums[kHeadProducts];
        for (int p = 0; p < kHeadProducts; ++p) sums[p] = head[p];
        A *const s_g = s.g, *const s_w = s.w, *const s_v = s.v;
        for_registers<A>(count, [&](int64_t i, auto part) {
            const V fi = load<A>(f + i, part) * unit, xi = load<A>(x + i, part) * unit;
            const V g = fi - xi;
            V df = fi - load<A>(f_prev + i, part) * unit;
            V dg = df - (xi - load<A>(x_prev + i, part) * unit);
            df = rounded(d_f + i, df * back_f, part) * scale_f;
            dg = rounded(d_g + i, dg * back_g, part) * scale_g;
            sums[kFF] += fi * fi;
            sums[kGG] += g * g;
            sums[kQQ] += dg * dg;
            write(s_g + i, g);
            write(s_v + i, dg);
            if constexpr (second) {
                sums[kVG] += dg * g;
            } else {
                const V w = df - c * dg;
                sums[kWW] += w * w;
                sums[kWG] += w * g;
                sums[kWV] += w * dg;
                write(s_w + i, w);
            }
        });
        for (int p = 0; p < kHeadProducts; ++p) head[p] = sums[p];
    }

    // Stores a register in the history's type and returns it as stored.
    template <class Extent>
    static V rounded(H* p, V v, Extent part) {
        H stored[kLanes<A>];
        Codec<A, H>::store(stored, v);
        if constexpr (std::is_same<Extent, Whole>::value)
            std::memcpy(p, stored, sizeof(stored));
        else
            for (int i = 0; i < part.count; ++i) p[i] = stored[i];
        return Codec<A, H>::load(stored);
    }

    // Power of two that brings the largest magnitude to [1/2, 1), for int8 to [64, 128).
    static A scale_for(V largest) {
        A peak = 0;
        for (int i = 0; i < kLanes<A>; ++i) peak = largest[i] > peak ? largest[i] : peak;
        int exponent = 0;
        if (std::isfinite(peak)) (void)std::frexp(peak, &exponent);
        return A(std::ldexp(1.0, std::is_same<H, int8_t>::value ? exponent - 7 : exponent));
    }

    V scale_of(int which, int64_t b, int j, int64_t block) const {
        if constexpr (kScaled<H>) return splat<A>(A(scales(which, b, j)[block]));
        return V{} + A(1);
    }
    static V scaled(V v, V scale) {
        if constexpr (kScaled<H>) return v * scale;
        return v;
    }

    // Products of n <= 2 older columns with the new one and with g.
    template <int n>
    void column_products(int64_t b, const int* columns, int64_t at, int64_t block, int64_t count, V c,
                         const Scratch<A>& s, V* out) const {
        const H *d_f[n], *d_g[n];
        V scale_f[n], scale_g[n], rhs[n], gram[n], row[n], col[n];
        const int per_column = type2 ? 2 : 4;
        const A *const s_g = s.g, *const s_v = s.v, *const s_w = s.w;
        for (int k = 0; k < n; ++k) {
            d_f[k] = column(0, b, columns[k]) + at;
            d_g[k] = column(1, b, columns[k]) + at;
            scale_f[k] = scale_of(0, b, columns[k], block);
            scale_g[k] = scale_of(1, b, columns[k], block);
            rhs[k] = out[k * per_column];
            gram[k] = out[k * per_column + 1];
        }
        if (type2) {
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V g = read<V>(s_g + i), new_v = read<V>(s_v + i);
                for (int k = 0; k < n; ++k) {
                    const V v = scaled(load<A>(d_g[k] + i, part), scale_g[k]);
                    rhs[k] += v * g;
                    gram[k] += v * new_v;
                }
            });
        } else {
            for (int k = 0; k < n; ++k) {
                row[k] = out[k * per_column + 2];
                col[k] = out[k * per_column + 3];
            }
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V g = read<V>(s_g + i), new_v = read<V>(s_v + i), new_w = read<V>(s_w + i);
                for (int k = 0; k < n; ++k) {
                    const V v = scaled(load<A>(d_g[k] + i, part), scale_g[k]);
                    const V w = scaled(load<A>(d_f[k] + i, part), scale_f[k]) - c * v;
                    rhs[k] += w * g;
                    gram[k] += v * new_v;
                    row[k] += v * new_w;
                    col[k] += w * new_v;
                }
            });
            for (int k = 0; k < n; ++k) {
                out[k * per_column + 2] = row[k];
                out[k * per_column + 3] = col[k];
            }
        }
        for (int k = 0; k < n; ++k) {
            out[k * per_column] = rhs[k];
            out[k * per_column + 1] = gram[k];
        }
    }

    // Writes the next iterate for numbers [begin, begin + kChunk) of leaf l; n < 0: plain Picard. False if not finite.
    __attribute__((noinline)) bool mix_chunk(int64_t b, int l, int64_t begin, int n, const A* gamma, int64_t stride,
                                             Scratch<A>& s) {
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        char* target = row_of(leaf.x_prev, a, leaf, b);
        const A beta = A(n < 0 ? 1 : a.mixing);
        const A per_unit = A(1) / a.at<A>(kUnit, b);
        bool finite = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, end - at);
            const A* from = read_source(leaf.f, f_row(a, b), at, count, s.f);
            if (beta != 1) {
                const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, at, count, s.x);
                for_registers<A>(count, [&](int64_t i, auto part) {
                    const V xi = load<A>(x + i, part);
                    write(s.out + i, xi + beta * (load<A>(from + i, part) - xi));
                });
                from = s.out;
            }
            const Mix mix{b, leaf.offset + at, leaf.block + at / kBlock, count, s.columns, gamma, stride, per_unit,
                          beta};
            int k = 0;
            for (; n - k > 8; k += 8) {
                mix_columns<8>(mix, k, from, s.out);
                from = s.out;
            }
            if (a.dtype == kDTypeOf<A>) {
                finite &= mix_rest(mix, k, n - k, from, reinterpret_cast<A*>(target) + at);
            } else {
                if (n > k) {
                    (void)mix_rest(mix, k, n - k, from, s.out);
                    from = s.out;
                }
                finite &= write_block(static_cast<void*>(target), a.dtype, at, count, from);
            }
        }
        return finite;
    }

    struct Mix {
        int64_t b, at, block, count;
        const int* columns;
        const A* gamma;
        int64_t stride;
        A per_unit, beta;
    };

    bool mix_rest(const Mix& mix, int k, int n, const A* from, A* out) const {
        switch (n < 0 ? 0 : n) {
            case 0: return mix_columns<0>(mix, k, from, out);
            case 1: return mix_columns<1>(mix, k, from, out);
            case 2: return mix_columns<2>(mix, k, from, out);
            case 3: return mix_columns<3>(mix, k, from, out);
            case 4: return mix_columns<4>(mix, k, from, out);
            case 5: return mix_columns<5>(mix, k, from, out);
            case 6: return mix_columns<6>(mix, k, from, out);
            case 7: return mix_columns<7>(mix, k, from, out);
            default: return mix_columns<8>(mix, k, from, out);
        }
    }

    // out = from - sum of n weighted columns; false if not finite.
    template <int n>
    bool mix_columns(const Mix& mix, int first_column, const A* from, A* out) const {
        const H *d_f[n + 1], *d_g[n + 1];
        V weight_f[n + 1], weight_g[n + 1];
        for (int k = 0; k < n; ++k) {
            const int j = mix.columns[first_column + k];
            const A weight = mix.gamma[j * mix.stride] * mix.per_unit;
            d_f[k] = column(0, mix.b, j) + mix.at;
            d_g[k] = column(1, mix.b, j) + mix.at;
            weight_f[k] = scaled(splat<A>(-weight), scale_of(0, mix.b, j, mix.block));
            weight_g[k] = scaled(splat<A>((1 - mix.beta) * weight), scale_of(1, mix.b, j, mix.block));
        }
        const V infinity = splat<A>(A(INFINITY));
        auto bad = V{} != V{};
        if (mix.beta == 1) {
            for_registers<A>(mix.count, [&](int64_t i, auto part) {
                V sum = load<A>(from + i, part);
                for (int k = 0; k < n; ++k) sum += weight_f[k] * load<A>(d_f[k] + i, part);
                bad |= ~(absolute(sum) < infinity);
                store<A>(out + i, sum, part);
            });
        } else {
            for_registers<A>(mix.count, [&](int64_t i, auto part) {
                V sum = load<A>(from + i, part);
                for (int k = 0; k < n; ++k)
                    sum += weight_f[k] * load<A>(d_f[k] + i, part) + weight_g[k] * load<A>(d_g[k] + i, part);
                bad |= ~(absolute(sum) < infinity);
                store<A>(out + i, sum, part);
            });
        }
        return !any(bad);
    }
};

template <class A>
void run(const AndersonArgs& a, int phase) {
    with_type(a.history_dtype, [&](auto type) {
        using H = decltype(type);
        if constexpr (sizeof(H) <= sizeof(A)) AndersonStep<A, H>(a).run(phase);
    });
}

}  // namespace

void anderson_step(const AndersonArgs& args, int phase) {
    if (args.dtype == DType::f64)
        run<double>(args, phase);
    else
        run<float>(args, phase);
}

}  // namespace deqfast::cpu::DEQFAST_ISA
