// One sample of an Anderson step: its place in the workspace, its verdict, and its part in the small solve.
#pragma once

#include "anderson_decide.h"
#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

// A history column's block of numbers and the scale they carry.
template <class H>
constexpr bool kScaled = std::is_same<H, F16>::value || std::is_same<H, int8_t>::value;

// Memory of one thread.
template <class A>
struct Scratch {
    A *x, *f, *x_prev, *f_prev, *g, *w, *v, *out;
    Vec<A>*sums, *work, *short_sample, *tiny;
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
        carve(tiny, 5 * kTinyN * kTinyN);
    }
};

template <class A, class H>
struct AndersonSample {
    using V = Vec<A>;
    using Ints = IntVec<A>;

    explicit AndersonSample(const AndersonArgs& args)
        : a(args), D(anderson_products(args.m)), type2(args.test_space == 0) {}

    const AndersonArgs& a;
    const int64_t D;
    const bool type2;

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
    int new_slot(int64_t b) const { return a.m == 0 || !a.has_previous || first(b) || last(b) ? -1 : a.at(kSlot, b); }
    // c of W_j = dF_j - c dG_j, and whether any column of sample b is a turned one: W_j = -dF_j.
    A test_space(int64_t b, int j) const { return norm(b, a.m + j) < 0 ? A(0) : A(a.test_space); }
    bool has_turned(int64_t b) const {
        for (int j = 0; a.turn > 0 && j < a.m; ++j)
            if (norm(b, j) > 0 && norm(b, a.m + j) < 0) return true;
        return false;
    }
    // The older columns in use.
    int list_columns(int64_t b, int slot, int* list) const {
        int n = 0;
        for (int j = 0; j < a.m; ++j)
            if (j != slot && norm(b, j) > 0) list[n++] = j;
        return n;
    }

    // Statistics and status of sample b after its reduction; fills lane i. True if the sample goes on.
    bool verdict(int64_t b, int slot, int i, double ff, double gg, Lanes<A>& lanes, Scratch<A>& s) const {
        const Verdict v = judge<A>(a, b, ff, gg, s.x);
        if (v.spill || !v.going) spill_and_rest(a, b, v);
        lanes.going[i] = v.going;
        if (!v.going) return false;
        lanes.slot[i] = v.reset ? A(-1) : A(slot);
        lanes.reset[i] = v.reset;
        lanes.steps[i] = A(a.at(kSteps, b));
        const bool grew = !v.reset && a.at(kSteps, b) > 1 && a.at<A>(kNorm, b) > A(kGrowthLimit) * A(v.previous_norm) &&
                          ((type2 && a.m > 0) || has_turned(b));
        lanes.grew[i] = grew;
        if (grew) a.at(kGrowthRestarts, b)++;
        return true;
    }

    // gamma of samples b0 ... b0 + count - 1. Where other threads may be writing the tile's other lanes, a lone sample
    // works on a copy of its own, in lane 0.
    void solve_lanes(int64_t b0, int count, bool whole, Lanes<A>& lanes, Scratch<A>& s,
                     const AllProducts<A>* all = nullptr) const {
        const Tile<A> shared = tile(b0 / kTile);
        const int lane0 = int(b0 % kTile), first_lane = whole ? lane0 : 0;
        const Tile<A>& t = whole ? shared : s.own;
        if (!whole) copy_lane(shared, lane0, s.own, 0);
        for (int lane = first_lane / kLanes<A> * kLanes<A>; lane < first_lane + count; lane += kLanes<A>)
            decide<A>(a, t, lanes, lane, s.products, s.gamma, s.work, all);
        if (!whole) copy_lane(s.own, 0, shared, lane0);
        for (int i = 0; i < count; ++i) {
            const int lane = first_lane + i;
            const int64_t b = b0 + i;
            const bool going = lanes.going[lane] > 0;
            a.at(kSlot, b) = going ? int32_t(lanes.next_slot[lane]) : a.at(kSlot, b);
            a.at(kCount, b) = going ? int32_t(lanes.count[lane]) : a.at(kCount, b);
            a.at(kEvictions, b) += going ? int32_t(lanes.evicted[lane]) : 0;
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

    // Of a spread sample, before its verdict: what the last mix was on the other ranks. The column that this step has
    // made stays.
    void take_carried(int64_t b) const {
        double& lost = a.carry[b * kAndersonCarried];
        if (lost != 0) {
            a.at(kStepFallbacks, b)++;
            for (int j = 0; j < a.m; ++j) norm(b, j) = 0;
        }
        lost = 0;
    }

    // Sample b has no columns any more.
    void forget(int64_t b) const {
        if (a.m == 0) return;
        for (int j = 0; j < a.m; ++j) norm(b, j) = 0;
        a.at(kSlot, b) = 0;
        a.at(kCount, b) = 0;
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
