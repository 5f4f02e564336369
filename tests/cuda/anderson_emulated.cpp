// The CUDA Anderson step, emulated, beside the CPU kernel: the same decisions and, up to rounding, the same iterates.
#include <cstdio>
#include <random>

#include "../../csrc/cuda/verdict.cuh"
#include "deqfast/anderson.h"
#include "emulate.h"

namespace deqfast::cpu::baseline {
void anderson_step(const AndersonArgs& args, int phase);
}
namespace deqfast::cuda {
void anderson_step(const AndersonArgs& a, const DeviceWork& work);
}
using namespace deqfast;

constexpr int kEvaluations = 14;

struct Problem {
    std::vector<float> x0, x1, saved, f[2], reals, matrix, gram, norms, scales;
    std::vector<double> sums, partials;
    std::vector<int32_t> ints, ages;
    std::vector<char> history, scratch;
    Leaf leaf;
    AndersonArgs a;
    int64_t running = 0;
    int cur = 0;

    Problem(int64_t B, int64_t N, int m, double c, DType h) {
        const int64_t padded = (B + 15) / 16 * 16, tiles = padded / 16, blocks = blocks_of(N);
        x0.assign(B * N, 0), x1.assign(B * N, 0), saved.assign(B * N, 0);
        f[0].assign(B * N, 0), f[1].assign(B * N, 0);
        reals.assign(8 * padded, 0);
        for (int64_t b = 0; b < padded; ++b) reals[kBest * padded + b] = INFINITY;
        ints.assign(16 * padded, 0);
        matrix.assign(tiles * m * m * 16, NAN), gram.assign(tiles * m * m * 16, NAN);
        norms.assign(tiles * 2 * m * 16, 0), ages.assign(tiles * m * 16, 0);
        scales.assign(2 * B * m * blocks, NAN);
        history.assign(size_t(2 * B * m * N * 4), char(0xff));
        leaf.n = N;
        leaf.saved = saved.data();
        leaf.f.batch_stride = leaf.f_prev.batch_stride = N;
        a.B = B, a.N = N, a.n_leaves = 1, a.leaves = &leaf, a.ints = ints.data(), a.reals = reals.data();
        a.padded = padded, a.rtol = 1e-4, a.max_iter = kEvaluations, a.m = m, a.test_space = c,
        a.ridge = c ? 1e-4 : 1e-6;
        a.history_dtype = h, a.history = history.data(), a.scales = scales.data(), a.blocks = blocks;
        a.matrix = matrix.data(), a.gram = gram.data(), a.norms = norms.data(), a.ages = ages.data();
        a.scratch_bytes = anderson_scratch_bytes(m, 4);
        scratch.resize(size_t(a.scratch_bytes) + 64);
        a.scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
        a.chunks = chunks_of(N);
        sums.resize(size_t(B * anderson_products(m))), partials.resize(size_t(B * a.chunks * anderson_products(m)));
        a.sums = sums.data(), a.partials = partials.data(), a.running = &running;
    }
    const float* x() const { return cur ? x1.data() : x0.data(); }
    void point(int k) {
        leaf.x = cur ? x1.data() : x0.data();
        leaf.x_prev = cur ? x0.data() : x1.data();
        leaf.f.data = f[k & 1].data();
        leaf.f_prev.data = f[1 - (k & 1)].data();
        a.has_previous = k > 0;
    }
};

int main() {
    int bad = 0, cases = 0;
    for (auto [B, N] : {std::pair<int64_t, int64_t>{17, 9}, {3, 33}, {2, 64}, {2, 1025}, {1, 20001}})
        for (int m : {1, 3, 10})
            for (double c : {2.0, 1.0, 0.0})
                for (DType h : {DType::f32, DType::bf16, DType::f16, DType::i8}) {
                    if (N > 4000 && (m != 3 || c == 1)) continue;
                    std::mt19937 gen(1);
                    std::normal_distribution<float> normal;
                    std::uniform_real_distribution<float> uniform(-0.9f, 0.97f);
                    std::vector<float> rate(N), shift(B * N);
                    for (float& r : rate) r = uniform(gen);
                    for (float& s : shift) s = normal(gen);
                    Problem cpu(B, N, m, c, h), gpu(B, N, m, c, h);
                    std::vector<int32_t> counters{int32_t(B), 0}, arrivals(2 * B), outcomes(B), infinite(B), seen(2);
                    std::vector<float> gamma(B * m);
                    std::vector<double> partials(B * anderson_products(m) * (N / 4096 + 1));
                    cuda::DeviceWork work{counters.data(), arrivals.data(), outcomes.data(), infinite.data(),
                                          partials.data(), gamma.data(),    seen.data(),     nullptr};
                    ++cases;
                    double worst = 0;
                    bool same = true;
                    for (int k = 0; k < kEvaluations; ++k) {
                        for (Problem* p : {&cpu, &gpu}) {
                            p->point(k);
                            for (int64_t i = 0; i < B * N; ++i)
                                p->f[k & 1][size_t(i)] = std::tanh(rate[size_t(i % N)] * p->x()[i]) + shift[size_t(i)];
                        }
                        cpu::baseline::anderson_step(cpu.a, kStep);
                        cuda::anderson_step(gpu.a, work);
                        cpu.cur ^= 1, gpu.cur ^= 1;
                        double difference = 0, size = 0;
                        for (int64_t i = 0; i < B * N; ++i) {
                            difference += std::pow(double(cpu.x()[i]) - double(gpu.x()[i]), 2);
                            size += std::pow(double(cpu.x()[i]), 2);
                        }
                        if (k < 4) worst = std::max(worst, std::sqrt(difference / size));
                        same = same && seen[1] == counters[0] && seen[0] == k + 1;
                    }
                    int32_t steps = 0;
                    for (int64_t b = 0; b < B; ++b)
                        steps = std::max(steps, std::abs(cpu.a.at(kSteps, b) - gpu.a.at(kSteps, b)));
                    const bool ok = worst < 1e-2 && steps <= 2 && same;
                    if (!ok)
                        std::printf("B=%ld N=%ld m=%d c=%g h=%d: difference %.1e, steps %d, %d\n", long(B), long(N), m,
                                    c, int(h), worst, steps, int(same)),
                            ++bad;
                }
    std::printf("%d of %d cases differ\n", bad, cases);
    return bad != 0;
}
