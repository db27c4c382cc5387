/* Vectors of floats as this processor has them, and what makes them of rows in memory.
 *
 * Everything else is written with the vector types of GCC and Clang, which know the operators. */
#ifndef CORE_SPLITFUSE_LANES_H
#define CORE_SPLITFUSE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, STRIP = 4 };
#elif defined(__AVX2__)
enum { LANES = 8, STRIP = 2 };
#else
enum { LANES = 4, STRIP = 2 };
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE floats all(float value) { return (floats){0} + value; }

INLINE floats get(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void put(float *to, floats values) { memcpy(to, &values, sizeof values); }

/* That of `yes` in the lanes where `where` is all ones, else that of `no`. */
INLINE floats either(ints where, floats yes, floats no) {
    return (floats)(((ints)yes & where) | ((ints)no & ~where));
}

INLINE floats larger(floats a, floats b) { return either(a > b, a, b); }

INLINE float largest(floats values) {
    float found = values[0];
    for (int lane = 1; lane < LANES; lane++) found = values[lane] > found ? values[lane] : found;
    return found;
}

INLINE float sum(floats values) {
    float found = 0;
    for (int lane = 0; lane < LANES; lane++) found += values[lane];
    return found;
}

INLINE const char *element(const void *row, int64_t index, const int single) {
    return (const char *)row + index * (single ? 4 : 2);
}

/* The elements of a row from `index` on. */
INLINE floats load(const void *row, int64_t index, const int single) {
    const char *from = element(row, index, single);
    if (single) return get((const float *)from);
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return (floats)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return (floats)_mm256_slli_epi32(wide, 16);
#else
    halves bits;
    memcpy(&bits, from, sizeof bits);
    ints wide = __builtin_convertvector(bits, ints) << 16;
    return (floats)wide;
#endif
}

/* The same where only some are left; the others are zeros. */
INLINE floats load_some(const void *row, int64_t index, int64_t count, const int single) {
#if defined(__AVX512F__)
    const char *from = element(row, index, single);
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    if (single) return (floats)_mm512_maskz_loadu_ps(mask, from);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return (floats)_mm512_slli_epi32(wide, 16);
#else
    float filled[LANES] = {0};
    memcpy(filled, element(row, index, single), (size_t)count * (single ? 4 : 2));
    return load(filled, 0, single);
#endif
}

/* The sum of each of as many vectors as there are lanes; all are added up in the same order. */
INLINE floats sums_of(const floats of[LANES]) {
#if defined(__AVX512F__)
    __m512 pairs[8], fours[4];
    UNROLLED for (int each = 0; each < 8; each++) {
        __m512 a = (__m512)of[2 * each], b = (__m512)of[2 * each + 1];
        pairs[each] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    UNROLLED for (int each = 0; each < 4; each++) {
        __m512d a = (__m512d)pairs[2 * each], b = (__m512d)pairs[2 * each + 1];
        fours[each] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b),
                                    (__m512)_mm512_unpackhi_pd(a, b));
    }
    UNROLLED for (int each = 0; each < 4; each += 2)
        fours[each] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[each], fours[each + 1], 0x88),
                                    _mm512_shuffle_f32x4(fours[each], fours[each + 1], 0xDD));
    return (floats)_mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[2], 0x88),
                                 _mm512_shuffle_f32x4(fours[0], fours[2], 0xDD));
#elif defined(__AVX2__)
    __m256 fours[2];
    UNROLLED for (int each = 0; each < 2; each++) {
        const floats *four = of + 4 * each;
        fours[each] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)four[0], (__m256)four[1]),
                                     _mm256_hadd_ps((__m256)four[2], (__m256)four[3]));
    }
    return (floats)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                                 _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
    floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = sum(of[lane]);
    return found;
#endif
}

/* exp(x) for x <= 0, to two units in the last place; zero below -87. */
INLINE floats exponential(floats x) {
    ints tiny = x < -87.0f;
    x = either(tiny, all(-87.0f), x);
    floats shifted = x * 1.44269504f + 12582912.0f; /* its lowest bits are the rounded number */
    floats whole = shifted - 12582912.0f;
    floats rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    floats found = all(1.9875691500e-4f);
    found = found * rest + 1.3981999507e-3f;
    found = found * rest + 8.3334519073e-3f;
    found = found * rest + 4.1665795894e-2f;
    found = found * rest + 1.6666665459e-1f;
    found = found * rest + 5.0000001201e-1f;
    found = found * (rest * rest) + rest + 1.0f;
    ints power = ((ints)shifted - 0x4B400000 + 127) << 23;
    return either(tiny, all(0), found * (floats)power);
}

INLINE float exponential_of(float x) { return exponential(all(x))[0]; }

/* tanh(x), to a few units in the last place (the two ranges are those of Cephes). */
INLINE floats hyperbolic_tangent(floats x) {
    ints negative = (ints)x & (int32_t)0x80000000;
    floats size = (floats)((ints)x & 0x7FFFFFFF), square = x * x;
    floats power = exponential(size * -2.0f);
    floats far = (1.0f - power) / (1.0f + power);
    floats near = all(-5.70498872745e-3f);
    near = near * square + 2.06390887954e-2f;
    near = near * square + -5.37397155531e-2f;
    near = near * square + 1.33314422036e-1f;
    near = near * square + -3.33332819422e-1f;
    near = near * (square * size) + size;
    return (floats)((ints)either(size < 0.625f, near, far) | negative);
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#endif
