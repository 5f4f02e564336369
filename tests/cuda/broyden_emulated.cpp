// The CUDA Broyden step, emulated, beside the CPU kernel: the same decisions and, up to rounding, the same iterates.
#include "emulate.h"
#include "emulated.h"

namespace deqfast::cpu::baseline {
void broyden_step(const BroydenArgs& args, int phase);
}
using namespace deqfast;
using namespace deqfast::emulated;

template <class T>
struct BroydenProblem : Problem<T, BroydenArgs> {
    std::vector<T> history, norms, gram;

    BroydenProblem(int64_t B, int64_t N, int n_leaves, Form form, int memory, bool scale_first, bool keep_gram)
        : Problem<T, BroydenArgs>(B, N, n_leaves, form, sizeof(T) == 8 ? 1e-9 : 1e-4, 14) {
        auto& a = this->a;
        history.assign(size_t(B * memory * N), T(NAN));
        norms.assign(size_t(B * memory), T(NAN));
        gram.assign(size_t(B * memory * memory), T(NAN));
        a.memory = memory, a.scale_first = scale_first;
        a.history = history.data(), a.norms = norms.data(), a.gram = keep_gram ? gram.data() : nullptr;
        this->allocate(broyden_scratch_bytes(N, !keep_gram, sizeof(T)), broyden_products(memory));
    }
};

template <class T>
void test(Report& report, int64_t B, int64_t N, int n_leaves, Form form, int memory, bool scale_first, bool gram,
          bool halves) {
    BroydenProblem<T> cpu(B, N, n_leaves, form, memory, scale_first, gram),
        gpu(B, N, n_leaves, form, memory, scale_first, gram);
    Memory device(gpu.a, halves);
    Agreement found = compare(
        cpu, gpu, device, 14, 6, halves, [](BroydenArgs& a, int) { cpu::baseline::broyden_step(a, kStep); },
        [](BroydenArgs& a, const cuda::DeviceWork& work, int, int phase) { cuda::broyden_step(a, work, phase); });
    for (IntRow row : {kFullRestarts, kStepFallbacks, kRescales})
        for (int64_t b = 0; b < B; ++b)
            if (cpu.a.at(row, b) != gpu.a.at(row, b)) found.steps = 99;
    report.add(found, sizeof(T) == 8 ? 1e-9 : 2e-4,
               "B=%ld N=%ld leaves=%d form=%d memory=%d scale=%d gram=%d halves=%d f%d", long(B), long(N), n_leaves,
               int(form), memory, int(scale_first), int(gram), int(halves), int(sizeof(T) * 8));
}

int main() {
    Report report;
    for (auto [B, N] : {std::pair<int64_t, int64_t>{17, 9}, {3, 33}, {2, 64}, {2, 1025}, {1, 4104}})
        for (int memory : {3, 12})
            for (bool scale : {false, true})
                for (bool gram : {false, true}) {
                    test<float>(report, B, N, 1, kDense, memory, scale, gram, false);
                    test<double>(report, B, N, 1, kDense, memory, scale, gram, gram);
                }
    for (bool gram : {false, true}) {
        test<float>(report, 1, 20001, 1, kDense, 4, true, gram, false);  // beyond shared memory; several chunks
        test<float>(report, 1, 20001, 2, kStrided, 5, false, gram, gram);
        for (Form form : {kDense, kStrided, kNarrow, kStridedNarrow, kRows})
            for (int leaves : {1, 2}) {
                test<float>(report, 3, 42, leaves, form, 5, true, gram, gram);
                test<double>(report, 3, 48, leaves, form, 5, true, gram, false);
            }
    }
    test<float>(report, 1, 9000, 1, kDense, 40, false, true, false);
    return report.finish();
}
