// begin -> WHILE (pass -> check) -> IF (rest -> ended): the conditions are set by kernels of one thread from the count
// of running samples that the last block of a step leaves in device memory.
#include "graph_loop.h"

#include <stdexcept>
#include <vector>

#include "launch.cuh"
#include "runtime.h"

namespace deqfast::cuda {

#ifdef __CUDACC__
namespace {

struct Loop {
    cudaGraphConditionalHandle again, remain;
    const int32_t* running;
    int32_t* made;
    int steps, limit;
    bool has_rest;  // a condition without a node of its own may not exist
};

__device__ void decide(const Loop& loop) {
    const bool going = *static_cast<volatile const int32_t*>(loop.running) > 0;
    const bool room = *loop.made + loop.steps <= loop.limit;
    cudaGraphSetConditional(loop.again, going && room);
    if (loop.has_rest) cudaGraphSetConditional(loop.remain, going && !room && *loop.made < loop.limit);
}

__global__ void begin_kernel(const __grid_constant__ Loop loop) {
    *loop.made = 1;
    decide(loop);
}

__global__ void check_kernel(const __grid_constant__ Loop loop) {
    *loop.made += loop.steps;
    decide(loop);
}

__global__ void ended_kernel(const __grid_constant__ Loop loop) { *loop.made = loop.limit; }

// A graph that is being put together; what was added last comes before what is added next.
class Chain {
   public:
    explicit Chain(cudaGraph_t graph) : graph_(graph) {}

    void kernel(void (*function)(Loop), Loop loop) {
        cudaKernelNodeParams params{};
        void* arguments[] = {&loop};
        params.func = reinterpret_cast<void*>(function);
        params.gridDim = params.blockDim = dim3(1);
        params.kernelParams = arguments;
        cudaGraphNode_t node;
        check(cudaGraphAddKernelNode(&node, graph_, before(), count(), &params), "graph kernel node");
        last_ = node;
    }
    void child(cudaGraph_t graph) {
        cudaGraphNode_t node;
        check(cudaGraphAddChildGraphNode(&node, graph_, before(), count(), graph), "graph child node");
        last_ = node;
    }
    cudaGraph_t conditional(cudaGraphConditionalHandle handle, cudaGraphConditionalNodeType type) {
        cudaGraphNodeParams params{};
        params.type = cudaGraphNodeTypeConditional;
        params.conditional.handle = handle;
        params.conditional.type = type;
        params.conditional.size = 1;
        cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
        check(cudaGraphAddNode(&node, graph_, before(), nullptr, count(), &params), "graph conditional node");
#else
        check(cudaGraphAddNode(&node, graph_, before(), count(), &params), "graph conditional node");
#endif
        last_ = node;
        return params.conditional.phGraph_out[0];
    }

   private:
    cudaGraph_t graph_;
    cudaGraphNode_t last_ = nullptr;
    const cudaGraphNode_t* before() const { return last_ ? &last_ : nullptr; }
    size_t count() const { return last_ ? 1 : 0; }
};

const char* name_of(cudaGraphNodeType type) {
    switch (type) {
        case cudaGraphNodeTypeHost:
            return "a host callback";
        case cudaGraphNodeTypeMemAlloc:
        case cudaGraphNodeTypeMemFree:
            return "a memory allocation";
        case cudaGraphNodeTypeWaitEvent:
        case cudaGraphNodeTypeEventRecord:
            return "an event";
        case cudaGraphNodeTypeExtSemaphoreSignal:
        case cudaGraphNodeTypeExtSemaphoreWait:
            return "an external semaphore";
        default:
            return "a node of an unknown type";
    }
}

}  // namespace

std::string why_no_device_loop() {
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    if (driver >= 12040) return "";
    return "the driver serves CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", loops on the device need 12.4";
}

std::string node_not_allowed(void* graph) {
    const auto captured = static_cast<cudaGraph_t>(graph);
    size_t count = 0;
    check(cudaGraphGetNodes(captured, nullptr, &count), "graph nodes");
    std::vector<cudaGraphNode_t> nodes(count);
    check(cudaGraphGetNodes(captured, nodes.data(), &count), "graph nodes");
    for (const cudaGraphNode_t node : nodes) {
        cudaGraphNodeType type;
        check(cudaGraphNodeGetType(node, &type), "graph node");
        if (type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemcpy || type == cudaGraphNodeTypeMemset ||
            type == cudaGraphNodeTypeEmpty)
            continue;
        if (type != cudaGraphNodeTypeGraph) return name_of(type);
        cudaGraph_t inner;
        check(cudaGraphChildGraphNodeGetGraph(node, &inner), "graph child node");
        const std::string found = node_not_allowed(inner);
        if (!found.empty()) return found;
    }
    return "";
}

DeviceLoop::DeviceLoop(int device, void* pass, void* rest, int steps, const int32_t* running, int32_t* made, int limit)
    : device_(device) {
    const OnDevice on(device_);
    cudaGraph_t graph;
    check(cudaGraphCreate(&graph, 0), "graph");
    try {
        Loop loop{0, 0, running, made, steps, limit, rest != nullptr};
        check(cudaGraphConditionalHandleCreate(&loop.again, graph, 0, cudaGraphCondAssignDefault), "graph condition");
        if (rest)
            check(cudaGraphConditionalHandleCreate(&loop.remain, graph, 0, cudaGraphCondAssignDefault),
                  "graph condition");
        Chain top(graph);
        top.kernel(begin_kernel, loop);
        Chain body(top.conditional(loop.again, cudaGraphCondTypeWhile));
        body.child(static_cast<cudaGraph_t>(pass));
        body.kernel(check_kernel, loop);
        if (rest) {
            Chain tail(top.conditional(loop.remain, cudaGraphCondTypeIf));
            tail.child(static_cast<cudaGraph_t>(rest));
            tail.kernel(ended_kernel, loop);
        }
        cudaGraphExec_t executable;
        check(cudaGraphInstantiate(&executable, graph, 0), "graph with a loop");
        executable_ = executable;
    } catch (...) {
        (void)cudaGraphDestroy(graph);
        throw;
    }
    check(cudaGraphDestroy(graph), "graph");
}

DeviceLoop::~DeviceLoop() { (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)); }

void DeviceLoop::launch(void* stream) const {
    const OnDevice on(device_);
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), static_cast<cudaStream_t>(stream)),
          "loop on the device");
}
#else
std::string why_no_device_loop() { return "an emulated device has no graphs"; }
std::string node_not_allowed(void*) { return ""; }
DeviceLoop::DeviceLoop(int device, void*, void*, int, const int32_t*, int32_t*, int) : device_(device) {
    throw std::logic_error(why_no_device_loop());
}
DeviceLoop::~DeviceLoop() { (void)device_, (void)executable_; }
void DeviceLoop::launch(void*) const {}
#endif

}  // namespace deqfast::cuda
