// deqfast._C. The files of this folder are the only ones that know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "joint_plan.h"
#include "plan.h"
#ifdef DEQFAST_HAS_CUDA
#include "cuda/graph_loop.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

using deqfast::Address;
using deqfast::DType;
using deqfast::pointer;

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

template <size_t n>
py::dict as_dict(const deqfast::Named (&table)[n]) {
    py::dict found;
    for (const deqfast::Named& entry : table) found[entry.name] = entry.value;
    return found;
}

#ifdef DEQFAST_HAS_CUDA
void declare_device(py::module_& m) {
    using deqfast::cuda::DeviceLoop;
    m.def("cuda_why_not", &deqfast::cuda::why_not,
          "Why the CUDA kernels of this module cannot run on the device of this index, empty if they can.");
    m.def("why_no_device_loop", &deqfast::cuda::why_no_device_loop,
          "Why the driver cannot run a loop on the device, empty if it can.");
    m.def(
        "node_not_allowed", [](Address graph) { return deqfast::cuda::node_not_allowed(pointer<void>(graph)); },
        "The first type of node in a captured graph that may not stand in a loop on the device, empty if none.");
    py::class_<DeviceLoop>(m, "DeviceLoop", "A solve's loop as one CUDA graph; see csrc/cuda/graph_loop.h.")
        .def(py::init([](int device, Address pass, Address rest, int steps, Address running, Address made, int limit) {
                 return new DeviceLoop(device, pointer<void>(pass), pointer<void>(rest), steps,
                                       pointer<int32_t>(running), pointer<int32_t>(made), limit);
             }),
             py::kw_only(), "device"_a, "pass_"_a, "rest"_a, "steps"_a, "running"_a, "made"_a, "limit"_a)
        .def("launch", [](const DeviceLoop& loop, Address stream) { loop.launch(pointer<void>(stream)); });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of deqfast; call them through deqfast.ops.";
    m.def("build_info", &build_info, "How this module was built: version, compiler, build type, instruction sets.");
    m.def(
        "cpu_isa", [] { return std::string(deqfast::cpu::kernels().name); },
        "Name of the instruction set whose kernels run on this machine; ValueError if DEQFAST_CPU_ISA names none.");
    m.def("constants", [] { return as_dict(deqfast::kConstants); }, "What every language agrees on, by name.");
    m.def("regimes", [] { return as_dict(deqfast::kRegimes); }, "The sizes at which kernels change their schedule.");
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
    deqfast::declare_plans(m);
    deqfast::declare_joint(m);
#ifdef DEQFAST_HAS_CUDA
    declare_device(m);
#endif
}
