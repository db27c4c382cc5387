/* Keys and values of a pass go to their slots. */
#include "attention.h"

#include <string.h>

enum { THREAD_BYTES = 1 << 20 };

static void keep_rows(const struct pass *pass, const char *from, int64_t distance, char *to,
                      int64_t bytes) {
    for (int64_t token = 0; token < pass->tokens; token++)
        memcpy(to + pass->slots[token] * bytes, from + token * distance, (size_t)bytes);
}

static void keep_head(const void *given, int64_t head) {
    const struct kept *kept = given;
    const struct store *store = kept->store;
    int64_t size = store->single ? 4 : 2;
    int64_t key_bytes = store->width * size, value_bytes = store->value_width * size;
    keep_rows(kept->pass, (const char *)kept->key + head * kept->key_head * size,
              kept->key_row * size, (char *)store->keys + head * store->slots * key_bytes,
              key_bytes);
    keep_rows(kept->pass, (const char *)kept->value + head * kept->value_head * size,
              kept->value_row * size, (char *)store->values + head * store->slots * value_bytes,
              value_bytes);
}

void core_splitfuse_keep(const struct kept *kept, int32_t threads) {
    const struct store *store = kept->store;
    int64_t elements = kept->pass->tokens * store->kv_heads * (store->width + store->value_width);
    run_parallel(keep_head, kept, store->kv_heads, elements < THREAD_BYTES / 2 ? 1 : threads);
}
