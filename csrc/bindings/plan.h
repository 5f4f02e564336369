// One solve: the workspace's memory, bound once, so that a step passes only what changes. A plan borrows every tensor;
// whoever makes one keeps them alive. One that exists is complete.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "deqfast/anderson.h"
#include "deqfast/broyden.h"
#include "deqfast/dispatch.h"
#include "place.h"
#ifdef DEQFAST_HAS_CUDA
#include "cuda/solve.h"
#endif

namespace deqfast {

using Arrays = std::vector<Array>;

// The tensors of a state, leaf by leaf.
struct Iterates {
    const std::vector<int64_t>& numbers;  // a sample
    const Arrays &x, &x_prev, &saved;
};

// A state of several blocks: their norms, and (rtol, atol, weight) of each.
struct Blocks {
    Array norms;
    std::vector<std::array<double, 3>> rules;
};

// Where a solve on a device runs. `allocate`: zeroed memory of so many bytes there, whose first number is how many
// samples run. `lag`: steps between a count and its reading. `halves`: reduce and apply will be called apart.
struct Place {
    int index;
    int64_t evaluations;
    int lag;
    bool halves;
    std::function<Address(int64_t)> allocate;
};

template <class Args, void (*cpu::KernelTable::*kernel)(const Args&, int)>
class Plan {
   public:
    Plan(int64_t B, DType dtype, const Iterates& state, const Array& ints, const Array& reals, int64_t stride,
         const pybind11::tuple& stopping, int threads, const std::optional<Blocks>& blocks)
        : padded((B + kTile - 1) / kTile * kTile) {
        static_cast<Stopping&>(args) = read_group<Stopping>("stopping", stopping);
        if (stride < padded) throw std::invalid_argument("stride: rows of ints and reals overlap");
        args.B = B;
        args.dtype = dtype;
        args.padded = stride;
        args.ints = checked<int32_t>("ints", ints, 16 * padded * 4);
        args.reals = checked("reals", reals, 8 * padded * number());
        args.threads = threads;
        args.running = &running_;
        const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
        for (size_t i = 0; i < state.numbers.size(); ++i) {
            Leaf leaf;
            leaf.n = state.numbers[i];
            leaf.offset = args.N;
            leaf.block = blocks_;
            leaf.saved = checked("saved", state.saved.at(i), B * leaf.n * size);
            leaves_.push_back(leaf);
            x_.push_back({checked("x", state.x.at(i), B * leaf.n * size),
                          checked("x_prev", state.x_prev.at(i), B * leaf.n * size)});
            args.N += leaf.n;
            args.chunks += chunks_of(leaf.n);
            blocks_ += blocks_of(leaf.n);
        }
        args.leaves = leaves_.data();
        args.n_leaves = int(leaves_.size());
        if (blocks) judge(*blocks);
    }
    virtual ~Plan() = default;

    // Where f's (which = 0) or the previous f's (1) output for a leaf lies; strides in numbers.
    void source(int leaf, int which, Address data, DType dtype, int64_t batch_stride, bool dense,
                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        Source& s = which ? leaves_.at(size_t(leaf)).f_prev : leaves_.at(size_t(leaf)).f;
        place(s, data, dtype, batch_stride, dense, sizes, strides);
    }

    // One leaf, dense, of the state's dtype: only addresses change. f_prev 0: there is none.
    int64_t step_dense(int cur, Address f, Address f_prev, Address stream) {
        for (Source* s : {&leaves_[0].f, &leaves_[0].f_prev}) {
            s->dtype = args.dtype;
            s->batch_stride = leaves_[0].n;
            s->dense = true;
        }
        leaves_[0].f.data = pointer<void>(f);
        leaves_[0].f_prev.data = pointer<void>(f_prev);
        return step(cur, f_prev != 0, 0, 0, kStep, stream);
    }

    // Returns the samples still running; on a device those of an earlier step, see cuda::Device.
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
            pybind11::gil_scoped_release release;
            return device_->step(args, phase, pointer<void>(stream));
        }
#endif
        (void)stream;
        const auto& table = cpu::kernels();
        pybind11::gil_scoped_release release;
        (table.*kernel)(args, phase);
        return running_;
    }

    // How many samples that converged before evaluation `made` are not within their tolerance at its f, told by source.
    int64_t recheck(int cur, Address f_rows, int made, double slack, double noise, double same) {
        args.f_rows = pointer<int32_t>(f_rows);
        for (size_t i = 0; i < leaves_.size(); ++i) leaves_[i].x = x_[i][cur];
        const auto& table = cpu::kernels();
        pybind11::gil_scoped_release release;
        return table.recheck(args, Recheck{made, slack, noise, same});
    }

    // Every sample is spread over ranks, and has so many `numbers` on all of them. Between reduce and apply the caller
    // adds up `buffer`: (B, products) sums, then (B, carried), and then, where `squares()` says so, `squares` (B, 2).
    void spread(const Array& buffer, const Array& squares, int64_t numbers) {
        check_phase(kReduce);
        const int64_t products = args.B * products_a_sample();
        args.sums = checked<double>("buffer", buffer, (products + args.B * carried_a_sample()) * 8);
        args.carry = args.sums + products;
        args.squares = squares_ = checked<double>("squares", squares, args.B * 2 * 8);
        args.spread_n = numbers;
    }
    // Numbers a sample that are added up, and how many of them are carried from one step to the next.
    int64_t summed() const { return products_a_sample() + carried_a_sample(); }
    int64_t carried() const { return carried_a_sample(); }
    int64_t squares() {
        const auto& table = cpu::kernels();
        pybind11::gil_scoped_release release;
        return table.squares(args, Squares{products_a_sample(), squares_});
    }

#ifdef DEQFAST_HAS_CUDA
    int64_t failed() const {
        pybind11::gil_scoped_release release;
        return device_->failed();
    }
    void rewind(int64_t evaluations) { device_->rewind(evaluations); }
    int64_t report(Address stream, int lag) {
        pybind11::gil_scoped_release release;
        return device_->report(pointer<void>(stream), lag);
    }
#endif

   protected:
    Args args;
    const int64_t padded;  // B rounded up to tiles; rows of ints and reals may lie further apart
    int64_t blocks_ = 0;

    virtual void set_previous(bool) {}
    virtual void check_phase(int) const {}
    virtual int64_t products_a_sample() const = 0;
    virtual int64_t carried_a_sample() const = 0;

    int64_t number() const { return args.dtype == DType::f64 ? 8 : 4; }

    // Once the method's memory is known: the device's part of it, or scratch for the threads of a CPU.
    void settle(const std::optional<Place>& place, int64_t scratch_bytes, int64_t products, bool split) {
#ifdef DEQFAST_HAS_CUDA
        if (place) {
            device_.reset(new cuda::Device(place->index, args.B, place->evaluations, place->lag));
            device_->use(args, place->halves, pointer<char>(place->allocate(device_->bytes(args, place->halves))));
            return;
        }
#else
        if (place) throw std::invalid_argument("this module was built without kernels for a device");
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

   private:
    std::vector<Leaf> leaves_;
    std::vector<std::array<void*, 2>> x_;
#ifdef DEQFAST_HAS_CUDA
    std::unique_ptr<cuda::Device> device_;
#endif
    Buffer scratch_, sums_, partials_;
    double* squares_ = nullptr;
    int64_t running_ = 0;

    void judge(const Blocks& blocks) {
        const size_t count = blocks.rules.size();
        if (count > size_t(kMaxBlocks)) throw std::invalid_argument("too many blocks");
        args.block_norms = checked<double>("block_norms", blocks.norms, int64_t(count) * 2 * padded * 8);
        args.n_blocks = int(count);
        for (size_t i = 0; i < count; ++i) {
            args.block_rtol[i] = blocks.rules[i][0];
            args.block_atol[i] = blocks.rules[i][1];
            args.block_weight[i] = blocks.rules[i][2];
        }
    }
};

class AndersonPlan final : public Plan<AndersonArgs, &cpu::KernelTable::anderson_step> {
   public:
    AndersonPlan(int64_t B, DType dtype, const std::vector<int64_t>& numbers, const Arrays& x, const Arrays& x_prev,
                 const Arrays& saved, const Array& ints, const Array& reals, int64_t stride,
                 const pybind11::tuple& stopping, int threads, const std::optional<Blocks>& blocks,
                 const std::optional<Place>& place, const pybind11::tuple& method, DType history_dtype,
                 const Array& history, const Array& scales, const Array& matrix, const Array& gram, const Array& norms,
                 const Array& ages)
        : Plan(B, dtype, Iterates{numbers, x, x_prev, saved}, ints, reals, stride, stopping, threads, blocks) {
        static_cast<AndersonMethod&>(args) = read_group<AndersonMethod>("method", method);
        const bool scaled = history_dtype == DType::f16 || history_dtype == DType::i8;
        const int64_t m = args.m, tiled = padded * number();
        const bool kept = args.N > kTinyN || args.n_leaves > 1 || scaled || gram.bytes > 0;
        const int64_t bytes = history_dtype == DType::f64   ? 8
                              : history_dtype == DType::f32 ? 4
                              : history_dtype == DType::i8  ? 1
                                                            : 2;
        args.history_dtype = history_dtype;
        args.history = checked("history", history, 2 * (kept ? B : padded) * m * args.N * bytes);
        args.scales = checked<float>("scales", scales, scaled ? 2 * B * m * blocks_ * 4 : 0);
        args.blocks = scaled ? blocks_ : 0;
        args.matrix = checked("matrix", matrix, kept && args.test_space != 0 ? m * m * tiled : 0);
        args.gram = checked("gram", gram, kept ? m * m * tiled : 0);
        args.norms = checked("norms", norms, 2 * m * tiled);
        args.ages = checked<int32_t>("ages", ages, m * padded * 4);
        settle(place, anderson_scratch_bytes(args.m, number()), anderson_products(args.m), true);
    }

    // A residual of the caller's own at the evaluation whose step comes next, and the one before it, 0: there is none;
    // (B, n) numbers of the accumulation type each.
    void own(const Array& residual, Address before, const Array& columns) {
        if (args.test_space != 0 || args.mixing != 1 || (args.m > 0 && !args.gram))
            throw std::invalid_argument("own: expected Type II with mixing 1 and kept products");
        const int64_t n = args.B ? residual.bytes / (args.B * number()) : 0;
        args.own = checked("own", residual, args.B * n * number());
        args.own_columns = checked("own_columns", columns, args.B * args.m * n * number());
        args.own_prev = pointer<void>(before);
        args.own_n = n;
    }

   protected:
    void set_previous(bool has_previous) override { args.has_previous = has_previous && (!args.own || args.own_prev); }
    void check_phase(int phase) const override {
        if (phase != kStep && args.m > 0 && !args.gram) whole_steps_only();
    }
    int64_t products_a_sample() const override { return anderson_products(args.m); }
    int64_t carried_a_sample() const override { return kAndersonCarried; }
};

class BroydenPlan final : public Plan<BroydenArgs, &cpu::KernelTable::broyden_step> {
   public:
    BroydenPlan(int64_t B, DType dtype, const std::vector<int64_t>& numbers, const Arrays& x, const Arrays& x_prev,
                const Arrays& saved, const Array& ints, const Array& reals, int64_t stride,
                const pybind11::tuple& stopping, int threads, const std::optional<Blocks>& blocks,
                const std::optional<Place>& place, const pybind11::tuple& method, DType history_dtype,
                const Array& history, const Array& norms, const Array& gram)
        : Plan(B, dtype, Iterates{numbers, x, x_prev, saved}, ints, reals, stride, stopping, threads, blocks) {
        static_cast<BroydenMethod&>(args) = read_group<BroydenMethod>("method", method);
        const int64_t memory = args.memory;
        const bool streams = args.N >= kGramMinN || gram.bytes > 0;  // which a spread sample needs of any size
        if (history_dtype != (dtype == DType::f64 ? DType::f64 : DType::f32))
            throw std::invalid_argument("history_dtype: steps are kept in the accumulation dtype");
        args.history = checked("history", history, B * memory * args.N * number());
        args.norms = checked("norms", norms, B * memory * number());
        args.gram = checked("gram", gram, streams ? B * memory * memory * number() : 0);
        settle(place, broyden_scratch_bytes(args.N, !streams, number()), broyden_products(args.memory), streams);
    }

   protected:
    void check_phase(int phase) const override {
        if (phase != kStep && !args.gram) whole_steps_only();
    }
    int64_t products_a_sample() const override { return broyden_products(args.memory); }
    int64_t carried_a_sample() const override { return broyden_carried(args.memory); }
};

template <class P>
void declare_steps(pybind11::class_<P>& plan) {
    using namespace pybind11::literals;
    plan.def("source", &P::source);
    plan.def("step_dense", &P::step_dense, "cur"_a, "f"_a, "f_prev"_a, "stream"_a = 0);
    plan.def("step", &P::step, pybind11::kw_only(), "cur"_a, "has_previous"_a, "f_rows"_a, "f_prev_rows"_a, "phase"_a,
             "stream"_a);
    plan.def("spread", &P::spread, pybind11::kw_only(), "buffer"_a, "squares"_a, "numbers"_a);
    plan.def("squares", &P::squares);
    plan.def_property_readonly("summed", &P::summed);
    plan.def_property_readonly("carried", &P::carried);
    plan.def("recheck", &P::recheck, pybind11::kw_only(), "cur"_a, "f_rows"_a, "made"_a, "slack"_a, "noise"_a,
             "same"_a);
#ifdef DEQFAST_HAS_CUDA
    plan.def("failed", &P::failed);
    plan.def("rewind", &P::rewind);
    plan.def("report", &P::report);
#endif
}

inline void declare_plans(pybind11::module_& m) {
    namespace py = pybind11;
    using namespace py::literals;
    py::class_<Blocks>(m, "Blocks", "Norms and stopping rules of a state of several blocks.")
        .def(py::init([](const Array& norms, const std::vector<std::array<double, 3>>& rules) {
                 return Blocks{norms, rules};
             }),
             py::kw_only(), "norms"_a, "rules"_a);
    py::class_<Place>(m, "Place", "Where a solve on a device runs.")
        .def(py::init([](int index, int64_t evaluations, int lag, bool halves,
                         const std::function<Address(int64_t)>& allocate) {
                 return Place{index, evaluations, lag, halves, allocate};
             }),
             py::kw_only(), "index"_a, "evaluations"_a, "lag"_a, "halves"_a, "allocate"_a);
    py::class_<AndersonPlan> anderson(m, "AndersonPlan", "One Anderson solve on a workspace; see deqfast.ops.native.");
    anderson.def(py::init<int64_t, DType, const std::vector<int64_t>&, const Arrays&, const Arrays&, const Arrays&,
                          const Array&, const Array&, int64_t, const py::tuple&, int, const std::optional<Blocks>&,
                          const std::optional<Place>&, const py::tuple&, DType, const Array&, const Array&,
                          const Array&, const Array&, const Array&, const Array&>(),
                 py::kw_only(), "B"_a, "dtype"_a, "numbers"_a, "x"_a, "x_prev"_a, "saved"_a, "ints"_a, "reals"_a,
                 "stride"_a, "stopping"_a, "threads"_a, "blocks"_a, "place"_a, "method"_a, "history_dtype"_a,
                 "history"_a, "scales"_a, "matrix"_a, "gram"_a, "norms"_a, "ages"_a);
    declare_steps(anderson);
    anderson.def("own", &AndersonPlan::own, py::kw_only(), "residual"_a, "before"_a, "columns"_a);
    py::class_<BroydenPlan> broyden(m, "BroydenPlan", "One Broyden solve on a workspace; see deqfast.ops.native.");
    broyden.def(
        py::init<int64_t, DType, const std::vector<int64_t>&, const Arrays&, const Arrays&, const Arrays&, const Array&,
                 const Array&, int64_t, const py::tuple&, int, const std::optional<Blocks>&,
                 const std::optional<Place>&, const py::tuple&, DType, const Array&, const Array&, const Array&>(),
        py::kw_only(), "B"_a, "dtype"_a, "numbers"_a, "x"_a, "x_prev"_a, "saved"_a, "ints"_a, "reals"_a, "stride"_a,
        "stopping"_a, "threads"_a, "blocks"_a, "place"_a, "method"_a, "history_dtype"_a, "history"_a, "norms"_a,
        "gram"_a);
    declare_steps(broyden);
}

}  // namespace deqfast
