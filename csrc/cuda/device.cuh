// What every CUDA kernel shares: number formats, sums over warps and blocks, reading a tile of a row.
//
// A block handles a row in tiles of 8 numbers a thread. In rows whose length is a multiple of 8 a thread takes them in
// groups of neighbours, 16 bytes of the widest type at hand, and the groups of neighbouring threads lie side by side:
// every access of a warp is one run of whole sectors. In other rows it takes every blockDim-th number. Which numbers a
// thread adds up depends on the length and the types alone.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include <algorithm>
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

// ---- lists ----

// Writes the j in [0, count) for which `chosen` into `list`, in order; returns how many. The whole block calls: every
// warp looks at all, a lane a number, and the first one writes.
template <class Chosen>
__device__ __forceinline__ int list_of(int count, int* list, Chosen&& chosen) {
    int n = 0;
    for (int first = 0; first < count; first += kWarpSize) {
        const int j = first + lane_of();
        const bool mine = j < count && chosen(j);
        const unsigned all = __ballot_sync(kAll, mine);
        if (mine && warp_of() == 0) list[n + __popc(all & ((1u << lane_of()) - 1))] = j;
        n += __popc(all);
    }
    return n;
}

// ---- tiles ----

// Numbers in a group: 16 bytes of the widest of the types whose rows are walked together.
template <class... T>
constexpr int kGroup = 16 / int(std::max({sizeof(T)...}));

// Which numbers of a tile a thread holds, in groups of V.
template <int V>
struct Tile {
    int64_t begin;    // of the tile, in the row
    int count;        // numbers in the tile
    bool neighbours;  // groups of V in a row, or every blockDim-th number

    __device__ __forceinline__ int at(int k) const {
        const int group = k / V * int(blockDim.x) + int(threadIdx.x);
        return neighbours ? group * V + k % V : k * int(blockDim.x) + int(threadIdx.x);
    }
};

// What one access moves. Memory is read and written as these and no other way: a store of a struct of words is taken
// apart into words by the compiler.
template <int bytes>
struct Piece;
template <>
struct Piece<1> {
    using type = unsigned char;
};
template <>
struct Piece<2> {
    using type = unsigned short;
};
template <>
struct Piece<4> {
    using type = unsigned;
};
template <>
struct Piece<8> {
    using type = uint2;
};
template <>
struct Piece<16> {
    using type = uint4;
};
template <class T, int V>
using PieceOf = typename Piece<V* int(sizeof(T)) < 16 ? V * int(sizeof(T)) : 16>::type;

// A thread's numbers of a tile as they lie in memory. Loads end here and are converted later: converting right away
// would wait for each load before the next one is asked for.
template <class T, int V>
struct Pack {
    static constexpr int pieces = kItems * int(sizeof(T)) / int(sizeof(PieceOf<T, V>));
    static constexpr int numbers = kItems / pieces;  // in a piece
    PieceOf<T, V> piece[pieces];
};

template <class T, int V>
__device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(PieceOf<T, V>) == 0;
}

// The thread's numbers of a dense row; zeros beyond the end.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_tile(const T* row, const Tile<V>& tile) {
    using P = PieceOf<T, V>;
    const T* p = row + tile.begin;
    Pack<T, V> pack;
    if (tile.neighbours && aligned<T, V>(p)) {
        DEQFAST_UNROLL
        for (int i = 0; i < pack.pieces; ++i) {
            const int at = tile.at(i * pack.numbers);
            pack.piece[i] = at < tile.count ? *reinterpret_cast<const P*>(p + at) : P{};
        }
        return pack;
    }
    T part[kItems];
    DEQFAST_UNROLL
    for (int k = 0; k < kItems; ++k) part[k] = tile.at(k) < tile.count ? p[tile.at(k)] : T{};
    memcpy(&pack, part, sizeof(pack));
    return pack;
}
template <class T, class A, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, A* out) {
    T part[kItems];
    memcpy(part, &pack, sizeof(part));
    DEQFAST_UNROLL
    for (int k = 0; k < kItems; ++k) out[k] = Format<A, T>::read(part[k]);
}
template <class A, class T, int V>
__device__ __forceinline__ void read_tile(const T* row, const Tile<V>& tile, A* out) {
    unpack<T>(load_tile(row, tile), out);
}

// A store to global memory; the first-level cache keeps nothing of it.
struct ToGlobal {
    template <class P>
    static __device__ __forceinline__ void put(P* p, P value) {
        __stcg(p, value);
    }
};
// A store of an accumulation type to shared memory.
struct ToShared {
    static __device__ __forceinline__ void put(uint4* p, uint4 v) {
#ifdef __CUDACC__
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(unsigned(__cvta_generic_to_shared(p))), "r"(v.x),
                     "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
#else
        *p = v;
#endif
    }
};
template <class To = ToGlobal, class T, int V>
__device__ __forceinline__ void write_tile(T* row, const Tile<V>& tile, const T* values) {
    using P = PieceOf<T, V>;
    T* p = row + tile.begin;
    if (tile.neighbours && aligned<T, V>(p)) {
        Pack<T, V> pack;
        memcpy(&pack, values, sizeof(pack));
        DEQFAST_UNROLL
        for (int i = 0; i < pack.pieces; ++i) {
            const int at = tile.at(i * pack.numbers);
            if (at < tile.count) To::put(reinterpret_cast<P*>(p + at), pack.piece[i]);
        }
    } else {
        DEQFAST_UNROLL
        for (int k = 0; k < kItems; ++k)
            if (tile.at(k) < tile.count) p[tile.at(k)] = values[k];
    }
}

// Rounds the thread's numbers into the state's type; true if every one is finite there.
template <class A, class S, int V>
__device__ __forceinline__ bool write_state(S* row, const Tile<V>& tile, const A* values) {
    bool finite = true;
    S part[kItems];
    for (int k = 0; k < kItems; ++k) {
        part[k] = Format<A, S>::write(values[k]);
        finite &= tile.at(k) >= tile.count || isfinite(double(Format<A, S>::read(part[k])));
    }
    write_tile(row, tile, part);
    return finite;
}

}  // namespace deqfast::cuda
