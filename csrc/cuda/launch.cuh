// Starting a kernel on a stream, or on the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "work.h"

#ifdef __CUDACC__
#define DEQFAST_SHARED(name) extern __shared__ __align__(16) char name[]
#define DEQFAST_BLOCK_SHARED __shared__
#else
#define DEQFAST_SHARED(name) char* name = emulate::block().shared
#define DEQFAST_BLOCK_SHARED static
#endif

namespace deqfast::cuda {

inline void check_shared(int64_t bytes) {
    if (bytes > kMaxDynamic)
        throw std::invalid_argument("the solver's columns need " + std::to_string(bytes) +
                                    " bytes of shared memory, a block has " + std::to_string(kMaxDynamic) +
                                    "; keep fewer (m or memory), or use backend='triton'");
}

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("deqfast: ") + what + ": " + cudaGetErrorString(error));
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared, void* stream, const Params& params) {
    check_shared(shared);
    if (must_ask(shared))  // for all there is: two threads may launch one kernel with different sizes
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(kMaxDynamic)),
              "shared memory");
    kernel<<<grid, threads, size_t(shared), static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "kernel launch");
}
#else
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared, void*, const Params& params) {
    check_shared(shared);
    emulate::admit(shared, must_ask(shared) ? kMaxDynamic : 0);
    emulate::block().run(grid, dim3(unsigned(threads)), size_t(shared), [&] { kernel(params); });
}
#endif

}  // namespace deqfast::cuda
