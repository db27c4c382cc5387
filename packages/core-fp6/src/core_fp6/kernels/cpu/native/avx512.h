/* What the kernels for AVX512-VBMI, GFNI and AVX512-BF16 have in common.
 *
 * A code is the index into tables of its bfloat16, low and high byte apart (vpermb). Codes are
 * exact in bfloat16, so bfloat16 activations are multiplied as they are (vdpbf16ps) and float ones
 * in float; scales meet the float sums. What is computed for a row and a token depends on nothing
 * else but the number of tokens, whoever computes it. */
#ifndef CORE_FP6_AVX512_H
#define CORE_FP6_AVX512_H

#include "product.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

enum { FEW = 8, SPAN = 128, HALF = 32 };

/* A span is what is unpacked from the same half of the bytes of the low plane: two parts. Its
 * activations follow each other, token by token: what is read together stands together, and not
 * at distances that share a place in the cache. */

INLINE int bytes_of(const int single) { return single ? 4 : 2; }

/* Tokens in the workspace; the last may be zeros. */
INLINE int64_t padded_tokens(int64_t tokens) {
    return tokens > 2 && tokens < FEW ? (tokens + 1) / 2 * 2 : tokens;
}

struct decoder {
    __m512i upper[4], lower_half, upper_half, nibble;
};

INLINE struct decoder decoder_of(const struct codes *codes) {
    struct decoder decoder;
    decoder.lower_half = _mm512_loadu_si512(codes->halves[0]);
    decoder.upper_half = _mm512_loadu_si512(codes->halves[1]);
    decoder.nibble = _mm512_set1_epi8(15);
    /* Bit i of a product with a matrix over GF(2) is made by byte 7-i of the matrix: the sign goes
     * to bit 5 and the top of the exponent to bit 4. */
    for (int part = 0; part < 4; part++)
        decoder.upper[part] = _mm512_set1_epi64((1LL << (codes->sign[part] + 16)) |
                                                (1LL << (codes->top[part] + 24)));
    return decoder;
}

/* 64 bfloat16: those of the lower 8 bytes of each 16, and those of the upper ones. The codes'
 * lower bits are in the lower half of the bytes of `low`. */
INLINE void decode(const struct decoder *decoder, __m512i low, __m512i high, __m512i upper,
                   __m512i out[2]) {
    __m512i top = _mm512_gf2p8affine_epi64_epi8(high, upper, 0);
    __m512i code = _mm512_ternarylogic_epi32(low, decoder->nibble, top, 0xEA);
    __m512i lower_half = _mm512_permutexvar_epi8(code, decoder->lower_half);
    __m512i upper_half = _mm512_permutexvar_epi8(code, decoder->upper_half);
    out[0] = _mm512_unpacklo_epi8(lower_half, upper_half);
    out[1] = _mm512_unpackhi_epi8(lower_half, upper_half);
}

/* Floats of the first and of the second of each pair of bfloat16. */
INLINE __m512i even(__m512i pairs) { return _mm512_slli_epi32(pairs, 16); }

INLINE __m512i odd(__m512i pairs) {
    return _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000));
}

INLINE __m512 multiply(__m512 sum, __m512i weight, __m512i x, const int single) {
    return single ? _mm512_fmadd_ps((__m512)weight, (__m512)x, sum)
                  : _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
}

INLINE __mmask16 first_of_16(int64_t count) {
    return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1);
}

INLINE void store(const struct product *of, int64_t token, int64_t row, __mmask16 mask,
                  __m512 sums, const int single) {
    int64_t at = token * of->rows + row;
    if (of->bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, of->bias + row));
    if (single)
        _mm512_mask_storeu_ps((float *)of->out + at, mask, sums);
    else
        _mm256_mask_storeu_epi16((uint16_t *)of->out + at, mask,
                                 (__m256i)_mm512_cvtneps_pbh(sums));
}

/* Work for run_parallel(): 16 rows with few tokens; 64 rows with many. */
void avx512_few(const void *product, int64_t index);
int64_t avx512_few_count(const struct product *of);
void avx512_many(const void *product, int64_t index);
int64_t avx512_many_count(const struct product *of);

#endif
