// Between rows, one a sample, and registers that hold the same number of kLanes samples. For samples of a few numbers
// this makes every sum over a sample a sum over registers, with no reduction inside one.
#pragma once

#include "simd.h"

namespace deqfast::cpu::DEQFAST_ISA {

constexpr int kStrip = 8;  // numbers transposed at a time

#if defined(__AVX512F__)
template <class T>
constexpr bool kShuffled = std::is_same<T, float>::value || std::is_same<T, Bf16>::value;

inline __m256 load_strip(const float* p, __mmask8 mask) { return _mm256_maskz_loadu_ps(mask, p); }
inline __m256 load_strip(const Bf16* p, __mmask8 mask) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, p)), 16));
}
inline void store_half_strip(float* p, __m128 v, __mmask8 mask) { _mm_mask_storeu_ps(p, mask, v); }
inline void store_half_strip(Bf16* p, __m128 v, __mmask8 mask) {
    _mm_mask_cvtepi32_storeu_epi16(p, mask, _mm_srli_epi32(_mm_castps_si128(v), 16));
}

// Sample order of the four 128-bit lanes: 0-3, 4-7, 8-11, 12-15.
template <class T>
inline void shuffle_in(const T* const* rows, int at, int width, Vec<float>* out) {
    const __mmask8 mask = __mmask8((1u << width) - 1);
    __m512 r[8], t[8], s[8];
    for (int i = 0; i < 8; ++i) {
        const int low = i < 4 ? i : i + 4;
        r[i] = _mm512_insertf32x8(_mm512_castps256_ps512(load_strip(rows[low] + at, mask)),
                                  load_strip(rows[low + 4] + at, mask), 1);
    }
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        s[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        s[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        s[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        s[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int k = 0; k < 4; ++k) {
        write(out + k, _mm512_shuffle_f32x4(s[k], s[k + 4], 0x88));
        write(out + k + 4, _mm512_shuffle_f32x4(s[k], s[k + 4], 0xdd));
    }
}

template <class T>
inline void shuffle_out(T* const* rows, int at, int width, const Vec<float>* in) {
    for (int half = 0; half < 2 && width > 4 * half; ++half) {
        const int left = width - 4 * half;
        const __mmask8 mask = __mmask8(left >= 4 ? 15 : (1u << left) - 1);
        __m512 v[4], q[4];
        for (int k = 0; k < 4; ++k) v[k] = read<__m512>(in + 4 * half + k);
        const __m512 a0 = _mm512_unpacklo_ps(v[0], v[1]), a1 = _mm512_unpackhi_ps(v[0], v[1]);
        const __m512 b0 = _mm512_unpacklo_ps(v[2], v[3]), b1 = _mm512_unpackhi_ps(v[2], v[3]);
        q[0] = _mm512_shuffle_ps(a0, b0, 0x44);
        q[1] = _mm512_shuffle_ps(a0, b0, 0xee);
        q[2] = _mm512_shuffle_ps(a1, b1, 0x44);
        q[3] = _mm512_shuffle_ps(a1, b1, 0xee);
        for (int i = 0; i < 4; ++i) {
            store_half_strip(rows[i] + at + 4 * half, _mm512_castps512_ps128(q[i]), mask);
            store_half_strip(rows[4 + i] + at + 4 * half, _mm512_extractf32x4_ps(q[i], 1), mask);
            store_half_strip(rows[8 + i] + at + 4 * half, _mm512_extractf32x4_ps(q[i], 2), mask);
            store_half_strip(rows[12 + i] + at + 4 * half, _mm512_extractf32x4_ps(q[i], 3), mask);
        }
    }
}
#else
template <class T>
constexpr bool kShuffled = false;
#endif

// Numbers [at, at + width), width <= kStrip, of kLanes rows: out[k] holds number at + k of every sample.
template <class A, class T>
inline void transpose_in(const T* const* rows, int at, int width, Vec<A>* out) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4 && kShuffled<T>) return shuffle_in(rows, at, width, out);
#endif
    A part[kStrip][kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i)
        for (int k = 0; k < width; ++k) {
            T one[kLanes<A>] = {rows[i][at + k]};
            part[k][i] = Codec<A, T>::load(one)[0];
        }
    for (int k = 0; k < width; ++k) out[k] = read<Vec<A>>(part[k]);
}

// The way back; the numbers must already be such that T holds them.
template <class A, class T>
inline void transpose_out(T* const* rows, int at, int width, const Vec<A>* in) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4 && kShuffled<T>) return shuffle_out(rows, at, width, in);
#endif
    T part[kStrip][kLanes<A>];
    for (int k = 0; k < width; ++k) Codec<A, T>::store(part[k], in[k]);
    for (int i = 0; i < kLanes<A>; ++i)
        for (int k = 0; k < width; ++k) rows[i][at + k] = part[k][i];
}

}  // namespace deqfast::cpu::DEQFAST_ISA
