#pragma once
// One register of floats of the instruction set that the including file is compiled for.
//
// Included by leaf kernels only. Everything is in an unnamed namespace and free of the standard library:
// a function template instantiated here with AVX-512 flags and merged by the linker with a portable file's
// instance would crash on a processor without AVX-512.

#include <cstdint>

#include "bfloat16.hpp"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)

struct Vector {
    static constexpr std::int64_t width = 16;
    static constexpr int registers = 32;
    __m512 lanes;

    static Vector zero() { return {_mm512_setzero_ps()}; }
    static Vector load(const float *from) { return {_mm512_loadu_ps(from)}; }
    static Vector load(const weft::Bfloat16 *from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
    }
    // The first `count` floats (0 <= count < width), zero in the other lanes.
    static Vector load_first(const float *from, std::int64_t count) {
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from)};
    }
    // Pairs of halves under a mask, as halves by themselves would need more than the base of AVX-512; then the odd one.
    static Vector load_first(const weft::Bfloat16 *from, std::int64_t count) {
        const __m256i pairs = _mm256_maskz_loadu_epi32(static_cast<__mmask8>((1u << count / 2) - 1u), from);
        __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(pairs), 16);
        if (count % 2 != 0)
            bits = _mm512_mask_set1_epi32(bits, static_cast<__mmask16>(1u << (count - 1)),
                                          static_cast<int>(std::uint32_t{from[count - 1].bits} << 16));
        return {_mm512_castsi512_ps(bits)};
    }
    static Vector fill(float value) { return {_mm512_set1_ps(value)}; }
    void store(float *to) const { _mm512_storeu_ps(to, lanes); }
    void store_first(float *to, std::int64_t count) const {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), lanes);
    }
    Vector add(Vector other) const { return {_mm512_add_ps(lanes, other.lanes)}; }
    // this + a * b
    Vector add_product(Vector a, Vector b) const { return {_mm512_fmadd_ps(a.lanes, b.lanes, lanes)}; }
    float sum() const { return _mm512_reduce_add_ps(lanes); }
};

inline __m256 fold(Vector v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v.lanes),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.lanes), 1)));
}

#elif defined(__AVX2__)

struct Vector {
    static constexpr std::int64_t width = 8;
    static constexpr int registers = 16;
    __m256 lanes;

    static Vector zero() { return {_mm256_setzero_ps()}; }
    static Vector load(const float *from) { return {_mm256_loadu_ps(from)}; }
    static Vector load(const weft::Bfloat16 *from) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
    }
    static Vector load_first(const float *from, std::int64_t count) {
        return {_mm256_maskload_ps(from, first(count))};
    }
    // Pairs of halves under a mask, then the odd one.
    static Vector load_first(const weft::Bfloat16 *from, std::int64_t count) {
        const __m128i lane = _mm_setr_epi32(0, 1, 2, 3);
        const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count / 2)), lane);
        const __m128i pairs = _mm_maskload_epi32(reinterpret_cast<const int *>(from), mask);
        __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(pairs), 16);
        if (count % 2 != 0) {
            const __m256i odd = _mm256_andnot_si256(first(count - 1), first(count));
            const int last = static_cast<int>(std::uint32_t{from[count - 1].bits} << 16);
            bits = _mm256_or_si256(bits, _mm256_and_si256(odd, _mm256_set1_epi32(last)));
        }
        return {_mm256_castsi256_ps(bits)};
    }
    static Vector fill(float value) { return {_mm256_set1_ps(value)}; }
    void store(float *to) const { _mm256_storeu_ps(to, lanes); }
    void store_first(float *to, std::int64_t count) const { _mm256_maskstore_ps(to, first(count), lanes); }
    Vector add(Vector other) const { return {_mm256_add_ps(lanes, other.lanes)}; }
    Vector add_product(Vector a, Vector b) const { return {_mm256_fmadd_ps(a.lanes, b.lanes, lanes)}; }
    float sum() const {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

private:
    static __m256i first(std::int64_t count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    }
};

inline __m256 fold(Vector v) { return v.lanes; }

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct Vector {
    static constexpr std::int64_t width = 4;
    static constexpr int registers = 32;
    float32x4_t lanes;

    static Vector zero() { return {vdupq_n_f32(0.0f)}; }
    static Vector load(const float *from) { return {vld1q_f32(from)}; }
    static Vector load(const weft::Bfloat16 *from) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t *>(from)), 16))};
    }
    static Vector load_first(const float *from, std::int64_t count) {
        float first[width] = {};
        for (std::int64_t i = 0; i < count; ++i) first[i] = from[i];
        return load(first);
    }
    static Vector load_first(const weft::Bfloat16 *from, std::int64_t count) {
        weft::Bfloat16 first[width] = {};
        for (std::int64_t i = 0; i < count; ++i) first[i] = from[i];
        return load(first);
    }
    static Vector fill(float value) { return {vdupq_n_f32(value)}; }
    void store(float *to) const { vst1q_f32(to, lanes); }
    void store_first(float *to, std::int64_t count) const {
        float all[width];
        store(all);
        for (std::int64_t i = 0; i < count; ++i) to[i] = all[i];
    }
    Vector add(Vector other) const { return {vaddq_f32(lanes, other.lanes)}; }
    Vector add_product(Vector a, Vector b) const { return {vfmaq_f32(lanes, a.lanes, b.lanes)}; }
    float sum() const { return vaddvq_f32(lanes); }
};

#else

struct Vector {
    static constexpr std::int64_t width = 4;
    static constexpr int registers = 16;
    float lanes[width];

    static Vector zero() { return {}; }
    static Vector load(const float *from) { return load_first(from, width); }
    static Vector load(const weft::Bfloat16 *from) {
        Vector result = {};
        for (std::int64_t i = 0; i < width; ++i) result.lanes[i] = weft::widened(from[i]);
        return result;
    }
    static Vector load_first(const float *from, std::int64_t count) {
        Vector result = {};
        for (std::int64_t i = 0; i < count; ++i) result.lanes[i] = from[i];
        return result;
    }
    static Vector load_first(const weft::Bfloat16 *from, std::int64_t count) {
        Vector result = {};
        for (std::int64_t i = 0; i < count; ++i) result.lanes[i] = weft::widened(from[i]);
        return result;
    }
    static Vector fill(float value) {
        Vector result = {};
        for (std::int64_t i = 0; i < width; ++i) result.lanes[i] = value;
        return result;
    }
    void store(float *to) const { store_first(to, width); }
    void store_first(float *to, std::int64_t count) const {
        for (std::int64_t i = 0; i < count; ++i) to[i] = lanes[i];
    }
    Vector add(Vector other) const {
        for (std::int64_t i = 0; i < width; ++i) other.lanes[i] += lanes[i];
        return other;
    }
    Vector add_product(Vector a, Vector b) const {
        Vector result = *this;
        for (std::int64_t i = 0; i < width; ++i) result.lanes[i] += a.lanes[i] * b.lanes[i];
        return result;
    }
    float sum() const { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
};

#endif

// Asks for the line of the cache that an address lies in, which need not be one that may be read: of weights, which
// a product reads once. They are not to push out of the larger caches what the calls in between need, Python's own
// data above all; products of 1 MB that are called in a loop gain 6 to 10 % by that.
inline void fetch_ahead(const void *at) {
#if defined(__AVX2__) || defined(__AVX512F__)
    _mm_prefetch(static_cast<const char *>(at), _MM_HINT_NTA);
#elif defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(at, 0, 0);
#else
    (void)at;
#endif
}

// The sums of four vectors, plus `bias[0..3]` where there is one, stored in out[0..3].
inline void store_four_sums(Vector a, Vector b, Vector c, Vector d, const float *bias, float *out) {
#if defined(__AVX2__) || defined(__AVX512F__)
    const __m256 ab = _mm256_hadd_ps(fold(a), fold(b));
    const __m256 cd = _mm256_hadd_ps(fold(c), fold(d));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    if (bias != nullptr) sums = _mm_add_ps(sums, _mm_loadu_ps(bias));
    _mm_storeu_ps(out, sums);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    float32x4_t sums = vpaddq_f32(vpaddq_f32(a.lanes, b.lanes), vpaddq_f32(c.lanes, d.lanes));
    if (bias != nullptr) sums = vaddq_f32(sums, vld1q_f32(bias));
    vst1q_f32(out, sums);
#else
    const float sums[4] = {a.sum(), b.sum(), c.sum(), d.sum()};
    for (int i = 0; i < 4; ++i) out[i] = bias != nullptr ? sums[i] + bias[i] : sums[i];
#endif
}

}  // namespace
