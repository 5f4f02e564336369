// Anderson kernels for float16 states.
#include "anderson_kernels.cuh"

namespace deqfast::cuda {

void anderson_step_f16(const AndersonArgs& a, const DeviceWork& work, int phase) {
    anderson_step_of<float, F16>(a, work, phase);
}

}  // namespace deqfast::cuda
