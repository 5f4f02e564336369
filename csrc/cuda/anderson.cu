// Anderson step on a GPU: hands over to the kernels of the state's dtype. Each dtype has a file of its own, so that
// they are compiled side by side; what they do is in anderson_kernels.cuh.
#include "work.h"

namespace deqfast::cuda {

void anderson_step_f64(const AndersonArgs& a, const DeviceWork& work, int phase);
void anderson_step_f32(const AndersonArgs& a, const DeviceWork& work, int phase);
void anderson_step_bf16(const AndersonArgs& a, const DeviceWork& work, int phase);
void anderson_step_f16(const AndersonArgs& a, const DeviceWork& work, int phase);

void anderson_step(const AndersonArgs& a, const DeviceWork& work, int phase) {
    switch (a.dtype) {
        case DType::f64:
            return anderson_step_f64(a, work, phase);
        case DType::f32:
            return anderson_step_f32(a, work, phase);
        case DType::bf16:
            return anderson_step_bf16(a, work, phase);
        default:
            return anderson_step_f16(a, work, phase);
    }
}

}  // namespace deqfast::cuda
