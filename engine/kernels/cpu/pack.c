// Weights into the panels that matmul.c reads.

#include "kernels.h"

enum { PANEL = 16, QUAD = 4 };

// The next four bytes of a row of `size`, zeros behind its end.
INLINE uint32_t word_at(const uint8_t *row, int64_t position, int64_t size) {
    uint32_t word = 0;
    const int64_t left = size - position;
    if (left >= (int64_t)sizeof word) memcpy(&word, row + position, sizeof word);
    else if (left > 0) memcpy(&word, row + position, (size_t)left);
    return word;
}

// To a byte 128 is added by turning its highest bit over.
OPERATION(pack_int8) {
    const int64_t panels = count(args->num_rows), columns = args->columns, stride = padded_columns(columns);
    FOR_ROWS(panel, panels) {
        const uint8_t *weight = (const uint8_t *)args->weight + panel * PANEL * columns;
        const int64_t rows = args->rows - panel * PANEL < PANEL ? args->rows - panel * PANEL : PANEL;
        uint32_t *output = (uint32_t *)(args->output + panel * PANEL * stride);
        for (int64_t k = 0; k < stride; k += QUAD, output += PANEL)
            for (int64_t row = 0; row < PANEL; row++)
                output[row] = 0x80808080u ^ (row < rows ? word_at(weight + row * columns, k, columns) : 0);
    }
}

// Elements 2i and 2i + 1 of each row: of eight, the first four go into low nibbles, the others into high ones.
OPERATION(pack_nibbles) {
    const int64_t panels = count(args->num_rows), rows = args->rows, bytes = args->num_bytes;
    const int64_t panel_bytes = padded_columns(2 * bytes) / 2 * PANEL;
    FOR_ROWS(panel, panels) {
        const uint8_t *codes = args->codes + panel * PANEL * bytes;
        uint32_t *output = (uint32_t *)(args->output + panel * panel_bytes);
        for (int64_t i = 0; i < panel_bytes / PANEL; i += 4, output += PANEL)
            for (int64_t row = 0; row < PANEL; row++) {
                const uint32_t word = panel * PANEL + row < rows ? word_at(codes + row * bytes, i, bytes) : 0;
                const uint32_t first = word & 0xffff, second = word >> 16;
                const uint32_t even = (first & 0x0f0f) | (second & 0x0f0f) << 4;
                const uint32_t odd = (first >> 4 & 0x0f0f) | (second & 0xf0f0);
                output[row] = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
            }
    }
}

// The low `bits` bits of each byte, moved up.
INLINE uint32_t field(uint32_t word, int from, int bits, int to) {
    return (word >> from & 0x01010101u * ((1u << bits) - 1)) << to;
}

// Eight words of codes of five bits in five words: the other three fill the bits that these leave.
INLINE void pack_fives(const uint32_t *codes, uint32_t *lines) {
    lines[0] = codes[0] | field(codes[5], 0, 3, 5);
    lines[PANEL] = codes[1] | field(codes[5], 3, 2, 6) | field(codes[7], 3, 1, 5);
    lines[2 * PANEL] = codes[2] | field(codes[6], 0, 3, 5);
    lines[3 * PANEL] = codes[3] | field(codes[6], 3, 2, 6) | field(codes[7], 4, 1, 5);
    lines[4 * PANEL] = codes[4] | field(codes[7], 0, 3, 5);
}

// Four of six bits in three.
INLINE void pack_sixes(const uint32_t *codes, uint32_t *lines) {
    for (int i = 0; i < 3; i++) lines[i * PANEL] = codes[i] | field(codes[3], 2 * i, 2, 6);
}

OPERATION(pack_bits) {
    const int64_t panels = count(args->num_rows), rows = args->rows, columns = args->columns;
    const int64_t quads = args->bits == 5 ? 8 : 4, lines = quads * args->bits / 8;
    const int64_t units = padded_columns(columns) / (quads * QUAD);
    FOR_ROWS(panel, panels) {
        uint32_t *unit = (uint32_t *)args->output + panel * units * lines * PANEL;
        for (int64_t i = 0; i < units; i++, unit += lines * PANEL)
            for (int64_t row = 0; row < PANEL; row++) {
                const int64_t n = panel * PANEL + row;
                uint32_t words[8] = {0};
                for (int64_t quad = 0; n < rows && quad < quads; quad++)
                    words[quad] = word_at(args->codes + n * columns, (i * quads + quad) * QUAD, columns);
                if (args->bits == 5) pack_fives(words, unit + row);
                else pack_sixes(words, unit + row);
            }
    }
}

// A panel without factors starts with tables of 16 values plus 128, a table an output; one with factors with the
// values as they are, room up to 64 bytes, and for each block 16 factors. It ends with the blocks: twice, for 32 input
// features, 16 bytes an output, the first 16 in the low nibbles. Tables, and bytes of such a half, stand in the order
// of outputs 0, 4, 8, 12, 1, 5, …
OPERATION(pack_codebook) {
    enum { VALUES = 16, BLOCK = 64, LINE = 64, HALF_BYTES = 256 };
    const int64_t panels = count(args->num_rows), rows = args->rows, bytes = args->num_bytes;
    const int64_t panel_bytes = args->panel_bytes, blocks = padded_columns(2 * bytes) / BLOCK;
    const int16_t *all_factors = args->factors;
    FOR_ROWS(panel, panels) {
        uint8_t *output = args->output + panel * panel_bytes;
        uint8_t *codes_of_panel = output + panel_bytes - 2 * blocks * HALF_BYTES;
        memset(output, 0, (size_t)panel_bytes);
        if (all_factors != NULL) memcpy(output, args->values, VALUES * sizeof(int16_t));
        for (int64_t row = 0; row < PANEL && panel * PANEL + row < rows; row++) {
            const int64_t n = panel * PANEL + row, place = (row % QUAD * (PANEL / QUAD) + row / QUAD) * VALUES;
            if (all_factors == NULL)
                for (int i = 0; i < VALUES; i++)
                    output[place + i] = ((const uint8_t *)args->values)[n * VALUES + i] ^ 128;
            else
                for (int64_t b = 0; b < blocks; b++)
                    ((int16_t *)(output + LINE))[b * PANEL + row] = all_factors[n * blocks + b];
            const uint8_t *codes = args->codes + n * bytes;
            for (int64_t i = 0; i < 2 * bytes; i++) {
                const int code = (codes[i / 2] >> (i % 2 * 4)) & 15, shift = i % 32 / 16 * 4;
                codes_of_panel[i / 32 * HALF_BYTES + place + i % 16] |= (uint8_t)(code << shift);
            }
        }
    }
}

// See sparse_tiles.h; a quad that there is not has zeros for its first two elements.
OPERATION(pack_sparse) {
    enum { UNIT = 4, KEPT = 2, PLACES = PANEL * KEPT };
    const int64_t panels = count(args->num_rows), rows = args->rows, columns = args->columns, bits = args->bits;
    const int64_t quads = columns / QUAD, units = padded_columns(columns) / QUAD / UNIT, code_bytes = PLACES * bits / 8;
    const int64_t unit_bytes = PLACES + UNIT * code_bytes, mask_bytes = (quads + 1) / 2;
    FOR_ROWS(panel, panels) {
        uint8_t *unit = args->output + panel * units * unit_bytes;
        for (int64_t u = 0; u < units; u++, unit += unit_bytes) {
            memset(unit, 0, (size_t)unit_bytes);
            for (int64_t i = 0; i < UNIT * PANEL; i++) {
                const int64_t row = i / UNIT, part = i % UNIT, n = panel * PANEL + row, quad = u * UNIT + part;
                const int is_there = n < rows && quad < quads;
                uint32_t mask = is_there ? args->masks[n * mask_bytes + quad / 2] >> (quad % 2 * 4) & 15 : 3;
                for (int64_t slot = 0; slot < KEPT; slot++, mask &= mask - 1) {
                    const int64_t place = row * KEPT + slot, code = (n * quads + quad) * KEPT + slot;
                    unit[place] |= (uint8_t)((mask != 0 ? __builtin_ctz(mask) : 0) << (2 * part));
                    uint8_t *output = unit + PLACES + (bits == 8 ? part : part / 2) * PLACES + place;
                    const uint8_t *kept = args->kept;
                    if (bits == 8) *output = is_there ? kept[code] : 0;
                    else *output |= (uint8_t)((is_there ? kept[code / 2] >> (slot * 4) & 15 : 8) << (part % 2 * 4));
                }
            }
        }
    }
}
