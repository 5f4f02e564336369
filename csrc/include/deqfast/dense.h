// Small dense solves, one system per lane. V is a number or a vector of numbers with +, -, *, /; Ops has the functions
// select(mask, a, b), absolute(a), greater(a, b), equal(a, b), any(mask): on a GPU V is a thread's own number, on a CPU
// a register.
// Matrices are row-major with row stride m; only the leading n x n part is used. A singular system yields numbers that
// are not finite: the caller looks.
#pragma once

namespace deqfast {

// Solves a y = b by LU with partial pivoting; y replaces b, a is destroyed.
template <class Ops, class V>
inline void solve_lu(V* a, V* b, int n, int m) {
    for (int k = 0; k < n; ++k) {
        V largest = Ops::absolute(a[k * m + k]);
        V pivot = V{} + float(k);
        for (int i = k + 1; i < n; ++i) {
            const V candidate = Ops::absolute(a[i * m + k]);
            const auto better = Ops::greater(candidate, largest);
            largest = Ops::select(better, candidate, largest);
            pivot = Ops::select(better, V{} + float(i), pivot);
        }
        for (int i = k + 1; i < n; ++i) {
            const auto swap = Ops::equal(pivot, V{} + float(i));
            if (!Ops::any(swap)) continue;
            for (int j = k; j < n; ++j) {
                const V upper = a[k * m + j], lower = a[i * m + j];
                a[k * m + j] = Ops::select(swap, lower, upper);
                a[i * m + j] = Ops::select(swap, upper, lower);
            }
            const V upper = b[k], lower = b[i];
            b[k] = Ops::select(swap, lower, upper);
            b[i] = Ops::select(swap, upper, lower);
        }
        const V inverse = 1.0f / a[k * m + k];
        for (int i = k + 1; i < n; ++i) {
            const V factor = a[i * m + k] * inverse;
            for (int j = k + 1; j < n; ++j) a[i * m + j] -= factor * a[k * m + j];
            b[i] -= factor * b[k];
        }
        a[k * m + k] = inverse;
    }
    for (int k = n - 1; k >= 0; --k) {
        V sum = b[k];
        for (int j = k + 1; j < n; ++j) sum -= a[k * m + j] * b[j];
        b[k] = sum * a[k * m + k];
    }
}

// Factors a symmetric positive definite a = L D L^T in its lower triangle: L below the diagonal, 1/D on it. Returns the
// lanes whose pivots were all positive.
template <class Ops, class V>
inline auto factor_ldl(V* a, int n, int m) {
    auto positive = Ops::greater(V{} + 1.0f, V{});
    for (int k = 0; k < n; ++k) {
        positive = positive & Ops::greater(a[k * m + k], V{});
        const V inverse = 1.0f / a[k * m + k];
        for (int i = k + 1; i < n; ++i) {
            const V factor = a[i * m + k] * inverse;
            for (int j = k + 1; j <= i; ++j) a[i * m + j] -= factor * a[j * m + k];
        }
        for (int i = k + 1; i < n; ++i) a[i * m + k] *= inverse;
        a[k * m + k] = inverse;
    }
    return positive;
}

template <class Ops, class V>
inline void solve_ldl(const V* a, V* b, int n, int m) {
    for (int i = 1; i < n; ++i)
        for (int j = 0; j < i; ++j) b[i] -= a[i * m + j] * b[j];
    for (int i = n - 1; i >= 0; --i) {
        V sum = b[i] * a[i * m + i];
        for (int j = i + 1; j < n; ++j) sum -= a[j * m + i] * b[j];
        b[i] = sum;
    }
}

// Diagonal of the inverse of a factored matrix: entry j is sum_i (L^-1)_ij^2 / D_i. `work` holds n numbers.
template <class Ops, class V>
inline void inverse_diagonal(const V* a, V* diagonal, V* work, int n, int m) {
    for (int j = 0; j < n; ++j) {
        V sum = a[j * m + j];
        for (int i = j + 1; i < n; ++i) {
            V value = -a[i * m + j];
            for (int k = j + 1; k < i; ++k) value -= a[i * m + k] * work[k];
            work[i] = value;
            sum += value * value * a[i * m + i];
        }
        diagonal[j] = sum;
    }
}

}  // namespace deqfast
