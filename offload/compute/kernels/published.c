/* Decodes matrices as checkpoints publish them. Every weight is made in float32 by the same operations as in the torch code
 * (offload/checkpoint/formats) and rounded once, so the bits are the same.
 *
 * The layouts: docs/formats.md. A call decodes the rows from first to last, so that several threads can share a matrix. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { F32, BF16 };
enum { GROUP = 32, TILE = 16 };

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static inline void store(void *out, int dtype, long at, const float *values, long count) {
    if (dtype == F32) {
        memcpy((float *)out + at, values, 4 * count);
        return;
    }
    uint16_t *to = (uint16_t *)out + at;
    for (long i = 0; i < count; i++) to[i] = to_bf16(values[i]);
}

/* The bits of an e4m3 in the place of a float's are the value less 120 powers of two; all bits set are no number. */
static inline float from_e4m3(uint8_t code) {
    uint32_t size = code & 0x7f;
    float value = as_float(size << 20) * 0x1p120f;
    value = size == 0x7f ? NAN : value;
    return code & 0x80 ? -value : value;
}

/* codes [rows, columns] e4m3; scales float32 [ceil(rows / block_rows), ceil(columns / block_columns)] */
void rl_fp8(const uint8_t *codes, const float *scales, long columns, long block_rows, long block_columns, void *out,
            int dtype, long first, long last) {
    long across = (columns + block_columns - 1) / block_columns;
    for (long r = first; r < last; r++) {
        const float *scale = scales + r / block_rows * across;
        for (long block = 0; block < across; block++) {
            long end = (block + 1) * block_columns < columns ? (block + 1) * block_columns : columns;
            for (long c = block * block_columns; c < end; c += 128) {
                float values[128];
                long count = end - c < 128 ? end - c : 128;
                const uint8_t *from = codes + r * columns + c;
                for (long i = 0; i < count; i++) values[i] = from_e4m3(from[i]) * scale[block];
                store(out, dtype, r * columns + c, values, count);
            }
        }
    }
}

static const float FP4[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

static inline void fp4_group(const uint8_t *codes, uint8_t exponent, float *values) {
    float scale = exponent ? as_float((uint32_t)exponent << 23) : 0x1p-127f;
    for (int i = 0; i < GROUP / 2; i++) {
        values[2 * i] = FP4[codes[i] & 15] * scale;
        values[2 * i + 1] = FP4[codes[i] >> 4] * scale;
    }
}

/* codes [rows, columns / 2], scales [rows, columns / 32]; out is [rows, columns], or its transpose. first is a multiple of 16. */
void rl_mxfp4(const uint8_t *codes, const uint8_t *scales, long rows, long columns, int transposed, void *out, int dtype,
              long first, long last) {
    long groups = columns / GROUP;
    for (; first < last; first += TILE) {
        long count = last - first < TILE ? last - first : TILE;
        for (long g = 0; g < groups; g++) {
            float values[TILE][GROUP], turned[TILE];
            for (long r = 0; r < count; r++) {
                long at = (first + r) * groups + g;
                fp4_group(codes + at * (GROUP / 2), scales[at], values[r]);
                if (!transposed) store(out, dtype, at * GROUP, values[r], GROUP);
            }
            for (long c = 0; transposed && c < GROUP; c++) {
                for (long r = 0; r < count; r++) turned[r] = values[r][c];
                store(out, dtype, (g * GROUP + c) * rows + first, turned, count);
            }
        }
    }
}

/* codes [rows, columns / 2], 8 above their value; scales bfloat16 [rows, columns / group]; products are rounded to bfloat16 */
void rl_int4(const uint8_t *codes, const uint16_t *scales, long columns, long group, void *out, int dtype, long first,
             long last) {
    long groups = columns / group;
    for (long r = first; r < last; r++) {
        for (long g = 0; g < groups; g++) {
            float scale = as_float((uint32_t)scales[r * groups + g] << 16);
            for (long c = g * group; c < (g + 1) * group; c += GROUP) {
                float values[GROUP];
                const uint8_t *from = codes + (r * columns + c) / 2;
                for (int i = 0; i < GROUP / 2; i++) {
                    values[2 * i] = (float)((int)(from[i] & 15) - 8) * scale;
                    values[2 * i + 1] = (float)((int)(from[i] >> 4) - 8) * scale;
                }
                if (dtype == F32)
                    for (int i = 0; i < GROUP; i++) values[i] = as_float((uint32_t)to_bf16(values[i]) << 16);
                store(out, dtype, r * columns + c, values, GROUP);
            }
        }
    }
}
