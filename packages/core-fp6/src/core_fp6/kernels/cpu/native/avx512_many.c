/* Many tokens: 64 rows of a block are decoded side by side, with rows along the lanes of a
 * register, and meet tiles of up to six tokens, whose sums fill the other registers. */
#include "avx512.h"

enum { PANEL = 64, VECTORS = 4, TILE = 6, TOKENS_AT_ONCE = 504 };

/* A panel has, for each span of columns and each 16 of its rows, the columns (float) or the pairs
 * of columns (bfloat16) one after the other, each with all 16 rows. */
INLINE char *panel_place(char *panel, int column, int vector, const int single) {
    int place = (column / SPAN * VECTORS + vector) * SPAN + column % SPAN;
    return panel + place * 16 * bytes_of(single);
}

INLINE void put(char *to, __m512i pairs, const int single) {
    if (single) {
        _mm512_store_si512(to, even(pairs));
        _mm512_store_si512(to + 64, odd(pairs));
    } else {
        _mm512_store_si512(to, pairs);
    }
}

/* 16 bytes of 16 rows: two of four rows, and two more of these, and so on in each register. */
INLINE void load_rows(const uint8_t *const rows[16], int at, __m512i out[4]) {
    __m512i all[4];
    UNROLLED for (int row = 0; row < 4; row++) {
        all[row] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(rows[row] + at)));
        UNROLLED for (int lane = 1; lane < 4; lane++)
            all[row] = _mm512_mask_broadcast_i32x4(
                all[row], (__mmask16)(15 << 4 * lane),
                _mm_loadu_si128((const __m128i *)(rows[4 * lane + row] + at)));
    }
    __m512i a = _mm512_unpacklo_epi16(all[0], all[2]), b = _mm512_unpacklo_epi16(all[1], all[3]);
    __m512i c = _mm512_unpackhi_epi16(all[0], all[2]), d = _mm512_unpackhi_epi16(all[1], all[3]);
    out[0] = _mm512_unpacklo_epi16(a, b);
    out[1] = _mm512_unpackhi_epi16(a, b);
    out[2] = _mm512_unpacklo_epi16(c, d);
    out[3] = _mm512_unpackhi_epi16(c, d);
}

INLINE void decode_16_rows(const struct decoder *decoder, const uint8_t *const lows[16],
                           const uint8_t *const highs[16], int vector, char *panel,
                           const int single) {
    const int pair_bytes = 32 * bytes_of(single);
    for (int piece = 0; piece < 4; piece++) {
        __m512i low[2][4], high[4], pairs[2];
        load_rows(lows, 16 * piece, low[0]);
        load_rows(lows, PART + 16 * piece, low[1]);
        load_rows(highs, 16 * piece, high);
        UNROLLED for (int b = 0; b < 4; b++)
            UNROLLED for (int part = 0; part < 4; part++) {
                __m512i bytes = low[part % 2][b];
                if (part >= 2) bytes = _mm512_srli_epi16(bytes, 4);
                decode(decoder, bytes, high[b], decoder->upper[part], pairs);
                char *to = panel_place(panel, PART * part + 16 * b + 4 * piece, vector, single);
                put(to, pairs[0], single);
                put(to + pair_bytes, pairs[1], single);
            }
    }
}

INLINE void decode_panel(const struct product *of, const struct decoder *decoder, int64_t row,
                         int64_t block, char *panel, const int single) {
    int64_t blocks = blocks_of(of->columns);
    for (int vector = 0; vector < VECTORS; vector++) {
        const uint8_t *lows[16], *highs[16];
        for (int each = 0; each < 16; each++) {
            int64_t place = at_most(row + 16 * vector + each, of->rows - 1) * blocks + block;
            lows[each] = of->low + place * LOW_BYTES;
            highs[each] = of->high + place * HIGH_BYTES;
        }
        decode_16_rows(decoder, lows, highs, vector, panel, single);
        for (int each = 0; each < 16; each++) {
            _mm_prefetch(lows[each] + LOW_BYTES, _MM_HINT_T0);
            _mm_prefetch(lows[each] + LOW_BYTES + 64, _MM_HINT_T0);
            _mm_prefetch(highs[each] + HIGH_BYTES, _MM_HINT_T0);
        }
    }
}

INLINE void multiply_tile(const int tokens, const int32_t *x, const char *panel, int columns,
                          const __m512 scales[VECTORS], __m512 *totals, const int single) {
    const int token_words = SPAN * bytes_of(single) / 4;
    __m512 sums[TILE][VECTORS];
    UNROLLED for (int token = 0; token < tokens; token++)
        UNROLLED for (int vector = 0; vector < VECTORS; vector++)
            sums[token][vector] = _mm512_setzero_ps();
    for (int step = 0; step < columns * bytes_of(single) / 4; step++, panel += 64) {
        /* Those of the next tile. */
        _mm_prefetch((const char *)(x + tokens * token_words) + 64 * step, _MM_HINT_T0);
        _mm_prefetch((const char *)(totals + tokens * VECTORS + step), _MM_HINT_T0);
        UNROLLED for (int token = 0; token < tokens; token++) {
            __m512i all = _mm512_set1_epi32(x[token * token_words + step]);
            UNROLLED for (int vector = 0; vector < VECTORS; vector++) {
                const char *from = panel + vector * SPAN * 16 * bytes_of(single);
                __m512i weights = _mm512_load_si512(from);
                sums[token][vector] = multiply(sums[token][vector], weights, all, single);
            }
        }
    }
    UNROLLED for (int token = 0; token < tokens; token++)
        UNROLLED for (int vector = 0; vector < VECTORS; vector++, totals++)
            *totals = _mm512_fmadd_ps(sums[token][vector], scales[vector], *totals);
}

INLINE void multiply_panel(const char *x, int64_t tokens, const char *panel, int columns,
                           const __m512 scales[VECTORS], __m512 *totals, const int single) {
    int64_t tiles = (tokens + TILE - 1) / TILE;
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t begin = tokens * tile / tiles, end = tokens * (tile + 1) / tiles;
        const int32_t *at = (const int32_t *)(x + begin * SPAN * bytes_of(single));
        __m512 *to = totals + begin * VECTORS;
        /* More than FEW tokens make tiles of four at least. */
        switch (end - begin) {
            case 4: multiply_tile(4, at, panel, columns, scales, to, single); break;
            case 5: multiply_tile(5, at, panel, columns, scales, to, single); break;
            default: multiply_tile(6, at, panel, columns, scales, to, single);
        }
    }
}

static void panel_scales(const struct product *of, int64_t row, int64_t group,
                         __m512 out[VECTORS]) {
    int64_t groups = groups_of(of);
    float scales[PANEL];
    for (int each = 0; each < PANEL; each++) {
        int64_t place = at_most(row + each, of->rows - 1) * groups + at_most(group, groups - 1);
        scales[each] = of->group_size ? from_bfloat16(((const uint16_t *)of->scale)[place])
                                      : ((const float *)of->scale)[place];
    }
    memcpy(out, scales, sizeof scales);
}

INLINE void panel_products(const struct product *of, int64_t row, int64_t token, int64_t tokens,
                           const int single) {
    const int size = bytes_of(single);
    struct decoder decoder = decoder_of(of->codes);
    char panel[BLOCK * PANEL * 4] __attribute__((aligned(64)));
    __m512 totals[TOKENS_AT_ONCE * VECTORS], results[TOKENS_AT_ONCE * VECTORS], scales[VECTORS];
    int64_t blocks = blocks_of(of->columns);
    size_t total_bytes = (size_t)tokens * VECTORS * sizeof *totals;
    /* Products of bfloat16 have few digits. */
    const int longest = single ? SPAN / 2 : SPAN;
    int together = of->group_size ? (int)at_most(of->group_size, longest) : longest;
    memset(totals, 0, total_bytes);
    memset(results, 0, total_bytes);
    for (int vector = 0; vector < VECTORS; vector++) scales[vector] = _mm512_set1_ps(1);
    for (int64_t block = 0; block < blocks; block++) {
        decode_panel(of, &decoder, row, block, panel, single);
        for (int begin = 0; begin < BLOCK; begin += together) {
            int64_t span = (block * BLOCK + begin) / SPAN;
            const char *x = (const char *)of->workspace +
                            ((span * of->tokens + token) * SPAN + begin % SPAN) * size;
            if (of->group_size)
                panel_scales(of, row, (block * BLOCK + begin) / of->group_size, scales);
            multiply_panel(x, tokens, panel_place(panel, begin, 0, single), together, scales,
                           totals, single);
        }
        if ((block + 1) % SUMMED_BLOCKS && block + 1 < blocks) continue;
        for (int64_t each = 0; each < tokens * VECTORS; each++) results[each] += totals[each];
        memset(totals, 0, total_bytes);
    }
    if (!of->group_size) panel_scales(of, row, 0, scales);
    for (int64_t each = 0; each < tokens; each++)
        for (int vector = 0; vector < VECTORS && row + 16 * vector < of->rows; vector++) {
            int64_t at = row + 16 * vector;
            __m512 sums = results[each * VECTORS + vector];
            if (!of->group_size) sums *= scales[vector];
            store(of, token + each, at, first_of_16(of->rows - at), sums, single);
        }
}

static int64_t chunks_of(const struct product *of) {
    return (of->tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
}

void avx512_many(const void *product, int64_t index) {
    const struct product *of = product;
    int64_t chunks = chunks_of(of), row = index / chunks * PANEL, chunk = index % chunks;
    int64_t token = of->tokens * chunk / chunks;
    int64_t tokens = of->tokens * (chunk + 1) / chunks - token;
    if (of->single)
        panel_products(of, row, token, tokens, 1);
    else
        panel_products(of, row, token, tokens, 0);
}

int64_t avx512_many_count(const struct product *of) {
    return (of->rows + PANEL - 1) / PANEL * chunks_of(of);
}
