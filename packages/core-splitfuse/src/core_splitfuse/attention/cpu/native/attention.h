/* What an attention of one layer and one pass is made of. Sizes and strides are in elements. */
#ifndef CORE_SPLITFUSE_ATTENTION_H
#define CORE_SPLITFUSE_ATTENTION_H

#include "threads.h"

#include <stddef.h>
#include <stdint.h>

/* Tokens of one sequence. Its keys and values are in the blocks that tables[table], ... name. */
struct span {
    int64_t row;   /* of the first one in the packed row */
    int64_t begin; /* its position; the tokens before it are in the store */
    int64_t end;   /* one past the position of the last */
    int64_t table;
};

/* Of one layer: keys[kv_heads, slots, width] and values[kv_heads, slots, value_width], which are
 * float where `single` is set, else bfloat16. All else that a pass brings is of the same kind. */
struct store {
    void *keys, *values;
    int64_t slots, kv_heads, width, value_width, single;
};

/* Of all layers: the tokens of a pass, and the slots that keep them. */
struct pass {
    const struct span *spans;
    const int32_t *tables;
    const int64_t *slots;
    int64_t count, block, tokens; /* spans, tokens of a block of the store, tokens of the pass */
};

/* key[kv_heads, T, width] and value[kv_heads, T, value_width] go to their slots. */
struct kept {
    const struct store *store;
    const struct pass *pass;
    const void *key, *value;
    int64_t key_head, key_row, value_head, value_row;
};

/* out[T, heads, value_width] of query[heads, T, width]. The elements of a row lie behind each
 * other; the heads of a group share a head of keys. */
struct attention {
    const struct store *store;
    const struct pass *pass;
    const void *query;
    void *out;
    const float *sinks; /* [heads], or NULL */
    int64_t query_head, query_row, heads;
    int64_t window; /* tokens that a token sees, itself included; 0 for all before it */
    float scaling, softcap; /* 0 for none */
};

static inline int64_t at_least(int64_t value, int64_t limit) {
    return value > limit ? value : limit;
}

#endif
