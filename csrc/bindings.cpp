// deqfast._C. This and joint_plan.h are the only files that know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <memory>
#include <stdexcept>

#include "deqfast/anderson.h"
#include "deqfast/broyden.h"
#include "deqfast/dispatch.h"
#include "joint_plan.h"
#include "place.h"
#ifdef DEQFAST_HAS_CUDA
#include "cuda/graph_loop.h"
#include "cuda/runtime.h"
#include "cuda/work.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

using deqfast::DType;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Memory aligned to cache lines that nobody has to free.
class Buffer {
   public:
    char* reserve(int64_t bytes) {
        memory_.reset(new char[size_t(bytes) + 64]);
        return pointer<char>((Address(memory_.get()) + 63) / 64 * 64);
    }

   private:
    std::unique_ptr<char[]> memory_;
};

#ifdef DEQFAST_HAS_CUDA
using deqfast::cuda::DeviceLoop;

void device_step(const deqfast::AndersonArgs& args, const deqfast::cuda::DeviceWork& work, int phase) {
    deqfast::cuda::anderson_step(args, work, phase);
}
void device_step(const deqfast::BroydenArgs& args, const deqfast::cuda::DeviceWork& work, int phase) {
    deqfast::cuda::broyden_step(args, work, phase);
}

// A solve's place on a device: memory beside the workspace, and the way back to the host.
class Device {
   public:
    // B: samples that still run; evaluations: made so far.
    Device(int index, int64_t B, int64_t evaluations, int lag)
        : index_(index), lag_(lag), B_(B), evaluations_(evaluations) {}

    template <class Args>
    int64_t bytes(const Args& args, bool halves) const {
        deqfast::cuda::DeviceWork work;
        Args copy = args;
        return lay_out(copy, halves, nullptr, work);
    }
    template <class Args>
    void use(Args& args, bool halves, char* memory) {
        deqfast::cuda::check_supported(args);
        (void)lay_out(args, halves, memory, work_);
        halves_ = halves;
    }

    // Launches, and returns the samples still running `lag` steps before.
    template <class Args>
    int64_t step(const Args& args, int phase, void* stream) {
        if (!work_.counters) throw std::logic_error("a plan on a device was given no memory");
        if (phase != deqfast::kStep && !halves_) throw std::invalid_argument("this plan takes whole steps only");
        if (args.B == 0) return 0;
        const deqfast::cuda::OnDevice on(index_);
        // A captured graph may be replayed when this plan is gone, so that its steps tell nobody.
        const bool captured = deqfast::cuda::capturing(stream);
        work_.stream = stream;
        if (captured) {
            work_.ring = nullptr;
        } else if (phase & deqfast::kApply) {
            point_ring(stream);
        }
        try {
            device_step(args, work_, phase);
        } catch (...) {
            if (!captured && phase & deqfast::kApply) counts_->take_back();
            throw;
        }
        if (phase == deqfast::kReduce) return known_;
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
        const deqfast::cuda::OnDevice on(index_);
        if (deqfast::cuda::capturing(stream)) throw std::logic_error("a report cannot be captured");
        point_ring(stream);
        deqfast::cuda::report(work_);
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
    deqfast::cuda::DeviceWork work_;
    std::unique_ptr<deqfast::cuda::Counts> counts_;

    void take_note(const deqfast::cuda::Counts::Entry& entry) {
        known_ = entry.running;
        if (known_ == 0) failed_ = entry.failed;
    }

    void point_ring(void* stream) {
        if (!counts_) counts_.reset(new deqfast::cuda::Counts);
        work_.stream = stream;
        work_.ring = counts_->ring();
        work_.ring_size = deqfast::cuda::Counts::kEntries;
        work_.step = counts_->next(stream);
    }

    // Gives every array its part of `memory`; returns how much that takes in all.
    template <class Args>
    static int64_t lay_out(Args& args, bool halves, char* memory, deqfast::cuda::DeviceWork& work) {
        const deqfast::cuda::WorkSizes sizes = deqfast::cuda::work_sizes(args, halves);
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
        place(work.z, sizes.z);
        return at;
    }
};
#endif

// One solve: the workspace's addresses, bound once, so that a step passes only what changes. It borrows every tensor;
// whoever makes a plan keeps them alive.
template <class Args, void (*deqfast::cpu::KernelTable::*kernel)(const Args&, int)>
class Plan {
   public:
    // leaves: (numbers a sample, address of x[0], of x[1], of saved).
    void bind(int64_t B, DType dtype, const std::vector<std::tuple<int64_t, Address, Address, Address>>& leaves,
              Address ints, Address reals, int64_t padded, double rtol, double atol, int max_iter, bool keep_best,
              int threads) {
        args.B = B;
        args.dtype = dtype;
        args.ints = pointer<int32_t>(ints);
        args.reals = pointer<void>(reals);
        args.padded = padded;
        args.rtol = rtol;
        args.atol = atol;
        args.max_iter = max_iter;
        args.keep_best = keep_best;
        args.threads = threads;
        args.running = &running_;
        int64_t blocks = 0;
        for (const auto& [n, x0, x1, saved] : leaves) {
            deqfast::Leaf leaf;
            leaf.n = n;
            leaf.offset = args.N;
            leaf.block = blocks;
            leaf.saved = pointer<void>(saved);
            leaves_.push_back(leaf);
            x_.push_back({pointer<void>(x0), pointer<void>(x1)});
            args.N += n;
            args.chunks += deqfast::chunks_of(n);
            blocks += deqfast::blocks_of(n);
        }
        args.leaves = leaves_.data();
        args.n_leaves = int(leaves_.size());
        blocks_ = blocks;
    }

    // A state of several blocks; rules: (rtol, atol, weight) of each.
    void blocks(Address norms, const std::vector<std::array<double, 3>>& rules) {
        if (rules.size() > size_t(deqfast::kMaxBlocks)) throw std::invalid_argument("too many blocks");
        args.block_norms = pointer<double>(norms);
        args.n_blocks = int(rules.size());
        for (size_t i = 0; i < rules.size(); ++i) {
            args.block_rtol[i] = rules[i][0];
            args.block_atol[i] = rules[i][1];
            args.block_weight[i] = rules[i][2];
        }
    }

    // Where f's (which = 0) or the previous f's (1) output for a leaf lies; strides in numbers.
    void source(int leaf, int which, Address data, DType dtype, int64_t batch_stride, bool dense,
                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        deqfast::Source& s = which ? leaves_.at(size_t(leaf)).f_prev : leaves_.at(size_t(leaf)).f;
        deqfast::place(s, data, dtype, batch_stride, dense, sizes, strides);
    }

    // One leaf, dense, of the state's dtype: only addresses change. f_prev 0: there is none.
    int64_t step_dense(int cur, Address f, Address f_prev, Address stream) {
        for (deqfast::Source* s : {&leaves_[0].f, &leaves_[0].f_prev}) {
            s->dtype = args.dtype;
            s->batch_stride = leaves_[0].n;
            s->dense = true;
        }
        leaves_[0].f.data = pointer<void>(f);
        leaves_[0].f_prev.data = pointer<void>(f_prev);
        return step(cur, f_prev != 0, 0, 0, deqfast::kStep, stream);
    }

    // Returns the samples still running; on a device those of an earlier step, see Device.
    int64_t step(int cur, bool has_previous, Address f_rows, Address f_prev_rows, int phase, Address stream) {
        check_phase(phase);
        args.f_rows = pointer<int32_t>(f_rows);
        args.f_prev_rows = pointer<int32_t>(f_prev_rows);
        for (size_t i = 0; i < leaves_.size(); ++i) {
            leaves_[i].x = x_[i][cur];
            leaves_[i].x_prev = x_[i][1 - cur];
        }
        set_previous(has_previous);
#ifdef DEQFAST_HAS_CUDA
        if (device_) {
            py::gil_scoped_release release;
            return device_->step(args, phase, pointer<void>(stream));
        }
#endif
        (void)stream;
        const auto& table = deqfast::cpu::kernels();
        py::gil_scoped_release release;
        (table.*kernel)(args, phase);
        return running_;
    }

#ifdef DEQFAST_HAS_CUDA
    // Before `method`: the kernels of a device will be used. Then `device_bytes` of zeroed memory, whose first number
    // is how many samples run.
    void on_device(int index, int64_t B, int64_t evaluations, int lag) {
        device_.reset(new Device(index, B, evaluations, lag));
    }
    int64_t device_bytes(bool halves) const { return device_->bytes(args, halves); }
    void use(Address memory, bool halves) { device_->use(args, halves, pointer<char>(memory)); }
    int64_t failed() const {
        py::gil_scoped_release release;
        return device_->failed();
    }
    void rewind(int64_t evaluations) { device_->rewind(evaluations); }
    int64_t report(Address stream, int lag) {
        py::gil_scoped_release release;
        return device_->report(pointer<void>(stream), lag);
    }
#endif

   protected:
    Args args;
    int64_t blocks_ = 0;

    virtual ~Plan() = default;
    virtual void set_previous(bool) {}
    virtual void check_phase(int) const {}

    void reserve(int64_t scratch_bytes, int64_t products, bool split) {
#ifdef DEQFAST_HAS_CUDA
        if (device_) return;
#endif
        args.scratch_bytes = scratch_bytes;
        args.scratch = scratch_.reserve(scratch_bytes * args.threads);
        if (!split) return;
        args.sums = reinterpret_cast<double*>(sums_.reserve(args.B * products * 8));
        args.partials = reinterpret_cast<double*>(partials_.reserve(args.B * args.chunks * products * 8));
    }
    // The two halves of a step can be run apart only where what passes between them is kept.
    static void whole_steps_only() {
        throw std::invalid_argument("a workspace that keeps no small matrices takes whole steps only");
    }
    int64_t number() const { return args.dtype == DType::f64 ? 8 : 4; }

   private:
    std::vector<deqfast::Leaf> leaves_;
    std::vector<std::array<void*, 2>> x_;
#ifdef DEQFAST_HAS_CUDA
    std::unique_ptr<Device> device_;
#endif
    Buffer scratch_, sums_, partials_;
    int64_t running_ = 0;
};

class AndersonPlan final : public Plan<deqfast::AndersonArgs, &deqfast::cpu::KernelTable::anderson_step> {
   public:
    void method(int m, double test_space, double mixing, double ridge, bool evict_least_useful, DType history_dtype,
                Address history, Address scales, Address matrix, Address gram, Address norms, Address ages) {
        args.m = m;
        args.test_space = test_space;
        args.mixing = mixing;
        args.ridge = ridge;
        args.evict_least_useful = evict_least_useful;
        args.history_dtype = history_dtype;
        args.history = pointer<void>(history);
        args.scales = pointer<float>(scales);
        args.blocks = blocks_;
        args.matrix = pointer<void>(matrix);
        args.gram = pointer<void>(gram);
        args.norms = pointer<void>(norms);
        args.ages = pointer<int32_t>(ages);
        reserve(deqfast::anderson_scratch_bytes(m, number()), deqfast::anderson_products(m), true);
    }

   protected:
    void set_previous(bool has_previous) override { args.has_previous = has_previous; }
    void check_phase(int phase) const override {
        if (phase != deqfast::kStep && args.m > 0 && !args.gram) whole_steps_only();
    }
};

class BroydenPlan final : public Plan<deqfast::BroydenArgs, &deqfast::cpu::KernelTable::broyden_step> {
   public:
    void method(int memory, bool scale_first, Address history, Address norms, Address gram) {
        args.memory = memory;
        args.scale_first = scale_first;
        args.history = pointer<void>(history);
        args.norms = pointer<void>(norms);
        args.gram = pointer<void>(gram);
        reserve(deqfast::broyden_scratch_bytes(args.N, gram == 0, number()), deqfast::broyden_products(memory),
                gram != 0);
    }

   protected:
    void check_phase(int phase) const override {
        if (phase != deqfast::kStep && !args.gram) whole_steps_only();
    }
};

template <class P>
py::class_<P> declare(py::module_& m, const char* name, const char* doc) {
    py::class_<P> plan(m, name, doc);
    plan.def(py::init<>());
    plan.def("bind", &P::bind, "B"_a, "dtype"_a, "leaves"_a, "ints"_a, "reals"_a, "padded"_a, "rtol"_a, "atol"_a,
             "max_iter"_a, "keep_best"_a, "threads"_a);
    plan.def("blocks", &P::blocks);
    plan.def("source", &P::source);
    plan.def("step_dense", &P::step_dense, "cur"_a, "f"_a, "f_prev"_a, "stream"_a = 0);
    plan.def("step", &P::step, "cur"_a, "has_previous"_a, "f_rows"_a, "f_prev_rows"_a, "phase"_a, "stream"_a = 0);
#ifdef DEQFAST_HAS_CUDA
    plan.def("on_device", &P::on_device);
    plan.def("device_bytes", &P::device_bytes);
    plan.def("use", &P::use);
    plan.def("failed", &P::failed);
    plan.def("rewind", &P::rewind);
    plan.def("report", &P::report);
#endif
    return plan;
}

// Asks for huge pages on memory that has not been touched yet: faulting in a large history takes less time then.
void advise_huge_pages(Address address, int64_t bytes) {
#ifdef __linux__
    constexpr Address huge = Address(2) << 20;
    const Address begin = (address + huge - 1) / huge * huge, end = (address + Address(bytes)) / huge * huge;
    if (begin < end) (void)madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address;
    (void)bytes;
#endif
}

py::dict build_info() {
#ifdef _OPENMP
    const bool openmp = true;
#else
    const bool openmp = false;
#endif
    py::dict info;
    info["version"] = DEQFAST_VERSION;
    info["compiler"] = DEQFAST_COMPILER;
    info["build_type"] = DEQFAST_BUILD_TYPE;
    info["isas"] = deqfast::cpu::isas_built();
    info["openmp"] = openmp;
#ifdef DEQFAST_HAS_CUDA
    info["cuda"] = DEQFAST_CUDA_TOOLKIT;
    info["cuda_archs"] = DEQFAST_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::none();
#endif
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
        PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of deqfast; call them through deqfast.ops.";
    m.def("build_info", &build_info, "How this module was built: version, compiler, build type, instruction sets.");
    m.def(
        "cpu_isa", [] { return std::string(deqfast::cpu::kernels().name); },
        "Name of the instruction set whose kernels run on this machine; ValueError if DEQFAST_CPU_ISA names none.");
#ifdef DEQFAST_HAS_CUDA
    m.def("cuda_why_not", &deqfast::cuda::why_not,
          "Why the CUDA kernels of this module cannot run on the device of this index, empty if they can.");
    m.def("why_no_device_loop", &deqfast::cuda::why_no_device_loop,
          "Why the driver cannot run a loop on the device, empty if it can.");
    m.def(
        "node_not_allowed", [](Address graph) { return deqfast::cuda::node_not_allowed(pointer<void>(graph)); },
        "The first type of node in a captured graph that may not stand in a loop on the device, empty if none.");
    py::class_<DeviceLoop>(m, "DeviceLoop", "A solve's loop as one CUDA graph; see csrc/cuda/graph_loop.h.")
        .def(py::init([](int device, Address pass, Address rest, int steps, Address running, Address made, int limit) {
            return new DeviceLoop(device, pointer<void>(pass), pointer<void>(rest), steps, pointer<int32_t>(running),
                                  pointer<int32_t>(made), limit);
        }))
        .def("launch", [](const DeviceLoop& loop, Address stream) { loop.launch(pointer<void>(stream)); });
#endif
    m.def("advise_huge_pages", &advise_huge_pages, "Ask for huge pages on untouched memory (Linux; else nothing).");

    py::enum_<DType>(m, "DType")
        .value("f64", DType::f64)
        .value("f32", DType::f32)
        .value("bf16", DType::bf16)
        .value("f16", DType::f16)
        .value("i8", DType::i8);
    m.attr("REDUCE") = int(deqfast::kReduce);
    m.attr("APPLY") = int(deqfast::kApply);
    m.attr("STEP") = int(deqfast::kStep);
    declare<AndersonPlan>(m, "AndersonPlan", "One Anderson solve on a workspace; see deqfast.ops.native.")
        .def("method", &AndersonPlan::method);
    declare<BroydenPlan>(m, "BroydenPlan", "One Broyden solve on a workspace; see deqfast.ops.native.")
        .def("method", &BroydenPlan::method);
    deqfast::declare_joint(m);
}
