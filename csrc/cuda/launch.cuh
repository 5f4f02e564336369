// Starting a kernel on a stream, or on the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

#ifdef __CUDACC__
#define DEQFAST_SHARED(name) extern __shared__ __align__(16) char name[]
#define DEQFAST_BLOCK_SHARED __shared__
#else
#define DEQFAST_SHARED(name) char* name = emulate::block().shared
#define DEQFAST_BLOCK_SHARED static
#endif

namespace deqfast::cuda {

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("deqfast: ") + what + ": " + cudaGetErrorString(error));
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared, void* stream, const Params& params) {
    if (shared > 48 << 10)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared)),
              "shared memory");
    kernel<<<grid, threads, size_t(shared), static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "kernel launch");
}
#else
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared, void*, const Params& params) {
    emulate::block().run(grid, dim3(unsigned(threads)), size_t(shared), [&] { kernel(params); });
}
#endif

}  // namespace deqfast::cuda
