/* Products of a few rows of queries with the keys of a stage, and of their weights with its values.
 *
 * As many sums are kept as there are lanes: of up to four rows with four and more keys. What is
 * computed for a row depends on nothing else, whatever rows it is computed with. */
#ifndef CORE_SPLITFUSE_TILE_H
#define CORE_SPLITFUSE_TILE_H

#include "attention.h"
#include "lanes.h"

/* Keys that are weighed at a time, and the distance between the scores of two rows: what is
 * computed beyond the last key has room there. */
enum { STAGE = 128, SCORES = STAGE + LANES };

/* Bfloat16 is multiplied as it is where the processor can: its products are exact in float. */
#if defined(__AVX512BF16__)
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
#endif

INLINE int paired(const int single) { return PAIRS && !single; }

/* Floats that a row of queries takes in the workspace, filled up with zeros. */
INLINE int64_t filled(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

INLINE void arrange(float *to, const void *row, int64_t width, const int single) {
    int64_t whole = width / LANES * LANES, place = filled(width);
    if (paired(single)) {
        memset(to, 0, (size_t)place * 4);
        memcpy(to, row, (size_t)width * 2);
        return;
    }
    for (int64_t at = 0; at < whole; at += LANES) put(to + at, load(row, at, single));
    if (whole < width) put(to + whole, load_some(row, whole, width - whole, single));
}

INLINE floats add_product(floats sums, const char *key, const float *query, int64_t at,
                          int64_t left, const int some, const int single) {
#if defined(__AVX512BF16__)
    if (!single) {
        const char *from = key + at * 2;
        __mmask32 mask = (__mmask32)((1ull << left) - 1);
        __m512i pairs = some ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_loadu_si512(from);
        __m512i other = _mm512_loadu_si512((const char *)query + at * 2);
        return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)other);
    }
#endif
    floats values = some ? load_some(key, at, left, single) : load(key, at, single);
    return sums + values * get(query + at);
}

/* Rows that are read soon, in blocks that no processor foresees. */
struct ahead {
    const char *rows;
    const int64_t *slots;
    int64_t from, to, bytes;
};

INLINE void fetch(struct ahead ahead, int64_t index) {
    if (index < ahead.from || index >= ahead.to) return;
    const char *row = ahead.rows + ahead.slots[index] * ahead.bytes;
    for (int64_t at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(row + at);
}

/* Scores of `rows` rows with the keys of some slots. */
INLINE void multiply_keys(const struct attention *of, const char *keys, const int64_t *slots,
                          int64_t from, int64_t to, const float *query, float *scores,
                          struct ahead ahead, const int rows, const int single) {
    const int together = LANES / rows, step = paired(single) ? 2 * LANES : LANES;
    int64_t width = of->store->width, place = filled(width), whole = width / step * step;
    for (int64_t key = from; key < to; key += together) {
        floats sums[LANES] = {{0}};
        const char *at[LANES];
        UNROLLED for (int each = 0; each < together; each++)
            at[each] = element(keys, slots[at_most(key + each, to - 1)] * width, single);
        for (int64_t each = key; each < key + together; each++) fetch(ahead, each);
        for (int64_t column = 0; column < whole; column += step)
            UNROLLED for (int each = 0; each < together; each++)
                UNROLLED for (int row = 0; row < rows; row++)
                    sums[row * together + each] =
                        add_product(sums[row * together + each], at[each], query + row * place,
                                    column, step, 0, single);
        if (whole < width)
            UNROLLED for (int each = 0; each < together; each++)
                UNROLLED for (int row = 0; row < rows; row++)
                    sums[row * together + each] =
                        add_product(sums[row * together + each], at[each], query + row * place,
                                    whole, width - whole, 1, single);
        floats found = sums_of(sums);
        UNROLLED for (int row = 0; row < rows; row++)
            memcpy(scores + row * SCORES + key, (const float *)&found + row * together,
                   (size_t)together * 4);
    }
}

/* Some columns: totals = totals * shrunk + weights @ values. */
INLINE void multiply_columns(const char *values, const int64_t *slots, int64_t width, int64_t from,
                             int64_t to, const float *weights, const float *shrunk, float *totals,
                             int64_t column, int64_t left, struct ahead ahead, const int rows,
                             const int count, const int some, const int single) {
    floats sums[4][STRIP];
    int64_t place = filled(width);
    UNROLLED for (int row = 0; row < rows; row++)
        UNROLLED for (int each = 0; each < count; each++)
            sums[row][each] = get(totals + row * place + column + each * LANES) * shrunk[row];
    for (int64_t key = from; key < to; key++) {
        const char *value = element(values, slots[key] * width, single);
        fetch(ahead, key);
        UNROLLED for (int each = 0; each < count; each++) {
            int64_t at = column + each * LANES;
            floats found = some ? load_some(value, at, left, single) : load(value, at, single);
            UNROLLED for (int row = 0; row < rows; row++)
                sums[row][each] += found * weights[row * SCORES + key];
        }
    }
    UNROLLED for (int row = 0; row < rows; row++)
        UNROLLED for (int each = 0; each < count; each++)
            put(totals + row * place + column + each * LANES, sums[row][each]);
}

INLINE void multiply_values(const char *values, const int64_t *slots, int64_t width, int64_t from,
                            int64_t to, const float *weights, const float *shrunk, float *totals,
                            struct ahead ahead, const int rows, const int single) {
    int64_t column = 0, left = width % LANES;
    for (; column + STRIP * LANES <= width; column += STRIP * LANES, ahead.to = 0)
        multiply_columns(values, slots, width, from, to, weights, shrunk, totals, column, 0, ahead,
                         rows, STRIP, 0, single);
    for (; column + LANES <= width; column += LANES, ahead.to = 0)
        multiply_columns(values, slots, width, from, to, weights, shrunk, totals, column, 0, ahead,
                         rows, 1, 0, single);
    if (left)
        multiply_columns(values, slots, width, from, to, weights, shrunk, totals, column, left,
                         ahead, rows, 1, 1, single);
}

#endif
