// Small dense solves by a team of threads that share memory: a warp, or a thread on its own.
// Up to kRowsMax rows a warp solves in registers, without a barrier.
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

// ---- a lane a row, in registers ----

constexpr int kRowsMax = 16;  // rows; every loop over them is unrolled

// What orders magnitudes as unsigned numbers do; of doubles the upper half, which is all that choosing a pivot needs.
__device__ __forceinline__ unsigned magnitude(float v) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    return bits & 0x7fffffffu;
}
__device__ __forceinline__ unsigned magnitude(double v) {
    uint64_t bits;
    memcpy(&bits, &v, 8);
    return unsigned(bits >> 32) & 0x7fffffffu;
}

// The lowest lane in which the flag is set.
__device__ __forceinline__ int lane_with(bool flag) { return __ffs(int(__ballot_sync(kAll, flag))) - 1; }

// Both eliminate above the pivot too (Gauss-Jordan), so that nothing has to be substituted back, and shift every row
// one to the left at each step, so that the loop over pivots need not be unrolled for the rows to stay in registers.

// Solves a y = b with partial pivoting; y replaces b, a stays. n <= kRowsMax. Rows are not swapped: a lane remembers
// when its row was the pivot.
template <class A>
__device__ inline void solve_rows(const A* a, A* b, int n, int m) {
    const int lane = lane_of();
    A row[kRowsMax], rhs = lane < n ? b[lane] : A(0), inverse_own = 0;
    DEQFAST_UNROLL
    for (int j = 0; j < kRowsMax; ++j) row[j] = lane < n && j < n ? a[lane * m + j] : A(0);
    int order = -1;
    for (int k = 0; k < n; ++k) {
        const bool candidate = lane < n && order < 0;
        const unsigned size = candidate ? magnitude(row[0]) : 0;
        const unsigned largest = __reduce_max_sync(kAll, size);
        const int from = lane_with(candidate && size == largest);
        const A inverse = A(1) / __shfl_sync(kAll, row[0], from);
        const A factor = lane == from ? A(0) : row[0] * inverse;
        if (lane == from) order = k, inverse_own = inverse;
        DEQFAST_UNROLL
        for (int j = 1; j < kRowsMax; ++j)
            if (j < n - k) row[j - 1] = row[j] - factor * __shfl_sync(kAll, row[j], from);
        rhs -= factor * __shfl_sync(kAll, rhs, from);
    }
    __syncwarp();
    if (lane < n) b[order] = rhs * inverse_own;
    __syncwarp();
}

// Of a symmetric positive definite a, given by its lower triangle, n <= kRowsMax: the diagonal of the inverse, and b
// replaced by the solution of a y = b unless b is null. a stays. Returns whether all pivots were positive.
// Eliminating column k adds (A11^-1 A12)_ik^2 / pivot to entry i of the leading block's inverse, for i < k, and what is
// squared there is the factor by which row i is eliminated: the inverse itself is not needed.
template <class A>
__device__ inline bool solve_spd_rows(const A* a, A* b, A* diagonal, int n, int m) {
    const int lane = lane_of();
    A row[kRowsMax], rhs = b && lane < n ? b[lane] : A(0), entry = 0;
    DEQFAST_UNROLL
    for (int j = 0; j < kRowsMax; ++j) row[j] = lane < n && j < n ? a[max(lane, j) * m + min(lane, j)] : A(0);
    bool positive = true;
    for (int k = 0; k < n; ++k) {
        const bool mine = lane == k;
        const A pivot = __shfl_sync(kAll, row[0], k), inverse = A(1) / pivot, factor = row[0];
        positive = positive && pivot > 0;
        entry = mine ? inverse : lane < k ? entry + factor * factor * inverse : entry;
        DEQFAST_UNROLL
        for (int j = 1; j < kRowsMax; ++j) {
            if (j >= n - k) continue;
            const A top = __shfl_sync(kAll, row[j], k) * inverse;
            row[j - 1] = mine ? top : row[j] - factor * top;
        }
        const A top = __shfl_sync(kAll, rhs, k) * inverse;
        rhs = mine ? top : rhs - factor * top;
    }
    __syncwarp();
    if (lane < n) {
        diagonal[lane] = entry;
        if (b) b[lane] = rhs;
    }
    __syncwarp();
    return positive;
}

}  // namespace deqfast::cuda
