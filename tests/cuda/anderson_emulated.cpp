// The CUDA Anderson step, emulated, beside the CPU kernel: the same decisions and, up to rounding, the same iterates.
#include "emulate.h"
#include "emulated.h"

namespace deqfast::cpu::baseline {
void anderson_step(const AndersonArgs& args, int phase);
}
using namespace deqfast;
using namespace deqfast::emulated;

constexpr int kEvaluations = 14;

struct Options {
    int64_t B, N;
    int m = 3;
    double test_space = 2;
    DType history = DType::f32;
    int leaves = 1;
    Form form = kDense;
    double mixing = 1;
    bool keep_products = true;
    bool halves = false;
};

template <class T>
struct AndersonProblem : Problem<T, AndersonArgs> {
    std::vector<T> matrix, gram, norms;
    std::vector<float> scales;
    std::vector<int32_t> ages;
    std::vector<char> history;

    explicit AndersonProblem(const Options& o)
        : Problem<T, AndersonArgs>(o.B, o.N, o.leaves, o.form, sizeof(T) == 8 ? 1e-9 : 1e-4, kEvaluations) {
        auto& a = this->a;
        const int64_t tiles = a.padded / kTile, m = o.m, blocks = this->leaves.back().block + blocks_of(o.N);
        matrix.assign(size_t(tiles * m * m * kTile), T(NAN)), gram.assign(size_t(tiles * m * m * kTile), T(NAN));
        norms.assign(size_t(tiles * 2 * m * kTile), 0), ages.assign(size_t(tiles * m * kTile), 0);
        scales.assign(size_t(2 * o.B * m * blocks), NAN);
        history.assign(size_t(2 * a.padded * m * o.N) * sizeof(T), char(0xff));
        a.m = o.m, a.test_space = o.test_space, a.mixing = o.mixing, a.ridge = o.test_space ? 1e-4 : 1e-6;
        a.history_dtype = o.history, a.history = history.data(), a.scales = scales.data(), a.blocks = blocks;
        a.matrix = matrix.data(), a.gram = o.keep_products ? gram.data() : nullptr, a.norms = norms.data();
        a.ages = ages.data();
        this->allocate(anderson_scratch_bytes(o.m, sizeof(T)), anderson_products(o.m));
    }
};

template <class T>
void test(Report& report, const Options& o) {
    AndersonProblem<T> cpu(o), gpu(o);
    Memory device(gpu.a, o.halves);
    const auto with_previous = [](AndersonArgs& a, int k) -> AndersonArgs& { return a.has_previous = k > 0, a; };
    const Agreement found = compare(
        cpu, gpu, device, kEvaluations, 4, o.halves,
        [&](AndersonArgs& a, int k) { cpu::baseline::anderson_step(with_previous(a, k), kStep); },
        [&](AndersonArgs& a, const cuda::DeviceWork& work, int k, int phase) {
            cuda::anderson_step(with_previous(a, k), work, phase);
        });
    report.add(found, sizeof(T) == 8 ? 1e-6 : 1e-2,
               "B=%ld N=%ld m=%d c=%g h=%d leaves=%d form=%d mixing=%g products=%d halves=%d f%d", long(o.B), long(o.N),
               o.m, o.test_space, int(o.history), o.leaves, int(o.form), o.mixing, int(o.keep_products), int(o.halves),
               int(sizeof(T) * 8));
}

int main() {
    Report report;
    for (auto [B, N] : {std::pair<int64_t, int64_t>{17, 9}, {3, 33}, {2, 64}, {2, 1025}, {1, 20001}})
        for (int m : {1, 3, 10})
            for (double c : {2.0, 1.0, 0.0})
                for (DType h : {DType::f32, DType::bf16, DType::f16, DType::i8})
                    if (N < 4000 || (m == 3 && c != 1)) test<float>(report, {B, N, m, c, h});
    for (Form form : {kDense, kStrided, kNarrow, kStridedNarrow, kRows})
        for (int leaves : {1, 2})
            for (bool halves : {false, true}) {
                test<float>(report, {3, 42, 4, 2.0, DType::bf16, leaves, form, 0.7, true, halves});
                test<double>(report, {3, 48, 4, 0.0, DType::f32, leaves, form, 1.0, true, halves});
            }
    for (double c : {2.0, 0.0}) {
        test<float>(report, {1, 5000, 5, c, DType::i8, 1, kDense, 1.0, true, true});
        test<float>(report, {1, 20000, 5, c, DType::bf16, 2, kStrided, 0.7, true, true});
    }
    for (int64_t N : {1, 3, 8})  // samples whose small matrices are formed anew
        for (double c : {2.0, 1.0, 0.0})
            for (double mixing : {1.0, 0.7}) {
                for (Form form : {kDense, kStrided, kRows})  // float: few columns, or rounding decides
                    test<float>(report, {70, N, int(std::min<int64_t>(N, 2)), c, DType::bf16, 1, form, mixing, false});
                for (Form form : {kDense, kStridedNarrow})
                    test<double>(report, {37, N, int(std::min<int64_t>(N, 5)), c, DType::f64, 1, form, mixing, false});
            }
    return report.finish();
}
