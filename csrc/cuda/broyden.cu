// Broyden step on a GPU. Where the workspace keeps no Gram matrix: the chain form, a block a sample, one launch. Else
// the Gram form, a block a chunk, two launches. Which it is depends on N alone, and so does the order of every sum.
#include "broyden_chain.cuh"
#include "broyden_gram.cuh"

namespace deqfast::cuda {
namespace {

template <class A, class S, int leaves>
void run(const BroydenArgs& a, const DeviceWork& work, int phase) {
    BroydenParams<leaves> p;
    p.a = a;
    p.work = work;
    p.phase = phase;
    for (int l = 0; l < a.n_leaves; ++l) p.leaf[l] = a.leaves[l];
    p.a.leaves = nullptr;
    if (!a.gram) {
        int threads = kChainThreads;
        while (threads > kWarpSize && a.N <= threads / 2 * kItems) threads /= 2;
        const int64_t shared = chain_shared(a.N, sizeof(A));
        launch(chain_kernel<A, S, leaves>, dim3(unsigned(a.B)), threads, shared, work.stream, p);
        return;
    }
    const int64_t shared = Gram<A, S, leaves>::bytes(a.memory);
    const dim3 grid = grid_of(a.B, split_chunks(a));
    if (phase & kReduce) launch(gram_reduce_kernel<A, S, leaves>, grid, kGramThreads, shared, work.stream, p);
    if (phase == kApply)
        launch(gram_decide_kernel<A, S, leaves>, dim3(unsigned(a.B)), kWarpSize, shared, work.stream, p);
    if (phase & kApply) launch(gram_apply_kernel<A, S, leaves>, grid, kGramThreads, shared, work.stream, p);
}

template <class A, class S>
void with_leaves(const BroydenArgs& a, const DeviceWork& work, int phase) {
    check_leaves<S>(a);
    if (a.n_leaves == 1) return run<A, S, 1>(a, work, phase);
    return run<A, S, kMaxLeaves>(a, work, phase);
}

}  // namespace

void broyden_step(const BroydenArgs& a, const DeviceWork& work, int phase) {
    if (phase != kStep && !a.gram) throw std::invalid_argument("the chain form takes whole steps only");
    switch (a.dtype) {
        case DType::f64:
            return with_leaves<double, double>(a, work, phase);
        case DType::f32:
            return with_leaves<float, float>(a, work, phase);
        case DType::bf16:
            return with_leaves<float, Bf16>(a, work, phase);
        default:
            return with_leaves<float, F16>(a, work, phase);
    }
}

}  // namespace deqfast::cuda
