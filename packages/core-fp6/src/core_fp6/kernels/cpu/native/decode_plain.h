/* Decoding for processors of any kind. */
#ifndef CORE_FP6_DECODE_PLAIN_H
#define CORE_FP6_DECODE_PLAIN_H

typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

static inline int position_of(int column) {
    int b = column / 16, e = column / 8 % 2, q = column % 8 / 2, h = column % 2;
    return 32 * (b / 2) + 8 * q + 4 * (b % 2) + 2 * h + e;
}

static inline integers widened(const uint8_t *from) {
    bytes narrow;
    memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, integers);
}

/* Exact and without a subnormal number on the way: a code with exponent zero is given a leading
 * one, which is then taken off. */
static inline void decode_block(const struct codes *codes, const uint8_t *low, const uint8_t *high,
                                floats out[BLOCK / LANES]) {
    const int shift = 23 - codes->mantissa, ones = 1 << codes->mantissa;
    const union { int32_t bits; float value; } smallest = {(128 - codes->bias) << 23};
    for (int part = 0; part < 4; part++)
        for (int run = 0; run < PART / LANES; run++) {
            integers lower = widened(low + PART * (part % 2) + LANES * run) >> 4 * (part / 2);
            integers upper = widened(high + LANES * run);
            integers size = (lower & 15) | (upper >> codes->top[part] & 1) << 4;
            integers subnormal = size < ones;
            union { integers bits; floats values; } leading, removed, all;
            leading.bits = (size << shift) + ((127 - codes->bias) << 23) + (subnormal & 1 << 23);
            removed.bits = subnormal & smallest.bits;
            all.values = leading.values - removed.values;
            all.bits |= (upper >> codes->sign[part] & 1) << 31;
            out[PART * part / LANES + run % 2 * 4 + run / 2] = all.values;
        }
}

#endif
