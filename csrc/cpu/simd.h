// One vector register of the instruction set this file is compiled for, and the conversions between it and every type
// that a state or a history is stored in. Everything is a plain vector type of the compiler; intrinsics stand only
// where it would not find the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push  // GCC 12's own header, inlined: _mm512_undefined_ps() looks uninitialised to it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "deqfast/args.h"

namespace deqfast::cpu::DEQFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class T, int lanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class T>
inline T read(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}
template <class T>
inline void write(void* p, const T& value) {
    std::memcpy(p, &value, sizeof(T));
}

inline float float_of(uint32_t bits) { return read<float>(&bits); }
inline uint32_t bits_of(float value) { return read<uint32_t>(&value); }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        const float magnitude = float(fraction) * 0x1p-24f;
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return uint16_t(sign | rounded);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

// Conversions between a register of A and kLanes<A> stored numbers of type T.
template <class A, class T>
struct Codec;

template <class A>
struct Codec<A, A> {
    static Vec<A> load(const A* p) { return read<Vec<A>>(p); }
    static void store(A* p, Vec<A> v) { write(p, v); }
};

template <class A>
using FloatVec = typename VectorOf<float, kLanes<A>>::type;

template <>
struct Codec<double, float> {
    static Vec<double> load(const float* p) { return __builtin_convertvector(read<FloatVec<double>>(p), Vec<double>); }
    static void store(float* p, Vec<double> v) { write(p, __builtin_convertvector(v, FloatVec<double>)); }
};

template <class A>
struct Codec<A, Bf16> {
    using U16 = typename VectorOf<uint16_t, kLanes<A>>::type;
    using U32 = typename VectorOf<uint32_t, kLanes<A>>::type;
    static Vec<A> load(const Bf16* p) {
        const U32 wide = __builtin_convertvector(read<U16>(p), U32) << 16;
        return __builtin_convertvector(read<FloatVec<A>>(&wide), Vec<A>);
    }
    static void store(Bf16* p, Vec<A> v) {
        const FloatVec<A> narrow = __builtin_convertvector(v, FloatVec<A>);
        const U32 bits = read<U32>(&narrow);
        const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        write(p, __builtin_convertvector(rounded, U16));
    }
};

template <class A>
struct Codec<A, F16> {
    static Vec<A> load(const F16* p) {
        FloatVec<A> wide;
#if defined(__AVX512F__)
        if constexpr (kLanes<A> == 16)
            write(&wide, _mm512_cvtph_ps(read<__m256i>(p)));
        else
            write(&wide, _mm256_cvtph_ps(read<__m128i>(p)));
#elif defined(__AVX2__)
        if constexpr (kLanes<A> == 8)
            write(&wide, _mm256_cvtph_ps(read<__m128i>(p)));
        else
            write(&wide, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
        for (int i = 0; i < kLanes<A>; ++i) wide[i] = half_to_float(p[i].bits);
#endif
        return __builtin_convertvector(wide, Vec<A>);
    }
    static void store(F16* p, Vec<A> v) {
        const FloatVec<A> narrow = __builtin_convertvector(v, FloatVec<A>);
#if defined(__AVX512F__)
        if constexpr (kLanes<A> == 16)
            write(p, _mm512_cvtps_ph(read<__m512>(&narrow), _MM_FROUND_TO_NEAREST_INT));
        else
            write(p, _mm256_cvtps_ph(read<__m256>(&narrow), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
        if constexpr (kLanes<A> == 8)
            write(p, _mm256_cvtps_ph(read<__m256>(&narrow), _MM_FROUND_TO_NEAREST_INT));
        else
            write(p, _mm_cvtsi128_si64(_mm_cvtps_ph(read<__m128>(&narrow), _MM_FROUND_TO_NEAREST_INT)));
#else
        for (int i = 0; i < kLanes<A>; ++i) p[i].bits = float_to_half(narrow[i]);
#endif
    }
};

template <class A>
struct Codec<A, int8_t> {
    using I8 = typename VectorOf<int8_t, kLanes<A>>::type;
    using I32 = typename VectorOf<int32_t, kLanes<A>>::type;
    static Vec<A> load(const int8_t* p) {
        const I32 wide = __builtin_convertvector(read<I8>(p), I32);
        return __builtin_convertvector(__builtin_convertvector(wide, FloatVec<A>), Vec<A>);
    }
    // Rounds half to even, as adding 1.5 * 2^23 does for magnitudes below 2^22, and clamps to +-127.
    static void store(int8_t* p, Vec<A> v) {
        const FloatVec<A> narrow = __builtin_convertvector(v, FloatVec<A>);
        const FloatVec<A> shifted = narrow + 0x1.8p23f;
        I32 code = read<I32>(&shifted) - 0x4b400000;
        code = code > 127 ? 127 + I32{} : code;
        code = code < -127 ? -127 + I32{} : code;
        write(p, __builtin_convertvector(code, I8));
    }
};

// The first n < kLanes<A> numbers, the rest zero; never touches memory beyond them.
template <class A, class T>
inline Vec<A> load_some(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4 && sizeof(A) == 4) {
        const __m512 part = _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
        return read<Vec<A>>(&part);
    } else if constexpr (sizeof(T) == 2) {
        alignas(64) T part[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
        return Codec<A, T>::load(part);
    }
#endif
    T part[kLanes<A>] = {};
    std::memcpy(part, p, size_t(n) * sizeof(T));
    return Codec<A, T>::load(part);
}

template <class A, class T>
inline void store_some(T* p, Vec<A> v, int n) {
    T part[kLanes<A>];
    Codec<A, T>::store(part, v);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}

// Loops over `count` numbers, a register at a time: body(first number, Whole), and for the rest body(first, Part).
struct Whole {};
struct Part {
    int count;
};
template <class A, class Body>
inline void for_registers(int64_t count, Body&& body) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) body(i, Whole{});
    if (i < count) body(i, Part{int(count - i)});
}
template <class A, class T>
inline Vec<A> load(const T* p, Whole) {
    return Codec<A, T>::load(p);
}
template <class A, class T>
inline Vec<A> load(const T* p, Part part) {
    return load_some<A, T>(p, part.count);
}
template <class A, class T>
inline void store(T* p, Vec<A> v, Whole) {
    Codec<A, T>::store(p, v);
}
template <class A, class T>
inline void store(T* p, Vec<A> v, Part part) {
    store_some<A, T>(p, v, part.count);
}

template <class A>
inline A sum_lanes(Vec<A> v) {
    for (int half = kLanes<A> / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}
#if defined(__AVX512F__)
template <>
inline float sum_lanes<float>(Vec<float> v) {
    const __m512 r = read<__m512>(&v);
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
#endif

template <class V>
inline V absolute(V v) {
    return v < 0 ? -v : v;
}
template <class M, class V>
inline V select(M mask, V a, V b) {
    return mask ? a : b;
}
template <class M>
inline bool any(M mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(M) == 64) return _mm512_test_epi32_mask(read<__m512i>(&mask), read<__m512i>(&mask)) != 0;
#endif
    for (int i = 0; i < int(sizeof(M) / sizeof(mask[0])); ++i)
        if (mask[i]) return true;
    return false;
}

// One bit a lane.
template <class M>
inline uint32_t bits(M mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(M) == 64 && sizeof(mask[0]) == 4) return _mm512_movepi32_mask(read<__m512i>(&mask));
    if constexpr (sizeof(M) == 64 && sizeof(mask[0]) == 8) return _mm512_movepi64_mask(read<__m512i>(&mask));
#endif
    uint32_t set = 0;
    for (int i = 0; i < int(sizeof(M) / sizeof(mask[0])); ++i) set |= uint32_t(mask[i] != 0) << i;
    return set;
}

// What dense.h asks of a lane type.
struct LaneOps {
    template <class V>
    static V absolute(V v) {
        return DEQFAST_ISA::absolute(v);
    }
    template <class V>
    static auto greater(V a, V b) {
        return a > b;
    }
    template <class V>
    static auto equal(V a, V b) {
        return a == b;
    }
    template <class M, class V>
    static V select(M mask, V a, V b) {
        return mask ? a : b;
    }
    template <class M>
    static bool any(M mask) {
        return DEQFAST_ISA::any(mask);
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
