// A solve's loop as one CUDA graph: evaluations and steps that were captured once, repeated on the device until no
// sample runs any more. No CUDA header, so that the bindings can read it.
#pragma once

#include <cstdint>
#include <string>

namespace deqfast::cuda {

// Why the driver cannot run such a graph, empty if it can.
std::string why_no_device_loop();

// The first type of node in a captured graph (cudaGraph_t) that may not stand in a loop on the device, empty if none.
std::string node_not_allowed(void* graph);

class DeviceLoop {
   public:
    // pass: graph of `steps` evaluations and steps; rest: of the `limit - 1` modulo `steps` that remain of the
    // evaluations allowed after the first and the passes, null if none. `running`: device memory, the samples that
    // still run; `made`: device memory that receives how many evaluations were made, the first included. The graphs are
    // copied; what their nodes use must outlive this.
    DeviceLoop(int device, void* pass, void* rest, int steps, const int32_t* running, int32_t* made, int limit);
    ~DeviceLoop();
    DeviceLoop(const DeviceLoop&) = delete;
    DeviceLoop& operator=(const DeviceLoop&) = delete;

    // After the first evaluation and step: repeats passes while a sample runs and evaluations are left.
    void launch(void* stream) const;

   private:
    int device_;
    void* executable_ = nullptr;
};

}  // namespace deqfast::cuda
