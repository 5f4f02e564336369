// What both solvers do with a new evaluation before they use it: best iterate, stopping, unit. One sample at a time, in
// double, the same on every device.
#pragma once

#include <cmath>

#include "deqfast/args.h"

namespace deqfast {

DEQFAST_HD inline Status out_of_evaluations(double score, double first, bool grown, int steps, int best_step) {
    const int idle = steps - best_step;
    if (grown || (first > 0 && score > kDivergence * first)) return kDiverged;
    return idle >= kStallMinSteps && idle * kStallFraction >= steps ? kStalled : kMaxIter;
}

struct Verdict {
    bool going = false;        // not stopped by this evaluation
    bool reset = false;        // the unit was set or changed: no history, no new column
    bool spill = false;        // x_prev holds the best iterate and is about to be overwritten: save it
    bool use_saved = false;    // the answer of a stopped sample lies in `saved`, else in x
    double previous_norm = 0;  // ||g|| at the evaluation before
};

// Norms of f and g in the sample's unit, or, where the unit does not fit (see needs_scan), measured directly.
DEQFAST_HD inline bool needs_scan(double unit, double ff, double gg, int64_t N) {
    if (!(unit > 0)) return true;
    const double largest = ff > gg ? ff : gg;  // squared norms in the unit
    const double rms2 = largest / double(N);
    return !(std::isfinite(ff) && std::isfinite(gg) && rms2 >= 1 / (kUnitRange * kUnitRange) &&
             rms2 <= kUnitRange * kUnitRange);
}

// What an evaluation says of a sample: residual, and whether it is within the tolerance.
struct Distance {
    double relative;
    bool finite, within;
};

DEQFAST_HD inline double ratio(double moved, double size) {
    return size > 0 ? moved / size : moved > 0 ? double(INFINITY) : 0.0;
}

DEQFAST_HD inline Distance distance(const SolveArgs& a, int64_t b, double f_norm, double g_norm) {
    Distance d;
    d.finite = std::isfinite(f_norm) && std::isfinite(g_norm);
    d.relative = ratio(g_norm, f_norm);
    d.within = g_norm <= a.atol + a.rtol * f_norm;
    if (a.n_blocks == 0) return d;
    d.relative = 0;
    d.within = true;
    for (int i = 0; i < a.n_blocks; ++i) {
        const double moved = a.block_norms[2 * i * a.padded + b], size = a.block_norms[(2 * i + 1) * a.padded + b];
        const double weighted = ratio(moved, size) * a.block_weight[i];
        d.finite = d.finite && std::isfinite(moved) && std::isfinite(size);
        d.within = d.within && moved <= a.block_atol[i] + a.block_rtol[i] * size;
        if (weighted > d.relative) d.relative = weighted;
    }
    return d;
}

// Whose ||g|| is small because ||f|| has become large. `epsilon`: of the accumulation type.
DEQFAST_HD inline bool has_run_away(const SolveArgs& a, double f_norm, double g_norm, double first, double largest,
                                    double epsilon) {
    const double rounding = epsilon * f_norm;
    const bool hardly = kFallen * g_norm > largest || rounding > largest || f_norm > kGone * first;
    const bool far = g_norm > kFar * a.rtol * first + a.atol && g_norm > rounding;
    return first > 0 && f_norm > kGrown * first && (hardly || far);
}

// f_norm, g_norm: true norms (not in the unit).
template <class A>
DEQFAST_HD inline Verdict measure(const SolveArgs& a, int64_t b, double f_norm, double g_norm) {
    Verdict v;
    const int32_t steps = ++a.at(kSteps, b);
    const Distance d = distance(a, b, f_norm, g_norm);
    const bool finite = d.finite;
    const A relative = A(finite ? d.relative : double(INFINITY));
    v.previous_norm = double(a.at<A>(kNorm, b));
    a.at<A>(kResidual, b) = relative;
    a.at<A>(kNorm, b) = A(g_norm);
    A& first = a.at<A>(kFirst, b);
    if (steps == 1) first = a.n_blocks ? relative : A(f_norm > g_norm ? f_norm : g_norm);
    A& largest = a.at<A>(kLargest, b);
    if (steps == 1 || A(g_norm) > largest) largest = A(g_norm);

    int32_t& best_at = a.at(kBestAt, b);
    A& least = a.at<A>(kLeast, b);
    const A score = a.n_blocks ? relative : A(g_norm);
    constexpr double epsilon = sizeof(A) == 8 ? 0x1p-52 : 0x1p-23;
    const bool ran_away =
        a.n_blocks == 0 && steps > 1 && has_run_away(a, f_norm, g_norm, double(first), double(largest), epsilon);
    const bool converged = finite && d.within && !ran_away;
    if (finite && (converged || best_at == kNowhere || score < least)) {
        best_at = kCurrent;
        least = score;
        a.at(kBestStep, b) = steps;
        a.at<A>(kBest, b) = relative;
    } else if (best_at == kPrevious) {
        v.spill = true;
        best_at = kSaved;
    }

    int32_t& status = a.at(kStatus, b);
    if (!finite)
        status = kNonFinite;
    else if (converged)
        status = kConverged;
    else if (a.max_iter && steps == a.max_iter)
        status = out_of_evaluations(double(score), double(first),
                                    !a.n_blocks && a.at(kBestStep, b) == 1 && g_norm > kDivergence * double(least),
                                    steps, a.at(kBestStep, b));
    v.going = status == kRunning;
    v.use_saved = best_at == kSaved && (a.keep_best || !finite);
    if (!v.going) return v;

    A& unit = a.at<A>(kUnit, b);
    const double rms = (f_norm > g_norm ? f_norm : g_norm) / std::sqrt(double(a.total()));
    const double scaled = rms * double(unit);
    if (rms > 0 && !(scaled >= 1 / kUnitRange && scaled <= kUnitRange)) {
        v.reset = true;
        if (unit > 0) a.at(kRescales, b)++;
        int exponent;
        (void)std::frexp(rms, &exponent);
        const int limit = sizeof(A) == 4 ? 120 : 1000;  // a unit, and its inverse, must be normal numbers
        exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
        unit = A(std::ldexp(1.0, 1 - exponent));
    } else if (unit == 0) {
        unit = 1;
    }
    return v;
}

}  // namespace deqfast
