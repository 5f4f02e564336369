// The last part of a joint step: what the verdict on each sample means beyond the accelerated tensors. The formulas and
// the oracle are in deqfast/ops/formulas/joint.py.
#pragma once

#include <cmath>

#include "deqfast/args.h"

namespace deqfast {

// Which iterate a solve returns.
enum class Returns : int { best, last, cost };

// One tensor of the state; rows of n numbers of the state's dtype, dense.
struct FinishPart {
    int64_t n = 0;
    const void* x = nullptr;       // the iterate that was measured
    const void* mapped = nullptr;  // what the joint map made of it
    void* next = nullptr;          // receives the next iterate; null where the accelerated step made it
    void* saved = nullptr;         // the best iterate so far, beside `next`
    void* kept = nullptr;          // the iterate that Returns::cost would give back; null with the others
};

struct FinishArgs {
    int64_t B = 0;
    int n_parts = 0;
    int n_blocks = 0;
    FinishPart* parts = nullptr;
    DType dtype = DType::f32;  // of the state; A, the accumulation type, is double for f64 and else float
    int32_t* ints = nullptr;   // of the accelerated part's workspace: (rows, padded)
    void* reals = nullptr;     // (rows, padded) of A
    int64_t padded = 0;
    int32_t made = 0;  // evaluations made in this workspace, this one included
    Returns returns = Returns::best;
    bool safeguard = false;
    bool keep_best = true;
    const void* cost = nullptr;           // (B) of A; null: there is none
    void* best_cost = nullptr;            // (B) of A, at the iterate that would be returned
    const double* block_norms = nullptr;  // (n_blocks, 2, padded)
    double* best_norms = nullptr;         // the same, at the iterate that would be returned
    void* saved_cost = nullptr;     // both at the one of the least residual, which a sample that becomes no number
    double* saved_norms = nullptr;  // goes back to; null but with Returns::last
    void* least = nullptr;          // (B) of A: the best residual since the last restart
    void* column_norms = nullptr;   // (tiles, columns, kTile) of A; zero: no such column
    int64_t columns = 0;
    int32_t* taken = nullptr;  // (B), out: the iterate just measured is the one to be returned
    int threads = 1;

    DEQFAST_HD int32_t at(IntRow row, int64_t b) const { return ints[row * padded + b]; }
    template <class A>
    DEQFAST_HD A at(RealRow row, int64_t b) const {
        return static_cast<const A*>(reals)[row * padded + b];
    }
    // Whether a tensor has rows to be copied.
    bool copies() const {
        for (int i = 0; i < n_parts; ++i)
            if (parts[i].next || parts[i].kept) return true;
        return false;
    }
};

template <class A>
DEQFAST_HD inline void note(const FinishArgs& a, int64_t b, const void* cost, const double* norms, void* to_cost,
                            double* to_norms) {
    if (cost) static_cast<A*>(to_cost)[b] = static_cast<const A*>(cost)[b];
    for (int row = 0; row < 2 * a.n_blocks; ++row) to_norms[row * a.padded + b] = norms[row * a.padded + b];
}

// Updates the records of sample b; whether its iterate would be returned now.
template <class A>
DEQFAST_HD inline bool record(const FinishArgs& a, int64_t b) {
    const bool measured = a.at(kSteps, b) == a.made && a.at(kStatus, b) != kNonFinite;
    const bool better = a.at(kBestStep, b) == a.made;
    const A residual = a.at<A>(kResidual, b);
    bool take = a.returns == Returns::last ? measured : better;
    if (a.returns == Returns::cost && a.cost && measured) {
        const bool lower = static_cast<const A*>(a.cost)[b] < static_cast<const A*>(a.best_cost)[b];
        take = take || (lower && residual < A(kCostSlack) * a.at<A>(kBest, b));
    }
    if (take) note<A>(a, b, a.cost, a.block_norms, a.best_cost, a.best_norms);
    if (a.saved_norms) {
        if (better) note<A>(a, b, a.cost, a.block_norms, a.saved_cost, a.saved_norms);
        if (a.at(kSteps, b) == a.made && !measured)
            note<A>(a, b, a.cost ? a.saved_cost : nullptr, a.saved_norms, a.best_cost, a.best_norms);
    }
    if (a.safeguard && measured) {
        A& least = static_cast<A*>(a.least)[b];
        const bool grown = residual > A(kSafeguard) * least;
        least = grown || residual < least ? residual : least;
        if (grown) {
            A* norms = static_cast<A*>(a.column_norms) + b / kTile * a.columns * kTile + b % kTile;
            for (int64_t column = 0; column < a.columns; ++column) norms[column * kTile] = A(0);
        }
    }
    return take;
}

// Where a row of a tensor that is not accelerated goes on from, and whether it is the best so far.
enum class From : int { iterate, mapped, saved };
struct Move {
    From next;
    bool save;
};

DEQFAST_HD inline Move move_of(const FinishArgs& a, int64_t b) {
    if (a.at(kSteps, b) != a.made) return {From::iterate, false};  // it had stopped before
    const int32_t status = a.at(kStatus, b), best_step = a.at(kBestStep, b);
    const bool best = best_step == a.made;
    if (status == kRunning) return {From::mapped, best};
    // A sample whose first evaluation is no number has nothing saved: it stays where it began.
    const bool from_saved = (a.keep_best ? !best : status == kNonFinite) && best_step > 0;
    return {from_saved ? From::saved : From::iterate, best};
}

}  // namespace deqfast
