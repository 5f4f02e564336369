// What the launch code of the CUDA kernels asks for, swept over every size on the CPU, and how long the host waits.
// Prints a line for each sweep; a launch that a device would refuse ends it with exit status 1.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "cuda/launch.cuh"
#include "cuda/waiting.h"

using namespace deqfast;
using namespace deqfast::cuda;

namespace {

constexpr DType kStates[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
constexpr int kMostWarps = 8;

void nothing(int) {}

// Launches a kernel that does nothing, as the emulator lets a device judge it.
void launch_with(int64_t shared) { launch(nothing, dim3(1), kWarpSize, shared, nullptr, 0); }

// Largest m that is taken, every block size below it launched.
template <class Args, class Method, class Shared>
int most_columns(DType dtype, Args args, int Method::* columns, const Shared& shared) {
    args.dtype = dtype;
    for (int m = 0;; ++m) {
        args.*columns = m;
        try {
            check_supported(args);
        } catch (const std::invalid_argument&) {
            return m - 1;
        }
        for (int warps = 1; warps <= kMostWarps; warps *= 2) launch_with(shared(m, warps, accumulation_size(dtype)));
    }
}

void columns() {
    double matrix[1];
    BroydenArgs broyden;
    broyden.gram = matrix;
    for (const DType dtype : kStates) {
        const int m = most_columns(dtype, AndersonArgs{}, &AndersonArgs::m, anderson_shared);
        const int steps = most_columns(dtype, broyden, &BroydenArgs::memory,
                                       [](int k, int warps, int64_t) { return gram_shared(k, warps); });
        std::printf("columns %d %d\n", m, steps);
        if (m < 64 || steps < 256) throw std::logic_error("fewer columns than are promised");
    }
}

void chains() {
    int64_t sizes = 0;
    for (const int64_t number : {8, 4})
        for (int64_t N = 1; N < kDeviceGramMinN; ++N, ++sizes) launch_with(chain_shared(N, number));
    std::printf("chains %lld\n", static_cast<long long>(sizes));
}

void tiny() {
    for (const int64_t number : {8, 4})
        for (int m = 0; m <= kTinyN; ++m)
            for (int N = 1; N <= kTinyN; ++N) launch_with(tiny_shared(m, N, number == 8 ? 32 : 64, number));
    std::printf("tiny\n");
}

// What launches before had the rule wrong for: between what is free and what is free beside a kernel's own variables.
void boundary() {
    for (int64_t shared = kFreeShared - 2 * kStaticShared; shared <= kFreeShared + kStaticShared; ++shared)
        launch_with(shared);
    launch_with(kMaxDynamic);
    bool refused = false;
    try {
        launch_with(kMaxDynamic + 1);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    if (!refused) throw std::logic_error("more than there is was not refused");
    std::printf("boundary\n");
}

using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

void waiting() {
    // A word that comes while the host spins: nobody asks the driver. One that never does: asked after the spin.
    for (int attempt = 0; attempt < 20; ++attempt) {
        int looks = 0;
        wait_for([&] { return ++looks > 3; }, [] { throw std::logic_error("asked the driver at once"); });
    }
    const Clock::time_point begin = Clock::now();
    double first = 0;
    try {
        wait_for([] { return false; },
                 [&] {
                     first = microseconds(Clock::now() - begin);
                     throw std::runtime_error("nothing will come");
                 });
    } catch (const std::runtime_error&) {
    }
    if (first < 200) throw std::logic_error("gave up spinning before 200 us");
    std::printf("waiting %.0f\n", first);
}

}  // namespace

int main() try {
    columns();
    chains();
    tiny();
    boundary();
    waiting();
    return 0;
} catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
    return 1;
}
