// The plan of a joint step's own parts, the map before the accelerated step and the finish after it: a solve's
// addresses, bound once, so that a step passes only what changes. It borrows every tensor; whoever makes a plan keeps
// them alive.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <vector>

#include "arrays.h"
#include "deqfast/dispatch.h"
#include "deqfast/joint.h"
#include "deqfast/joint_finish.h"
#include "place.h"
#ifdef DEQFAST_HAS_CUDA
#include "cuda/joint_work.h"
#include "cuda/runtime.h"
#endif

namespace deqfast {

// Every tensor of z, mu and x, in order; an array of address 0 is not there. `saved`: of a tensor that is not
// accelerated.
struct JointTensors {
    std::vector<int> block;
    std::vector<int64_t> numbers;  // a sample
    std::vector<Array> x, x_next, mapped, mapped_next, center, saved, kept;
};

// The joint map's own numbers; the fields of JointNumbers in deqfast/ops/native/joint.py.
struct JointNumbers {
    double damping_z = 1, damping_mu = 1;
    bool normalize = false;
    Ball ball = Ball::none;
    double radius = 0, low = 0, high = 0;
};
template <class Visit>
void fields(JointNumbers& n, Visit&& visit) {
    visit("damping_z", n.damping_z);
    visit("damping_mu", n.damping_mu);
    visit("normalize", n.normalize);
    visit("ball", n.ball);
    visit("radius", n.radius);
    visit("low", n.low);
    visit("high", n.high);
}

// What the finish keeps; `column_norms` has so many columns a tile.
struct JointRecord {
    Returns returns;
    bool safeguard, keep_best;
    Array best_cost, best_norms, saved_cost, saved_norms, least, taken, column_norms;
    int64_t columns;
};

class JointPlan {
   public:
    JointPlan(int64_t B, DType dtype, const JointTensors& tensors, const Array& ints, const Array& reals,
              const Array& block_norms, int n_blocks, int threads, const pybind11::tuple& numbers,
              const JointRecord& record, int device, const std::function<Address(int64_t)>& allocate) {
        const int64_t padded = (B + kTile - 1) / kTile * kTile, acc = dtype == DType::f64 ? 8 : 4;
        const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
        a_.B = end_.B = B;
        a_.dtype = end_.dtype = dtype;
        end_.ints = checked<int32_t>("ints", ints, 16 * padded * 4);
        a_.status = end_.ints + kStatus * padded;
        end_.reals = checked("reals", reals, 8 * padded * acc);
        end_.block_norms = a_.block_norms = checked<double>("block_norms", block_norms, n_blocks * 2 * padded * 8);
        a_.n_blocks = end_.n_blocks = n_blocks;
        a_.padded = end_.padded = padded;
        a_.threads = end_.threads = threads;
        for (size_t i = 0; i < tensors.numbers.size(); ++i) {
            const int64_t n = tensors.numbers[i], bytes = B * n * size;
            JointPart part;
            part.n = n;
            part.block = tensors.block.at(i);
            part.center = perhaps("center", tensors.center.at(i), B * n * acc);
            parts_.push_back(part);
            buffers_.push_back({{checked("x", tensors.x.at(i), bytes), checked("x_next", tensors.x_next.at(i), bytes)},
                                {checked("mapped", tensors.mapped.at(i), bytes),
                                 checked("mapped_next", tensors.mapped_next.at(i), bytes)}});
            a_.chunks += chunks_of(n);
            FinishPart last;
            last.n = n;
            last.saved = perhaps("saved", tensors.saved.at(i), bytes);
            last.kept = perhaps("kept", tensors.kept.at(i), bytes);
            ends_.push_back(last);
        }
        a_.parts = parts_.data();
        end_.parts = ends_.data();
        a_.n_parts = end_.n_parts = int(parts_.size());
        set(read_group<JointNumbers>("numbers", numbers));
        set(record, acc);
        place_on(device, allocate);
    }

    // Where f, p or q of a part lies; strides in numbers.
    void source(int part, Address data, DType dtype, int64_t batch_stride, bool dense,
                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        if (int(dtype) < int(a_.dtype))
            throw std::invalid_argument("f(z, x) and its gradients must not be of a wider dtype than z0");
        place(parts_.at(size_t(part)).value, data, dtype, batch_stride, dense, sizes, strides);
    }

    // The map; `cost` is 0 if there is none.
    void step(int cur, double step_size, Address cost, Address stream) {
        a_.step_size = step_size;
        a_.cost = pointer<void>(cost);
        for (size_t i = 0; i < parts_.size(); ++i) {
            parts_[i].v = buffers_[i].x[cur];
            parts_[i].mapped = buffers_[i].mapped[cur];
        }
#ifdef DEQFAST_HAS_CUDA
        if (index_ >= 0) {
            pybind11::gil_scoped_release release;
            const cuda::OnDevice on(index_);
            work_.stream = pointer<void>(stream);
            return cuda::joint_map(a_, work_);
        }
#endif
        (void)stream;
        const auto& table = cpu::kernels();
        if (!a_.partials) {
            memory_.reset(new double[size_t(a_.B * (2 * a_.chunks + 2))]);
            a_.partials = memory_.get();
            a_.factors = a_.partials + 2 * a_.B * a_.chunks;
        }
        pybind11::gil_scoped_release release;
        table.joint_map(a_);
    }

    // After the accelerated step of evaluation number `made`, before the buffers change places.
    void finish(int cur, int32_t made, Address cost, Address stream) {
        end_.made = made;
        end_.cost = pointer<void>(cost);
        for (size_t i = 0; i < ends_.size(); ++i) {
            ends_[i].x = buffers_[i].x[cur];
            ends_[i].mapped = buffers_[i].mapped[cur];
            ends_[i].next = ends_[i].saved ? buffers_[i].x[1 - cur] : nullptr;
        }
        pybind11::gil_scoped_release release;
#ifdef DEQFAST_HAS_CUDA
        if (index_ >= 0) {
            const cuda::OnDevice on(index_);
            return cuda::joint_finish(end_, pointer<void>(stream));
        }
#endif
        (void)stream;
        cpu::kernels().joint_finish(end_);
    }

   private:
    struct Buffers {
        void *x[2], *mapped[2];
    };
    JointArgs a_;
    FinishArgs end_;
    std::vector<JointPart> parts_;
    std::vector<FinishPart> ends_;
    std::vector<Buffers> buffers_;
    std::unique_ptr<double[]> memory_;
#ifdef DEQFAST_HAS_CUDA
    int index_ = -1;
    cuda::JointWork work_;
#endif

    static void* perhaps(const char* name, const Array& array, int64_t bytes) {
        return array.address ? checked(name, array, bytes) : nullptr;
    }

    void set(const JointNumbers& numbers) {
        a_.damping[kStateBlock] = numbers.damping_z;
        a_.damping[kAdjointBlock] = numbers.damping_mu;
        a_.normalize = numbers.normalize;
        a_.ball = numbers.ball;
        a_.radius = numbers.radius;
        a_.low = numbers.low;
        a_.high = numbers.high;
    }

    void set(const JointRecord& record, int64_t acc) {
        const int64_t norms = a_.n_blocks * 2 * a_.padded * 8;
        end_.returns = record.returns;
        end_.safeguard = record.safeguard;
        end_.keep_best = record.keep_best;
        end_.best_cost = checked("best_cost", record.best_cost, a_.B * acc);
        end_.best_norms = checked<double>("best_norms", record.best_norms, norms);
        end_.saved_cost = perhaps("saved_cost", record.saved_cost, a_.B * acc);
        end_.saved_norms = static_cast<double*>(perhaps("saved_norms", record.saved_norms, norms));
        end_.least = checked("least", record.least, a_.B * acc);
        end_.taken = checked<int32_t>("taken", record.taken, a_.B * 4);
        end_.column_norms = checked("column_norms", record.column_norms, record.columns * a_.padded * acc);
        end_.columns = record.columns;
    }

    // `index` -1: the kernels of the CPU.
    void place_on(int index, const std::function<Address(int64_t)>& allocate) {
#ifdef DEQFAST_HAS_CUDA
        index_ = index;
        if (index < 0) return;
        const cuda::JointSizes sizes = cuda::joint_sizes(a_);
        const Address memory = allocate(sizes.partials + sizes.factors + sizes.arrivals);
        a_.partials = pointer<double>(memory);
        a_.factors = pointer<double>(memory + Address(sizes.partials));
        work_.arrivals = pointer<int32_t>(memory + Address(sizes.partials + sizes.factors));
#else
        (void)allocate;
        if (index >= 0) throw std::invalid_argument("this module was built without kernels for a device");
#endif
    }
};

inline void declare_joint(pybind11::module_& m) {
    using namespace pybind11::literals;
    pybind11::enum_<Ball>(m, "Ball").value("none", Ball::none).value("l2", Ball::l2).value("linf", Ball::linf);
    pybind11::enum_<Returns>(m, "Returns")
        .value("best", Returns::best)
        .value("last", Returns::last)
        .value("cost", Returns::cost);
    using Arrays = std::vector<Array>;
    pybind11::class_<JointTensors>(m, "JointTensors", "Every tensor of z, mu and x, in order.")
        .def(pybind11::init([](const std::vector<int>& block, const std::vector<int64_t>& numbers, const Arrays& x,
                               const Arrays& x_next, const Arrays& mapped, const Arrays& mapped_next,
                               const Arrays& center, const Arrays& saved, const Arrays& kept) {
                 return JointTensors{block, numbers, x, x_next, mapped, mapped_next, center, saved, kept};
             }),
             pybind11::kw_only(), "block"_a, "numbers"_a, "x"_a, "x_next"_a, "mapped"_a, "mapped_next"_a, "center"_a,
             "saved"_a, "kept"_a);
    pybind11::class_<JointRecord>(m, "JointRecord", "What a joint solve keeps of the iterate that it would return.")
        .def(pybind11::init([](Returns returns, bool safeguard, bool keep_best, const Array& best_cost,
                               const Array& best_norms, const Array& saved_cost, const Array& saved_norms,
                               const Array& least, const Array& taken, const Array& column_norms, int64_t columns) {
                 return JointRecord{returns,     safeguard, keep_best, best_cost,    best_norms, saved_cost,
                                    saved_norms, least,     taken,     column_norms, columns};
             }),
             pybind11::kw_only(), "returns"_a, "safeguard"_a, "keep_best"_a, "best_cost"_a, "best_norms"_a,
             "saved_cost"_a, "saved_norms"_a, "least"_a, "taken"_a, "column_norms"_a, "columns"_a);
    pybind11::class_<JointPlan>(m, "JointPlan", "A joint solve's own parts; see deqfast.ops.native.")
        .def(pybind11::init<int64_t, DType, const JointTensors&, const Array&, const Array&, const Array&, int, int,
                            const pybind11::tuple&, const JointRecord&, int, const std::function<Address(int64_t)>&>(),
             pybind11::kw_only(), "B"_a, "dtype"_a, "tensors"_a, "ints"_a, "reals"_a, "block_norms"_a, "n_blocks"_a,
             "threads"_a, "numbers"_a, "record"_a, "device"_a, "allocate"_a)
        .def("source", &JointPlan::source)
        .def("step", &JointPlan::step, pybind11::kw_only(), "cur"_a, "step_size"_a, "cost"_a, "stream"_a)
        .def("finish", &JointPlan::finish, pybind11::kw_only(), "cur"_a, "made"_a, "cost"_a, "stream"_a);
}

}  // namespace deqfast
