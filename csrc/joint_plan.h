// The plan of a joint step's own parts, the map before the accelerated step and the finish after it: a solve's
// addresses, bound once, so that a step passes only what changes. It borrows every tensor; whoever makes a plan keeps
// them alive. Part of the bindings (bindings.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <tuple>
#include <vector>

#include "deqfast/dispatch.h"
#include "deqfast/joint.h"
#include "deqfast/joint_finish.h"
#include "place.h"
#ifdef DEQFAST_HAS_CUDA
#include "cuda/joint_work.h"
#include "cuda/runtime.h"
#endif

namespace deqfast {

class JointPlan {
   public:
    using Address = std::uintptr_t;
    // (block, numbers a sample, addresses of x[0], x[1], mapped[0], mapped[1], centre, saved, kept); 0: there is none.
    // Saved: of a tensor that is not accelerated.
    using Part = std::tuple<int, int64_t, Address, Address, Address, Address, Address, Address, Address>;

    void bind(int64_t B, DType dtype, const std::vector<Part>& parts, Address ints, Address reals, Address block_norms,
              int n_blocks, int64_t padded, int threads) {
        a_.B = end_.B = B;
        a_.dtype = end_.dtype = dtype;
        a_.status = at<int32_t>(ints) + kStatus * padded;
        end_.ints = at<int32_t>(ints);
        end_.reals = at<void>(reals);
        end_.block_norms = a_.block_norms = at<double>(block_norms);
        a_.n_blocks = end_.n_blocks = n_blocks;
        a_.padded = end_.padded = padded;
        a_.threads = end_.threads = threads;
        for (const auto& [block, n, x0, x1, mapped0, mapped1, center, saved, kept] : parts) {
            JointPart part;
            part.n = n;
            part.block = block;
            part.center = at<void>(center);
            parts_.push_back(part);
            buffers_.push_back({{at<void>(x0), at<void>(x1)}, {at<void>(mapped0), at<void>(mapped1)}});
            a_.chunks += chunks_of(n);
            FinishPart last;
            last.n = n;
            last.saved = at<void>(saved);
            last.kept = at<void>(kept);
            ends_.push_back(last);
        }
        a_.parts = parts_.data();
        end_.parts = ends_.data();
        a_.n_parts = end_.n_parts = int(parts_.size());
    }

    // What the finish keeps; `column_norms` has so many columns a tile.
    void record(Returns returns, bool safeguard, bool keep_best, Address best_cost, Address best_norms,
                Address saved_cost, Address saved_norms, Address least, Address taken, Address column_norms,
                int64_t columns) {
        end_.returns = returns;
        end_.safeguard = safeguard;
        end_.keep_best = keep_best;
        end_.best_cost = at<void>(best_cost);
        end_.best_norms = at<double>(best_norms);
        end_.saved_cost = at<void>(saved_cost);
        end_.saved_norms = at<double>(saved_norms);
        end_.least = at<void>(least);
        end_.taken = at<int32_t>(taken);
        end_.column_norms = at<void>(column_norms);
        end_.columns = columns;
    }

    void method(double damping_z, double damping_mu, bool normalize, Ball ball, double radius, double low,
                double high) {
        a_.damping[kStateBlock] = damping_z;
        a_.damping[kAdjointBlock] = damping_mu;
        a_.normalize = normalize;
        a_.ball = ball;
        a_.radius = radius;
        a_.low = low;
        a_.high = high;
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
        a_.cost = at<void>(cost);
        for (size_t i = 0; i < parts_.size(); ++i) {
            parts_[i].v = buffers_[i].x[cur];
            parts_[i].mapped = buffers_[i].mapped[cur];
        }
#ifdef DEQFAST_HAS_CUDA
        if (index_ >= 0) {
            pybind11::gil_scoped_release release;
            const cuda::OnDevice on(index_);
            work_.stream = at<void>(stream);
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
        end_.cost = at<void>(cost);
        for (size_t i = 0; i < ends_.size(); ++i) {
            ends_[i].x = buffers_[i].x[cur];
            ends_[i].mapped = buffers_[i].mapped[cur];
            ends_[i].next = ends_[i].saved ? buffers_[i].x[1 - cur] : nullptr;
        }
        pybind11::gil_scoped_release release;
#ifdef DEQFAST_HAS_CUDA
        if (index_ >= 0) {
            const cuda::OnDevice on(index_);
            return cuda::joint_finish(end_, at<void>(stream));
        }
#endif
        (void)stream;
        cpu::kernels().joint_finish(end_);
    }

#ifdef DEQFAST_HAS_CUDA
    // After `bind`: the kernels of a device will be used. `use` gives them so many bytes of zeroed memory.
    void on_device(int index) { index_ = index; }
    int64_t device_bytes() const {
        const cuda::JointSizes sizes = cuda::joint_sizes(a_);
        return sizes.partials + sizes.factors + sizes.arrivals;
    }
    void use(Address memory) {
        const cuda::JointSizes sizes = cuda::joint_sizes(a_);
        a_.partials = at<double>(memory);
        a_.factors = at<double>(memory + Address(sizes.partials));
        work_.arrivals = at<int32_t>(memory + Address(sizes.partials + sizes.factors));
    }
#endif

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

    template <class T>
    static T* at(Address address) {
        return reinterpret_cast<T*>(address);
    }
};

inline void declare_joint(pybind11::module_& m) {
    using namespace pybind11::literals;
    pybind11::enum_<Ball>(m, "Ball").value("none", Ball::none).value("l2", Ball::l2).value("linf", Ball::linf);
    pybind11::enum_<Returns>(m, "Returns")
        .value("best", Returns::best)
        .value("last", Returns::last)
        .value("cost", Returns::cost);
    pybind11::class_<JointPlan> plan(m, "JointPlan", "A joint solve's own parts; see deqfast.ops.native_joint.");
    plan.def(pybind11::init<>());
    plan.def("bind", &JointPlan::bind, "B"_a, "dtype"_a, "parts"_a, "ints"_a, "reals"_a, "block_norms"_a, "n_blocks"_a,
             "padded"_a, "threads"_a);
    plan.def("record", &JointPlan::record, "returns"_a, "safeguard"_a, "keep_best"_a, "best_cost"_a, "best_norms"_a,
             "saved_cost"_a, "saved_norms"_a, "least"_a, "taken"_a, "column_norms"_a, "columns"_a);
    plan.def("method", &JointPlan::method, "damping_z"_a, "damping_mu"_a, "normalize"_a, "ball"_a, "radius"_a, "low"_a,
             "high"_a);
    plan.def("source", &JointPlan::source);
    plan.def("step", &JointPlan::step, "cur"_a, "step_size"_a, "cost"_a, "stream"_a);
    plan.def("finish", &JointPlan::finish, "cur"_a, "made"_a, "cost"_a, "stream"_a);
#ifdef DEQFAST_HAS_CUDA
    plan.def("on_device", &JointPlan::on_device);
    plan.def("device_bytes", &JointPlan::device_bytes);
    plan.def("use", &JointPlan::use);
#endif
}

}  // namespace deqfast
