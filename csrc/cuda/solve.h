// The host side of a solve on a GPU: its memory there, and how the host learns what still runs. No CUDA header, no
// Python.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <type_traits>

#include "deqfast/anderson.h"
#include "deqfast/broyden.h"
#include "runtime.h"
#include "work.h"

namespace deqfast::cuda {

inline void device_step(const AndersonArgs& args, const DeviceWork& work, int phase) {
    anderson_step(args, work, phase);
}
inline void device_step(const BroydenArgs& args, const DeviceWork& work, int phase) { broyden_step(args, work, phase); }

// A solve's place on a device: memory beside the workspace, and the way back to the host.
class Device {
   public:
    // B: samples that still run; evaluations: made so far.
    Device(int index, int64_t B, int64_t evaluations, int lag)
        : index_(index), lag_(lag), B_(B), evaluations_(evaluations) {}

    template <class Args>
    int64_t bytes(const Args& args, bool halves) const {
        DeviceWork work;
        Args copy = args;
        return lay_out(copy, halves, nullptr, work);
    }
    template <class Args>
    void use(Args& args, bool halves, char* memory) {
        check_supported(args);
        (void)lay_out(args, halves, memory, work_);
        halves_ = halves;
    }

    // Launches, and returns the samples still running `lag` steps before.
    template <class Args>
    int64_t step(const Args& args, int phase, void* stream) {
        if (!work_.counters) throw std::logic_error("a plan on a device was given no memory");
        if (phase != kStep && !halves_) throw std::invalid_argument("this plan takes whole steps only");
        if (args.B == 0) return 0;
        const OnDevice on(index_);
        // A captured graph may be replayed when this plan is gone, so that its steps tell nobody.
        const bool captured = capturing(stream);
        work_.stream = stream;
        if (captured) {
            work_.ring = nullptr;
        } else if (phase & kApply) {
            point_ring(stream);
        }
        try {
            device_step(args, work_, phase);
        } catch (...) {
            if (!captured && phase & kApply) counts_->take_back();
            throw;
        }
        if (phase == kReduce) return known_;
        ++evaluations_;
        counted_ = captured ? 0 : counted_ + 1;
        if (args.max_iter && evaluations_ >= args.max_iter) return known_ = 0;
        if (counted_ > lag_) take_note(counts_->read(lag_));
        return known_;
    }

    // For a solve in the same memory, which the caller has made as new.
    void rewind(int64_t evaluations) {
        evaluations_ = evaluations;
        known_ = B_;
        failed_ = -1;
        counted_ = 0;
    }

    // After captured steps were replayed: has the device tell the host; returns the samples still running `lag` reports
    // before.
    int64_t report(void* stream, int lag) {
        const OnDevice on(index_);
        if (capturing(stream)) throw std::logic_error("a report cannot be captured");
        point_ring(stream);
        cuda::report(work_);
        if (++counted_ > lag) take_note(counts_->read(lag));
        return known_;
    }

    // Samples that stopped without having converged, after the newest step: waits for it unless that is known. -1: the
    // host was told of no step.
    int64_t failed() const { return failed_ >= 0 ? failed_ : counted_ > 0 ? counts_->read(0).failed : -1; }

   private:
    int index_, lag_;
    int64_t B_, evaluations_, known_ = B_;
    int64_t failed_ = -1;  // known once no sample runs
    int64_t counted_ = 0;  // steps in a row that the host is told about
    bool halves_ = false;
    DeviceWork work_;
    std::unique_ptr<Counts> counts_;

    void take_note(const Counts::Entry& entry) {
        known_ = entry.running;
        if (known_ == 0) failed_ = entry.failed;
    }

    void point_ring(void* stream) {
        if (!counts_) counts_.reset(new Counts);
        work_.stream = stream;
        work_.ring = counts_->ring();
        work_.ring_size = Counts::kEntries;
        work_.step = counts_->next(stream);
    }

    // Gives every array its part of `memory`; returns how much that takes in all.
    template <class Args>
    static int64_t lay_out(Args& args, bool halves, char* memory, DeviceWork& work) {
        const WorkSizes sizes = work_sizes(args, halves);
        int64_t at = 0;
        const auto place = [&](auto*& array, int64_t bytes) {
            using T = std::remove_reference_t<decltype(array)>;
            array = bytes && memory ? reinterpret_cast<T>(memory + at) : nullptr;
            at += (bytes + 15) / 16 * 16;
        };
        place(work.counters, sizes.counters);
        place(work.arrivals, sizes.arrivals);
        place(work.outcomes, sizes.outcomes);
        place(work.infinite, sizes.infinite);
        place(work.partials, sizes.partials);
        place(args.sums, sizes.sums);
        place(work.coefficients, sizes.coefficients);
        return at;
    }
};

}  // namespace deqfast::cuda
