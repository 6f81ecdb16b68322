/* The weights of matrices as checkpoints publish them.
 *
 * A format is one function that makes the weights of a part of a row, in float32, by the same operations as the torch code
 * (offload/checkpoint/formats), and a line in MADE_AS. A weight is rounded once to the model's dtype, so decoded matrices
 * are bit for bit torch's. The layouts: docs/formats.md.
 */
#include "weights.h"

/* --- FP8 (e4m3): codes [rows, columns], scales float32 [ceil(rows / block_rows), ceil(columns / block_columns)] */

/* The bits of an e4m3 in the place of a float's are the value less 120 powers of two; all bits set are no number. */
INLINE float from_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7f;
  const float value = size == 0x7f ? NAN : as_float(size << 20) * 0x1p120f;
  return code & 0x80 ? -value : value;
}

INLINE f32x16 from_e4m3_16(const uint8_t *codes) {
  i32x16 code;
#if defined(__AVX512F__)
  code = (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes));
#else
  for (int i = 0; i < 16; i++) code[i] = (int8_t)codes[i];
#endif
  const i32x16 bits = (code & (int32_t)0x80000000) | (code & 0x7f) << 20;
  f32x16 value;
  memcpy(&value, &bits, sizeof value);
  return choose16((code & 0x7f) == 0x7f, all16(NAN), value * 0x1p120f);
}

INLINE void make_fp8(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const long across = (m->columns + m->block_columns - 1) / m->block_columns;
  const float *scales = (const float *)m->scales + row / m->block_rows * across;
  const uint8_t *codes = m->codes + row * m->columns + first;
  for (long c = 0; c < count;) {
    const long block = (first + c) / m->block_columns, left = (block + 1) * m->block_columns - first;
    const long end = left < count ? left : count;
    for (; c + 16 <= end; c += 16) put16(out, kind, c, from_e4m3_16(codes + c) * scales[block]);
    for (; c < end; c++) put(out, kind, c, from_e4m3(codes[c]) * scales[block]);
  }
}

/* --- MXFP4: codes [rows, columns / 2], scales uint8 [rows, columns / 32] */

static const float FP4[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

INLINE void make_mxfp4(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *codes = m->codes + (row * m->columns + first) / 2;
  const uint8_t *exponents = (const uint8_t *)m->scales + (row * m->columns + first) / 32;
  for (long c = 0; c < count; c += 32) {
    const uint8_t exponent = exponents[c / 32];
    const float scale = exponent ? as_float((uint32_t)exponent << 23) : 0x1p-127f;
    u8x16 first_half, second_half;
    pairs(codes + c / 2, 0, &first_half, &second_half);
    put16(out, kind, c, pick16(FP4, first_half) * scale);
    put16(out, kind, c + 16, pick16(FP4, second_half) * scale);
  }
}

/* --- NVFP4: codes as MXFP4's, scales e4m3 [rows, columns / 16]; more[0], float32, is for all of them: they are divided by
 * it if `variant` is 1, else multiplied */

INLINE void make_nvfp4(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *codes = m->codes + (row * m->columns + first) / 2;
  uint8_t held[16] = {0};
  memcpy(held, (const uint8_t *)m->scales + (row * m->columns + first) / 16, count / 16);
  const f32x16 own = from_e4m3_16(held), all = all16(*(const float *)m->more[0]);
  float scales[16];
  const f32x16 both = m->variant ? own / all : own * all;
  memcpy(scales, &both, sizeof both);
  for (long c = 0; c < count; c += 32) {
    u8x16 first_half, second_half;
    pairs(codes + c / 2, 0, &first_half, &second_half);
    put16(out, kind, c, pick16(FP4, first_half) * scales[c / 16]);
    put16(out, kind, c + 16, pick16(FP4, second_half) * scales[c / 16 + 1]);
  }
}

/* --- whole numbers of 4 bits, 8 above their value: codes [rows, columns / 2], scales bfloat16 [rows, columns / block_columns];
 * products are rounded to bfloat16 */

INLINE f32x16 weights_of_int4(u8x16 codes, float scale, const int kind) {
  const f32x16 value = (numbers16(codes) - 8.0f) * scale;
  return kind == F32 || kind == F16 ? to_bf16_and_back(value) : value;
}

INLINE void make_int4(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *codes = m->codes + (row * m->columns + first) / 2;
  const uint16_t *scales = (const uint16_t *)m->scales + row * (m->columns / m->block_columns);
  for (long c = 0; c < count; c += 32) {
    const float scale = bf16_to_float(scales[(first + c) / m->block_columns]);
    u8x16 first_half, second_half;
    pairs(codes + c / 2, 0, &first_half, &second_half);
    put16(out, kind, c, weights_of_int4(first_half, scale, kind));
    put16(out, kind, c + 16, weights_of_int4(second_half, scale, kind));
  }
}

/* --- whole numbers of 4 bits with zero points, or scales in float16: codes [rows, columns / 2], of GPTQ and AWQ as by_inputs.c
 * has turned them. Scales are float16, or bfloat16 if block_rows is 1, for each group of block_columns and each row, more[0]
 * has as many zero points of 4 bits, in words along the rows; NULL: all are 8. `variant`: BY_ROWS, scales and words stand
 * [rows, groups], else [groups, rows]; IN_AWQ_ORDER, the zero points of a word; its low bits: what all zero points lack.
 * Weights are rounded to the scales' dtype. */

enum { IN_AWQ_ORDER = 256, BY_ROWS = 512 };

/* The weights of all 16 codes of a row and a group, so that a weight is a look-up. */
INLINE void weights_of_group(const Packed *m, long row, long group, const int kind, void *table) {
  const long groups = m->columns / m->block_columns, by_rows = m->variant & BY_ROWS;
  const uint16_t held = ((const uint16_t *)m->scales)[by_rows ? row * groups + group : group * m->rows + row];
  float zero = 8.0f;
  if (m->more[0]) {
    const long at = by_rows ? row / 8 * groups + group : (group * m->rows + row) / 8;
    const int place = m->variant & IN_AWQ_ORDER ? row % 2 * 4 + row % 8 / 2 : row % 8;
    zero = (float)(((((const uint32_t *)m->more[0])[at] >> 4 * place) + (m->variant & 15)) & 15);
  }
  f32x16 value = (f32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - zero;
  value = value * (m->block_rows ? bf16_to_float(held) : from_f16(held));
  put16(table, kind, 0, m->block_rows ? to_bf16_and_back(value) : to_f16_and_back(value));
}

INLINE void make_grouped(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *codes = m->codes + (row * m->columns + first) / 2;
  for (long c = 0; c < count;) {
    float table[16];
    const long group = (first + c) / m->block_columns, left = (group + 1) * m->block_columns - first;
    const long end = left < count ? left : count;
    weights_of_group(m, row, group, kind, table);
    for (; c < end; c += 32) {
      u8x16 first_half, second_half;
      pairs(codes + c / 2, 0, &first_half, &second_half);
      pick32(table, first_half, second_half, kind, out, c);
    }
  }
}

/* --- bitsandbytes' NF4 and FP4: codes [rows * columns / 2], high halves first, of which each picks one of the 16 values
 * more[0]; scales float32 for each block_columns weights, or, if `variant` is not 0, codes that pick one of the values
 * more[2], times more[1], float32 for each `variant` of them, plus more[3][0] */

INLINE float scale_of_nf4(const Packed *m, long block) {
  if (!m->variant) return ((const float *)m->scales)[block];
  const float value = ((const float *)m->more[2])[((const uint8_t *)m->scales)[block]];
  return rounded1(value * ((const float *)m->more[1])[block / m->variant]) + *(const float *)m->more[3];
}

INLINE void make_nf4(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const long start = row * m->columns + first;
  const uint8_t *codes = m->codes + start / 2;
  for (long c = 0; c < count;) {
    const long block = (start + c) / m->block_columns, left = (block + 1) * m->block_columns - start;
    const long end = left < count ? left : count;
    const float scale = scale_of_nf4(m, block);
    for (; c < end; c += 32) {
      u8x16 first_half, second_half;
      pairs(codes + c / 2, 1, &first_half, &second_half);
      put16(out, kind, c, pick16(m->more[0], first_half) * scale);
      put16(out, kind, c + 16, pick16(m->more[0], second_half) * scale);
    }
  }
}

/* --- GGUF: blocks with their scales inside, as ggml-common.h has them */

static float half_at(const uint8_t *at) {
  uint16_t half;
  memcpy(&half, at, 2);
  return from_f16(half);
}

INLINE const uint8_t *blocks_at(const Packed *m, long row, long first, int weights, int bytes) {
  return m->codes + (row * m->columns + first) / weights * bytes;
}

INLINE void make_q4_0(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 32, 18);
  for (long c = 0; c < count; c += 32, block += 18) {
    const u8x16 codes = bytes16(block + 2);
    const float scale = half_at(block);
    put16(out, kind, c, (numbers16(codes & 15) - 8.0f) * scale);
    put16(out, kind, c + 16, (numbers16(codes >> 4) - 8.0f) * scale);
  }
}

INLINE void make_q8_0(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 32, 34);
  for (long c = 0; c < count; c += 32, block += 34) {
    const float scale = half_at(block);
    put16(out, kind, c, float_of_int8(block + 2) * scale);
    put16(out, kind, c + 16, float_of_int8(block + 18) * scale);
  }
}

/* Scale and minimum of group g of 8: six bits each, in 12 bytes. */
INLINE void six_bits(const uint8_t *data, int g, int *scale, int *low) {
  if (g < 4) {
    *scale = data[g] & 63;
    *low = data[4 + g] & 63;
  } else {
    *scale = (data[4 + g] & 15) | (data[g - 4] >> 6) << 4;
    *low = data[4 + g] >> 4 | (data[g] >> 6) << 4;
  }
}

/* Two groups of 32 whose codes share bytes. `high` is what holds the fifth bits of Q5_K, else NULL. */
INLINE void make_k(const uint8_t *block, const uint8_t *high, const uint8_t *codes, int g, const int kind, void *out, long at) {
  const float d = half_at(block), dmin = half_at(block + 2);
  float times[2], less[2];
  for (int i = 0; i < 2; i++) {
    int scale, low;
    six_bits(block + 4, g + i, &scale, &low);
    times[i] = d * (float)scale;
    less[i] = dmin * (float)low;
  }
  for (int half = 0; half < 32; half += 16) {
    u8x16 low = bytes16(codes + half) & 15, next = bytes16(codes + half) >> 4;
    if (high) {
      const u8x16 fifth = bytes16(high + half);
      low |= (u8x16)((fifth & (uint8_t)(1 << g)) != 0) & 16;
      next |= (u8x16)((fifth & (uint8_t)(2 << g)) != 0) & 16;
    }
    put16(out, kind, at + half, rounded(numbers16(low) * times[0]) - less[0]);
    put16(out, kind, at + 32 + half, rounded(numbers16(next) * times[1]) - less[1]);
  }
}

INLINE void make_q4_k(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 256, 144);
  for (long c = 0; c < count; c += 64, block += c % 256 ? 0 : 144)
    make_k(block, NULL, block + 16 + c % 256 / 2, c % 256 / 32, kind, out, c);
}

INLINE void make_q5_k(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 256, 176);
  for (long c = 0; c < count; c += 64, block += c % 256 ? 0 : 176)
    make_k(block, block + 16, block + 48 + c % 256 / 2, c % 256 / 32, kind, out, c);
}

/* 16 bytes of the lower halves of codes, and 16 of two more bits for four codes each, of which this takes number `quarter`. */
INLINE f32x16 codes_of_six_bits(const uint8_t *low, const uint8_t *high, const int quarter) {
  const u8x16 four = quarter < 2 ? bytes16(low) & 15 : bytes16(low) >> 4;
  return numbers16(four | (bytes16(high) >> 2 * quarter & 3) << 4) - 32.0f;
}

INLINE void make_q6_k(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 256, 210);
  for (long c = 0; c < count; c += 256, block += 210) {
    const float d = half_at(block + 208);
    for (int half = 0; half < 2; half++)
      for (int at = 0; at < 32; at += 16) {
        const uint8_t *low = block + half * 64 + at, *high = block + 128 + half * 32 + at;
        const int8_t *scales = (const int8_t *)block + 192 + half * 8 + at / 16;
        const long to = c + half * 128 + at;
        put16(out, kind, to, codes_of_six_bits(low, high, 0) * (d * (float)scales[0]));
        put16(out, kind, to + 32, codes_of_six_bits(low + 32, high, 1) * (d * (float)scales[2]));
        put16(out, kind, to + 64, codes_of_six_bits(low, high, 2) * (d * (float)scales[4]));
        put16(out, kind, to + 96, codes_of_six_bits(low + 32, high, 3) * (d * (float)scales[6]));
      }
  }
}

#define ONE(format, kind) \
  static void format##_as_##kind(const Packed *m, long row, long first, long count, void *out) { \
    format(m, row, first, count, kind, out); \
  }
#define MADE_AS(kind) \
  ONE(make_fp8, kind) \
  ONE(make_mxfp4, kind) \
  ONE(make_int4, kind) \
  ONE(make_q4_0, kind) \
  ONE(make_q8_0, kind) \
  ONE(make_q4_k, kind) \
  ONE(make_q5_k, kind) \
  ONE(make_q6_k, kind) \
  ONE(make_nvfp4, kind) \
  ONE(make_grouped, kind) \
  ONE(make_nf4, kind) \
  static Make *const AS_##kind[] = {make_fp8_as_##kind,  make_mxfp4_as_##kind, make_int4_as_##kind, make_q4_0_as_##kind, \
                                    make_q8_0_as_##kind, make_q4_k_as_##kind,  make_q5_k_as_##kind, make_q6_k_as_##kind, \
                                    make_nvfp4_as_##kind, make_grouped_as_##kind, make_grouped_as_##kind, make_nf4_as_##kind, \
                                    make_grouped_as_##kind};
MADE_AS(F32)
MADE_AS(BF16)
MADE_AS(NEAR_BF16)
MADE_AS(F16)

static Make *const *const FORMATS[] = {AS_F32, AS_BF16, AS_NEAR_BF16, AS_F16};

Make *maker_of(int format, int kind) { return FORMATS[kind][format]; }
