// Weights into the panels that matmul.c reads.

#include "kernels.h"

enum { PANEL = 16, QUAD = 4, ALIGNMENT = 64 };

INLINE int64_t padded(int64_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

OPERATION(pack_int8) {
    const int64_t panels = count(args->num_rows), rows = args->rows, columns = args->columns, stride = padded(columns);
    FOR_ROWS(panel, panels) {
        uint8_t *output = args->output + panel * PANEL * stride;
        memset(output, (int)args->offset, (size_t)(PANEL * stride));
        for (int64_t row = 0; row < PANEL && panel * PANEL + row < rows; row++) {
            const uint8_t *weight = (const uint8_t *)args->weight + (panel * PANEL + row) * columns;
            for (int64_t k = 0; k < columns; k++)
                output[(k / QUAD * PANEL + row) * QUAD + k % QUAD] = (uint8_t)(weight[k] + args->offset);
        }
    }
}

// Elements 2i and 2i + 1 of each row: of eight, the first four go into low nibbles, the others into high ones.
OPERATION(pack_nibbles) {
    const int64_t panels = count(args->num_rows), rows = args->rows, bytes = args->num_bytes;
    const int64_t panel_bytes = padded(2 * bytes) / 2 * PANEL;
    FOR_ROWS(panel, panels) {
        uint8_t *output = args->output + panel * panel_bytes;
        memset(output, 0, (size_t)panel_bytes);
        for (int64_t row = 0; row < PANEL && panel * PANEL + row < rows; row++) {
            const uint8_t *codes = args->codes + (panel * PANEL + row) * bytes;
            for (int64_t i = 0; i < bytes; i++) {
                uint8_t *place = output + i / 4 * PANEL * QUAD + row * QUAD + i % 2 * 2;
                const int shift = i % 4 / 2 * 4;
                place[0] |= (uint8_t)((codes[i] & 15) << shift);
                place[1] |= (uint8_t)((codes[i] >> 4) << shift);
            }
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
    const int64_t panel_bytes = args->panel_bytes, blocks = padded(2 * bytes) / BLOCK;
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
