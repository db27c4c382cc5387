/* What is called from outside, and the order of activations. */
#include "avx512.h"

/* Where the kernels want each of 32 neighbouring columns, which stand at places of the layout:
 * along the lanes as decode() gives them, or pair by pair. */
static int wanted_place(int column, int few, int single) {
    int b = column / 16, e = column / 8 % 2, q = column % 8 / 2, h = column % 2;
    if (!few) return 16 * b + 4 * q + 2 * h + e;
    return single ? 16 * e + 4 * q + 2 * b + h : 8 * q + 4 * b + 2 * h + e;
}

struct order {
    uint32_t of_float[HALF];
    uint16_t of_bfloat16[HALF];
};

INLINE void arrange_half(const char *from, int64_t inside, char *to, const struct order *order,
                         const int single) {
    __mmask32 mask = inside >= HALF ? 0xFFFFFFFF : inside <= 0 ? 0 : (1u << inside) - 1;
    if (single) {
        __m512i first = _mm512_loadu_si512(order->of_float);
        __m512i second = _mm512_loadu_si512(order->of_float + 16);
        __m512 a = _mm512_maskz_loadu_ps((__mmask16)mask, from);
        __m512 b = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 64);
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, first, b));
        _mm512_storeu_ps(to + 64, _mm512_permutex2var_ps(a, second, b));
    } else {
        __m512i all = _mm512_maskz_loadu_epi16(mask, from);
        __m512i places = _mm512_loadu_si512(order->of_bfloat16);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, all));
    }
}

/* A span of all tokens, filled up with zeros. */
INLINE void arrange_span(const struct product *of, int64_t span, const int single) {
    const int size = bytes_of(single);
    int64_t inside = of->columns - span * SPAN, tokens = padded_tokens(of->tokens);
    struct order order;
    for (int column = 0; column < HALF; column++) {
        int place = wanted_place(column, of->tokens <= FEW, single);
        order.of_float[place] = (uint32_t)column;
        order.of_bfloat16[place] = (uint16_t)column;
    }
    for (int64_t token = 0; token < tokens; token++) {
        const char *from = (const char *)of->x + (token * of->columns + span * SPAN) * size;
        char *to = (char *)of->workspace + (span * tokens + token) * SPAN * size;
        for (int at = 0; at < SPAN; at += HALF) {
            int64_t left = token < of->tokens ? inside - at : 0;
            arrange_half(from + at * size, left, to + at * size, &order, single);
        }
    }
}

static void arrange(const void *product, int64_t span) {
    const struct product *of = product;
    if (of->single)
        arrange_span(of, span, 1);
    else
        arrange_span(of, span, 0);
}

int64_t core_fp6_workspace(const struct product *of) {
    return padded_tokens(of->tokens) * blocks_of(of->columns) * BLOCK * (of->single ? 4 : 2);
}

void core_fp6_linear(const struct product *of, int32_t threads) {
    int64_t spans = blocks_of(of->columns) * (BLOCK / SPAN);
    int few = of->tokens <= FEW;
    run_parallel(arrange, of, spans, few ? 1 : threads);
    if (few)
        run_parallel(avx512_few, of, avx512_few_count(of), threads);
    else
        run_parallel(avx512_many, of, avx512_many_count(of), threads);
}
