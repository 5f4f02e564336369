// Anderson step on the CPU. What moves, per number: x, f, the previous x and f are read once, the two new columns
// written, the older columns of dG (Type II) or of both (mixed, Type I) read in the reducing pass, dF read again in the
// mixing pass. A sample small enough to stay in cache is reduced, solved and mixed by one thread before the next one;
// large samples are split over threads, chunk by chunk. Both add up the same chunks in the same order, so that the
// schedule never changes a bit.
#include "deqfast/anderson.h"

#include "anderson_own.h"
#include "anderson_short.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

// Small and middle samples: one thread a sample, or a tile of them.
template <class A, class H>
class AndersonWhole {
   public:
    explicit AndersonWhole(const AndersonArgs& args) : columns(args), sample(columns.sample), own(args), a(args) {}

    void run() const {
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

   private:
    const AndersonColumns<A, H> columns;
    const AndersonSample<A, H>& sample;
    const OwnResidual<A> own;
    const AndersonArgs& a;

    // One reduction, small solve and mixing for samples b0 ... b0 + count - 1 of one tile. `whole`: this thread has the
    // tile to itself.
    void group(int64_t b0, int count, bool whole, Scratch<A>& s) const {
        Lanes<A> lanes = {};
        const int lane0 = int(b0 % kTile), first_lane = whole ? lane0 : 0;
        bool any_going = false;
        for (int i = 0; i < count; ++i) {
            const int64_t b = b0 + i;
            if (a.at(kStatus, b) != kRunning) continue;
            const int slot = sample.new_slot(b);
            std::fill_n(s.sample, sample.D, 0.0);
            if (!sample.first(b)) {
                const int n = sample.last(b) ? 0 : sample.list_columns(b, slot, s.columns);
                for (int l = 0; l < a.n_leaves; ++l)
                    for (int64_t c = 0; c < a.leaves[l].n; c += kChunk)
                        columns.reduce_chunk(b, l, c, slot, a.own ? 0 : n, s, s.sample);
                if (a.own) own.reduce(b, slot, n, s, sample.D, s.sample);
            }
            const int lane = first_lane + i;
            any_going |= sample.verdict(b, slot, lane, s.sample[kFF], s.sample[kGG], lanes, s);
            for (int64_t d = 0; d < sample.D; ++d) s.products[d * kTile + lane] = A(s.sample[d]);
        }
        if (any_going && a.m > 0) sample.solve_lanes(b0, count, whole, lanes, s);
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
                    finite &= columns.mix_chunk(b, l, c, n, s.gamma + lane, kTile, s);
            if (!finite) columns.picard(b, s);
            after_step(a, b);
        }
    }
};

// Large samples: chunks over threads, in two halves.
template <class A, class H>
class AndersonSplit {
   public:
    explicit AndersonSplit(const AndersonArgs& args) : columns(args), sample(columns.sample), a(args) {}

    void reduce() const {
        for_chunks([&](int64_t b, int l, int64_t c, double* partial, Scratch<A>& s) {
            std::fill_n(partial, sample.D, 0.0);
            if (sample.first(b)) return;
            const int slot = sample.new_slot(b);
            const int n = sample.last(b) ? 0 : sample.list_columns(b, slot, s.columns);
            columns.reduce_chunk(b, l, c, slot, n, s, partial);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            double* sum = a.sums + b * sample.D;
            std::fill_n(sum, sample.D, 0.0);
            if (a.at(kStatus, b) != kRunning) continue;
            for (int64_t c = 0; c < a.chunks; ++c)
                for (int64_t d = 0; d < sample.D; ++d) sum[d] += a.partials[(b * a.chunks + c) * sample.D + d];
        }
    }

    void apply() const {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            if (a.carry) sample.take_carried(b);
            Scratch<A> s(a, thread_index());
            Lanes<A> lanes = {};
            double* sum = a.sums + b * sample.D;
            if (!sample.verdict(b, sample.new_slot(b), 0, sum[kFF], sum[kGG], lanes, s) || a.m == 0) continue;
            for (int64_t d = 0; d < sample.D; ++d) s.products[d * kTile] = A(sum[d]);
            sample.solve_lanes(b, 1, false, lanes, s);
            for (int j = 0; j < a.m; ++j) sum[j] = double(s.gamma[j * kTile]);
        }
        for_chunks([&](int64_t b, int l, int64_t c, double* partial, Scratch<A>& s) {
            int n = 0;
            for (int j = 0; j < a.m; ++j) {
                s.gamma[j] = A(a.sums[b * sample.D + j]);
                if (s.gamma[j] != 0) s.columns[n++] = j;
            }
            partial[0] = columns.mix_chunk(b, l, c, n, s.gamma, 1, s);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.at(kStatus, b) != kRunning) continue;
            bool finite = true;
            for (int64_t c = 0; c < a.chunks; ++c) finite &= a.partials[(b * a.chunks + c) * sample.D] != 0;
            if (!finite) {
                Scratch<A> s(a, 0);
                columns.picard(b, s);
            }
            after_step(a, b);
        }
    }

   private:
    const AndersonColumns<A, H> columns;
    const AndersonSample<A, H>& sample;
    const AndersonArgs& a;

    template <class Work>
    void for_chunks(Work&& work) const {
        over_chunks(a, [&](int64_t b, int l, int64_t begin, int64_t unit) {
            Scratch<A> s(a, thread_index());
            work(b, l, begin, a.partials + unit * sample.D, s);
        });
    }
};

template <class A, class H>
void step(const AndersonArgs& a, int phase) {
    if (a.own) {
        AndersonWhole<A, H>(a).run();
    } else if (phase == kStep && a.N <= kSplitMinN) {
        if (!kScaled<H> && a.N <= kShortN && a.n_leaves == 1)
            AndersonShort<A, H>(a).run();
        else
            AndersonWhole<A, H>(a).run();
    } else {
        const AndersonSplit<A, H> split(a);
        if (phase & kReduce) split.reduce();
        if (phase & kApply) split.apply();
    }
    if (!(phase & kApply)) return;
    int64_t running = 0;
    for (int64_t b = 0; b < a.B; ++b) running += a.at(kStatus, b) == kRunning;
    *a.running = running;
}

template <class A>
void run(const AndersonArgs& a, int phase) {
    with_type(a.history_dtype, [&](auto type) {
        using H = decltype(type);
        if constexpr (sizeof(H) <= sizeof(A)) step<A, H>(a, phase);
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
