// Anderson kernels for float32 states.
#include "anderson_kernels.cuh"

namespace deqfast::cuda {

void anderson_step_f32(const AndersonArgs& a, const DeviceWork& work, int phase) {
    anderson_step_of<float, float>(a, work, phase);
}

}  // namespace deqfast::cuda
