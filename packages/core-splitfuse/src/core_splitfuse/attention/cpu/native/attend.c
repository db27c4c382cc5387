/* Attention over keys and values in blocks, where they lie.
 *
 * A piece is a head of keys, with some tokens of a sequence and a part of what they see. It goes
 * through its keys in stages, and keeps the largest score, the sum of the weights and the weighted
 * sum of the values (online softmax). Parts begin at multiples of PART and stages at multiples of
 * STAGE, so that the result of a token depends on its sequence alone. */
#include "attention.h"
#include "tile.h"

#include <stdlib.h>

/* Keys of a part; rows (tokens times heads of a group) of a piece; products worth a thread. */
enum { PART = 2048, MOST_ROWS = 32, THREAD = 1 << 18 };

/* Tokens of a span and heads of every group, which are computed together. */
struct tokens {
    int64_t span, begin, end; /* positions */
    int64_t first, last;      /* of the keys that they see */
    int64_t head, heads;      /* in the group */
    int64_t pieces;           /* before this one */
    int64_t workspace;        /* where their parts meet */
};

struct work {
    struct attention of;
    struct tokens *tokens;
    int64_t count;
    float *workspace;
};

/* Rows of one piece: largest scores, sums of weights, weighted sums of values. */
struct rows {
    float *top, *sum, *total;
};

static int64_t group_of(const struct attention *of) { return of->heads / of->store->kv_heads; }

static int64_t parts_of(const struct tokens *tokens) {
    return (tokens->last + PART - 1) / PART - tokens->first / PART;
}

static int64_t rows_of(const struct tokens *tokens) {
    return (tokens->end - tokens->begin) * tokens->heads;
}

/* Floats of the rows of a piece; rows are computed four by four. */
static int64_t size_of(const struct attention *of, int64_t rows) {
    return ((rows + 3) / 4 * 4) * (2 + filled(of->store->value_width));
}

static struct rows rows_at(float *where, int64_t rows) {
    int64_t room = (rows + 3) / 4 * 4;
    return (struct rows){where, where + room, where + 2 * room};
}

/* Head, and line of the packed row, of a row. */
struct place {
    int64_t head, line;
};

static struct place place_of(const struct attention *of, const struct tokens *tokens, int64_t head,
                             int64_t row) {
    const struct span *span = of->pass->spans + tokens->span;
    int64_t line = span->row + tokens->begin - span->begin + row / tokens->heads;
    return (struct place){head * group_of(of) + tokens->head + row % tokens->heads, line};
}

static void find_slots(const struct attention *of, const struct span *span, int64_t stage,
                       int64_t from, int64_t to, int64_t *slots) {
    int64_t block = (stage + from) / of->pass->block, inside = (stage + from) % of->pass->block;
    const int32_t *table = of->pass->tables + span->table + block;
    while (from < to) {
        int64_t slot = *table++ * of->pass->block + inside;
        int64_t stop = at_most(to, from + of->pass->block - inside);
        while (from < stop) slots[from++] = slot++;
        inside = 0;
    }
}

/* Scores become weights, and the sums so far shrink as the largest score grows. */
INLINE void weigh(const struct attention *of, float *scores, int64_t from, int64_t to,
                  int64_t seen_from, int64_t seen_to, float *top, float *total, float *shrunk) {
    int64_t begin = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    for (int64_t at = begin; at < end; at += LANES) {
        floats found = get(scores + at) * of->scaling;
        if (of->softcap > 0)
            found = hyperbolic_tangent(found / of->softcap) * of->softcap;
        put(scores + at, found);
    }
    seen_from = at_least(seen_from, from);
    seen_to = at_most(seen_to, to);
    for (int64_t at = begin; at < at_most(seen_from, end); at++) scores[at] = -INFINITY;
    for (int64_t at = at_least(seen_to, begin); at < end; at++) scores[at] = -INFINITY;
    floats highest = all(*top);
    for (int64_t at = begin; at < end; at += LANES) highest = larger(get(scores + at), highest);
    float before = *top, now = largest(highest), zero = now == -INFINITY ? 0 : now;
    floats weights = {0};
    for (int64_t at = begin; at < end; at += LANES) {
        floats weight = exponential(get(scores + at) - zero);
        put(scores + at, weight);
        weights += weight;
    }
    *shrunk = before == now ? 1 : exponential_of(before - zero);
    *total = *total * *shrunk + sum(weights);
    *top = now;
}

/* Calls for four rows at a time; the first ones fetch what is read next. */
#define BY_FOUR(call, count)                                             \
    for (int64_t row = 0; row < (count); row += 4, ahead.to = 0) {       \
        if (row + 1 == (count))                                          \
            call(1);                                                     \
        else if (row + 2 == (count))                                     \
            call(2);                                                     \
        else if (row + 3 == (count))                                     \
            call(3);                                                     \
        else                                                             \
            call(4);                                                     \
    }

INLINE void multiply_stage(const struct attention *of, const char *keys, const int64_t *slots,
                           int64_t from, int64_t to, const float *query, float *scores,
                           int64_t count, struct ahead ahead, const int single) {
    int64_t place = filled(of->store->width);
#define MULTIPLY(rows)                                                                          \
    multiply_keys(of, keys, slots, from, to, query + row * place, scores + row * SCORES, ahead, \
                  rows, single)
    BY_FOUR(MULTIPLY, count)
#undef MULTIPLY
}

INLINE void add_stage(const struct attention *of, const char *values, const int64_t *slots,
                      int64_t from, int64_t to, const float *weights, const float *shrunk,
                      float *totals, int64_t count, struct ahead ahead, const int single) {
    int64_t width = of->store->value_width, place = filled(width);
#define ADD(rows)                                                                             \
    multiply_values(values, slots, width, from, to, weights + row * SCORES, shrunk + row,     \
                    totals + row * place, ahead, rows, single)
    BY_FOUR(ADD, count)
#undef ADD
}

/* One part of what some tokens see. */
INLINE void compute(const struct attention *of, const struct tokens *tokens, int64_t head,
                    int64_t first, int64_t last, struct rows rows, const int single) {
    const struct span *span = of->pass->spans + tokens->span;
    int64_t count = rows_of(tokens), room = (count + 3) / 4 * 4;
    int64_t place = filled(of->store->width), bytes = single ? 4 : 2;
    int64_t both[2][STAGE], *slots = both[0], *next = both[1];
    float query[room * place], scores[room * SCORES], shrunk[room];
    const struct store *store = of->store;
    const char *keys = element(store->keys, head * store->slots * store->width, single);
    const char *values = element(store->values, head * store->slots * store->value_width, single);
    memset(query, 0, sizeof query);
    memset(rows.top, 0, (size_t)size_of(of, count) * 4);
    for (int64_t row = 0; row < room; row++) rows.top[row] = -INFINITY, shrunk[row] = 1;
    for (int64_t row = 0; row < count; row++) {
        struct place from = place_of(of, tokens, head, row);
        int64_t at = from.head * of->query_head + from.line * of->query_row;
        arrange(query + row * place, element(of->query, at, single), store->width, single);
    }
    int64_t stage = first / STAGE * STAGE, from = first - stage;
    int64_t to = at_most(last - stage, STAGE);
    find_slots(of, span, stage, from, to, slots);
    while (stage < last) {
        int64_t more = at_least(at_most(last - stage - STAGE, STAGE), 0), *read = slots;
        struct ahead soon = {values, slots, from, to, store->value_width * bytes};
        struct ahead later = {keys, next, 0, more, store->width * bytes};
        find_slots(of, span, stage + STAGE, 0, more, next);
        multiply_stage(of, keys, slots, from, to, query, scores, count, soon, single);
        for (int64_t row = 0; row < count; row++) {
            int64_t position = tokens->begin + row / tokens->heads;
            int64_t seen = of->window ? position + 1 - of->window - stage : 0;
            weigh(of, scores + row * SCORES, from, to, seen, position + 1 - stage, rows.top + row,
                  rows.sum + row, shrunk + row);
        }
        add_stage(of, values, slots, from, to, scores, shrunk, rows.total, count, later, single);
        stage += STAGE, from = 0, to = more;
        slots = next, next = read;
    }
}

/* Divides by the sums of the weights, with the share of sinks, and rounds. */
static void finish(const struct attention *of, const struct tokens *tokens, int64_t head,
                   struct rows rows) {
    int64_t width = of->store->value_width;
    for (int64_t row = 0; row < rows_of(tokens); row++) {
        struct place into = place_of(of, tokens, head, row);
        float divisor = rows.sum[row], factor = 1;
        if (of->sinks) {
            float top = rows.top[row], sink = of->sinks[into.head], most = sink > top ? sink : top;
            factor = exponential_of(top - most);
            divisor = divisor * factor + exponential_of(sink - most);
        }
        const float *from = rows.total + row * filled(width);
        int64_t at = (into.line * of->heads + into.head) * width;
        for (int64_t column = 0; column < width; column++) {
            float found = from[column] * factor / divisor;
            if (of->store->single)
                ((float *)of->out)[at + column] = found;
            else
                ((uint16_t *)of->out)[at + column] = to_bfloat16(found);
        }
    }
}

static const struct tokens *tokens_of(const struct work *work, int64_t piece) {
    int64_t low = 0, high = work->count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (work->tokens[middle].pieces <= piece)
            low = middle;
        else
            high = middle - 1;
    }
    return work->tokens + low;
}

static struct rows shared_rows(const struct work *work, const struct tokens *tokens, int64_t head,
                               int64_t part) {
    int64_t rows = rows_of(tokens);
    int64_t index = head * parts_of(tokens) + part;
    return rows_at(work->workspace + tokens->workspace + index * size_of(&work->of, rows), rows);
}

static void compute_piece(const void *given, int64_t index) {
    const struct work *work = given;
    const struct attention *of = &work->of;
    const struct tokens *tokens = tokens_of(work, index);
    int64_t parts = parts_of(tokens), inside = index - tokens->pieces;
    int64_t head = inside / parts, part = inside % parts;
    int64_t begin = (tokens->first / PART + part) * PART;
    int64_t first = at_least(begin, tokens->first), last = at_most(begin + PART, tokens->last);
    int64_t rows = rows_of(tokens);
    float own[parts == 1 ? size_of(of, rows) : 1];
    struct rows into = parts == 1 ? rows_at(own, rows) : shared_rows(work, tokens, head, part);
    if (of->store->single)
        compute(of, tokens, head, first, last, into, 1);
    else
        compute(of, tokens, head, first, last, into, 0);
    if (parts == 1) finish(of, tokens, head, into);
}

/* Adds up the parts of some tokens, the first one first. */
static void meet(const void *given, int64_t index) {
    const struct work *work = given;
    const struct tokens *tokens = work->tokens + index / work->of.store->kv_heads;
    int64_t head = index % work->of.store->kv_heads, parts = parts_of(tokens);
    int64_t place = filled(work->of.store->value_width);
    if (parts == 1) return;
    struct rows into = shared_rows(work, tokens, head, 0);
    for (int64_t part = 1; part < parts; part++) {
        struct rows from = shared_rows(work, tokens, head, part);
        for (int64_t row = 0; row < rows_of(tokens); row++) {
            float old = into.top[row], other = from.top[row], top = other > old ? other : old;
            float zero = top == -INFINITY ? 0 : top;
            float kept = old == top ? 1 : exponential_of(old - zero);
            float added = other == top ? 1 : exponential_of(other - zero);
            into.sum[row] = into.sum[row] * kept + from.sum[row] * added;
            for (int64_t at = row * place; at < (row + 1) * place; at++)
                into.total[at] = into.total[at] * kept + from.total[at] * added;
            into.top[row] = top;
        }
    }
    finish(&work->of, tokens, head, into);
}

/* Lists what is computed together, and returns how many that are. */
static int64_t list_tokens(const struct attention *of, struct tokens *tokens) {
    int64_t group = group_of(of), together = at_least(MOST_ROWS / group, 1), found = 0;
    for (int64_t index = 0; index < of->pass->count; index++) {
        const struct span *span = of->pass->spans + index;
        for (int64_t begin = span->begin; begin < span->end; begin += together)
            for (int64_t head = 0; head < group; head += MOST_ROWS, found++) {
                if (!tokens) continue;
                int64_t end = at_most(begin + together, span->end);
                int64_t first = of->window ? at_least(begin + 1 - of->window, 0) : 0;
                int64_t heads = at_most(group - head, MOST_ROWS);
                tokens[found] = (struct tokens){index, begin, end, first, end, head, heads, 0, 0};
            }
    }
    return found;
}

/* Fills in out; returns 1 where there is no memory for it. */
int32_t core_splitfuse_attend(const struct attention *of, int32_t threads) {
    struct work work = {*of, NULL, list_tokens(of, NULL), NULL};
    int64_t pieces = 0, shared = 0, products = 0;
    if (!work.count) return 0;
    work.tokens = malloc((size_t)work.count * sizeof *work.tokens);
    if (!work.tokens) return 1;
    list_tokens(of, work.tokens);
    for (int64_t index = 0; index < work.count; index++) {
        struct tokens *tokens = work.tokens + index;
        int64_t rows = rows_of(tokens), parts = parts_of(tokens);
        tokens->pieces = pieces;
        tokens->workspace = shared;
        pieces += parts * of->store->kv_heads;
        if (parts > 1) shared += parts * of->store->kv_heads * size_of(of, rows);
        products += rows * of->store->kv_heads * (tokens->last - tokens->first);
    }
    products *= of->store->width + of->store->value_width;
    if (shared && !(work.workspace = malloc((size_t)shared * 4))) {
        free(work.tokens);
        return 1;
    }
    threads = (int32_t)at_most(threads, 1 + products / THREAD);
    run_parallel(compute_piece, &work, pieces, threads);
    if (shared) run_parallel(meet, &work, work.count * of->store->kv_heads, threads);
    free(work.workspace);
    free(work.tokens);
    return 0;
}
