// The operations: each with its arguments, in the order in which they lie in memory as words of 8 bytes. This list is
// the only one. kernels.h makes a struct of each operation's arguments and declares its body, operations.c the table
// by which Python checks a call. A body without an entry does not compile, an entry without a body does not link.
//
// Whoever includes the list defines its words before:
//
//     SIGNATURE(operation, arguments)      before them each has the number of rows, [1] int64, M in the shapes below
//     INTEGER(name), FLOAT(name)           64 bits each
//     READS(type, name)                    the address of elements; void: another argument says of which type
//     WRITES(type, name)                   they are written, perhaps read before
//     MAY_READ, MAY_WRITE                  the address may be null
//     WRITES_CODES, MAY_WRITE_CODES        int8 activations, `Codes` in kernels.h: low, tokens, quads, stride; low is
//                                          null where floats are wanted
//     READS_CODES, READS_GROUP_CODES       of the latter tokens and quads are null where groups have scales
//
// Shapes stand beside the arguments, "or null" beside what may be that.

// elementwise.c

SIGNATURE(quantize,
    READS(float, x)                // [M, K]
    INTEGER(x_stride)
    INTEGER(size)                  // K
    INTEGER(is_rotated)            // whether x is rotated before (rotation.py)
    FLOAT(spread)
    WRITES_CODES
)

SIGNATURE(add,
    WRITES(float, x)               // [M, H]: x += delta
    READS(float, delta)            // [M, H]
    INTEGER(size)                  // H
)

SIGNATURE(gather,
    READS(float, x)                // [T, H]
    READS(int32_t, indices)        // [M]
    INTEGER(size)                  // H
    WRITES(float, output)          // [M, H]
)

SIGNATURE(rms_norm,
    WRITES(float, x)               // [M, H], written where there is a delta
    MAY_READ(float, delta)         // [M, H], added to x before, or null
    READS(float, weight)           // [H]
    FLOAT(epsilon)
    INTEGER(size)                  // H
    MAY_WRITE(float, output)       // [M, H] or null
    INTEGER(is_rotated)            // whether what is written is (rotation.py)
    FLOAT(spread)
    MAY_WRITE_CODES
)

SIGNATURE(gated,
    READS(float, gate_up)          // [M, 2 * I]
    INTEGER(size)                  // I
    INTEGER(is_gelu)               // else SiLU
    MAY_WRITE(float, output)       // [M, I] or null
    INTEGER(is_rotated)            // whether what is written is (rotation.py)
    FLOAT(spread)
    MAY_WRITE_CODES
)

SIGNATURE(checksum,
    READS(void, data)              // [num_bytes], in M blocks of 2^20, the last one perhaps shorter
    INTEGER(num_bytes)
    WRITES(int32_t, sums)          // [M], see checksum.py
)

SIGNATURE(rotate_and_write,
    WRITES(float, heads)           // [M, H + 2 * G, D]: queries and keys are rotated in place
    READS(int32_t, positions)      // [M]
    READS(float, cosine)           // [positions, D / 2]
    READS(float, sine)             // [positions, D / 2]
    READS(int32_t, slots)          // [M]
    MAY_READ(float, query_norm)    // [D] or null
    MAY_READ(float, key_norm)      // [D] or null
    FLOAT(epsilon)
    INTEGER(num_heads)             // H
    INTEGER(num_kv_heads)          // G
    INTEGER(head_dim)              // D
    WRITES(void, keys)             // [slots, G, D]
    WRITES(void, values)           // [slots, G, D]
    MAY_WRITE(void, key_scales)    // see attention/kv_layer.py, or null
    MAY_WRITE(void, value_scales)
    INTEGER(cache_type)            // of kernels.h
    INTEGER(hadamard_size)         // of hadamard.py: 2^L
    FLOAT(query_factor)
    FLOAT(key_factor)
)

// attention.c, whose rows are the S sequences

SIGNATURE(group_segments,
    READS(int32_t, query_starts)   // [S + 1]
    READS(int32_t, starts)         // [S]
    READS(int32_t, table_rows)     // [S]
    READS(int32_t, tables)         // [rows, stride]
    INTEGER(table_stride)
    INTEGER(block_size)
    WRITES(int32_t, groups)        // [.., 3]
    WRITES(int32_t, members)       // [..]
    WRITES(int64_t, num_groups)    // [1]
)

SIGNATURE(paged_attention,
    READS(float, queries)          // [T, stride]
    INTEGER(query_stride)
    READS(int32_t, query_starts)   // [S + 1]
    READS(int32_t, starts)         // [S]
    READS(int32_t, table_rows)     // [S]
    READS(int32_t, tables)         // [rows, stride]
    INTEGER(table_stride)
    READS(void, keys)              // [slots, G, D]
    READS(void, values)            // [slots, G, D]
    MAY_READ(void, key_scales)     // see attention/kv_layer.py, or null
    MAY_READ(void, value_scales)
    INTEGER(cache_type)            // of kernels.h
    INTEGER(num_kv_heads)          // G
    INTEGER(heads_per_kv_head)     // H / G
    INTEGER(head_dim)              // D
    INTEGER(block_size)
    FLOAT(scale)
    INTEGER(window)                // keys that a query sees; 0: all
    WRITES(float, output)          // [T, H, D]
    READS(int32_t, partial_starts) // [S]
    WRITES(float, partials)        // [.., H, D + 2]
    READS(int32_t, groups)         // [.., 3]
    READS(int32_t, members)        // [..]
    READS(int64_t, num_groups)     // [1]
)

SIGNATURE(merge_segments,
    READS(int32_t, query_starts)   // [S + 1]
    READS(int32_t, starts)         // [S]
    INTEGER(num_kv_heads)          // G
    INTEGER(heads_per_kv_head)     // H / G
    INTEGER(head_dim)              // D
    INTEGER(window)                // or 0
    WRITES(float, output)          // [T, H, D]
    READS(int32_t, partial_starts) // [S]
    READS(float, partials)         // [.., H, D + 2]
)

// matmul.c

SIGNATURE(int8_matmul,
    READS_CODES                    // [M, K]
    READS(uint8_t, weight)         // [N, K] in panels, see pack.c
    INTEGER(weight_kind)           // of term_sums.h
    READS(float, scale)            // [N padded to 16]
    MAY_READ(float, bias)          // [N padded to 16] or null
    INTEGER(features)              // N
    WRITES(float, output)          // [M, N]
)

SIGNATURE(float_matmul,
    READS(float, x)                // [M, K]
    INTEGER(size)                  // K
    READS(float, weight)           // [N, K] in panels
    MAY_READ(float, bias)          // [N padded to 16] or null
    INTEGER(features)              // N
    WRITES(float, output)          // [M, N]
)

SIGNATURE(float_rows,
    READS(int32_t, indices)        // [M], of rows of the weight
    INTEGER(size)                  // K
    READS(float, weight)           // [N, K] in panels
    FLOAT(factor)
    WRITES(float, output)          // [M, K]
)

// grouped_matmul.c

SIGNATURE(grouped_matmul,
    READS_GROUP_CODES              // [M, K]
    MAY_READ(float, token_scale)   // [M, groups] of the activations, or null
    READS(uint8_t, weight)         // [N, K] in panels
    INTEGER(kind)                  // of group_tiles.h
    INTEGER(offset)                // of the codes
    MAY_READ(uint8_t, table)       // [16] or null
    MAY_READ(Half, group_scale)    // [panels, groups, 16] of the weight, with steps [panels, blocks, 16], or null
    MAY_READ(int8_t, scale_steps)  // [panels, groups, 16] or null
    MAY_READ(Half, minimum)        // as the scale
    MAY_READ(int8_t, minimum_steps)
    MAY_READ(float, scale)         // [N padded to 16] or null
    MAY_READ(float, bias)          // [N padded to 16] or null
    INTEGER(size)                  // K
    INTEGER(group_size)
    INTEGER(block_size)            // the group size times a power of two
    INTEGER(features)              // N
    WRITES(float, output)          // [M, N], rows at a distance of output_stride
    INTEGER(output_stride)
)

SIGNATURE(weight_rows,
    READS(int32_t, indices)        // [M], of rows of the weight
    READS(uint8_t, weight)         // as in grouped_matmul, down to the block size
    INTEGER(kind)
    INTEGER(offset)
    MAY_READ(uint8_t, table)
    READS(Half, group_scale)
    MAY_READ(int8_t, scale_steps)
    MAY_READ(Half, minimum)
    MAY_READ(int8_t, minimum_steps)
    INTEGER(size)                  // K
    INTEGER(group_size)
    INTEGER(block_size)
    FLOAT(factor)
    WRITES(float, output)          // [M, K]
)

SIGNATURE(quantize_groups,
    READS(float, x)                // [M, K]
    INTEGER(x_stride)
    INTEGER(size)                  // K
    INTEGER(group_size)            // a multiple of 16
    WRITES(int8_t, codes)          // [M, stride]
    INTEGER(stride)
    WRITES(float, scale)           // [M, groups]
)

// sharded_matmul.c

SIGNATURE(block_maxima,
    READS(float, x)                // [M, K]
    INTEGER(x_stride)
    INTEGER(size)                  // K, a multiple of 32
    WRITES(float, maxima)          // [M, K / 32]: the largest of each 32, infinity where one is not finite
)

SIGNATURE(quantize_part,
    READS(float, x)                // [M, part of K]
    INTEGER(x_stride)
    INTEGER(size)                  // of the part
    FLOAT(spread)
    WRITES_CODES
    READS(float, maxima)           // [M, blocks] of the whole tokens
    INTEGER(num_blocks)
)

SIGNATURE(sum_products,
    READS_CODES                    // [M, part of K]
    READS(uint8_t, weight)         // [shares, N padded to 16, part of K] in panels
    INTEGER(weight_kind)           // of term_sums.h: int8 or sparse
    INTEGER(num_shares)
    INTEGER(features)              // N, of a share
    INTEGER(num_terms)
    WRITES(int32_t, sums)          // [shares, M, terms, N]: of low terms and, with two terms, of high ones
)

SIGNATURE(finish_sums,
    READS(int32_t, sums)           // [shares, M, terms, N]
    INTEGER(num_shares)
    INTEGER(features)              // N
    INTEGER(num_terms)
    READS(Token, tokens)           // [M] of the codes
    READS(float, scale)            // [N]
    MAY_READ(float, bias)          // [N] or null
    WRITES(float, output)          // [M, N]
)

// pack.c, whose rows are panels

SIGNATURE(pack_int8,
    READS(int8_t, weight)          // [N, K]
    INTEGER(rows)                  // N
    INTEGER(columns)               // K
    WRITES(uint8_t, output)        // [panels, padded K / 4, 16, 4]: the codes plus 128
)

SIGNATURE(pack_nibbles,
    READS(uint8_t, codes)          // [N, bytes], the even elements in the low nibbles
    INTEGER(rows)                  // N
    INTEGER(num_bytes)
    WRITES(uint8_t, output)        // [panels, padded K / 8, 64], see group_tiles.h
)

SIGNATURE(pack_bits,
    READS(uint8_t, codes)          // [N, K], one in a byte, of 5 or 6 bits
    INTEGER(rows)                  // N
    INTEGER(columns)               // K
    INTEGER(bits)
    WRITES(uint8_t, output)        // [panels, padded K * bits * 2], see group_tiles.h
)

SIGNATURE(pack_codebook,
    READS(uint8_t, codes)          // [N, bytes], the even elements in the low nibbles
    INTEGER(rows)                  // N
    INTEGER(num_bytes)
    READS(void, values)            // [N, 16] int8, or with factors [16] int16
    MAY_READ(int16_t, factors)     // [N, blocks of 64] or null
    INTEGER(panel_bytes)
    WRITES(uint8_t, output)        // [panels, bytes of a panel]
)

// blocks.c, whose rows are those of a matrix

SIGNATURE(take_codes,
    READS(uint8_t, data)           // [M, stride]: blocks of GGUF's, one behind the other
    INTEGER(stride)
    INTEGER(num_blocks)            // of a row
    INTEGER(block_bytes)
    INTEGER(start)                 // where a block's codes begin
    INTEGER(layout)                // of blocks.py
    WRITES(uint8_t, output)        // [M, codes], two of four bits in a byte, else one
)

SIGNATURE(pack_sparse,
    READS(void, kept)              // [N, K / 2] int8, or [N, K / 4] uint8 of two codes
    READS(uint8_t, masks)          // [N, ceil(K / 8)], those of two fours
    INTEGER(rows)                  // N
    INTEGER(columns)               // K, a multiple of 4
    INTEGER(bits)                  // of a code: 8 or 4
    WRITES(uint8_t, output)        // [panels, bytes], see sparse_tiles.h
)

// sample.c, whose rows are those that draw, [R, V] float32 logits

SIGNATURE(adjust_logits,
    WRITES(float, logits)          // [R, V]
    INTEGER(vocab_size)            // V
    MAY_READ(int32_t, allowed)     // [R, ceil(V / 32)], bitmasks, or null
    MAY_READ(int32_t, starts)      // [R + 1], where the entries of each row begin, or null
    MAY_READ(int32_t, token_ids)   // [entries]; what changes a logit as in sample.py
    MAY_READ(float, bias)
    MAY_READ(float, repetition)
    MAY_READ(float, subtract)
)

SIGNATURE(draw_tokens,
    READS(float, logits)           // [R, V]
    INTEGER(vocab_size)            // V
    READS(int32_t, key_low)        // [R] each, as in sample.py
    READS(int32_t, key_high)
    READS(float, temperature)
    READS(int32_t, top_k)
    READS(float, top_p)
    READS(float, min_p)
    WRITES(int32_t, tokens)        // [R]: -1 where there is nothing to draw from
)

SIGNATURE(logprobs_of,
    READS(float, logits)           // [R, V]
    INTEGER(vocab_size)            // V
    READS(int32_t, tokens)         // [R]: below 0 is as 0
    READS(int32_t, nums)           // [R]: likeliest tokens that are wanted, at most `most`
    INTEGER(most)
    WRITES(float, chosen)          // [R]
    WRITES(int32_t, ranks)         // [R]
    WRITES(int64_t, top_ids)       // [R, most], the likeliest first, of equal ones the lowest id
    WRITES(float, top_values)      // [R, most]
)
