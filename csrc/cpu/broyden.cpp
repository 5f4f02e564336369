// Broyden step on the CPU. N alone decides between the chain form, a thread a sample or a sample a lane, and the Gram
// form, whose samples are split over threads.
#include "deqfast/broyden.h"

#include "broyden_chain.h"
#include "broyden_gram.h"
#include "broyden_short.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

template <class A>
void chains(const BroydenArgs& a) {
    const BroydenShort<A> lanes(a);
    const BroydenChain<A> chain(a);
    const bool is_short = a.N <= kShortN && a.n_leaves == 1;
    const int64_t per_unit = is_short ? kLanes<A> : 1, units = (a.B + per_unit - 1) / per_unit;
    const int threads = int(std::min<int64_t>(a.threads, a.B * a.N * 8 < 16384 ? 1 : units));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t u = 0; u < units; ++u) {
        BroydenScratch<A> s(a, thread_index());
        if (is_short)
            lanes.step(u * per_unit, int(std::min(per_unit, a.B - u * per_unit)), s);
        else if (a.at(kStatus, u) == kRunning)
            chain.step(u, s);
    }
}

template <class A>
void run(const BroydenArgs& a, int phase) {
    if (a.gram) {
        BroydenGram<A> gram(a);
        if (phase & kReduce) gram.reduce();
        if (phase & kApply) gram.apply();
    } else {
        chains<A>(a);
    }
    if (!(phase & kApply)) return;
    int64_t running = 0;
    for (int64_t b = 0; b < a.B; ++b) running += a.at(kStatus, b) == kRunning;
    *a.running = running;
}

}  // namespace

void broyden_step(const BroydenArgs& args, int phase) {
    if (args.dtype == DType::f64)
        run<double>(args, phase);
    else
        run<float>(args, phase);
}

}  // namespace deqfast::cpu::DEQFAST_ISA
