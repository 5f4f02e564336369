// How the host waits for a word that the device is about to write.
#pragma once

#include <chrono>
#include <thread>

namespace deqfast::cuda {

// How long it looks without a pause. Asking the driver and sleeping take 70 us and more, during which the device would
// run out of work: evaluations of 20 to 100 us, of which few are ahead, have to fit in here.
constexpr std::chrono::microseconds kSpin{250};
constexpr std::chrono::microseconds kPause{20};  // between two looks after that

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Until `written()`; after kSpin, which a clock measures, `alive()` before each pause: it throws where nothing will
// come.
template <class Written, class Alive>
void wait_for(Written&& written, Alive&& alive) {
    using Clock = std::chrono::steady_clock;
    if (written()) return;
    const Clock::time_point end = Clock::now() + kSpin;
    while (!written()) {
        relax();
        if (Clock::now() < end) continue;
        alive();
        std::this_thread::sleep_for(kPause);
    }
}

}  // namespace deqfast::cuda
