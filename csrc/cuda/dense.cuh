// Small dense solves by a team of threads that share memory: a warp, or a thread on its own.
// Matrices are row-major with row stride m, entries `stride` apart, so that the matrices of a block's threads may lie
// interleaved. A singular system yields numbers that are not finite: the caller looks.
#pragma once

#include "device.cuh"

namespace deqfast::cuda {

struct WarpTeam {
    static constexpr int size = kWarpSize;
    static __device__ __forceinline__ int rank() { return lane_of(); }
    static __device__ __forceinline__ void sync() { __syncwarp(); }
    template <class T>
    static __device__ __forceinline__ T sum(T v) {
        return warp_sum(v);
    }
    // The member with the largest `value`, of equals the one with the least index; all get both.
    template <class A>
    static __device__ __forceinline__ void largest(A& value, int& index) {
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            const A other = __shfl_xor_sync(kAll, value, step);
            const int at = __shfl_xor_sync(kAll, index, step);
            if (other > value || (other == value && at < index)) value = other, index = at;
        }
    }
    static __device__ __forceinline__ bool any(bool v) { return __any_sync(kAll, v); }
};

struct LoneTeam {
    static constexpr int size = 1;
    static __device__ __forceinline__ int rank() { return 0; }
    static __device__ __forceinline__ void sync() {}
    template <class A>
    static __device__ __forceinline__ void largest(A&, int&) {}
};

// Numbers in memory that the team shares, `stride` apart.
template <class A>
struct Numbers {
    A* base;
    int stride;
    __device__ __forceinline__ A& operator[](int i) const { return base[int64_t(i) * stride]; }
    __device__ __forceinline__ Numbers from(int i) const { return {base + int64_t(i) * stride, stride}; }
};

// Solves a y = b by LU with partial pivoting; y replaces b, a is destroyed. n <= m.
template <class Team, class A>
__device__ inline void solve_lu(Numbers<A> a, Numbers<A> b, int n, int m) {
    for (int k = 0; k < n; ++k) {
        A largest = A(-1);
        int pivot = k;
        for (int i = k + Team::rank(); i < n; i += Team::size) {
            const A candidate = fabs(a[i * m + k]);
            if (candidate > largest) largest = candidate, pivot = i;
        }
        Team::largest(largest, pivot);
        if (pivot != k) {
            for (int j = k + Team::rank(); j <= n; j += Team::size) {
                A &upper = j < n ? a[k * m + j] : b[k], &lower = j < n ? a[pivot * m + j] : b[pivot];
                const A kept = upper;
                upper = lower;
                lower = kept;
            }
        }
        Team::sync();
        const A inverse = A(1) / a[k * m + k];
        for (int j = k + 1 + Team::rank(); j <= n; j += Team::size) {
            const A top = j < n ? a[k * m + j] : b[k];
            for (int i = k + 1; i < n; ++i) {
                A& entry = j < n ? a[i * m + j] : b[i];
                entry -= a[i * m + k] * inverse * top;
            }
        }
        Team::sync();
    }
    for (int k = n - 1; k >= 0; --k) {
        const A y = b[k] / a[k * m + k];
        Team::sync();
        for (int i = Team::rank(); i <= k; i += Team::size) b[i] = i == k ? y : b[i] - a[i * m + k] * y;
        Team::sync();
    }
}

// Factors a symmetric positive definite a = L D L^T in its lower triangle: L below the diagonal, 1/D on it. Returns
// whether all pivots were positive.
template <class Team, class A>
__device__ inline bool factor_ldl(Numbers<A> a, int n, int m) {
    bool positive = true;
    for (int k = 0; k < n; ++k) {
        const A pivot = a[k * m + k], inverse = A(1) / pivot;
        positive = positive && pivot > 0;
        for (int i = k + 1 + Team::rank(); i < n; i += Team::size) {
            const A factor = a[i * m + k] * inverse;
            for (int j = k + 1; j <= i; ++j) a[i * m + j] -= factor * a[j * m + k];
        }
        Team::sync();
        for (int i = k + Team::rank(); i < n; i += Team::size) a[i * m + k] = i == k ? inverse : a[i * m + k] * inverse;
        Team::sync();
    }
    return positive;
}

template <class Team, class A>
__device__ inline void solve_ldl(Numbers<A> a, Numbers<A> b, int n, int m) {
    for (int j = 0; j < n; ++j) {
        for (int i = j + 1 + Team::rank(); i < n; i += Team::size) b[i] -= a[i * m + j] * b[j];
        Team::sync();
    }
    for (int i = Team::rank(); i < n; i += Team::size) b[i] *= a[i * m + i];
    Team::sync();
    for (int j = n - 1; j >= 0; --j) {
        for (int i = Team::rank(); i < j; i += Team::size) b[i] -= a[j * m + i] * b[j];
        Team::sync();
    }
}

// Diagonal of the inverse of a factored matrix; column j of L^-1 is left above the diagonal, in row j.
template <class Team, class A>
__device__ inline void inverse_diagonal(Numbers<A> a, Numbers<A> diagonal, int n, int m) {
    for (int j = Team::rank(); j < n; j += Team::size) {
        A sum = a[j * m + j];
        for (int i = j + 1; i < n; ++i) {
            A value = -a[i * m + j];
            for (int k = j + 1; k < i; ++k) value -= a[i * m + k] * a[j * m + k];
            a[j * m + i] = value;
            sum += value * value * a[i * m + i];
        }
        diagonal[j] = sum;
    }
    Team::sync();
}

}  // namespace deqfast::cuda
