// Codes out of the blocks of GGUF's types; their layouts are those of engine/kernels/blocks.py.

#include "kernels.h"

enum { BYTES, PAIRS_OF_16, PAIRS_OF_32, FIVES, SIXES };

// Low halves of some bytes come first in a block, and then the high ones: neighbours into one byte.
INLINE void pair(const uint8_t *bytes, uint8_t *output, int size) {
    for (int i = 0; i < size / 2; i++) {
        output[i] = (uint8_t)((bytes[2 * i] & 15) | bytes[2 * i + 1] << 4);
        output[size / 2 + i] = (uint8_t)(bytes[2 * i] >> 4 | (bytes[2 * i + 1] & 0xF0));
    }
}

// 32 fifth bits, then 16 bytes of halves.
INLINE void take_fives(const uint8_t *bytes, uint8_t *output) {
    uint32_t fifth;
    memcpy(&fifth, bytes, sizeof fifth);
    for (int i = 0; i < 16; i++) {
        output[i] = (uint8_t)((bytes[4 + i] & 15) | (fifth >> i & 1) << 4);
        output[16 + i] = (uint8_t)(bytes[4 + i] >> 4 | (fifth >> (16 + i) & 1) << 4);
    }
}

// Twice for 128 elements: 64 bytes of halves, behind those of both 32 bytes, each with two bits of four elements.
INLINE void take_sixes(const uint8_t *bytes, uint8_t *output) {
    for (int half = 0; half < 2; half++, output += 128) {
        const uint8_t *low = bytes + 64 * half, *high = bytes + 128 + 32 * half;
        for (int i = 0; i < 32; i++) {
            output[i] = (uint8_t)((low[i] & 15) | (high[i] & 3) << 4);
            output[32 + i] = (uint8_t)((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4);
            output[64 + i] = (uint8_t)(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
            output[96 + i] = (uint8_t)(low[32 + i] >> 4 | high[i] >> 6 << 4);
        }
    }
}

OPERATION(take_codes) {
    const int64_t rows = count(args->num_rows), block_bytes = args->block_bytes, start = args->start;
    const int64_t codes_bytes = block_bytes - start, layout = args->layout;
    const int64_t width = layout == FIVES ? 32 : layout == SIXES ? 256 : codes_bytes;
    FOR_ROWS(m, rows) {
        const uint8_t *bytes = args->data + m * args->stride + start;
        uint8_t *output = args->output + m * args->num_blocks * width;
        for (int64_t b = 0; b < args->num_blocks; b++, bytes += block_bytes, output += width) {
            if (layout == FIVES) take_fives(bytes, output);
            else if (layout == SIXES) take_sixes(bytes, output);
            else if (layout == BYTES) memcpy(output, bytes, (size_t)codes_bytes);
            else if (layout == PAIRS_OF_16)
                for (int64_t i = 0; i < codes_bytes; i += 16) pair(bytes + i, output + i, 16);
            else
                for (int64_t i = 0; i < codes_bytes; i += 32) pair(bytes + i, output + i, 32);
        }
    }
}
