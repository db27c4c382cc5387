/* The weight itself, in float. */
#include "vector.h"

enum { HALF = 32 };

/* That of 32 columns, which share it. */
static float scale_at(const struct product *of, int64_t row, int64_t column) {
    if (!of->group_size) return ((const float *)of->scale)[row];
    int64_t group = at_most(column / of->group_size, groups_of(of) - 1);
    return from_bfloat16(((const uint16_t *)of->scale)[row * groups_of(of) + group]);
}

static void dequantize_row(const void *product, int64_t row) {
    const struct product *of = product;
    int64_t blocks = blocks_of(of->columns);
    int positions[HALF];
    for (int column = 0; column < HALF; column++) positions[column] = position_of(column);
    for (int64_t block = 0; block < blocks; block++) {
        int64_t place = row * blocks + block;
        union { floats runs[BLOCK / LANES]; float values[BLOCK]; } all;
        decode_block(of->codes, of->low + place * LOW_BYTES, of->high + place * HIGH_BYTES,
                     all.runs);
        for (int begin = 0; begin < BLOCK; begin += HALF) {
            int64_t column = block * BLOCK + begin, inside = at_most(HALF, of->columns - column);
            float scale = scale_at(of, row, column), *out = (float *)of->out;
            out += row * of->columns + column;
            for (int64_t each = 0; each < inside; each++)
                out[each] = all.values[begin + positions[each]] * scale;
        }
    }
}

/* out[rows, columns] in float; x and bias are not used. */
void core_fp6_dequantize(const struct product *of, int32_t threads) {
    run_parallel(dequantize_row, of, of->rows, threads);
}
