// Anderson kernels for float64 states.
#include "anderson_kernels.cuh"

namespace deqfast::cuda {

void anderson_step_f64(const AndersonArgs& a, const DeviceWork& work, int phase) {
    anderson_step_of<double, double>(a, work, phase);
}

}  // namespace deqfast::cuda
