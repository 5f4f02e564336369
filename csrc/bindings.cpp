// deqfast._C: the only file that knows Python.
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

    // Where f's (which = 0) or the previous f's (1) output for a leaf lies; strides in numbers.
    void source(int leaf, int which, Address data, DType dtype, int64_t batch_stride, bool dense,
                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        deqfast::Source& s = which ? leaves_.at(size_t(leaf)).f_prev : leaves_.at(size_t(leaf)).f;
        if (sizes.size() > deqfast::kMaxDims)
            throw std::invalid_argument("f(z): at most " + std::to_string(deqfast::kMaxDims) +
                                        " inner dimensions can be read through strides, got " +
                                        std::to_string(sizes.size()));
        s.data = pointer<void>(data);
        s.dtype = dtype;
        s.batch_stride = batch_stride;
        s.dense = dense;
        s.ndim = int(sizes.size());
        std::copy(sizes.begin(), sizes.end(), s.size);
        std::copy(strides.begin(), strides.end(), s.stride);
    }

    // One leaf, dense, of the state's dtype: only addresses change. f_prev 0: there is none.
    int64_t step_dense(int cur, Address f, Address f_prev) {
        for (deqfast::Source* s : {&leaves_[0].f, &leaves_[0].f_prev}) {
            s->dtype = args.dtype;
            s->batch_stride = leaves_[0].n;
            s->dense = true;
        }
        leaves_[0].f.data = pointer<void>(f);
        leaves_[0].f_prev.data = pointer<void>(f_prev);
        return step(cur, f_prev != 0, 0, 0, deqfast::kStep);
    }

    int64_t step(int cur, bool has_previous, Address f_rows, Address f_prev_rows, int phase) {
        check_phase(phase);
        args.f_rows = pointer<int32_t>(f_rows);
        args.f_prev_rows = pointer<int32_t>(f_prev_rows);
        for (size_t i = 0; i < leaves_.size(); ++i) {
            leaves_[i].x = x_[i][cur];
            leaves_[i].x_prev = x_[i][1 - cur];
        }
        set_previous(has_previous);
        const auto& table = deqfast::cpu::kernels();
        py::gil_scoped_release release;
        (table.*kernel)(args, phase);
        return running_;
    }

   protected:
    Args args;
    int64_t blocks_ = 0;

    virtual ~Plan() = default;
    virtual void set_previous(bool) {}
    virtual void check_phase(int) const {}

    void reserve(int64_t scratch_bytes, int64_t products, bool split) {
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
    plan.def("source", &P::source);
    plan.def("step_dense", &P::step_dense);
    plan.def("step", &P::step);
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
}
