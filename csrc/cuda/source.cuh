// Reading f's output in place: dense in the state's dtype, dense in a narrower one (autocast), or through strides.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "work.h"

namespace deqfast::cuda {

template <class S>
constexpr DType kDTypeOf = std::is_same<S, double>::value  ? DType::f64
                           : std::is_same<S, float>::value ? DType::f32
                           : std::is_same<S, Bf16>::value  ? DType::bf16
                                                           : DType::f16;

// Where number n of a sample lies, counted from the sample's first. Below 2^32: 32-bit divisions are a tenth of the
// work of 64-bit ones.
__device__ inline int64_t offset_in(const Source& s, int64_t n) {
    uint32_t rest = uint32_t(n);
    int64_t offset = 0;
    for (int d = s.ndim - 1; d >= 0; --d) {
        const uint32_t size = uint32_t(s.size[d]), quotient = rest / size;
        offset += int64_t(rest - quotient * size) * s.stride[d];
        rest = quotient;
    }
    return offset;
}

// Number n of a sample whose first is number `begin` of the tensor. A call, not inlined: this is the rare case, and
// eight copies of it in every place that reads f would double the code.
template <class A, class S>
__device__ __noinline__ A read_number(const Source& s, int64_t begin, int64_t n) {
    const int64_t at = begin + (s.dense ? n : offset_in(s, n));
    if (s.dtype == kDTypeOf<S>) return Format<A, S>::read(static_cast<const S*>(s.data)[at]);
    if constexpr (sizeof(S) == 8)
        if (s.dtype == DType::f32) return A(static_cast<const float*>(s.data)[at]);
    if (s.dtype == DType::bf16) return Format<A, Bf16>::read(static_cast<const Bf16*>(s.data)[at]);
    return Format<A, F16>::read(static_cast<const F16*>(s.data)[at]);
}

template <class A, class T, int V>
__device__ __forceinline__ void read_dense(const Source& s, int64_t begin, const Tile<V>& tile, A* out) {
    read_tile(static_cast<const T*>(s.data) + begin, tile, out);
}

// The thread's numbers of f's output for the sample in `row`. Widening is exact, so that they are as f made them.
template <class A, class S, int V>
__device__ __forceinline__ void read_source(const Source& s, int64_t row, const Tile<V>& tile, A* out) {
    const int64_t begin = row * s.batch_stride;
    if (s.dense && (sizeof(S) == 2 || s.dtype == kDTypeOf<S>)) return read_dense<A, S>(s, begin, tile, out);
    if (!s.dense) {
        DEQFAST_UNROLL
        for (int k = 0; k < kItems; ++k)
            out[k] = tile.at(k) < tile.count ? read_number<A, S>(s, begin, tile.begin + tile.at(k)) : A(0);
        return;
    }
    if constexpr (sizeof(S) == 8)
        if (s.dtype == DType::f32) return read_dense<A, float>(s, begin, tile, out);
    if constexpr (sizeof(S) >= 4) {
        if (s.dtype == DType::bf16) return read_dense<A, Bf16>(s, begin, tile, out);
        return read_dense<A, F16>(s, begin, tile, out);
    }
}

// Throws where the kernels cannot read a state's leaves.
template <class S>
inline void check_leaves(const SolveArgs& a) {
    if (a.n_leaves > kMaxLeaves)
        throw std::invalid_argument("z0: the CUDA kernels take at most " + std::to_string(kMaxLeaves) +
                                    " tensors, got " + std::to_string(a.n_leaves));
    for (int l = 0; l < a.n_leaves; ++l)
        for (const Source* s : {&a.leaves[l].f, &a.leaves[l].f_prev}) {
            const bool narrower = (sizeof(S) >= 4 && (s->dtype == DType::bf16 || s->dtype == DType::f16)) ||
                                  (sizeof(S) == 8 && s->dtype == DType::f32);
            if (s->data && s->dtype != kDTypeOf<S> && !narrower)
                throw std::invalid_argument("f(z): the CUDA kernels read the dtype of z0 or a narrower float");
            if (s->data && !s->dense && a.leaves[l].n > 0xffffffff)
                throw std::invalid_argument("f(z): a strided output may have at most 2^32 numbers a sample");
        }
}

}  // namespace deqfast::cuda
