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
#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

constexpr int64_t kSplitMinN = 1 << 16;  // samples larger than this are split over threads
constexpr int64_t kTileMaxN = 1024;      // samples up to this share one small solve, 16 at a time

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
    Vec<A>*sums, *work;
    A *products, *gamma;
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
        const bool tiles = a.N <= kTileMaxN && (a.B + kTile - 1) / kTile >= a.threads;
        const int64_t per_unit = tiles ? kTile : 1, units = (a.B + per_unit - 1) / per_unit;
        const int threads = int(std::min<int64_t>(a.threads, a.B * a.N * (a.m + 1) < 16384 ? 1 : units));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t u = 0; u < units; ++u) {
            Scratch<A> s(a, thread_index());
            one_unit(u * per_unit, int(std::min(per_unit, a.B - u * per_unit)), s);
        }
    }

    void one_unit(int64_t b0, int count, Scratch<A>& s) {
        Lanes<A> lanes = {};
        const bool whole = count > 1 || a.N <= kTileMaxN;
        const int lane0 = int(b0 % kTile);
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
            any_going |= verdict(b, slot, i, s.sample, lanes, s);
        }
        (void)whole;
        if (any_going && a.m > 0) solve_lanes(b0, count, lane0, lanes, s);
        for (int i = 0; i < count; ++i) {
            const int64_t b = b0 + i;
            if (!(lanes.going[i] > 0)) continue;
            int n = 0;
            for (int j = 0; j < a.m; ++j)
                if (s.gamma[j * kTile + i] != 0) s.columns[n++] = j;
            bool finite = true;
            for (int l = 0; l < a.n_leaves; ++l)
                for (int64_t c = 0; c < a.leaves[l].n; c += kChunk)
                    finite &= mix_chunk(b, l, c, n, s.gamma + i, kTile, s);
            if (!finite) picard(b, s);
            after_step(a, b);
        }
    }

    // Statistics and status of sample b after its reduction; fills lane i. True if the sample goes on.
    bool verdict(int64_t b, int slot, int i, const double* sums, Lanes<A>& lanes, Scratch<A>& s) {
        const Verdict v = judge<A>(a, b, sums[kFF], sums[kGG], s.x);
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
        for (int64_t d = 0; d < D; ++d) s.products[d * kTile + i] = A(sums[d]);
        return true;
    }

    // gamma of samples b0 ... b0 + count - 1, which fill the first lanes. A lone sample works on a copy of its lane:
    // other threads may be writing its neighbours.
    void solve_lanes(int64_t b0, int count, int lane0, Lanes<A>& lanes, Scratch<A>& s) {
        const Tile<A> shared = tile(b0 / kTile);
        const bool copy = count == 1;
        const Tile<A>& t = copy ? s.own : shared;
        if (copy) copy_lane(shared, lane0, s.own, 0);
        for (int lane = 0; lane < count; lane += kLanes<A>) {
            bool some = false;
            for (int i = lane; i < lane + kLanes<A>; ++i) some |= lanes.going[i] > 0;
            if (some) decide<A>(a, t, lanes, lane, s.products, s.gamma, s.work);
        }
        if (copy) copy_lane(s.own, 0, shared, lane0);
        for (int i = 0; i < count; ++i) {
            if (!(lanes.going[i] > 0)) continue;
            const int64_t b = b0 + i;
            a.at(kSlot, b) = int32_t(lanes.next_slot[i]);
            a.at(kCount, b) = int32_t(lanes.count[i]);
            a.at(kEvictions, b) += lanes.full[i] > 0;
            a.at(kSolveFallbacks, b) += lanes.failed[i] > 0;
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
            if (!verdict(b, new_slot(b), 0, sum, lanes, s) || a.m == 0) continue;
            solve_lanes(b, 1, int(b % kTile), lanes, s);
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
                for (int64_t i = 0; i < count; i += kLanes<A>) {
                    const V fi = load_up_to<A>(f + i, count - i) * unit;
                    const V gi = fi - load_up_to<A>(x + i, count - i) * unit;
                    head[kFF] += fi * fi;
                    head[kGG] += gi * gi;
                    write(s.g + i, gi);
                    write(s.w + i, V{});
                    write(s.v + i, V{});
                }
            } else {
                const A* f_prev = read_source(leaf.f_prev, f_prev_row(a, b), n, count, s.f_prev);
                const A* x_prev = read_block(row_of(leaf.x_prev, a, leaf, b), a.dtype, n, count, s.x_prev);
                const int64_t block = leaf.block + n / kBlock;
                new_column(b, slot, leaf.offset + n, block, count, f, x, f_prev, x_prev, unit, c, head, s);
            }
            for (int k = 0; k < n_columns; ++k)
                column_products(b, s.columns[k], leaf.offset + n, leaf.block + n / kBlock, count, c, s,
                                s.sums + k * per_column);
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

    // Makes `count` numbers of the new column, rounds them into the history, and leaves g, W and dG as stored in scratch.
    void new_column(int64_t b, int slot, int64_t at, int64_t block, int64_t count, const A* f, const A* x,
                    const A* f_prev, const A* x_prev, V unit, V c, V* head, Scratch<A>& s) {
        H *d_f = column(0, b, slot) + at, *d_g = column(1, b, slot) + at;
        V scale_f = V{} + A(1), scale_g = scale_f;
        if constexpr (kScaled<H>) {
            V largest_f = {}, largest_g = {};
            for (int64_t i = 0; i < count; i += kLanes<A>) {
                const V fi = (load_up_to<A>(f + i, count - i) - load_up_to<A>(f_prev + i, count - i)) * unit;
                const V gi = fi - (load_up_to<A>(x + i, count - i) - load_up_to<A>(x_prev + i, count - i)) * unit;
                largest_f = select(absolute(fi) > largest_f, absolute(fi), largest_f);
                largest_g = select(absolute(gi) > largest_g, absolute(gi), largest_g);
            }
            scale_f = splat<A>(scale_for(largest_f));
            scale_g = splat<A>(scale_for(largest_g));
            scales(0, b, slot)[block] = float(scale_f[0]);
            scales(1, b, slot)[block] = float(scale_g[0]);
        }
        const V back_f = V{} + A(1) / scale_f, back_g = V{} + A(1) / scale_g;
        for (int64_t i = 0; i < count; i += kLanes<A>) {
            const int64_t left = count - i;
            const V fi = load_up_to<A>(f + i, left) * unit, xi = load_up_to<A>(x + i, left) * unit;
            const V g = fi - xi;
            V df = fi - load_up_to<A>(f_prev + i, left) * unit;
            V dg = df - (xi - load_up_to<A>(x_prev + i, left) * unit);
            df = rounded(d_f + i, df * back_f, left) * scale_f;
            dg = rounded(d_g + i, dg * back_g, left) * scale_g;
            const V w = df - c * dg;
            head[kFF] += fi * fi;
            head[kGG] += g * g;
            head[kQQ] += dg * dg;
            head[kWW] += w * w;
            head[kWG] += w * g;
            head[kVG] += dg * g;
            head[kWV] += w * dg;
            write(s.g + i, g);
            write(s.w + i, w);
            write(s.v + i, dg);
        }
    }

    // Stores a register in the history's type and returns it as stored.
    static V rounded(H* p, V v, int64_t left) {
        H part[kLanes<A>];
        Codec<A, H>::store(part, v);
        if (left >= kLanes<A>)
            std::memcpy(p, part, sizeof(part));
        else
            for (int64_t i = 0; i < left; ++i) p[i] = part[i];
        return Codec<A, H>::load(part);
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

    void column_products(int64_t b, int j, int64_t at, int64_t block, int64_t count, V c, const Scratch<A>& s,
                         V* sums) const {
        const H* d_g = column(1, b, j) + at;
        const V scale_g = scale_of(1, b, j, block);
        V rhs = sums[0], gram = sums[1];
        if (type2) {
            for (int64_t i = 0; i < count; i += kLanes<A>) {
                const V v = scaled(load_up_to<A>(d_g + i, count - i), scale_g);
                rhs += v * read<V>(s.g + i);
                gram += v * read<V>(s.v + i);
            }
        } else {
            const H* d_f = column(0, b, j) + at;
            const V scale_f = scale_of(0, b, j, block);
            V row = sums[2], col = sums[3];
            for (int64_t i = 0; i < count; i += kLanes<A>) {
                const V v = scaled(load_up_to<A>(d_g + i, count - i), scale_g);
                const V w = scaled(load_up_to<A>(d_f + i, count - i), scale_f) - c * v;
                const V new_v = read<V>(s.v + i);
                rhs += w * read<V>(s.g + i);
                gram += v * new_v;
                row += v * read<V>(s.w + i);
                col += w * new_v;
            }
            sums[2] = row;
            sums[3] = col;
        }
        sums[0] = rhs;
        sums[1] = gram;
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
                for (int64_t i = 0; i < count; i += kLanes<A>) {
                    const V xi = load_up_to<A>(x + i, count - i);
                    write(s.out + i, xi + beta * (load_up_to<A>(from + i, count - i) - xi));
                }
                from = s.out;
            }
            for (int k = 0; k < n; k += 4) {
                mix_columns(b, leaf.offset + at, leaf.block + at / kBlock, count, s.columns + k, std::min(4, n - k),
                            gamma, stride, per_unit, beta, from, s.out);
                from = s.out;
            }
            finite &= write_block(static_cast<void*>(target), a.dtype, at, count, from);
        }
        return finite;
    }

    // out = from - sum of up to four weighted columns.
    void mix_columns(int64_t b, int64_t at, int64_t block, int64_t count, const int* columns, int n, const A* gamma,
                     int64_t stride, A per_unit, A beta, const A* from, A* out) const {
        const H *d_f[4], *d_g[4];
        V weight_f[4], weight_g[4];
        for (int k = 0; k < 4; ++k) {
            const int j = columns[k < n ? k : 0];
            const A weight = k < n ? gamma[j * stride] * per_unit : A(0);
            d_f[k] = column(0, b, j) + at;
            d_g[k] = column(1, b, j) + at;
            weight_f[k] = scaled(splat<A>(-weight), scale_of(0, b, j, block));
            weight_g[k] = scaled(splat<A>((1 - beta) * weight), scale_of(1, b, j, block));
        }
        for (int64_t i = 0; i < count; i += kLanes<A>) {
            const int64_t left = count - i;
            V sum = load_up_to<A>(from + i, left);
            for (int k = 0; k < 4; ++k)
                if (k < n) sum += weight_f[k] * load_up_to<A>(d_f[k] + i, left);
            if (beta != 1)
                for (int k = 0; k < 4; ++k)
                    if (k < n) sum += weight_g[k] * load_up_to<A>(d_g[k] + i, left);
            write(out + i, sum);
        }
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
