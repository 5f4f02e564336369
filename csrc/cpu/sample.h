// Reading f's output and the iterates of one sample, block by block, and putting a stopped sample to rest.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>

#include "deqfast/measure.h"
#include "simd.h"

namespace deqfast::cpu::DEQFAST_ISA {

inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class Use>
inline decltype(auto) with_type(DType dtype, Use&& use) {
    switch (dtype) {
        case DType::f64:
            return use(double{});
        case DType::f32:
            return use(float{});
        case DType::bf16:
            return use(Bf16{});
        case DType::f16:
            return use(F16{});
        default:
            return use(int8_t{});
    }
}

inline int64_t size_of(DType dtype) {
    return with_type(dtype, [](auto type) -> int64_t { return sizeof(type); });
}

template <class A>
constexpr DType kDTypeOf = sizeof(A) == 8 ? DType::f64 : DType::f32;

// A float state is never read from doubles: the layout check upstream lets f be narrower, not wider.
template <class A, class T>
constexpr bool kReadable = sizeof(T) <= sizeof(A) && sizeof(T) > 1;

// `count` numbers of a row that starts at `row`, from number n on, as A: in place when they are, else in `buffer`.
template <class A>
inline const A* read_block(const void* row, DType dtype, int64_t n, int64_t count, A* buffer) {
    if (dtype == kDTypeOf<A>) return static_cast<const A*>(row) + n;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (kReadable<A, T>) {
            const T* p = static_cast<const T*>(row) + n;
            for_registers<A>(count, [&](int64_t i, auto part) { write(buffer + i, load<A>(p + i, part)); });
        }
    });
    return buffer;
}

// The same through strides: the multi-index of number n, then a walk with carries.
template <class A>
__attribute__((noinline)) inline void gather_block(const Source& s, const char* row, int64_t n, int64_t count,
                                                   A* buffer) {
    int64_t index[kMaxDims];
    int64_t offset = 0;
    for (int d = s.ndim - 1; d >= 0; --d) {
        index[d] = n % s.size[d];
        n /= s.size[d];
        offset += index[d] * s.stride[d];
    }
    with_type(s.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (kReadable<A, T>) {
            const T* p = reinterpret_cast<const T*>(row);
            const int last = s.ndim - 1;
            for (int64_t i = 0; i < count;) {
                const int64_t run = std::min(count - i, s.size[last] - index[last]);
                for (int64_t k = 0; k < run; ++k, offset += s.stride[last]) {
                    T part[kLanes<A>] = {p[offset]};
                    buffer[i + k] = Codec<A, T>::load(part)[0];
                }
                i += run;
                index[last] += run;
                for (int d = last; d > 0 && index[d] == s.size[d]; --d) {
                    offset += s.stride[d - 1] - s.size[d] * s.stride[d];
                    index[d] = 0;
                    ++index[d - 1];
                }
            }
        }
    });
}

template <class A>
inline const A* read_source(const Source& s, int64_t sample_row, int64_t n, int64_t count, A* buffer) {
    const char* row = static_cast<const char*>(s.data) + sample_row * s.batch_stride * size_of(s.dtype);
    if (s.dense) return read_block(static_cast<const void*>(row), s.dtype, n, count, buffer);
    gather_block(s, row, n, count, buffer);
    return buffer;
}

inline char* row_of(void* base, const SolveArgs& a, const Leaf& leaf, int64_t b) {
    return static_cast<char*>(base) + b * leaf.n * size_of(a.dtype);
}

inline int64_t f_row(const SolveArgs& a, int64_t b) { return a.f_rows ? a.f_rows[b] : b; }
inline int64_t f_prev_row(const SolveArgs& a, int64_t b) { return a.f_prev_rows ? a.f_prev_rows[b] : b; }

// Round `count` numbers into the state's type; true if every one is finite there.
template <class A>
inline bool write_block(void* row, DType dtype, int64_t n, int64_t count, const A* from) {
    return with_type(dtype, [&](auto type) -> bool {
        using T = decltype(type);
        if constexpr (sizeof(T) > 1 && sizeof(T) <= sizeof(A)) {
            constexpr double largest = sizeof(T) == 8                ? 0x1.fffffffffffffp1023
                                       : sizeof(T) == 4              ? 0x1.fffffep127
                                       : std::is_same<T, F16>::value ? 65519.99609375  // 65520 rounds to infinity
                                                                     : 0x1.fefffep127;
            T* p = static_cast<T*>(row) + n;
            auto bad = Vec<A>{} != Vec<A>{};
            for_registers<A>(count, [&](int64_t i, auto part) {
                const Vec<A> v = load<A>(from + i, part);
                bad |= ~(absolute(v) <= A(largest));
                store<A>(p + i, v, part);
            });
            return !any(bad);
        }
        return false;
    });
}

// use(sample, leaf, first number, index of the chunk) for every chunk of every running sample, over threads.
template <class Use>
inline void over_chunks(const SolveArgs& a, Use&& use) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
    for (int64_t unit = 0; unit < a.B * a.chunks; ++unit) {
        const int64_t b = unit / a.chunks;
        if (a.at(kStatus, b) != kRunning) continue;
        int64_t rest = unit % a.chunks;
        int l = 0;
        for (; rest >= chunks_of(a.leaves[l].n); ++l) rest -= chunks_of(a.leaves[l].n);
        use(b, l, rest * kChunk, unit);
    }
}

// Adds squares of `count` numbers, eight sums side by side.
template <class A>
inline void add_squares(const A* p, int64_t count, double (&parts)[8]) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; ++k) parts[k] += double(p[i + k]) * double(p[i + k]);
    for (; i < count; ++i) parts[i & 7] += double(p[i]) * double(p[i]);
}

// Norms of f and of f - x, or of the caller's own residual, in double: no square of a finite float overflows or
// vanishes there.
template <class A>
__attribute__((noinline)) void scan_norms(const SolveArgs& a, int64_t b, A* buffers, double* f_norm, double* g_norm) {
    double ff = 0, gg = 0;
    for (int l = 0; l < a.n_leaves; ++l) {
        const Leaf& leaf = a.leaves[l];
        for (int64_t n = 0; n < leaf.n; n += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, leaf.n - n);
            const A* f = read_source(leaf.f, f_row(a, b), n, count, buffers);
            const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, n, count, buffers + kBlock);
            double f_part[8] = {}, g_part[8] = {};
            int64_t i = 0;
            for (; i + 8 <= count; i += 8)
                for (int k = 0; k < 8; ++k) {
                    const double fi = f[i + k], gi = fi - x[i + k];
                    f_part[k] += fi * fi;
                    g_part[k] += gi * gi;
                }
            for (; i < count; ++i) {
                const double fi = f[i], gi = fi - x[i];
                f_part[i & 7] += fi * fi;
                g_part[i & 7] += gi * gi;
            }
            for (int k = 0; k < 8; ++k) ff += f_part[k], gg += g_part[k];
        }
    }
    if (a.own) {
        double parts[8] = {};
        add_squares(static_cast<const A*>(a.own) + b * a.own_n, a.own_n, parts);
        gg = 0;
        for (double part : parts) gg += part;
    }
    *f_norm = std::sqrt(ff);
    *g_norm = std::sqrt(gg);
}

// Norms from the products in the sample's unit, or measured directly where the unit does not fit; then the verdict.
template <class A>
inline Verdict judge(const SolveArgs& a, int64_t b, double ff, double gg, A* buffers) {
    const double unit = double(a.at<A>(kUnit, b));
    double f_norm, g_norm;
    if (needs_scan(unit, ff, gg, a.total())) {
        if (a.squares) {
            f_norm = std::sqrt(a.squares[2 * b]);
            g_norm = std::sqrt(a.squares[2 * b + 1]);
        } else {
            scan_norms(a, b, buffers, &f_norm, &g_norm);
        }
    } else {
        f_norm = std::sqrt(ff) / unit;
        g_norm = std::sqrt(gg) / unit;
    }
    return measure<A>(a, b, f_norm, g_norm);
}

// Keep the best iterate before it is overwritten; for a stopped sample put its answer into both buffers.
inline void spill_and_rest(const SolveArgs& a, int64_t b, const Verdict& v) {
    for (int l = 0; l < a.n_leaves; ++l) {
        const Leaf& leaf = a.leaves[l];
        const size_t bytes = size_t(leaf.n) * size_of(a.dtype);
        if (!bytes) continue;  // and perhaps no address
        char *x = row_of(leaf.x, a, leaf, b), *x_prev = row_of(leaf.x_prev, a, leaf, b);
        char* saved = row_of(leaf.saved, a, leaf, b);
        if (v.spill) std::memcpy(saved, x_prev, bytes);
        if (v.going) continue;
        if (v.use_saved) std::memcpy(x, saved, bytes);
        std::memcpy(x_prev, x, bytes);
    }
}

inline void after_step(const SolveArgs& a, int64_t b) {
    int32_t& best_at = a.at(kBestAt, b);
    if (best_at == kCurrent) best_at = kPrevious;
}

}  // namespace deqfast::cpu::DEQFAST_ISA
