// What both solvers share for short samples, kLanes of them at a time: choosing rows, and judging evaluations side by
// side.
#pragma once

#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A>
constexpr uint32_t kAllLanes = (1u << kLanes<A>)-1;
template <class A>
using IntVec = typename VectorOf<int32_t, kLanes<A>>::type;
template <class A>
using Mask = decltype(Vec<A>{} < Vec<A>{});

template <class A>
inline Vec<A> splat(A value) {
    return Vec<A>{} + value;
}
template <class A>
inline Vec<A> root(Vec<A> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
        const __m512 r = _mm512_sqrt_ps(read<__m512>(&v));
        return read<Vec<A>>(&r);
    } else {
        const __m512d r = _mm512_sqrt_pd(read<__m512d>(&v));
        return read<Vec<A>>(&r);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
        const __m256 r = _mm256_sqrt_ps(read<__m256>(&v));
        return read<Vec<A>>(&r);
    } else {
        const __m256d r = _mm256_sqrt_pd(read<__m256d>(&v));
        return read<Vec<A>>(&r);
    }
#else
    for (int i = 0; i < kLanes<A>; ++i) v[i] = A(std::sqrt(v[i]));
    return v;
#endif
}

template <class A>
inline Mask<A> lanes_of(uint32_t bits) {
    Mask<A> mask;
    for (int i = 0; i < kLanes<A>; ++i) mask[i] = bits >> i & 1 ? -1 : 0;
    return mask;
}
template <class A>
inline IntVec<A> narrow_mask(Mask<A> mask) {
    return __builtin_convertvector(mask, IntVec<A>);
}

// Rows of kLanes samples: `row(i)` for the lanes in `use`, else a row of zeros (to read) or of nothing (to write).
template <int lanes, class T, class Row>
inline void point(T** rows, T* other, uint32_t use, Row&& row) {
    for (int i = 0; i < lanes; ++i) rows[i] = use >> i & 1 ? row(i) : other;
}

// Samples that go on and whose unit stays, judged side by side.
template <class A>
struct Judged {
    uint32_t going;
    Vec<A> norm, previous_norm;
    IntVec<A> steps;
};

// `judge` for the lanes in `ordinary` (running, started, not at their last evaluation) of samples b0, b0 + 1, ... The
// lanes that turn out to need more, because they stop or need another unit, are left untouched and out of `going`; so
// are all where a state is judged by its blocks.
template <class A>
inline Judged<A> judge_lanes(const SolveArgs& a, int64_t b0, int count, Vec<A> ff, Vec<A> gg, uint32_t ordinary) {
    using V = Vec<A>;
    using Ints = IntVec<A>;
    const auto ints = [&](IntRow row) { return a.ints + row * a.padded + b0; };
    const auto reals = [&](RealRow row) { return static_cast<A*>(a.reals) + row * a.padded + b0; };
    const V units = read<V>(reals(kUnit));
    const V f_norm = root<A>(ff) / units, g_norm = root<A>(gg) / units;
    const V mean = select(ff > gg, ff, gg) / splat<A>(A(a.N));
    const V range = splat<A>(A(kUnitRange * kUnitRange));
    const auto fits = (mean <= range) & (mean * range >= splat<A>(1)) & (f_norm > splat<A>(0));
    const auto unfinished = g_norm > splat<A>(A(a.atol)) + A(a.rtol) * f_norm;
    const auto going = lanes_of<A>(a.n_blocks ? 0 : ordinary) & fits & unfinished;

    const V relative = g_norm / f_norm, best = read<V>(reals(kBest)), previous_norm = read<V>(reals(kNorm));
    const V least = read<V>(reals(kLeast)), largest = read<V>(reals(kLargest));
    const Ints going_ints = narrow_mask<A>(going), best_at = read<Ints>(ints(kBestAt));
    const Ints better = going_ints & (narrow_mask<A>(g_norm < least) | (best_at == int32_t(kNowhere)));
    const Ints spill = going_ints & ~better & (best_at == int32_t(kPrevious));
    const Ints steps = read<Ints>(ints(kSteps)), next = select(going_ints, steps + 1, steps);
    const auto better_lanes = __builtin_convertvector(better, Mask<A>);
    write(ints(kSteps), next);
    write(ints(kBestAt), select(better, Ints{} + int32_t(kCurrent), select(spill, Ints{} + int32_t(kSaved), best_at)));
    write(ints(kBestStep), select(better, next, read<Ints>(ints(kBestStep))));
    write(reals(kBest), select(better_lanes, relative, best));
    write(reals(kLeast), select(better_lanes, g_norm, least));
    write(reals(kLargest), select(going & (g_norm > largest), g_norm, largest));
    write(reals(kResidual), select(going, relative, read<V>(reals(kResidual))));
    write(reals(kNorm), select(going, g_norm, previous_norm));
    if (const uint32_t lost = bits(spill))
        for (int i = 0; i < count; ++i)
            if (lost >> i & 1) spill_and_rest(a, b0 + i, {true, false, true, false, 0});
    return {bits(going), g_norm, previous_norm, next};
}

// `after_step` for the lanes in `going`.
template <class A>
inline void after_steps(const SolveArgs& a, int64_t b0, uint32_t going) {
    using Ints = IntVec<A>;
    int32_t* best_at = a.ints + kBestAt * a.padded + b0;
    const Ints at = read<Ints>(best_at);
    const Ints moved = narrow_mask<A>(lanes_of<A>(going)) & (at == int32_t(kCurrent));
    write(best_at, select(moved, Ints{} + int32_t(kPrevious), at));
}

}  // namespace deqfast::cpu::DEQFAST_ISA
