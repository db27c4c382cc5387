/* What a product of activations with a six-bit weight is made of, for all variants. */
#ifndef CORE_FP6_PRODUCT_H
#define CORE_FP6_PRODUCT_H

#include "threads.h"

#include <stddef.h>
#include <stdint.h>

/* Columns of a block of the layout, and of its parts; bytes of a block in the two planes. */
enum { BLOCK = 256, PART = 64, LOW_BYTES = 128, HIGH_BYTES = 64 };

/* Blocks that are added up before their sum meets others: long sums of equal terms lose digits. */
enum { SUMMED_BLOCKS = 8 };

/* A format, and where the two upper bits of its codes stand in a byte of the high plane. */
struct codes {
    int32_t sign[4], top[4];
    int32_t mantissa, bias;
    uint8_t halves[2][64]; /* lower and upper bytes of the values in bfloat16 */
};

/* out[tokens, rows] = x[tokens, columns] @ weight[rows, columns].T + bias.
 * x and out are float where `single` is set, else bfloat16; both are contiguous. The scale is float
 * [rows] where group_size is 0, else bfloat16 [rows, groups]. The workspace starts at a multiple of
 * 64 and has core_fp6_workspace(...) bytes. */
struct product {
    const uint8_t *low, *high;
    const void *scale, *x;
    const float *bias;
    void *out, *workspace;
    const struct codes *codes;
    int64_t rows, columns, tokens;
    int32_t group_size, single;
};

static inline int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

static inline int64_t groups_of(const struct product *of) {
    return of->group_size ? (of->columns + of->group_size - 1) / of->group_size : 1;
}

static inline float from_bfloat16(uint16_t bits) {
    union { uint32_t bits; float value; } both = {(uint32_t)bits << 16};
    return both.value;
}

#endif
