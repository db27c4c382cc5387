/* Few tokens: columns lie along the lanes of a register, and a row meets all tokens as it is
 * decoded. */
#include "avx512.h"

enum { ROWS_AT_ONCE = 16, AHEAD = 2048 };

/* The product of 32 weights, as decode() gives them. */
INLINE __m512 half_product(__m512 sum, __m512i weights, const char *x, const int single) {
    if (!single) return multiply(sum, weights, _mm512_loadu_si512(x), 0);
    sum = multiply(sum, even(weights), _mm512_loadu_si512(x), 1);
    return multiply(sum, odd(weights), _mm512_loadu_si512(x + 64), 1);
}

/* The scales of a block of a row; behind the last ones zeros. */
INLINE __m512 block_scales(const struct product *of, int64_t row, int64_t block) {
    int64_t groups = groups_of(of), here = BLOCK / of->group_size, begin = block * here;
    const uint16_t *scales = (const uint16_t *)of->scale + row * groups + begin;
    __mmask8 mask = (__mmask8)((1 << at_most(here, groups - begin)) - 1);
    __m256i bits = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, scales));
    return (__m512)_mm512_castsi256_si512(_mm256_slli_epi32(bits, 16));
}

/* Two parts; `step` columns (32, 64 or 128) meet a scale together, or all of a row (0). */
INLINE void span_products(const struct product *of, const struct decoder *decoder, int span,
                          const __m512i lows[2], __m512i high, __m512 scales, const char *x,
                          const int tokens, const int chains, const int single, const int step,
                          __m512 sums[FEW][4]) {
    const int half_bytes = HALF * bytes_of(single);
    __m512 grouped[FEW];
    __m512i weights[2] = {high, high};
    UNROLLED for (int half = 0; half < SPAN / HALF; half++) {
        const int part = half / 2, chain = (step ? HALF * half / step : half) % chains;
        if (half % 2 == 0)
            decode(decoder, lows[part], high, decoder->upper[2 * span + part], weights);
        UNROLLED for (int token = 0; token < tokens; token++) {
            const char *at = x + (token * SPAN / HALF + half) * half_bytes;
            __m512 *sum = &sums[token][chain];
            if (!step) {
                *sum = half_product(*sum, weights[half % 2], at, single);
                continue;
            }
            __m512 begin = HALF * half % step ? grouped[token] : _mm512_setzero_ps();
            grouped[token] = half_product(begin, weights[half % 2], at, single);
            if (HALF * (half + 1) % step == 0) {
                int group = (SPAN * span + HALF * half) / of->group_size;
                __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32(group), scales);
                *sum = _mm512_fmadd_ps(grouped[token], scale, *sum);
            }
        }
    }
}

INLINE void row_products(const struct product *of, const struct decoder *decoder, int64_t row,
                         const int tokens, const int single, const int step, float *out) {
    /* Enough sums that do not wait for each other. */
    const int chains = tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1;
    const int span_bytes = tokens * SPAN * bytes_of(single);
    int64_t blocks = blocks_of(of->columns);
    const uint8_t *low = of->low + row * blocks * LOW_BYTES;
    const uint8_t *high = of->high + row * blocks * HIGH_BYTES;
    const char *x = of->workspace;
    __m512 totals[FEW];
    UNROLLED for (int token = 0; token < tokens; token++) totals[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks;) {
        __m512 sums[FEW][4];
        UNROLLED for (int token = 0; token < tokens; token++)
            UNROLLED for (int chain = 0; chain < chains; chain++)
                sums[token][chain] = _mm512_setzero_ps();
        int64_t end = at_most(block + SUMMED_BLOCKS, blocks);
        for (; block < end; block++, low += LOW_BYTES, high += HIGH_BYTES) {
            __m512i lows[2] = {_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)};
            __m512i highs = _mm512_loadu_si512(high);
            _mm_prefetch(low + AHEAD, _MM_HINT_T0);
            _mm_prefetch(low + AHEAD + 64, _MM_HINT_T0);
            _mm_prefetch(high + AHEAD / 2, _MM_HINT_T0);
            __m512 scales = step ? block_scales(of, row, block) : _mm512_setzero_ps();
            for (int span = 0; span < BLOCK / SPAN; span++, x += span_bytes) {
                span_products(of, decoder, span, lows, highs, scales, x, tokens, chains, single,
                              step, sums);
                lows[0] = _mm512_srli_epi16(lows[0], 4);
                lows[1] = _mm512_srli_epi16(lows[1], 4);
            }
        }
        UNROLLED for (int token = 0; token < tokens; token++)
            UNROLLED for (int chain = 0; chain < chains; chain++)
                totals[token] = _mm512_add_ps(totals[token], sums[token][chain]);
    }
    UNROLLED for (int token = 0; token < tokens; token++)
        out[token * ROWS_AT_ONCE] = _mm512_reduce_add_ps(totals[token]);
}

INLINE void rows_products(const struct product *of, int64_t row, const int tokens,
                          const int single, const int step) {
    struct decoder decoder = decoder_of(of->codes);
    int64_t count = at_most(ROWS_AT_ONCE, of->rows - row);
    __mmask16 mask = first_of_16(count);
    float results[FEW][ROWS_AT_ONCE] = {{0}};
    for (int64_t each = 0; each < count; each++)
        row_products(of, &decoder, row + each, tokens, single, step, &results[0][each]);
    for (int64_t token = 0; token < of->tokens; token++) {
        __m512 sums = _mm512_loadu_ps(results[token]);
        if (!step) sums *= _mm512_maskz_loadu_ps(mask, (const float *)of->scale + row);
        store(of, token, row, mask, sums, single);
    }
}

INLINE void with_step(const struct product *of, int64_t row, const int single, const int step) {
    switch (padded_tokens(of->tokens)) {
        case 1: rows_products(of, row, 1, single, step); break;
        case 2: rows_products(of, row, 2, single, step); break;
        case 4: rows_products(of, row, 4, single, step); break;
        case 6: rows_products(of, row, 6, single, step); break;
        default: rows_products(of, row, 8, single, step);
    }
}

INLINE void with_type(const struct product *of, int64_t row, const int single) {
    switch (of->group_size) {
        case 0: with_step(of, row, single, 0); break;
        case 32: with_step(of, row, single, 32); break;
        case 64: with_step(of, row, single, 64); break;
        default: with_step(of, row, single, 128);
    }
}

void avx512_few(const void *product, int64_t index) {
    const struct product *of = product;
    if (of->single)
        with_type(of, index * ROWS_AT_ONCE, 1);
    else
        with_type(of, index * ROWS_AT_ONCE, 0);
}

int64_t avx512_few_count(const struct product *of) {
    return (of->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
}
