/* Decoding with AVX2: both bytes of a bfloat16 are looked up among 16, by the lower four bits of
 * the code, in one of two tables, by the upper bit of the exponent. */
#ifndef CORE_FP6_DECODE_AVX2_H
#define CORE_FP6_DECODE_AVX2_H

#include <immintrin.h>

static inline int position_of(int column) {
    int b = column / 16, e = column / 8 % 2, q = column % 8 / 2, h = column % 2;
    return 32 * (b / 2) + 16 * (q / 2) + 8 * e + 4 * (q % 2) + 2 * (b % 2) + h;
}

static inline __m256i table_of(const uint8_t *bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
}

static inline void put_floats(__m256i pairs, floats out[2]) {
    out[0] = (floats)_mm256_slli_epi32(pairs, 16);
    out[1] = (floats)_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000));
}

static inline void decode_block(const struct codes *codes, const uint8_t *low, const uint8_t *high,
                                floats out[BLOCK / LANES]) {
    __m256i tables[2][2], nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8((char)128);
    for (int half = 0; half < 2; half++)
        for (int top = 0; top < 2; top++)
            tables[half][top] = table_of(codes->halves[half] + 16 * top);
    for (int part = 0; part < 4; part++) {
        /* A bit becomes the uppermost of its byte. */
        __m128i to_sign = _mm_cvtsi32_si128(7 - codes->sign[part]);
        __m128i to_top = _mm_cvtsi32_si128(7 - codes->top[part]);
        __m128i to_lower = _mm_cvtsi32_si128(part / 2 * 4);
        for (int at = 0; at < PART; at += 32, out += 2) {
            const uint8_t *from = low + PART * (part % 2) + at;
            __m256i lower = _mm256_loadu_si256((const __m256i *)from), bytes[2];
            __m256i upper = _mm256_loadu_si256((const __m256i *)(high + at));
            __m256i top = _mm256_sll_epi16(upper, to_top);
            lower = _mm256_and_si256(_mm256_srl_epi16(lower, to_lower), nibble);
            for (int half = 0; half < 2; half++)
                bytes[half] = _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[half][0], lower),
                                                 _mm256_shuffle_epi8(tables[half][1], lower), top);
            upper = _mm256_and_si256(_mm256_sll_epi16(upper, to_sign), sign);
            bytes[1] = _mm256_or_si256(bytes[1], upper);
            put_floats(_mm256_unpacklo_epi8(bytes[0], bytes[1]), out);
            put_floats(_mm256_unpackhi_epi8(bytes[0], bytes[1]), out + 4);
        }
        out += 4;
    }
}

#endif
