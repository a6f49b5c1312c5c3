// Causal attention over the paged cache. Keys are taken in segments of SEGMENT positions counted from 0; each has
// a softmax of its own, and segments are merged in order. Both kinds of attention to a segment,
// float_attention.c and int8_attention.c, sum in an order that the segment fixes: what a token gets depends on its
// position alone, not on the queries that are computed beside it.

#include "attention.h"
#include "int8_tiles.h"

enum { QUERY_TILE = 64 };  // queries in a task of a chunk

// The softmax of what was seen so far: values weighted relative to the largest score, not divided by their sum.
typedef struct {
    float *values;  // [size]
    float largest, sum;
} State;

INLINE void merge(State *total, const float *values, float largest, float sum, int64_t size) {
    if (total->largest == -INFINITY) {  // the first
        memcpy(total->values, values, (size_t)size * sizeof *values);
        total->sum = sum;
        total->largest = largest;
        return;
    }
    // The one with the larger score keeps its weights: exp(0) = 1.
    const int grows = largest > total->largest;
    const float factor = exp_negative_scalar(-fabsf(total->largest - largest));
    const float kept = grows ? factor : 1.0f, added = grows ? 1.0f : factor;
    for (int64_t d = 0; d < size; d += LANES) {
        const Floats old = load_part(total->values + d, size - d) * kept;
        store_part(total->values + d, old + load_part(values + d, size - d) * added, size - d);
    }
    total->sum = total->sum * kept + sum * added;
    total->largest = grows ? largest : total->largest;
}

INLINE void divide(State *state, int64_t size) {
    for (int64_t d = 0; d < size; d += LANES)
        store_part(state->values + d, load_part(state->values + d, size - d) / state->sum, size - d);
}

// The first key that a query sees.
INLINE int64_t oldest(const Inputs *in, int64_t position) {
    return in->window == 0 ? 0 : larger(0, position - in->window + 1);
}

// Whether a segment is int8 codes, that of four bits too.
INLINE int has_codes(const Inputs *in) { return in->type == INT8 || in->type == INT4; }

INLINE int64_t queries_at_once(const Inputs *in) { return has_codes(in) ? INT8_QUERIES : FLOAT_QUERIES; }

INLINE void read_segment(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last,
                         Segment *segment) {
    (in->type == INT8 ? read_int8 : in->type == INT4 ? read_int4 : read_floats)(in, table, head, first, last, segment);
}

INLINE void attend(const Inputs *in, const Segment *segment, Rows *rows) {
    (has_codes(in) ? attend_to_codes : attend_to_floats)(in, segment, rows);
}

// A query of one head, and where what it makes of a segment goes: weighted values, then largest and sum.
typedef struct {
    const float *query;
    int64_t position;
    float *partial;
} Query;

// All queries of a group over their segment, with one key head.
static void attend_group(const Inputs *in, const Query *all, int64_t num_queries, const int32_t *table, int64_t head,
                         int64_t index, Segment *segment) {
    const int64_t base = index * SEGMENT, most = queries_at_once(in);
    int64_t first = base + SEGMENT, last = base;
    for (int64_t i = 0; i < num_queries; i++) {
        first = smaller(first, larger(oldest(in, all[i].position), base));
        last = larger(last, smaller(all[i].position + 1, base + SEGMENT));
    }
    if (first >= last) return;
    read_segment(in, table, head, first, last, segment);
    for (int64_t q = 0; q < num_queries; q += most) {
        Rows rows;
        rows.size = smaller(most, num_queries - q);
        for (int64_t i = 0; i < rows.size; i++) {
            rows.queries[i] = all[q + i].query;
            rows.first[i] = larger(oldest(in, all[q + i].position) - base, 0);
            rows.last[i] = smaller(all[q + i].position + 1 - base, SEGMENT);
        }
        attend(in, segment, &rows);
        for (int64_t i = 0; i < rows.size; i++) {
            memcpy(all[q + i].partial, rows.values[i], (size_t)in->size * sizeof(float));
            all[q + i].partial[in->size] = rows.largest[i];
            all[q + i].partial[in->size + 1] = rows.sum[i];
        }
    }
}

// Queries `from` … `to` - 1 of a chunk, the heads that share a key head, over all that they see.
static void attend_chunk(const Inputs *in, const float *queries, const int32_t *table, int64_t start, int64_t from,
                         int64_t to, int64_t head, Segment *segment, float *output) {
    const int64_t num_rows = (to - from) * in->group, width = in->kv_heads * in->group * in->size;
    const int64_t most = queries_at_once(in);
    struct {
        State state;
        const float *query;
        int64_t position;
    } all[num_rows];
    for (int64_t query = from, row = 0; query < to; query++)
        for (int64_t g = 0; g < in->group; g++, row++) {
            const int64_t offset = (head * in->group + g) * in->size;
            all[row].state = (State){output + query * width + offset, -INFINITY, 0.0f};
            all[row].query = queries + query * in->query_stride + offset;
            all[row].position = start + query;
        }
    const int64_t end = start + to;
    for (int64_t base = oldest(in, start + from) / SEGMENT * SEGMENT; base < end; base += SEGMENT) {
        read_segment(in, table, head, larger(oldest(in, start + from), base), smaller(end, base + SEGMENT), segment);
        for (int64_t row = 0; row < num_rows; row += most) {
            Rows rows;
            int sees_any = 0;
            rows.size = smaller(most, num_rows - row);
            for (int64_t i = 0; i < rows.size; i++) {
                rows.queries[i] = all[row + i].query;
                rows.first[i] = larger(oldest(in, all[row + i].position) - base, 0);
                rows.last[i] = smaller(all[row + i].position + 1 - base, SEGMENT);
                sees_any |= rows.first[i] < rows.last[i];
            }
            if (!sees_any) continue;
            attend(in, segment, &rows);
            for (int64_t i = 0; i < rows.size; i++)
                if (rows.first[i] < rows.last[i])
                    merge(&all[row + i].state, rows.values[i], rows.largest[i], rows.sum[i], in->size);
        }
    }
    for (int64_t row = 0; row < num_rows; row++) divide(&all[row].state, in->size);
}

// Sequences with one query whose blocks of a segment are the same ones: members[first] … members[first + size - 1].
typedef struct {
    int32_t segment, first, size;
} Group;

enum { MOST_MEMBERS = 16 };  // so that there are tasks for all threads

// Once a step: prompts that begin alike share blocks, which need be read once for all.
OPERATION(group_segments) {
    const int64_t sequences = count(args->num_rows), blocks = SEGMENT / args->block_size;
    const int32_t *query_starts = args->query_starts, *starts = args->starts, *table_rows = args->table_rows;
    Group *groups = (Group *)args->groups;
    int32_t *members = args->members;
    int64_t most = 0, num_groups = 0, num_members = 0;
    int32_t group_of[sequences + 1], leader[sequences + 1];
    FOR_TASKS(task, 1) {
        for (int64_t s = 0; s < sequences; s++)
            if (query_starts[s + 1] - query_starts[s] == 1) most = larger(most, starts[s] / SEGMENT + 1);
        for (int64_t index = 0; index < most; index++) {
            const int64_t before = num_groups;
            for (int64_t s = 0; s < sequences; s++) {
                group_of[s] = -1;
                if (query_starts[s + 1] - query_starts[s] != 1 || starts[s] / SEGMENT < index) continue;
                const int32_t *table = args->tables + table_rows[s] * args->table_stride + index * blocks;
                // Blocks that are not full are nobody else's, and the table ends with them.
                int64_t g = starts[s] + 1 < (index + 1) * SEGMENT ? num_groups : before;
                for (; g < num_groups; g++) {
                    const int32_t *other = args->tables + leader[g - before] * args->table_stride + index * blocks;
                    if (table[0] == other[0] && groups[g].size < MOST_MEMBERS &&
                        memcmp(table, other, (size_t)blocks * sizeof *table) == 0)
                        break;
                }
                if (g == num_groups) {
                    groups[num_groups++] = (Group){(int32_t)index, 0, 0};
                    leader[g - before] = table_rows[s];
                }
                groups[g].size++;
                group_of[s] = (int32_t)g;
            }
            for (int64_t g = before; g < num_groups; g++) {
                groups[g].first = (int32_t)num_members;
                num_members += groups[g].size;
                groups[g].size = 0;
            }
            for (int64_t s = 0; s < sequences; s++)
                if (group_of[s] >= 0) {
                    Group *group = groups + group_of[s];
                    members[group->first + group->size++] = (int32_t)s;
                }
        }
        *args->num_groups = num_groups;
    }
}

// A task for each key head is a group's segment, whose results `merge_segments` merges, or a tile of a chunk's queries.
OPERATION(paged_attention) {
    static _Thread_local _Alignas(64) Segment segment;
    const Inputs in = {
        .queries = args->queries,
        .query_stride = args->query_stride,
        .keys = args->keys,
        .values = args->values,
        .key_scales = args->key_scales,
        .value_scales = args->value_scales,
        .type = args->cache_type,
        .kv_heads = args->num_kv_heads,
        .group = args->heads_per_kv_head,
        .size = args->head_dim,
        .block_shift = __builtin_ctzll((uint64_t)args->block_size),
        .scale = (float)args->scale,
        .window = args->window,
    };
    const int32_t *query_starts = args->query_starts, *starts = args->starts, *table_rows = args->table_rows;
    const int32_t *tables = args->tables, *partial_starts = args->partial_starts, *members = args->members;
    const Group *groups = (const Group *)args->groups;
    const int64_t sequences = count(args->num_rows), num_groups = count(args->num_groups), row_size = in.size + 2;
    const int64_t heads = in.kv_heads * in.group, table_stride = args->table_stride;
    float *output = args->output, *partials = args->partials;
    int64_t num_tiles = 0;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t num_queries = query_starts[s + 1] - query_starts[s];
        num_tiles += num_queries == 1 ? 0 : (num_queries + QUERY_TILE - 1) / QUERY_TILE;
    }
    int64_t s = 0, before = 0;
    if (has_codes(&in)) begin_tiles();
    FOR_TASKS(task, (num_tiles + num_groups) * in.kv_heads) {
        const int64_t head = task % in.kv_heads;
        // Tiles, the longer tasks, come first. A thread's only grow: it goes on from the sequence of the last one.
        const int64_t tile = task / in.kv_heads;
        if (tile >= num_tiles) {
            const Group group = groups[tile - num_tiles];
            Query all[MOST_MEMBERS * in.group];
            for (int64_t i = 0; i < group.size * in.group; i++) {
                const int64_t member = members[group.first + i / in.group], h = head * in.group + i % in.group;
                all[i] = (Query){in.queries + query_starts[member] * in.query_stride + h * in.size, starts[member],
                                 partials + ((partial_starts[member] + group.segment) * heads + h) * row_size};
            }
            attend_group(&in, all, group.size * in.group, tables + table_rows[members[group.first]] * table_stride,
                         head, group.segment, &segment);
            continue;
        }
        int64_t num_queries, parts;
        for (;; s++) {
            num_queries = query_starts[s + 1] - query_starts[s];
            parts = num_queries == 1 ? 0 : (num_queries + QUERY_TILE - 1) / QUERY_TILE;
            if (tile < before + parts) break;
            before += parts;
        }
        const int64_t part = parts - 1 - (tile - before);
        attend_chunk(&in, in.queries + query_starts[s] * in.query_stride, tables + table_rows[s] * table_stride,
                     starts[s], part * QUERY_TILE, smaller(num_queries, (part + 1) * QUERY_TILE), head, &segment,
                     output + query_starts[s] * heads * in.size);
    }
    if (has_codes(&in)) end_tiles();
}

OPERATION(merge_segments) {
    const Inputs in = {
        .kv_heads = args->num_kv_heads,
        .group = args->heads_per_kv_head,
        .size = args->head_dim,
        .window = args->window,
    };
    const int64_t sequences = count(args->num_rows), heads = in.kv_heads * in.group;
    const int32_t *query_starts = args->query_starts, *starts = args->starts;
    FOR_ROWS(s, sequences) {
        if (query_starts[s + 1] - query_starts[s] != 1) continue;
        for (int64_t head = 0; head < heads; head++) {
            State state = {args->output + (query_starts[s] * heads + head) * in.size, -INFINITY, 0.0f};
            for (int64_t index = oldest(&in, starts[s]) / SEGMENT; index <= starts[s] / SEGMENT; index++) {
                const float *row =
                    args->partials + ((args->partial_starts[s] + index) * heads + head) * (in.size + 2);
                merge(&state, row, row[in.size], row[in.size + 1], in.size);
            }
            divide(&state, in.size);
        }
    }
}
