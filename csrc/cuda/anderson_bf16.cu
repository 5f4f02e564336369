// Anderson kernels for bfloat16 states.
#include "anderson_kernels.cuh"

namespace deqfast::cuda {

void anderson_step_bf16(const AndersonArgs& a, const DeviceWork& work, int phase) {
    anderson_step_of<float, Bf16>(a, work, phase);
}

}  // namespace deqfast::cuda
