// The joint map on a GPU: checks, sizes, and the kernels of the state's dtype; what they do is in joint.cuh.
#include "joint.cuh"

namespace deqfast::cuda {
namespace {

int64_t numbers_of(const JointArgs& a) {
    int64_t numbers = 0;
    for (int i = 0; i < a.n_parts; ++i) numbers += a.parts[i].n;
    return numbers;
}

int64_t chunks_in(const JointArgs& a) {
    int64_t chunks = 0;
    for (int i = 0; i < a.n_parts; ++i) chunks += (a.parts[i].n + kSplitChunk - 1) / kSplitChunk;
    return chunks;
}

template <class A, class S>
void run(const JointArgs& a, const JointWork& work) {
    for (int i = 0; i < a.n_parts; ++i)
        if (!a.parts[i].value.dense && a.parts[i].n > 0xffffffff)
            throw std::invalid_argument("f(z, x): a strided output may have at most 2^32 numbers a sample");
    const int64_t numbers = numbers_of(a), chunks = chunks_in(a);
    if (a.n_parts <= 4) return run_joint<A, S, 4>(a, work, numbers, chunks);
    return run_joint<A, S, kMaxParts>(a, work, numbers, chunks);
}

}  // namespace

JointSizes joint_sizes(const JointArgs& a) {
    if (numbers_of(a) <= kBlockMaxN) return {0, 0, 0};
    return {4 * a.B, 8 * 2 * a.B * chunks_in(a), 8 * 2 * a.B};
}

void joint_map(const JointArgs& a, const JointWork& work) {
    check_parts(a.n_parts);
    if (a.B == 0) return;
    switch (a.dtype) {
        case DType::f64:
            return run<double, double>(a, work);
        case DType::f32:
            return run<float, float>(a, work);
        case DType::bf16:
            return run<float, Bf16>(a, work);
        default:
            return run<float, F16>(a, work);
    }
}

}  // namespace deqfast::cuda
