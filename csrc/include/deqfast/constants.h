// Numbers and codes that every language agrees on: Python has them in deqfast/ops/codes.py and deqfast/status.py,
// Triton in kernels/constants.py. The module exports kConstants, and a test compares all three name by name.
#pragma once

#include <cstdint>

namespace deqfast {

constexpr int kTile = 16;     // samples whose small matrices lie interleaved
constexpr int kTinyN = 8;     // samples up to this have their small matrices formed anew at every step
constexpr int kBlock = 1024;  // history numbers that share one scale; also what a kernel handles at a time

// A sample whose magnitude leaves [1/kUnitRange, kUnitRange] in its unit gets a new unit and forgets its history.
constexpr double kUnitRange = 1099511627776.0;  // 2^40
// Type II: a residual that grows by more forgets all but the newest column.
constexpr double kGrowthLimit = 1.5;
// A sample whose ||f|| is kGrown times what f and g were at first has run away while ||g|| is above a kFallen-th of its
// largest, or above rtol kFar times what they were at first and not rounding (eps ||f||), or while rounding is
// above that largest, or kGone times what they were at first: that ||g|| / ||f|| is small does not make it converged.
constexpr double kGrown = 10, kFallen = 4, kFar = 1000, kGone = 1e13;
// A sample out of evaluations has diverged when its residual ended this far above the first, and has stalled when the
// best residual came before the last third of its evaluations, and these are at least kStallMinSteps.
constexpr double kDivergence = 10;
constexpr int kStallFraction = 3, kStallMinSteps = 10;
constexpr double kMinDenominator = 1e-4;  // Broyden: |1 - c/||s||^2| below it restarts the sample
// Joint solves: a lower cost is taken at a residual up to this times the best one, and a residual this far above the
// best one since the last restart forgets the history.
constexpr double kCostSlack = 1.3, kSafeguard = 2.0;

enum Status : int32_t { kRunning, kConverged, kMaxIter, kNonFinite, kStopped, kDiverged, kStalled };
enum At : int32_t { kNowhere, kCurrent, kPrevious, kSaved };
enum class Evict : int { oldest, least_useful };
enum JointBlock : int { kStateBlock, kAdjointBlock, kInputBlock };

// Rows of Workspace.ints and Workspace.reals.
enum IntRow {
    kStatus,
    kSteps,
    kBestAt,
    kBestStep,
    kSlot,
    kCount,
    kSolveFallbacks,
    kStepFallbacks,
    kGrowthRestarts,
    kRescales,
    kEvictions,
    kFullRestarts,
    kDenominatorRestarts,
    kWoken
};
enum RealRow { kResidual, kNorm, kBest, kLeast, kFirst, kUnit, kLargest, kScale };

struct Named {
    const char* name;
    double value;
};

constexpr Named kConstants[] = {
    {"TILE", kTile},
    {"TINY", kTinyN},
    {"BLOCK", kBlock},
    {"UNIT_RANGE", kUnitRange},
    {"GROWTH_LIMIT", kGrowthLimit},
    {"GROWN", kGrown},
    {"FALLEN", kFallen},
    {"FAR", kFar},
    {"GONE", kGone},
    {"DIVERGENCE", kDivergence},
    {"STALL_FRACTION", kStallFraction},
    {"STALL_MIN_STEPS", kStallMinSteps},
    {"MIN_DENOMINATOR", kMinDenominator},
    {"COST_SLACK", kCostSlack},
    {"SAFEGUARD", kSafeguard},
    {"Status.RUNNING", kRunning},
    {"Status.CONVERGED", kConverged},
    {"Status.MAX_ITER", kMaxIter},
    {"Status.NON_FINITE", kNonFinite},
    {"Status.STOPPED", kStopped},
    {"Status.DIVERGED", kDiverged},
    {"Status.STALLED", kStalled},
    {"At.NOWHERE", kNowhere},
    {"At.CURRENT", kCurrent},
    {"At.PREVIOUS", kPrevious},
    {"At.SAVED", kSaved},
    {"Evict.OLDEST", int(Evict::oldest)},
    {"Evict.LEAST_USEFUL", int(Evict::least_useful)},
    {"Block.z", kStateBlock},
    {"Block.mu", kAdjointBlock},
    {"Block.x", kInputBlock},
    {"Int.STATUS", kStatus},
    {"Int.STEPS", kSteps},
    {"Int.BEST_AT", kBestAt},
    {"Int.BEST_STEP", kBestStep},
    {"Int.SLOT", kSlot},
    {"Int.COUNT", kCount},
    {"Int.SOLVE_FALLBACKS", kSolveFallbacks},
    {"Int.STEP_FALLBACKS", kStepFallbacks},
    {"Int.GROWTH_RESTARTS", kGrowthRestarts},
    {"Int.RESCALES", kRescales},
    {"Int.EVICTIONS", kEvictions},
    {"Int.FULL_RESTARTS", kFullRestarts},
    {"Int.DENOMINATOR_RESTARTS", kDenominatorRestarts},
    {"Int.WOKEN", kWoken},
    {"Real.RESIDUAL", kResidual},
    {"Real.NORM", kNorm},
    {"Real.BEST", kBest},
    {"Real.FIRST", kFirst},
    {"Real.UNIT", kUnit},
    {"Real.LEAST", kLeast},
    {"Real.LARGEST", kLargest},
    {"Real.SCALE", kScale},
};

}  // namespace deqfast
