// What every CUDA kernel shares: number formats, sums over warps and blocks, reading a tile of a row.
//
// A block handles a row in tiles of 8 numbers a thread. In rows whose length is a multiple of 8 a thread takes 8
// neighbours, with 16-byte accesses wherever the address allows them; else it takes every blockDim-th number, so that
// neighbouring threads still read neighbouring numbers. Which numbers a thread adds up depends on the length alone.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include <cmath>
#include <cstdint>

#include "deqfast/args.h"

#ifdef __CUDACC__
#define DEQFAST_UNROLL _Pragma("unroll")
#else
#define DEQFAST_UNROLL
#endif

namespace deqfast::cuda {

constexpr int kItems = 8;  // numbers of a tile that one thread holds
constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarpSize = 32;

// ---- number formats ----

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class A, class T>
struct Format {
    static __device__ __forceinline__ A read(T v) { return A(v); }
    static __device__ __forceinline__ T write(A v) { return T(v); }
};
template <class A>
struct Format<A, Bf16> {
    static __device__ __forceinline__ A read(Bf16 v) {
        const uint32_t bits = uint32_t(v.bits) << 16;
        float f;
        memcpy(&f, &bits, 4);
        return A(f);
    }
    static __device__ __forceinline__ Bf16 write(A value) {
        const float f = float(value);
        uint32_t bits;
        memcpy(&bits, &f, 4);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 64)};
        return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
    }
};
template <class A>
struct Format<A, F16> {
#ifdef __CUDACC__
    static __device__ __forceinline__ A read(F16 v) { return A(__half2float(__ushort_as_half(v.bits))); }
    static __device__ __forceinline__ F16 write(A v) { return {__half_as_ushort(__float2half_rn(float(v)))}; }
#else
    static A read(F16 v) {
        _Float16 h;
        memcpy(&h, &v, 2);
        return A(h);
    }
    static F16 write(A v) {
        const _Float16 h = _Float16(float(v));
        F16 result;
        memcpy(&result, &h, 2);
        return result;
    }
#endif
};
template <class A>
struct Format<A, int8_t> {
    static __device__ __forceinline__ A read(int8_t v) { return A(v); }
    static __device__ __forceinline__ int8_t write(A v) {
        const A r = A(rint(double(v)));
        return int8_t(r > A(127) ? A(127) : r < A(-127) ? A(-127) : r);
    }
};

// ---- sums ----

__device__ __forceinline__ int lane_of() { return int(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_of() { return int(threadIdx.x) / kWarpSize; }

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
    return v;
}

// Sums of four numbers over a warp in six shuffles instead of twenty: lanes 0-7 end with the first, 8-15 the second,
// ...
template <class T>
__device__ __forceinline__ T warp_sum_4(T a, T b, T c, T d) {
    const bool high = lane_of() & 16, odd = lane_of() & 8;
    const T first = (high ? c : a) + __shfl_xor_sync(kAll, high ? a : c, 16);
    const T second = (high ? d : b) + __shfl_xor_sync(kAll, high ? b : d, 16);
    T sum = (odd ? second : first) + __shfl_xor_sync(kAll, odd ? first : second, 8);
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    return sum;
}

// ---- tiles ----

// Which numbers of a tile a thread holds.
struct Tile {
    int64_t begin;    // of the tile, in the row
    int count;        // numbers in the tile
    bool neighbours;  // 8 in a row, or every blockDim-th

    __device__ __forceinline__ int at(int k) const {
        return neighbours ? int(threadIdx.x) * kItems + k : k * int(blockDim.x) + int(threadIdx.x);
    }
    __device__ __forceinline__ bool whole() const { return neighbours && int(threadIdx.x) * kItems + kItems <= count; }
};

// A thread's numbers of a tile as they lie in memory. Loads end here and are converted later: converting right away
// would wait for each load before the next one is asked for.
template <int bytes>
struct alignas(bytes < 16 ? bytes : 16) Packed {
    uint32_t words[bytes / 4];
};
template <class T>
using Pack = Packed<kItems* int(sizeof(T))>;

template <class T>
__device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T>) == 0;
}

// The thread's numbers of a dense row; zeros beyond the end.
template <class T>
__device__ __forceinline__ Pack<T> load_tile(const T* row, const Tile& tile) {
    const T* p = row + tile.begin;
    if (tile.whole() && aligned(p + tile.at(0))) return *reinterpret_cast<const Pack<T>*>(p + tile.at(0));
    T part[kItems];
    for (int k = 0; k < kItems; ++k) part[k] = tile.at(k) < tile.count ? p[tile.at(k)] : T{};
    Pack<T> pack;
    memcpy(&pack, part, sizeof(pack));
    return pack;
}
template <class T, class A>
__device__ __forceinline__ void unpack(const Pack<T>& pack, A* out) {
    T part[kItems];
    memcpy(part, &pack, sizeof(part));
    for (int k = 0; k < kItems; ++k) out[k] = Format<A, T>::read(part[k]);
}
template <class A, class T>
__device__ __forceinline__ void read_tile(const T* row, const Tile& tile, A* out) {
    unpack<T>(load_tile(row, tile), out);
}
template <class A, class T>
__device__ __forceinline__ void write_tile(T* row, const Tile& tile, const T* values) {
    T* p = row + tile.begin;
    if (tile.whole() && aligned(p + tile.at(0))) {
        Pack<T> pack;
        memcpy(&pack, values, sizeof(pack));
        *reinterpret_cast<Pack<T>*>(p + tile.at(0)) = pack;
    } else {
        for (int k = 0; k < kItems; ++k)
            if (tile.at(k) < tile.count) p[tile.at(k)] = values[k];
    }
}

// Rounds the thread's numbers into the state's type; true if every one is finite there.
template <class A, class S>
__device__ __forceinline__ bool write_state(S* row, const Tile& tile, const A* values) {
    bool finite = true;
    S part[kItems];
    for (int k = 0; k < kItems; ++k) {
        part[k] = Format<A, S>::write(values[k]);
        finite &= tile.at(k) >= tile.count || isfinite(double(Format<A, S>::read(part[k])));
    }
    write_tile<A>(row, tile, part);
    return finite;
}

}  // namespace deqfast::cuda
