// What the bindings need of the CUDA runtime; no CUDA header, so that the C++ compiler can read it.
#pragma once

#include <cstdint>
#include <string>

namespace deqfast::cuda {

// Why the kernels of this module cannot run on a device, empty if they can. Never throws.
std::string why_not(int device);

// Whether a graph is being captured on the stream.
bool capturing(void* stream);

// Makes a device current, and the one before again at the end.
class OnDevice {
   public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    int before_ = 0, device_ = 0;
};

// How the host learns how many samples still run. The last block of a step writes the step's ticket and its counts into
// pinned host memory; the host reads them a few steps later, so that the device always has work queued, and without
// any call that waits for the device. Reading at a fixed distance keeps the number of evaluations the same in every
// run.
//
// An entry is two words: (ticket << 32) | running, and the samples that stopped without converging. Tickets are never
// used twice, so that a late write of an earlier solve is not taken for one of this solve.
class Counts {
   public:
    static constexpr int kEntries = 8;

    Counts();
    ~Counts();
    Counts(const Counts&) = delete;
    Counts& operator=(const Counts&) = delete;

    volatile int64_t* ring() const { return ring_; }
    // The ticket of the step about to be launched on a stream.
    int64_t next(void* stream) {
        ++ticket_;
        streams_[ticket_ % kEntries] = stream;
        return ticket_;
    }

    // The step of the newest ticket was not launched.
    void take_back() { --ticket_; }

    struct Entry {
        int64_t running, failed;
    };
    // The counts `lag` steps before the newest; waits until the device has written them. std::runtime_error if it never
    // will.
    Entry read(int lag) const;

   private:
    void* streams_[kEntries] = {};
    volatile int64_t* ring_ = nullptr;
    int64_t ticket_ = 0;
};

}  // namespace deqfast::cuda
