/* Products in float with the vector types of GCC and Clang: four rows are decoded, block by block,
 * and meet the tokens two by two. */
#include "vector.h"

#define UNROLLED _Pragma("GCC unroll 8")

enum { ROWS = 4, TILE = 2, TOKENS_AT_ONCE = 256, RUNS = BLOCK / LANES };

/* A block of all tokens in the order of decode_block(), filled up with zeros. */
static void arrange(const void *product, int64_t block) {
    const struct product *of = product;
    int order[PART];
    for (int column = 0; column < PART; column++) order[position_of(column)] = column;
    int64_t inside = at_most(BLOCK, of->columns - block * BLOCK);
    float *to = (float *)of->workspace + block * of->tokens * BLOCK;
    for (int64_t token = 0; token < of->tokens; token++, to += BLOCK) {
        const float *from = (const float *)of->x + token * of->columns + block * BLOCK;
        float filled[BLOCK] = {0};
        memcpy(filled, from, (size_t)inside * sizeof *filled);
        for (int at = 0; at < BLOCK; at++) to[at] = filled[at / PART * PART + order[at % PART]];
    }
}

static inline __attribute__((always_inline)) void multiply_tile(
    const floats *x, const floats *weights, int runs, const float scales[ROWS], floats *totals,
    const int tokens) {
    floats sums[TILE][ROWS] = {{{0}}};
    for (int run = 0; run < runs; run++)
        UNROLLED for (int token = 0; token < tokens; token++)
            UNROLLED for (int row = 0; row < ROWS; row++)
                sums[token][row] += x[token * RUNS + run] * weights[row * RUNS + run];
    UNROLLED for (int token = 0; token < tokens; token++)
        UNROLLED for (int row = 0; row < ROWS; row++)
            totals[token * ROWS + row] += sums[token][row] * scales[row];
}

static void multiply_tokens(const floats *x, int64_t tokens, const floats *weights, int runs,
                            const float scales[ROWS], floats *totals) {
    int64_t token = 0;
    for (; token + TILE <= tokens; token += TILE)
        multiply_tile(x + token * RUNS, weights, runs, scales, totals + token * ROWS, TILE);
    if (token < tokens)
        multiply_tile(x + token * RUNS, weights, runs, scales, totals + token * ROWS, 1);
}

static void group_scales(const struct product *of, const int64_t rows[ROWS], int64_t column,
                         float scales[ROWS]) {
    int64_t groups = groups_of(of);
    for (int each = 0; each < ROWS; each++) {
        if (!of->group_size) {
            scales[each] = 1;
            continue;
        }
        int64_t group = at_most(column / of->group_size, groups - 1);
        scales[each] = from_bfloat16(((const uint16_t *)of->scale)[rows[each] * groups + group]);
    }
}

static float sum_of(floats values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

static void four_rows(const struct product *of, int64_t row, int64_t token, int64_t tokens) {
    floats weights[ROWS * RUNS], totals[TOKENS_AT_ONCE * ROWS];
    floats results[TOKENS_AT_ONCE * ROWS];
    int64_t blocks = blocks_of(of->columns), rows[ROWS];
    int together = of->group_size ? of->group_size : BLOCK;
    float scales[ROWS];
    for (int each = 0; each < ROWS; each++) rows[each] = at_most(row + each, of->rows - 1);
    size_t total_bytes = (size_t)tokens * ROWS * sizeof *totals;
    memset(totals, 0, total_bytes);
    memset(results, 0, total_bytes);
    for (int64_t block = 0; block < blocks; block++) {
        const floats *x = (const floats *)of->workspace + (block * of->tokens + token) * RUNS;
        for (int each = 0; each < ROWS; each++) {
            int64_t place = rows[each] * blocks + block;
            decode_block(of->codes, of->low + place * LOW_BYTES, of->high + place * HIGH_BYTES,
                         weights + each * RUNS);
        }
        for (int at = 0; at < BLOCK; at += together) {
            group_scales(of, rows, block * BLOCK + at, scales);
            multiply_tokens(x + at / LANES, tokens, weights + at / LANES, together / LANES, scales,
                            totals);
        }
        if ((block + 1) % SUMMED_BLOCKS && block + 1 < blocks) continue;
        for (int64_t each = 0; each < tokens * ROWS; each++) results[each] += totals[each];
        memset(totals, 0, total_bytes);
    }
    for (int64_t each = 0; each < tokens; each++)
        for (int next = 0; next < ROWS && row + next < of->rows; next++) {
            float sum = sum_of(results[each * ROWS + next]);
            if (!of->group_size) sum *= ((const float *)of->scale)[row + next];
            if (of->bias) sum += of->bias[row + next];
            ((float *)of->out)[(token + each) * of->rows + row + next] = sum;
        }
}

static int64_t chunks_of(const struct product *of) {
    return (of->tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
}

static void work(const void *product, int64_t index) {
    const struct product *of = product;
    int64_t chunks = chunks_of(of), chunk = index % chunks;
    int64_t begin = of->tokens * chunk / chunks, end = of->tokens * (chunk + 1) / chunks;
    four_rows(of, index / chunks * ROWS, begin, end - begin);
}

int64_t core_fp6_workspace(const struct product *of) {
    return of->tokens * blocks_of(of->columns) * BLOCK * 4;
}

void core_fp6_linear(const struct product *of, int32_t threads) {
    run_parallel(arrange, of, blocks_of(of->columns), of->tokens > 8 ? threads : 1);
    run_parallel(work, of, (of->rows + ROWS - 1) / ROWS * chunks_of(of), threads);
}
