// Whether samples that have stopped are still within their tolerance. What moves, per number of a stopped sample: x and
// f are read once. The oracle is deqfast/ops/recheck.py.
#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

constexpr int64_t kThreadsFrom = 1 << 16;  // numbers below which starting threads takes longer than the norms

template <class A>
int64_t look(const SolveArgs& a, const Recheck& rule) {
    int64_t outside = 0;
#pragma omp parallel for num_threads(a.threads) schedule(static) \
    reduction(+ : outside) if (a.threads > 1 && a.B * a.N >= kThreadsFrom)
    for (int64_t b = 0; b < a.B; ++b) {
        if (a.at(kStatus, b) != kConverged || a.at(kSteps, b) >= rule.made) continue;
        if (a.f_rows && a.f_rows[b] < 0) continue;
        A buffers[2 * kBlock];
        double f_norm, g_norm;
        scan_norms(a, b, buffers, &f_norm, &g_norm);
        const Distance d = distance(a, b, f_norm, g_norm);
        const double limit = (a.atol + a.rtol * f_norm) * (1 + rule.slack) + rule.noise * f_norm;
        if (!(d.finite && g_norm <= limit)) {
            ++outside;
            continue;
        }
        A& known = a.at<A>(kResidual, b);
        if (std::abs(d.relative - double(known)) <= rule.same * double(known)) continue;
        known = a.at<A>(kBest, b) = A(d.relative);
        a.at<A>(kNorm, b) = A(g_norm);
    }
    return outside;
}

// Samples of which the norms have to be added up for themselves, and this rank's part of them.
template <class A>
int64_t squares(const SolveArgs& a, const Squares& wanted) {
    int64_t found = 0;
#pragma omp parallel for num_threads(a.threads) schedule(static) \
    reduction(+ : found) if (a.threads > 1 && a.B * a.N >= kThreadsFrom)
    for (int64_t b = 0; b < a.B; ++b) {
        double* out = wanted.out + 2 * b;
        const double* sum = a.sums + b * wanted.products;
        out[0] = out[1] = 0;
        if (a.at(kStatus, b) != kRunning) continue;
        if (!needs_scan(double(a.at<A>(kUnit, b)), sum[0], sum[1], a.total())) continue;
        A buffers[2 * kBlock];
        double f_norm, g_norm;
        scan_norms(a, b, buffers, &f_norm, &g_norm);
        out[0] = f_norm * f_norm;
        out[1] = g_norm * g_norm;
        ++found;
    }
    return found;
}

}  // namespace

int64_t squares(const SolveArgs& a, const Squares& wanted) {
    return a.dtype == DType::f64 ? squares<double>(a, wanted) : squares<float>(a, wanted);
}

int64_t recheck(const SolveArgs& a, const Recheck& rule) {
    return a.dtype == DType::f64 ? look<double>(a, rule) : look<float>(a, rule);
}

}  // namespace deqfast::cpu::DEQFAST_ISA
