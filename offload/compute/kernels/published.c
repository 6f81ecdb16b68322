/* Matrices as checkpoints publish them: decoded, and multiplied with a few tokens without being written to memory.
 *
 * A format is one function that makes the weights of a part of a row, in float32, by the same operations as the torch code
 * (offload/checkpoint/formats), and a line in MADE_AS. A weight is rounded once to the model's dtype, so decoded matrices
 * are bit for bit torch's; products multiply those same weights and add in an order of their own, the same for a row and a
 * token whatever else is in the call. The layouts: docs/formats.md.
 */
#include "common.h"
#include "pool.h"

#define PART 256 /* columns that a format makes at a time: a multiple of every block of codes */
#define TILE 16  /* rows of a thread's piece of work */
#define SHARED 4 /* tokens that share a pass over a decoded row */

/* A matrix as its parts hold it, a row an output. block_*: what shares a scale; 0 where the format says it itself. */
typedef struct {
  const uint8_t *codes;
  const void *scales;
  int32_t format, rows, columns, block_rows, block_columns;
} Packed;

/* Writes `count` weights of a row, from the column `first` on, a multiple of PART, to `out` as `kind` says. */
typedef void Make(const Packed *m, long row, long first, long count, void *out);

/* What weights are written as. NEAR_BF16 takes the processor's own rounding to bfloat16, which makes zeros of numbers below
 * 2^-126, where it has one. */
enum { NEAR_BF16 = 2 };

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t result = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)result;
}

INLINE void put16(void *out, const int kind, long at, f32x16 value) {
  if (kind == F32) {
    memcpy((float *)out + at, &value, sizeof value);
    return;
  }
  uint16_t *to = (uint16_t *)out + at;
#if defined(__AVX512BF16__)
  if (kind == NEAR_BF16) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
    return;
  }
#endif
  i32x16 bits;
  memcpy(&bits, &value, sizeof bits);
  const i32x16 number = (bits & 0x7fffffff) <= 0x7f800000;
  bits = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 & number) | (0x7fc0 & ~number);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)bits));
#else
  for (int i = 0; i < 16; i++) to[i] = (uint16_t)bits[i];
#endif
}

INLINE void put(void *out, const int kind, long at, float value) {
  if (kind == F32) ((float *)out)[at] = value;
  else ((uint16_t *)out)[at] = to_bf16(value);
}

/* The product as it is, so that the compiler does not make one operation of it and the sum that follows. */
INLINE f32x16 rounded(f32x16 value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#else
  __asm__("" : "+m"(value));
#endif
  return value;
}

typedef uint8_t u8x16 __attribute__((vector_size(16)));

INLINE u8x16 bytes16(const uint8_t *from) {
  u8x16 value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE f32x16 numbers16(u8x16 from) { /* below 128 */
  uint8_t bytes[16];
  memcpy(bytes, &from, sizeof bytes);
  return float_of_int8(bytes);
}

INLINE f32x16 pick16(const float table[16], u8x16 index) {
  f32x16 value;
#if defined(__AVX512F__)
  value = (f32x16)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32((__m128i)index), _mm512_loadu_ps(table));
#else
  for (int i = 0; i < 16; i++) value[i] = table[index[i]];
#endif
  return value;
}

/* 16 bytes, each with a low half before a high one. */
INLINE void pairs(const uint8_t *from, u8x16 *first, u8x16 *second) {
  const u8x16 low = bytes16(from) & 15, high = bytes16(from) >> 4;
#if defined(__AVX2__)
  *first = (u8x16)_mm_unpacklo_epi8((__m128i)low, (__m128i)high);
  *second = (u8x16)_mm_unpackhi_epi8((__m128i)low, (__m128i)high);
#else
  for (int i = 0; i < 16; i++) {
    (*first)[i] = i % 2 ? high[i / 2] : low[i / 2];
    (*second)[i] = i % 2 ? high[8 + i / 2] : low[8 + i / 2];
  }
#endif
}

static float from_half(const uint8_t *at) {
  uint16_t half;
  memcpy(&half, at, 2);
  float value = as_float((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
  if ((half & 0x7c00) == 0x7c00) value = half & 0x3ff ? NAN : INFINITY;
  return half & 0x8000 ? -value : value;
}

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
    pairs(codes + c / 2, &first_half, &second_half);
    put16(out, kind, c, pick16(FP4, first_half) * scale);
    put16(out, kind, c + 16, pick16(FP4, second_half) * scale);
  }
}

/* --- whole numbers of 4 bits, 8 above their value: codes [rows, columns / 2], scales bfloat16 [rows, columns / block_columns];
 * products are rounded to bfloat16 */

INLINE f32x16 to_bf16_and_back(f32x16 value) { /* of what is a number */
  i32x16 bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & (int32_t)0xffff0000;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE f32x16 weights_of_int4(u8x16 codes, float scale, const int kind) {
  const f32x16 value = (numbers16(codes) - 8.0f) * scale;
  return kind == F32 ? to_bf16_and_back(value) : value;
}

INLINE void make_int4(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *codes = m->codes + (row * m->columns + first) / 2;
  const uint16_t *scales = (const uint16_t *)m->scales + row * (m->columns / m->block_columns);
  for (long c = 0; c < count; c += 32) {
    const float scale = bf16_to_float(scales[(first + c) / m->block_columns]);
    u8x16 first_half, second_half;
    pairs(codes + c / 2, &first_half, &second_half);
    put16(out, kind, c, weights_of_int4(first_half, scale, kind));
    put16(out, kind, c + 16, weights_of_int4(second_half, scale, kind));
  }
}

/* --- GGUF: blocks with their scales inside, as ggml-common.h has them */

INLINE const uint8_t *blocks_at(const Packed *m, long row, long first, int weights, int bytes) {
  return m->codes + (row * m->columns + first) / weights * bytes;
}

INLINE void make_q4_0(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 32, 18);
  for (long c = 0; c < count; c += 32, block += 18) {
    const u8x16 codes = bytes16(block + 2);
    const float scale = from_half(block);
    put16(out, kind, c, (numbers16(codes & 15) - 8.0f) * scale);
    put16(out, kind, c + 16, (numbers16(codes >> 4) - 8.0f) * scale);
  }
}

INLINE void make_q8_0(const Packed *m, long row, long first, long count, const int kind, void *out) {
  const uint8_t *block = blocks_at(m, row, first, 32, 34);
  for (long c = 0; c < count; c += 32, block += 34) {
    const float scale = from_half(block);
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
  const float d = from_half(block), dmin = from_half(block + 2);
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
    const float d = from_half(block + 208);
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
  static Make *const AS_##kind[] = {make_fp8_as_##kind,  make_mxfp4_as_##kind, make_int4_as_##kind, make_q4_0_as_##kind, \
                                    make_q8_0_as_##kind, make_q4_k_as_##kind,  make_q5_k_as_##kind, make_q6_k_as_##kind};
MADE_AS(F32)
MADE_AS(BF16)
MADE_AS(NEAR_BF16)

static Make *const *const FORMATS[] = {AS_F32, AS_BF16, AS_NEAR_BF16};

/* --- decoding */

static void decode_row(const Packed *m, long row, void *out, int kind) {
  const size_t size = kind == F32 ? 4 : 2;
  for (long c = 0; c < m->columns; c += PART) {
    const long count = m->columns - c < PART ? m->columns - c : PART;
    FORMATS[kind][m->format](m, row, c, count, (char *)out + size * c);
  }
}

typedef struct {
  const Packed *m;
  void *out;
  int dtype, transposed;
} Decoding;

static void decode_part(void *context, int part) {
  const Decoding *d = context;
  const Packed *m = d->m;
  const long first = (long)part * TILE, count = m->rows - first < TILE ? m->rows - first : TILE;
  const size_t size = d->dtype == F32 ? 4 : 2;
  if (!d->transposed) {
    for (long r = first; r < first + count; r++) decode_row(m, r, (char *)d->out + size * r * m->columns, d->dtype);
    return;
  }
  float values[TILE][PART] __attribute__((aligned(64)));
  for (long c = 0; c < m->columns; c += PART) {
    const long width = m->columns - c < PART ? m->columns - c : PART;
    for (long r = 0; r < count; r++) FORMATS[F32][m->format](m, first + r, c, width, values[r]);
    for (long i = 0; i < width; i++) {
      const size_t at = (size_t)(c + i) * m->rows + first;
      if (d->dtype == F32)
        for (long r = 0; r < count; r++) ((float *)d->out)[at + r] = values[r][i];
      else
        for (long r = 0; r < count; r++) ((uint16_t *)d->out)[at + r] = to_bf16(values[r][i]);
    }
  }
}

/* The weights into out [rows, columns], or its transpose. */
void rl_packed_decode(const Packed *m, void *out, int dtype, int transposed, int threads) {
  Decoding decoding = {m, out, dtype, transposed};
  pool_run(threads, (m->rows + TILE - 1) / TILE, decode_part, &decoding);
}

/* --- products */

/* Sums of a decoded row with T tokens, 32 columns at a time, each 16 lanes in two sums. */
INLINE void dots_f32(const int T, const float *row, const float *const *x, long columns, float *sums) {
  f32x16 acc[SHARED][2] = {0};
  long c = 0;
  for (; c + 32 <= columns; c += 32) {
    const f32x16 a = load16(row + c), b = load16(row + c + 16);
    UNROLL
    for (int t = 0; t < T; t++) {
      acc[t][0] += a * load16(x[t] + c);
      acc[t][1] += b * load16(x[t] + c + 16);
    }
  }
  for (int t = 0; t < T; t++) {
    sums[t] = total16(acc[t][0] + acc[t][1]);
    for (long i = c; i < columns; i++) sums[t] += row[i] * x[t][i];
  }
}

INLINE void dots_bf16(const int T, const uint16_t *row, const uint16_t *const *x, long columns, float *sums) {
  f32x16 acc[SHARED][2] = {0};
  long c = 0;
#if defined(__AVX512BF16__)
  for (; c + 64 <= columns; c += 64) {
    const __m512i a = _mm512_loadu_si512(row + c), b = _mm512_loadu_si512(row + c + 32);
    UNROLL
    for (int t = 0; t < T; t++) {
      acc[t][0] = (f32x16)_mm512_dpbf16_ps((__m512)acc[t][0], (__m512bh)a, (__m512bh)_mm512_loadu_si512(x[t] + c));
      acc[t][1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[t][1], (__m512bh)b, (__m512bh)_mm512_loadu_si512(x[t] + c + 32));
    }
  }
#else
  for (; c + 32 <= columns; c += 32) { /* the even columns of 16 pairs, and the odd ones */
    i32x16 both, other;
    f32x16 even, odd, x_even, x_odd;
    memcpy(&both, row + c, sizeof both);
    other = both << 16;
    both &= (int32_t)0xffff0000;
    memcpy(&even, &other, sizeof even);
    memcpy(&odd, &both, sizeof odd);
    UNROLL
    for (int t = 0; t < T; t++) {
      memcpy(&both, x[t] + c, sizeof both);
      other = both << 16;
      both &= (int32_t)0xffff0000;
      memcpy(&x_even, &other, sizeof x_even);
      memcpy(&x_odd, &both, sizeof x_odd);
      acc[t][0] += even * x_even;
      acc[t][1] += odd * x_odd;
    }
  }
#endif
  for (int t = 0; t < T; t++) {
    sums[t] = total16(acc[t][0] + acc[t][1]);
    for (long i = c; i < columns; i++) sums[t] += bf16_to_float(row[i]) * bf16_to_float(x[t][i]);
  }
}

static void dots(int tokens, int dtype, const void *row, const void *const *x, long columns, float *sums) {
  if (dtype == F32) {
    const float *const *from = (const float *const *)x;
    if (tokens == 1) dots_f32(1, row, from, columns, sums);
    else if (tokens == 2) dots_f32(2, row, from, columns, sums);
    else dots_f32(SHARED, row, from, columns, sums);
  } else {
    const uint16_t *const *from = (const uint16_t *const *)x;
    if (tokens == 1) dots_bf16(1, row, from, columns, sums);
    else if (tokens == 2) dots_bf16(2, row, from, columns, sums);
    else dots_bf16(SHARED, row, from, columns, sums);
  }
}

static __thread Scratch decoded_row;

typedef struct {
  const Packed *m;
  const char *x; /* [tokens, columns] */
  char *out;     /* [tokens, stride], whose first values of each token are written */
  long tokens, stride;
  int dtype, failed;
} Product;

static void product_part(void *context, int part) {
  Product *p = context;
  const Packed *m = p->m;
  const size_t size = p->dtype == F32 ? 4 : 2;
  void *row = scratch(&decoded_row, size * m->columns);
  if (!row) {
    __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  const long first = (long)part * TILE, last = first + TILE < m->rows ? first + TILE : m->rows;
  for (long r = first; r < last; r++) {
    decode_row(m, r, row, p->dtype == F32 ? F32 : NEAR_BF16);
    for (long t = 0; t < p->tokens; t += SHARED) {
      const int some = p->tokens - t < SHARED ? (int)(p->tokens - t) : SHARED;
      const void *x[SHARED];
      float sums[SHARED];
      for (int i = 0; i < SHARED; i++) x[i] = p->x + size * m->columns * (t + (i < some ? i : 0));
      dots(some, p->dtype, row, x, m->columns, sums);
      for (int i = 0; i < some; i++) put(p->out, p->dtype, (t + i) * p->stride + r, sums[i]);
    }
  }
}

/* out[t][r] = weights[r] . x[t]; x and out are of one dtype. Returns 1 without memory for a row. */
int rl_packed_linear(const Packed *m, const void *x, int tokens, void *out, int stride, int dtype, int threads) {
  Product product = {m, x, out, tokens, stride, dtype, 0};
  pool_run(threads, (m->rows + TILE - 1) / TILE, product_part, &product);
  return product.failed;
}
