/* What the kernels share that are written with the vector types of GCC and Clang.
 *
 * A header gives decode_block(), which makes floats of a block, and position_of(), which tells
 * where it puts a column of each part; the first 32 columns have the first 32 positions. */
#ifndef CORE_FP6_VECTOR_H
#define CORE_FP6_VECTOR_H

#include "product.h"

#include <string.h>

enum { LANES = 8 };
typedef float floats __attribute__((vector_size(4 * LANES)));

#if defined(__AVX2__)
#include "decode_avx2.h"
#else
#include "decode_plain.h"
#endif

#endif
