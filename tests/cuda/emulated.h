// What the tests of emulated kernels share: a batch of small nonlinear maps, the memory of a solve, the device's own.
#pragma once

#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cuda/work.h"

namespace deqfast::emulated {

// How f hands its output over.
enum Form { kDense, kStrided, kNarrow, kStridedNarrow, kRows };

template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::f64 : DType::f32;

inline uint16_t to_bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// f(x) = tanh(rate x) + shift on states of one or two tensors, and all that a solve of it needs besides the method.
template <class T, class Args>
struct Problem {
    Args a;
    std::vector<Leaf> leaves;
    std::vector<T> x[2], saved, f[2], reals, rate, shift;
    std::vector<uint16_t> narrow[2];
    std::vector<int32_t> ints, rows;
    std::vector<double> sums, partials;
    std::vector<char> scratch;
    Form form;
    int64_t running = 0;
    int cur = 0;

    Problem(int64_t B, int64_t N, int n_leaves, Form how, double rtol, int max_iter) : form(how) {
        const int64_t padded = (B + kTile - 1) / kTile * kTile;
        std::mt19937 gen(1);
        std::normal_distribution<double> normal;
        std::uniform_real_distribution<double> uniform(-0.9, 0.97);
        for (int64_t i = 0; i < N; ++i) rate.push_back(T(uniform(gen)));
        for (int64_t i = 0; i < B * N; ++i) shift.push_back(T(normal(gen)));
        for (auto* v : {&x[0], &x[1], &saved, &f[0], &f[1]}) v->assign(size_t(B * N), 0);
        for (auto& v : narrow) v.assign(size_t(B * N), 0);
        reals.assign(size_t(8 * padded), 0);
        for (int64_t b = 0; b < padded; ++b) reals[size_t(kBest * padded + b)] = T(INFINITY);
        ints.assign(size_t(16 * padded), 0);
        for (int64_t b = 0; b < B; ++b) rows.push_back(int32_t(B - 1 - b));
        int64_t block = 0;
        for (int l = 0; l < n_leaves; ++l) {
            Leaf leaf;
            leaf.n = n_leaves == 1 ? N : l == 0 ? N / 3 : N - N / 3;
            leaf.offset = l == 0 ? 0 : N / 3;
            leaf.block = block;
            block += blocks_of(leaf.n);
            a.chunks += chunks_of(leaf.n);
            leaves.push_back(leaf);
        }
        a.B = B, a.N = N, a.n_leaves = n_leaves, a.leaves = leaves.data(), a.dtype = kDTypeOf<T>;
        a.ints = ints.data(), a.reals = reals.data(), a.padded = padded, a.rtol = rtol, a.max_iter = max_iter;
        a.running = &running;
    }
    void allocate(int64_t scratch_bytes, int64_t products) {
        a.scratch_bytes = scratch_bytes;
        scratch.resize(size_t(scratch_bytes) + 64);
        a.scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
        sums.assign(size_t(a.B * products), 0), partials.assign(size_t(a.B * a.chunks * products), 0);
        a.sums = sums.data(), a.partials = partials.data();
    }

    const T* iterate() const { return x[cur].data(); }

    // Evaluates f at the iterate and points the leaves at it, for evaluation k.
    void evaluate(int k) {
        for (Leaf& leaf : leaves) {
            const int64_t start = a.B * leaf.offset, n = leaf.n, B = a.B;
            leaf.x = x[cur].data() + start;
            leaf.x_prev = x[1 - cur].data() + start;
            leaf.saved = saved.data() + start;
            const int64_t inner = n % 7 == 0 ? 7 : n % 3 == 0 ? 3 : 1, outer = n / inner;
            for (int64_t b = 0; b < B; ++b)
                for (int64_t i = 0; i < n; ++i) {
                    const T value = std::tanh(rate[size_t(leaf.offset + i)] * x[cur][size_t(start + b * n + i)]) +
                                    shift[size_t(b * a.N + leaf.offset + i)];
                    const int64_t row = form == kRows ? B - 1 - b : b;
                    const bool strided = form == kStrided || form == kStridedNarrow;
                    const int64_t at = start + row * n + (strided ? i % inner * outer + i / inner : i);
                    f[k & 1][size_t(at)] = value;
                    narrow[k & 1][size_t(at)] = to_bf16(float(value));
                }
            for (int previous : {0, 1}) {
                Source& s = previous ? leaf.f_prev : leaf.f;
                const int which = (k + previous) & 1;
                const bool is_narrow = form == kNarrow || form == kStridedNarrow;
                s.data = is_narrow ? static_cast<const void*>(narrow[which].data() + start) : f[which].data() + start;
                s.dtype = is_narrow ? DType::bf16 : a.dtype;
                s.batch_stride = n;
                s.dense = form == kDense || form == kNarrow || form == kRows;
                s.ndim = 2;
                s.size[0] = outer, s.size[1] = inner, s.stride[0] = 1, s.stride[1] = outer;
            }
        }
        if (form == kRows) a.f_rows = a.f_prev_rows = rows.data();
    }
};

// The device memory of a solve.
struct Memory {
    std::vector<int32_t> counters, arrivals, outcomes, infinite;
    std::vector<double> partials, coefficients, z;
    std::vector<int64_t> ring = std::vector<int64_t>(8, -1);
    cuda::DeviceWork work;

    template <class Args>
    Memory(const Args& a, bool halves) {
        const cuda::WorkSizes sizes = cuda::work_sizes(a, halves);
        const auto allocate = [](auto& v, int64_t bytes) {
            v.assign(size_t(bytes) / sizeof(v[0]) + 1, 0);
            return v.data();
        };
        work.counters = allocate(counters, sizes.counters);
        work.arrivals = allocate(arrivals, sizes.arrivals);
        work.outcomes = allocate(outcomes, sizes.outcomes);
        work.infinite = allocate(infinite, sizes.infinite);
        work.partials = allocate(partials, sizes.partials);
        work.coefficients = allocate(coefficients, sizes.coefficients);
        work.z = allocate(z, sizes.z);
        work.ring = ring.data();
        work.ring_size = int64_t(ring.size()) / 2;
        counters[0] = int32_t(a.B);
    }
};

struct Agreement {
    double worst = 0;  // relative difference of the iterates in the first evaluations
    int steps = 0;     // difference of the evaluations used
    bool told = true;  // the host has been told what still runs
};

// Steps both solves through `evaluations`; `halves`: the second in two calls a step.
template <class P, class Cpu, class Cuda>
Agreement compare(P& cpu, P& gpu, Memory& memory, int evaluations, int compared, bool halves, Cpu&& cpu_step,
                  Cuda&& cuda_step) {
    Agreement found;
    const size_t numbers = size_t(cpu.a.B * cpu.a.N);
    for (int k = 0; k < evaluations; ++k) {
        cpu.evaluate(k), gpu.evaluate(k);
        cpu_step(cpu.a, k);
        memory.work.step = k + 1;
        for (int phase : halves ? std::vector<int>{kReduce, kApply} : std::vector<int>{kStep})
            cuda_step(gpu.a, memory.work, k, phase);
        cpu.cur ^= 1, gpu.cur ^= 1;
        double difference = 0, size = 0;
        for (size_t i = 0; i < numbers; ++i) {
            difference += std::pow(double(cpu.iterate()[i]) - double(gpu.iterate()[i]), 2);
            size += std::pow(double(cpu.iterate()[i]), 2);
        }
        const double relative = std::sqrt(difference / size);
        if (k < compared) found.worst = relative > found.worst || !(relative >= 0) ? relative : found.worst;
        int64_t running = 0, failed = 0;
        for (int64_t b = 0; b < gpu.a.B; ++b) {
            running += gpu.a.at(kStatus, b) == kRunning;
            failed += gpu.a.at(kStatus, b) > kConverged;
        }
        const int64_t* entry = memory.ring.data() + 2 * ((k + 1) % memory.work.ring_size);
        found.told = found.told && entry[0] == (int64_t(k + 1) << 32 | running) && entry[1] == failed;
    }
    for (int64_t b = 0; b < cpu.a.B; ++b)
        found.steps = std::max(found.steps, std::abs(cpu.a.at(kSteps, b) - gpu.a.at(kSteps, b)));
    return found;
}

// Counts the cases and prints those that differ.
class Report {
   public:
    template <class... Values>
    void add(const Agreement& found, double tolerance, const char* format, Values... values) {
        ++cases_;
        if (found.worst < tolerance && found.steps <= 2 && found.told) return;
        ++bad_;
        std::printf(format, values...);
        std::printf(": difference %.1e, steps %d, told %d\n", found.worst, found.steps, int(found.told));
    }
    int finish() const {
        std::printf("%d of %d cases differ\n", bad_, cases_);
        return bad_ != 0 || cases_ == 0;
    }

   private:
    int bad_ = 0, cases_ = 0;
};

}  // namespace deqfast::emulated
