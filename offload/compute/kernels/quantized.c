/* Products with 4- and 8-bit weights, for one or a few tokens, where reading the weights is what takes the time.
 *
 * Layout of a matrix [rows, columns] (docs/formats.md):
 *   4 bits  codes uint8 [rows, padded / 2]: byte b of a row holds column 2b in its low half and column 2b + 1 in its high
 *           half; params bf16 [rows, padded / group, 2]: scale and shift. weight = (code - 8) * scale + shift.
 *           padded is columns rounded up to a multiple of group (32, 64 or 128).
 *   8 bits  codes int8 [rows, columns], params float [rows]: scale. weight = code * scale.
 *
 * The result of a row and a token depends on nothing else: not on other rows, tokens, experts or threads of the call.
 * Every entry point is for one calling thread at a time and thread; all work is shared among OpenMP's threads.
 * Vectors are written with the extensions that GCC and clang share, so that any processor can run this; the products
 * that decide the speed have versions of their own for AVX-512 with integer dot products. These take an input that is
 * not exact as integers of 15 bits with a scale for each block of columns. llama.cpp does so with 8 bits; 15 cost
 * two more instructions a block, which hide behind the memory, and lose less than bf16 does.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define INTEGER_DOT 1
#else
#define INTEGER_DOT 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 128    /* columns that one 64-byte load of 4-bit codes holds */
#define TILE 128     /* most rows that a thread takes at a time: each start of a stream costs some lines that come late */
#define MAX_TOKENS 4 /* tokens that share one pass over the weights */
#define AHEAD 4096   /* bytes of codes to fetch ahead */
#define MAX_ROWS 4   /* rows that share one pass over the input */
#if defined(__AVX512F__)
#define CHAINS 4     /* sums of an 8-bit row that do not wait for each other */
#else
#define CHAINS 1     /* too few registers: rows side by side do not wait for each other either */
#endif
#define UNROLL _Pragma("GCC unroll 8") /* loops over rows and tokens: their arrays must become registers */

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

enum { F32 = 0, BF16 = 1 };

typedef struct {
  int32_t rows, columns, padded, group, bits;
} Shape;

typedef struct {
  const uint8_t *codes;
  const void *params;
  int32_t first, count; /* its rows of the input and of the output */
} Job;

/* The input of a product, made ready once and used for every row of the weights. */
typedef struct {
  int exact;         /* float instead of integers */
  size_t width;      /* values of a row, padded to BLOCK */
  size_t groups;     /* sums of a row, padded to 16 */
  void *values;      /* float [rows, width], for 4 bits reordered as the codes come out of a vector; or integers of
                        15 bits, of each block the upper bytes of all (4 bits: even columns, odd ones), then the lower */
  float *sums;       /* [rows, groups] of each group of columns; with 8 bits [0] is that of the whole row */
  float *scales;     /* of the integers: [rows, groups] with 4 bits, [rows, width / BLOCK] with 8 */
} Panel;

INLINE f32x16 load16(const float *from) {
  f32x16 value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE f32x16 all16(float value) { return value - (f32x16){0}; }

INLINE f32x16 choose16(i32x16 mask, f32x16 yes, f32x16 no) { /* lane by lane; C has no ?: for vectors */
  i32x16 a, b;
  memcpy(&a, &yes, sizeof a);
  memcpy(&b, &no, sizeof b);
  a = (a & mask) | (b & ~mask);
  memcpy(&yes, &a, sizeof a);
  return yes;
}

INLINE f32x16 between16(f32x16 v, float low, float high) {
  v = choose16(v < low, all16(low), v);
  return choose16(v > high, all16(high), v);
}

/* Widening, which GCC does element by element when it is left to __builtin_convertvector. */
INLINE f32x16 float_of_int8(const uint8_t *from) {
  f32x16 value;
#if defined(__AVX512F__)
  value = (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8))));
  memcpy(&value, &low, sizeof low);
  memcpy((char *)&value + sizeof low, &high, sizeof high);
#else
  i8x16 w;
  memcpy(&w, from, sizeof w);
  value = __builtin_convertvector(__builtin_convertvector(w, i32x16), f32x16);
#endif
  return value;
}

INLINE f32x8 float_of_uint16(u16x8 from) {
#if defined(__AVX2__)
  return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32((__m128i)from));
#else
  return __builtin_convertvector(__builtin_convertvector(from, i32x8), f32x8);
#endif
}

INLINE float total16(f32x16 v) {
  float sum = 0;
  f32x8 half;
  float lanes[16];
  memcpy(lanes, &v, sizeof lanes);
  memcpy(&half, lanes, sizeof half);
  f32x8 other;
  memcpy(&other, lanes + 8, sizeof other);
  half += other;
  memcpy(lanes, &half, sizeof half);
  for (int i = 0; i < 4; i++) sum += lanes[i] + lanes[i + 4];
  return sum;
}

INLINE float bf16_to_float(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

INLINE uint16_t float_to_bf16(float value) { /* to nearest, ties to even, as torch does */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16) | 0x40;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float load_value(const void *from, int dtype, size_t index) {
  return dtype == BF16 ? bf16_to_float(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

INLINE void store_value(void *to, int dtype, size_t index, float value) {
  if (dtype == BF16)
    ((uint16_t *)to)[index] = float_to_bf16(value);
  else
    ((float *)to)[index] = value;
}

INLINE size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

INLINE size_t row_bytes(const Shape *s) { return s->bits == 4 ? (size_t)s->padded / 2 : (size_t)s->columns; }

INLINE size_t row_params(const Shape *s) { /* bytes */
  return s->bits == 4 ? (size_t)s->padded / s->group * 4 : sizeof(float);
}

/* Grows only; one for each use and calling thread, so that a call allocates nothing in the long run. NULL if it cannot. */
typedef struct {
  void *memory;
  size_t size;
} Scratch;

static void *scratch(Scratch *s, size_t size) {
  if (s->size < size) {
    free(s->memory);
    s->memory = NULL;
    s->size = 0;
    if (posix_memalign(&s->memory, 64, round_up(size, 4096))) return s->memory = NULL;
    s->size = round_up(size, 4096);
  }
  return s->memory;
}

INLINE size_t panel_scales(const Panel *p, const Shape *s) { return s->bits == 4 ? p->groups : p->width / BLOCK; }

static int panel_init(Panel *p, const Shape *s, int rows, int exact, Scratch *values, Scratch *sums) {
  p->exact = exact || !INTEGER_DOT;
  p->width = round_up(s->bits == 4 ? s->padded : s->columns, BLOCK);
  p->groups = s->bits == 4 ? round_up(s->padded / s->group, 16) : 16;
  p->values = scratch(values, rows * p->width * (p->exact ? 4 : 2));
  p->sums = scratch(sums, rows * (p->groups + panel_scales(p, s)) * sizeof(float));
  p->scales = p->sums ? p->sums + rows * p->groups : NULL;
  return p->values && p->sums ? 0 : -1;
}

#if INTEGER_DOT
#define MOST 16256 /* 127 * 128: the upper byte of an integer is then in -127 .. 127, the lower one in -64 .. 63 */

INLINE __m512 load_floats(const void *from, int dtype, size_t at, __mmask16 there) {
  if (dtype != BF16) return _mm512_maskz_loadu_ps(there, (const float *)from + at);
  const __m256i half = _mm256_maskz_loadu_epi16(there, (const uint16_t *)from + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store_bytes(__m512i q, int8_t *upper, int8_t *lower) { /* q = upper * 128 + lower */
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
  _mm_store_si128((__m128i *)upper, _mm512_cvtepi32_epi8(high));
  _mm_store_si128((__m128i *)lower, _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(high, 7))));
}

/* One row of the input as integers. What is not finite makes every product of its row NaN. */
static void panel_fill_integers(const Panel *p, const Shape *s, int row, const void *from, int dtype, size_t at) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  float *sums = p->sums + row * p->groups, *scales = p->scales + row * panel_scales(p, s), whole = 0;
  for (size_t block = 0; block < p->width / BLOCK; block++) {
    int8_t *to = (int8_t *)p->values + (row * p->width + block * BLOCK) * 2;
    __m512 x[BLOCK / 16], most = _mm512_setzero_ps();
    __mmask16 finite = 0xffff;
    for (int i = 0; i < BLOCK / 16; i++) {
      const long left = s->columns - (long)(block * BLOCK + i * 16);
      x[i] = load_floats(from, dtype, at + block * BLOCK + i * 16, left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
      finite &= _mm512_cmp_ps_mask(_mm512_sub_ps(x[i], x[i]), _mm512_setzero_ps(), _CMP_EQ_OQ);
      most = _mm512_max_ps(most, _mm512_abs_ps(x[i]));
    }
    const float largest = _mm512_reduce_max_ps(most);
    const int some = finite == 0xffff && largest > 1e-33f; /* smaller ones are nothing beside any other block */
    const __m512 inverse = _mm512_set1_ps(some ? MOST / largest : 0);
    const float scale = some ? largest / MOST : finite == 0xffff ? 0 : NAN;
    __m512i q[BLOCK / 16];
    for (int i = 0; i < BLOCK / 16; i++) q[i] = some ? _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)) : _mm512_setzero_si512();
    if (s->bits == 8) {
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < BLOCK / 16; i++) {
        sum = _mm512_add_epi32(sum, q[i]);
        store_bytes(q[i], to + i * 16, to + BLOCK + i * 16);
      }
      whole += (float)_mm512_reduce_add_epi32(sum) * scale;
      scales[block] = scale;
      continue;
    }
    for (int i = 0; i < BLOCK / 16; i += 2) {
      store_bytes(_mm512_permutex2var_epi32(q[i], even, q[i + 1]), to + i * 8, to + BLOCK + i * 8);
      store_bytes(_mm512_permutex2var_epi32(q[i], odd, q[i + 1]), to + 64 + i * 8, to + BLOCK + 64 + i * 8);
    }
    const int vectors = s->group / 16;
    for (int i = 0; i < BLOCK / 16; i += vectors) {
      __m512i sum = q[i];
      for (int k = 1; k < vectors; k++) sum = _mm512_add_epi32(sum, q[i + k]);
      const size_t group = (block * BLOCK + i * 16) / s->group;
      sums[group] = (float)_mm512_reduce_add_epi32(sum) * scale;
      scales[group] = scale;
    }
  }
  if (s->bits == 8) sums[0] = whole;
}
#endif

/* One row of the input. With 4 bits, column 4i + j of a group stands at j * (group / 4) + i, since that is the order in
 * which shifting a vector of 16-bit lanes brings the codes out. */
static void panel_fill(const Panel *p, const Shape *s, int row, const void *from, int dtype, size_t at) {
  const int columns = s->columns;
#if INTEGER_DOT
  if (!p->exact) {
    panel_fill_integers(p, s, row, from, dtype, at);
    return;
  }
#endif
  float *to = (float *)p->values + row * p->width;
  if (s->bits == 8) {
    for (int c = 0; c < columns; c++) to[c] = load_value(from, dtype, at + c);
    for (size_t c = columns; c < p->width; c++) to[c] = 0;
    return;
  }
  float *sums = p->sums + row * p->groups;
  memset(sums, 0, p->groups * sizeof(float));
  memset(to, 0, p->width * sizeof(float));
  for (int start = 0; start < columns; start += s->group) {
    const int end = start + s->group < columns ? start + s->group : columns;
    float sum = 0;
    for (int c = start; c < end; c++) {
      const int inside = c - start;
      const float value = load_value(from, dtype, at + c);
      to[start + inside % 4 * (s->group / 4) + inside / 4] = value;
      sum += value;
    }
    sums[start / s->group] = sum;
  }
}

#if INTEGER_DOT
/* Products of a row with T tokens, 4 bits. A vector of codes is 64 bytes, of which every lane of 4 bytes lies in one
 * group: the integer sums of a lane are small enough to be exact, and get the group's scale after each block. */
INLINE void dot4_integers(const int T, const Shape *s, const uint8_t *codes, const uint8_t *params, const Panel *p, int token,
                          float *out, size_t out_stride) {
  const size_t stride = row_bytes(s);
  const int groups = s->padded / s->group, in_block = BLOCK / s->group;
  const __m512i nibble = _mm512_set1_epi8(15), next = _mm512_set1_epi32(in_block);
  const __m512i lanes = _mm512_srli_epi32(_mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), next), 4);
  const int8_t *x = (const int8_t *)p->values + token * p->width * 2;
  const float *sums = p->sums + token * p->groups, *scales = p->scales + token * p->groups;
  __m512 acc[MAX_TOKENS];
  UNROLL
  for (int t = 0; t < T; t++) acc[t] = _mm512_setzero_ps();
  for (int chunk = 0; chunk < groups; chunk += 16) {
    const int some = groups - chunk < 16 ? groups - chunk : 16;
    const __m512i pair = _mm512_maskz_loadu_epi32((__mmask16)((1u << some) - 1), params + chunk * 4);
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 shift = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
    const __m512 base = _mm512_fmadd_ps(scale, _mm512_set1_ps(-8), shift); /* codes count from 0 here */
    __m512 factors[MAX_TOKENS];
    UNROLL
    for (int t = 0; t < T; t++) {
      acc[t] = _mm512_fmadd_ps(base, _mm512_loadu_ps(sums + t * p->groups + chunk), acc[t]);
      factors[t] = _mm512_mul_ps(scale, _mm512_loadu_ps(scales + t * p->groups + chunk));
    }
    const int blocks = (some + in_block - 1) / in_block;
    __m512i which = lanes; /* the group of each lane */
    for (int b = 0; b < blocks; b++, which = _mm512_add_epi32(which, next)) {
      const size_t block = chunk / in_block + b, at = block * 64, left = stride - at;
      const __m512i w = left >= 64 ? _mm512_loadu_si512(codes + at) : _mm512_maskz_loadu_epi8((1ull << left) - 1, codes + at);
      __builtin_prefetch(codes + at + AHEAD);
      const __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
      UNROLL
      for (int t = 0; t < T; t++) {
        const int8_t *at_x = x + (t * p->width + block * BLOCK) * 2;
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_load_si512(at_x));
        sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, high, _mm512_load_si512(at_x + 64)), 7);
        sum = _mm512_dpbusd_epi32(sum, low, _mm512_load_si512(at_x + BLOCK));
        sum = _mm512_dpbusd_epi32(sum, high, _mm512_load_si512(at_x + BLOCK + 64));
        acc[t] = _mm512_fmadd_ps(_mm512_permutexvar_ps(which, factors[t]), _mm512_cvtepi32_ps(sum), acc[t]);
      }
    }
  }
  UNROLL
  for (int t = 0; t < T; t++) out[t * out_stride] = _mm512_reduce_add_ps(acc[t]);
}

/* The same with 8 bits. The instruction takes codes without a sign: 128 is added to each, and taken off in the end. */
INLINE void dot8_integers(const int T, const Shape *s, const uint8_t *codes, const uint8_t *params, const Panel *p, int token,
                          float *out, size_t out_stride) {
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  const size_t blocks = p->width / BLOCK;
  const int8_t *x = (const int8_t *)p->values + token * p->width * 2;
  const float *scales = p->scales + token * blocks;
  __m512 acc[MAX_TOKENS];
  UNROLL
  for (int t = 0; t < T; t++) acc[t] = _mm512_setzero_ps();
  for (size_t block = 0; block < blocks; block++) {
    const size_t at = block * BLOCK, left = s->columns - at;
    __m512i w[2];
    if (left >= BLOCK) {
      w[0] = _mm512_loadu_si512(codes + at);
      w[1] = _mm512_loadu_si512(codes + at + 64);
    } else {
      w[0] = _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : (1ull << left) - 1, codes + at);
      w[1] = _mm512_maskz_loadu_epi8(left <= 64 ? 0 : (1ull << (left - 64)) - 1, codes + at + 64);
    }
    __builtin_prefetch(codes + at + AHEAD);
    __builtin_prefetch(codes + at + 64 + AHEAD);
    w[0] = _mm512_xor_si512(w[0], sign);
    w[1] = _mm512_xor_si512(w[1], sign);
    UNROLL
    for (int t = 0; t < T; t++) {
      const int8_t *at_x = x + (t * p->width + at) * 2;
      __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[0], _mm512_load_si512(at_x));
      sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, w[1], _mm512_load_si512(at_x + 64)), 7);
      sum = _mm512_dpbusd_epi32(sum, w[0], _mm512_load_si512(at_x + BLOCK));
      sum = _mm512_dpbusd_epi32(sum, w[1], _mm512_load_si512(at_x + BLOCK + 64));
      acc[t] = _mm512_fmadd_ps(_mm512_set1_ps(scales[t * blocks + block]), _mm512_cvtepi32_ps(sum), acc[t]);
    }
  }
  float scale;
  memcpy(&scale, params, sizeof scale);
  UNROLL
  for (int t = 0; t < T; t++)
    out[t * out_stride] = (_mm512_reduce_add_ps(acc[t]) - 128 * p->sums[(token + t) * p->groups]) * scale;
}
#endif

/* The same with float inputs, on any processor. G is the group. The sums of a row are made in the same order whatever R
 * and T are: a token's result must not depend on how many others there are. */
INLINE void dot4_f32(const int G, const int R, const int T, const Shape *s, const uint8_t *codes, const uint8_t *params,
                     const Panel *p, int token, float *out, size_t out_stride) {
  const size_t stride = row_bytes(s), param_stride = row_params(s);
  const float *x = (const float *)p->values + token * p->width;
  const float *sums = p->sums + token * p->groups;
  f32x8 acc[MAX_ROWS][MAX_TOKENS];
  float rest[MAX_ROWS][MAX_TOKENS];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int t = 0; t < T; t++) {
      acc[r][t] = (f32x8){0};
      rest[r][t] = 0;
    }
  for (int g = 0; g < s->padded / G; g++) {
    f32x8 sum[MAX_ROWS][MAX_TOKENS];
    UNROLL
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(codes + r * stride + (size_t)g * G / 2 + AHEAD);
      UNROLL
      for (int t = 0; t < T; t++) sum[r][t] = (f32x8){0};
    }
    UNROLL
    for (int i = 0; i < G / 4; i += 8) {
      u16x8 w[MAX_ROWS];
      UNROLL
      for (int r = 0; r < R; r++) memcpy(&w[r], codes + r * stride + (size_t)g * G / 2 + i * 2, sizeof w[r]);
      UNROLL
      for (int j = 0; j < 4; j++) {
        f32x8 input[MAX_TOKENS];
        UNROLL
        for (int t = 0; t < T; t++) memcpy(&input[t], x + t * p->width + (size_t)g * G + j * (G / 4) + i, sizeof input[t]);
        UNROLL
        for (int r = 0; r < R; r++) {
          const f32x8 level = float_of_uint16((w[r] >> (4 * j)) & 15);
          UNROLL
          for (int t = 0; t < T; t++) sum[r][t] += level * input[t];
        }
      }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
      uint16_t pair[2];
      memcpy(pair, params + r * param_stride + g * 4, 4);
      const float scale = bf16_to_float(pair[0]), base = bf16_to_float(pair[1]) - 8 * scale;
      UNROLL
      for (int t = 0; t < T; t++) {
        acc[r][t] += sum[r][t] * scale;
        rest[r][t] += base * sums[t * p->groups + g];
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int t = 0; t < T; t++) {
      float lanes[8];
      memcpy(lanes, &acc[r][t], sizeof lanes);
      out[t * out_stride + r] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
                                ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest[r][t];
    }
}

/* Products of R rows with T tokens, 8 bits. */
INLINE void dot8_f32(const int R, const int T, const Shape *s, const uint8_t *codes, const uint8_t *params, const Panel *p,
                     int token, float *out, size_t out_stride) {
  const float *x = (const float *)p->values + token * p->width;
  const int whole = s->columns / 64 * 64;
  f32x16 acc[MAX_ROWS][MAX_TOKENS][CHAINS];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int t = 0; t < T; t++)
      UNROLL
      for (int i = 0; i < CHAINS; i++) acc[r][t][i] = (f32x16){0};
  for (int c = 0; c < whole; c += 64) {
    UNROLL
    for (int r = 0; r < R; r++) __builtin_prefetch(codes + (size_t)r * s->columns + c + AHEAD);
    UNROLL
    for (int j = 0; j < 4; j++) {
      UNROLL
      for (int r = 0; r < R; r++) {
        const f32x16 value = float_of_int8(codes + (size_t)r * s->columns + c + 16 * j);
        UNROLL
        for (int t = 0; t < T; t++) acc[r][t][j % CHAINS] += value * load16(x + t * p->width + c + 16 * j);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; r++) {
    float scale;
    memcpy(&scale, params + r * sizeof scale, sizeof scale);
    UNROLL
    for (int t = 0; t < T; t++) {
      f32x16 all = acc[r][t][0];
      UNROLL
      for (int i = 1; i < CHAINS; i++) all += acc[r][t][i];
      float sum = total16(all);
      for (int c = whole; c < s->columns; c++) sum += (float)(int8_t)codes[(size_t)r * s->columns + c] * x[t * p->width + c];
      out[t * out_stride + r] = sum * scale;
    }
  }
}

INLINE void some_rows(const int R, const int T, const Shape *s, const uint8_t *codes, const uint8_t *params, const Panel *p,
                      int token, float *out, size_t out_stride) {
#if INTEGER_DOT
  if (!p->exact) { /* one row after the other: several streams half defeat the hardware's own prefetching */
    if (s->bits == 8) dot8_integers(T, s, codes, params, p, token, out, out_stride);
    else dot4_integers(T, s, codes, params, p, token, out, out_stride);
    return;
  }
#endif
  if (s->bits == 8) {
    dot8_f32(R, T, s, codes, params, p, token, out, out_stride);
    return;
  }
  if (s->group == 32) dot4_f32(32, R, T, s, codes, params, p, token, out, out_stride);
  else if (s->group == 64) dot4_f32(64, R, T, s, codes, params, p, token, out, out_stride);
  else dot4_f32(128, R, T, s, codes, params, p, token, out, out_stride);
}

/* Rows [from, to) of one matrix with `count` tokens from `token` on: out[t * out_stride + r - from]. */
#define ROWS(R, T) \
  for (; r + R <= to; r += R) \
  some_rows(R, T, s, codes + (size_t)r * row_bytes(s), params + (size_t)r * row_params(s), p, token + t, \
            out + t * out_stride + (r - from), out_stride)

static void tile(const Shape *s, const uint8_t *codes, const uint8_t *params, const Panel *p, int token, int count, int from,
                 int to, float *out, size_t out_stride) {
  const int wide = p->exact && (s->bits == 4 || CHAINS == 1); /* several rows even with few tokens */
  for (int t = 0; t < count;) {
    const int left = count - t;
    int r = from;
    if (left >= 4) {
      if (p->exact && s->bits == 4) ROWS(2, 4);
      ROWS(1, 4);
      t += 4;
    } else if (left >= 2) {
      if (wide) ROWS(2, 2);
      ROWS(1, 2);
      t += 2;
    } else {
      if (wide) ROWS(4, 1);
      ROWS(1, 1);
      t += 1;
    }
  }
}

static __thread Scratch panel_values, panel_sums, inner_values, inner_sums, inner_states, row_numbers;

/* The rows of all jobs, one after the other: *of gives the number of each, *start the place of each job's first.
 * Returns how many there are, or -1 if there is no memory. */
static int collect_rows(int jobs, const Job *list, int32_t **of, int32_t **start) {
  int total = 0;
  for (int j = 0; j < jobs; j++) total += list[j].count;
  *of = scratch(&row_numbers, (size_t)(total + jobs) * sizeof(int32_t));
  if (!*of) return -1;
  *start = *of + total;
  total = 0;
  for (int j = 0; j < jobs; j++) {
    (*start)[j] = total;
    for (int i = 0; i < list[j].count; i++) (*of)[total++] = list[j].first + i;
  }
  return total;
}

/* out[row, :] = x[token_of[row], :] times each job's matrix, transposed, for the rows of each job.
 * x [tokens, columns], out [rows of all jobs, rows of the matrix]; token_of NULL means row r has token r.
 * Returns 0, or -1 if there is no memory. */
int rl_linear(const Shape *s, int jobs, const Job *list, const void *x, int x_dtype, const int32_t *token_of, int exact,
              void *out, int out_dtype, int threads) {
  Panel p;
  int32_t *row_of, *start;
  const int rows = collect_rows(jobs, list, &row_of, &start);
  if (rows < 0 || panel_init(&p, s, rows, exact, &panel_values, &panel_sums)) return -1;
  const int tiles = (s->rows + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++)
      panel_fill(&p, s, r, x, x_dtype, (size_t)(token_of ? token_of[row_of[r]] : row_of[r]) * s->columns);
#pragma omp for schedule(dynamic, 1) nowait
    for (int work = 0; work < jobs * tiles; work++) {
      const int j = work / tiles, from = work % tiles * TILE, to = from + TILE < s->rows ? from + TILE : s->rows;
      float part[MAX_TOKENS * TILE];
      for (int t = 0; t < list[j].count; t += MAX_TOKENS) {
        const int some = list[j].count - t < MAX_TOKENS ? list[j].count - t : MAX_TOKENS;
        tile(s, list[j].codes, list[j].params, &p, start[j] + t, some, from, to, part, TILE);
        for (int i = 0; i < some; i++)
          for (int r = from; r < to; r++)
            store_value(out, out_dtype, (size_t)(list[j].first + t + i) * s->rows + r, part[i * TILE + r - from]);
      }
    }
  }
  return 0;
}

INLINE f32x16 exp16(f32x16 x) { /* Cephes' expf: range reduction and a polynomial, 2 ulp */
  x = between16(x, -87.0f, 88.0f);
  const i32x16 n =
      __builtin_convertvector(x * 1.44269504088896341f + choose16(x < 0.0f, all16(-0.5f), all16(0.5f)), i32x16);
  const f32x16 k = __builtin_convertvector(n, f32x16);
  const f32x16 y = x - k * 0.693359375f + k * 2.12194440e-4f;
  f32x16 z = y * 1.9875691500e-4f + 1.3981999507e-3f;
  z = z * y + 8.3334519073e-3f;
  z = z * y + 4.1665795894e-2f;
  z = z * y + 1.6666665459e-1f;
  z = z * y + 5.0000001201e-1f;
  z = z * y * y + y + 1.0f;
  const i32x16 power = (n + 127) << 23;
  f32x16 scale;
  memcpy(&scale, &power, sizeof scale);
  return z * scale;
}

/* Whole experts that gate with silu: out[row] = down(silu(gate(x)) * up(x)), x[token_of[row]].
 * Each job names the first byte of its record; the matrices stand at the given offsets in it. gate_up has the gate's
 * rows first, then the up projection's. x [tokens, hidden], out float [rows of all jobs, hidden]. */
typedef struct {
  Shape gate_up, down;
  int64_t gate_up_codes, gate_up_params, down_codes, down_params;
} Expert;

int rl_silu_experts(const Expert *e, int jobs, const Job *list, const void *x, int x_dtype, int tokens, const int32_t *token_of,
                    int exact, float *out, int threads) {
  Panel outer, inner;
  int32_t *row_of, *start;
  const int width = e->down.columns, hidden = e->down.rows;
  const size_t stride = round_up(width, 16);
  const int rows = collect_rows(jobs, list, &row_of, &start);
  /* one token for all experts, as in decoding, is made ready once */
  int shared = tokens == 1;
  for (int j = 0; j < jobs; j++) shared &= list[j].count <= 1; /* not if it goes through an expert twice */
  if (rows < 0 || panel_init(&outer, &e->gate_up, shared ? 1 : rows, exact, &panel_values, &panel_sums) ||
      panel_init(&inner, &e->down, rows, exact, &inner_values, &inner_sums))
    return -1;
  float *states = scratch(&inner_states, (size_t)rows * stride * sizeof(float));
  if (!states) return -1;
  const int up_tiles = (width + TILE - 1) / TILE, down_tiles = (hidden + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int r = 0; r < (shared ? 1 : rows); r++)
      panel_fill(&outer, &e->gate_up, r, x, x_dtype, (size_t)(shared ? 0 : token_of[row_of[r]]) * e->gate_up.columns);
#pragma omp for schedule(dynamic, 1)
    for (int work = 0; work < jobs * up_tiles; work++) {
      const int j = work / up_tiles, from = work % up_tiles * TILE, to = from + TILE < width ? from + TILE : width;
      const uint8_t *codes = list[j].codes + e->gate_up_codes, *params = list[j].codes + e->gate_up_params;
      float gate[MAX_TOKENS * TILE] = {0}, up[MAX_TOKENS * TILE] = {0};
      for (int t = 0; t < list[j].count; t += MAX_TOKENS) {
        const int some = list[j].count - t < MAX_TOKENS ? list[j].count - t : MAX_TOKENS;
        const int token = shared ? 0 : start[j] + t;
        tile(&e->gate_up, codes, params, &outer, token, some, from, to, gate, TILE);
        tile(&e->gate_up, codes, params, &outer, token, some, width + from, width + to, up, TILE);
        for (int i = 0; i < some; i++)
          for (int r = 0; r < to - from; r += 16) {
            const f32x16 g = load16(gate + i * TILE + r);
            const f32x16 h = g / (1.0f + exp16(-g)) * load16(up + i * TILE + r);
            const size_t left = to - from - r < 16 ? to - from - r : 16;
            memcpy(states + (size_t)(start[j] + t + i) * stride + from + r, &h, left * sizeof(float));
          }
      }
    }
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) panel_fill(&inner, &e->down, r, states, F32, (size_t)r * stride);
#pragma omp for schedule(dynamic, 1) nowait
    for (int work = 0; work < jobs * down_tiles; work++) {
      const int j = work / down_tiles, from = work % down_tiles * TILE, to = from + TILE < hidden ? from + TILE : hidden;
      for (int t = 0; t < list[j].count; t += MAX_TOKENS) {
        const int some = list[j].count - t < MAX_TOKENS ? list[j].count - t : MAX_TOKENS;
        tile(&e->down, list[j].codes + e->down_codes, list[j].codes + e->down_params, &inner, start[j] + t, some, from, to,
             out + (size_t)(list[j].first + t) * hidden + from, hidden);
      }
    }
  }
  return 0;
}

/* out[token_of[r], :] += weights[r] * products[r, :], in the order of r; out starts from zero. */
int rl_combine(int rows, int hidden, const float *products, const float *weights, const int32_t *token_of, int tokens, void *out,
               int out_dtype, int threads) {
  const int parts = (hidden + 255) / 256;
  float *sum = scratch(&panel_values, (size_t)tokens * hidden * sizeof(float));
  if (!sum) return -1;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 64)
  for (int part = 0; part < parts; part++) {
    const int from = part * 256, to = from + 256 < hidden ? from + 256 : hidden;
    for (int t = 0; t < tokens; t++) memset(sum + (size_t)t * hidden + from, 0, (to - from) * sizeof(float));
    for (int r = 0; r < rows; r++) {
      float *into = sum + (size_t)token_of[r] * hidden;
      const float *product = products + (size_t)r * hidden;
      const float weight = weights[r];
      for (int c = from; c < to; c++) into[c] += weight * product[c];
    }
    for (int t = 0; t < tokens; t++)
      for (int c = from; c < to; c++) store_value(out, out_dtype, (size_t)t * hidden + c, sum[(size_t)t * hidden + c]);
  }
  return 0;
}

INLINE uint32_t round_bf16(float value) { /* as float_to_bf16, of a number */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Two columns at a time, so that the compiler can use vectors. */
INLINE void decode4_row(const Shape *s, const uint8_t *codes, const uint8_t *info, void *out, int out_dtype, size_t at) {
  for (int start = 0; start < s->columns; start += s->group) {
    uint16_t pair[2];
    memcpy(pair, info + start / s->group * 4, 4);
    const float scale = bf16_to_float(pair[0]), shift = bf16_to_float(pair[1]);
    const int count = s->columns - start < s->group ? s->columns - start : s->group;
    const uint8_t *both = codes + start / 2;
    float low[BLOCK / 2], high[BLOCK / 2];
    for (int i = 0; i < s->group / 2; i++) {
      low[i] = (float)((int)(both[i] & 15) - 8) * scale + shift;
      high[i] = (float)((int)(both[i] >> 4) - 8) * scale + shift;
    }
    if (out_dtype == BF16) {
      uint16_t *to = (uint16_t *)out + at + start;
      uint32_t words[BLOCK / 2];
      for (int i = 0; i < s->group / 2; i++) words[i] = round_bf16(low[i]) | round_bf16(high[i]) << 16;
      memcpy(to, words, count * sizeof *to);
    } else {
      float *to = (float *)out + at + start;
      for (int i = 0; i < count / 2; i++) {
        to[2 * i] = low[i];
        to[2 * i + 1] = high[i];
      }
      if (count % 2) to[count - 1] = low[count / 2];
    }
  }
}

/* The weights themselves: out [rows, columns]. */
int rl_decode(const Shape *s, const uint8_t *codes, const void *params, void *out, int out_dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int r = 0; r < s->rows; r++) {
    const uint8_t *row = codes + (size_t)r * row_bytes(s);
    const uint8_t *info = (const uint8_t *)params + (size_t)r * row_params(s);
    const size_t at = (size_t)r * s->columns;
    if (s->bits == 4) {
      decode4_row(s, row, info, out, out_dtype, at);
      continue;
    }
    float scale;
    memcpy(&scale, info, sizeof scale);
    if (out_dtype == BF16)
      for (int c = 0; c < s->columns; c++) ((uint16_t *)out)[at + c] = (uint16_t)round_bf16((float)(int8_t)row[c] * scale);
    else
      for (int c = 0; c < s->columns; c++) ((float *)out)[at + c] = (float)(int8_t)row[c] * scale;
  }
  return 0;
}

/* Encoding. A lane of a vector is a group of its own, so that many groups are searched at a time and no sum runs across
 * a vector. The search is that of llama.cpp's make_qkx2_quants, over weights scaled to 0..1: trial scales, each made the
 * best one for the codes that it gives by least squares; the best of all is refined again in the same way. */
#define TRIALS 16
#define REFINEMENTS 2
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

typedef struct {
  floats codes, squares, mixed; /* sums over a group: of codes, their squares, and codes times weights */
} Sums;

INLINE floats all_lanes(float value) { return value - (floats){0}; }

INLINE floats load_lanes(const float *from) {
  floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE floats choose(ints mask, floats yes, floats no) {
  ints a, b;
  memcpy(&a, &yes, sizeof a);
  memcpy(&b, &no, sizeof b);
  a = (a & mask) | (b & ~mask);
  memcpy(&yes, &a, sizeof a);
  return yes;
}

INLINE floats at_most(floats v, float most) {
#if defined(__AVX512F__)
  return (floats)_mm512_min_ps((__m512)v, _mm512_set1_ps(most));
#elif defined(__AVX2__)
  return (floats)_mm256_min_ps((__m256)v, _mm256_set1_ps(most));
#else
  return choose(v > most, all_lanes(most), v);
#endif
}

INLINE floats at_least(floats v, float least) {
#if defined(__AVX512F__)
  return (floats)_mm512_max_ps((__m512)v, _mm512_set1_ps(least));
#elif defined(__AVX2__)
  return (floats)_mm256_max_ps((__m256)v, _mm256_set1_ps(least));
#else
  return choose(v < least, all_lanes(least), v);
#endif
}

INLINE floats rounded(floats v) { /* to nearest, ties to even as torch does; of values far below 2^22 */
  return v + 12582912.0f - 12582912.0f;
}

INLINE void add_squares(double *sums, floats v) { /* in double: the square of a large float is none */
  float lanes[LANES];
  memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < LANES; i++) sums[i] += (double)lanes[i] * lanes[i];
}

INLINE double total(const double *sums) {
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += sums[i];
  return sum;
}

/* `count` weights as floats, with zeros behind them up to a whole vector. */
INLINE void load_weights(const void *weights, int dtype, size_t at, int count, float *to) {
  if (dtype == BF16)
    for (int i = 0; i < count; i++) to[i] = bf16_to_float(((const uint16_t *)weights)[at + i]);
  else
    memcpy(to, (const float *)weights + at, count * sizeof *to);
  for (int i = count; i % LANES; i++) to[i] = 0;
}

/* Groups as columns of w [group, LANES]; lane i has count[i] weights, and its first one repeated behind them. */
static void gather_groups(const Shape *s, const void *weights, int dtype, long first, long groups, float *w, ints *count) {
  const int per_row = s->padded / s->group;
  for (int lane = 0; lane < LANES; lane++) {
    const long number = first + lane;
    const int start = (int)(number % per_row) * s->group, left = s->columns - start;
    const int here = number >= groups ? 0 : left < s->group ? left : s->group;
    const size_t at = number >= groups ? 0 : (size_t)(number / per_row) * s->columns + start;
    float t[BLOCK];
    load_weights(weights, dtype, at, here, t);
    for (int i = here; i < s->group; i++) t[i] = here ? t[0] : 0;
    for (int i = 0; i < s->group; i++) w[i * LANES + lane] = t[i];
    (*count)[lane] = here;
  }
}

/* Keeps scale and base where they have a smaller error for the codes that `sums` stands for. */
INLINE void keep_better(Sums sums, floats n, floats v_sum, floats vv_sum, floats *scale, floats *base, floats *best) {
  const floats determinant = n * sums.squares - sums.codes * sums.codes;
  const floats trial = (n * sums.mixed - sums.codes * v_sum) / determinant;
  const floats offset = (sums.squares * v_sum - sums.codes * sums.mixed) / determinant;
  const floats error = vv_sum - trial * sums.mixed - offset * v_sum;
  const ints better = (trial > 0) & (error < *best); /* never true of the NaNs that a constant group gives */
  *scale = choose(better, trial, *scale);
  *base = choose(better, offset, *base);
  *best = choose(better, error, *best);
}

INLINE void add_code(Sums *sums, floats code, floats v) {
  sums->codes += code;
  sums->squares += code * code;
  sums->mixed += code * v;
}

/* Scale and base of groups of weights v [group, LANES] from 0 to 1: v is about code * scale + base. */
static void search_scales(int group, const float *v, ints count, floats *scale, floats *base) {
  const floats n = __builtin_convertvector(count, floats);
  floats v_sum = {0}, vv_sum = {0}, best = all_lanes(INFINITY);
  for (int i = 0; i < group; i++) {
    const floats value = load_lanes(v + i * LANES);
    v_sum += value;
    vv_sum += value * value;
  }
  *scale = all_lanes(1.0f / 15);
  *base = all_lanes(0);
  for (int trial = 0; trial < TRIALS; trial += 2) { /* two at a time: their sums do not wait for each other */
    const float one = 13.4f + 0.15f * trial, two = 13.4f + 0.15f * (trial + 1);
    Sums a = {0}, b = {0};
    for (int i = 0; i < group; i++) {
      const floats value = load_lanes(v + i * LANES);
      add_code(&a, at_most(rounded(value * one), 15), value);
      add_code(&b, at_most(rounded(value * two), 15), value);
    }
    keep_better(a, n, v_sum, vv_sum, scale, base, &best);
    keep_better(b, n, v_sum, vv_sum, scale, base, &best);
  }
  for (int step = 0; step < REFINEMENTS; step++) {
    const floats inverse = 1 / *scale;
    Sums a = {0};
    for (int i = 0; i < group; i++) {
      const floats value = load_lanes(v + i * LANES);
      const floats code = at_most(at_least(rounded((value - *base) * inverse), 0), 15);
      add_code(&a, choose(count > i, code, all_lanes(0)), value);
    }
    keep_better(a, n, v_sum, vv_sum, scale, base, &best);
  }
}

/* The LANES groups from `first` on; adds the squares of errors and weights to the two sums. */
static void encode_groups(const Shape *s, const void *weights, int dtype, long first, long groups, uint8_t *codes,
                          uint8_t *params, double *sums) {
  float w[BLOCK * LANES], v[BLOCK * LANES];
  int32_t bytes[BLOCK / 2 * LANES];
  ints count;
  gather_groups(s, weights, dtype, first, groups, w, &count);
  floats low = load_lanes(w), high = low;
  for (int i = 1; i < s->group; i++) {
    const floats value = load_lanes(w + i * LANES);
    low = choose(value < low, value, low);
    high = choose(value > high, value, high);
  }
  const floats range = high - low, divisor = choose(range > 0, range, all_lanes(1));
  for (int i = 0; i < s->group; i++) {
    const floats value = choose(count > i, (load_lanes(w + i * LANES) - low) / divisor, all_lanes(0));
    memcpy(v + i * LANES, &value, sizeof value);
  }
  floats scale, base;
  search_scales(s->group, v, count, &scale, &base);
  floats shift = (base + 8 * scale) * range + low;
  scale *= range;
  for (int lane = 0; lane < LANES; lane++) { /* what is stored is rounded, and the codes are chosen for the rounded values */
    const uint16_t pair[2] = {float_to_bf16(scale[lane]), float_to_bf16(shift[lane])};
    if (first + lane < groups) memcpy(params + (size_t)(first + lane) * 4, pair, 4);
    scale[lane] = bf16_to_float(pair[0]);
    shift[lane] = bf16_to_float(pair[1]);
  }
  const floats step = choose(scale > 0, scale, all_lanes(INFINITY));
  double lost[LANES] = {0}, all[LANES] = {0};
  for (int i = 0; i < s->group; i += 2) {
    ints code[2];
    for (int k = 0; k < 2; k++) {
      const floats value = load_lanes(w + (i + k) * LANES);
      const floats level = rounded(at_most(at_least((value - shift) / step, -8), 7));
      const ints real = count > i + k;
      code[k] = (__builtin_convertvector(level, ints) + 8) & real;
      add_squares(lost, choose(real, level * scale + shift - value, all_lanes(0)));
      add_squares(all, choose(real, value, all_lanes(0)));
    }
    const ints both = code[0] | code[1] << 4;
    memcpy(bytes + i / 2 * LANES, &both, sizeof both);
  }
  for (int lane = 0; lane < LANES && first + lane < groups; lane++) {
    uint8_t *to = codes + (size_t)(first + lane) * (s->group / 2); /* rows follow each other without a gap */
    for (int i = 0; i < s->group / 2; i++) to[i] = (uint8_t)bytes[i * LANES + lane];
  }
  sums[0] = total(lost);
  sums[1] = total(all);
}

static void encode8_row(const Shape *s, const void *weights, int dtype, int r, int8_t *codes, float *params, double *sums) {
  const size_t at = (size_t)r * s->columns;
  float t[BLOCK], most = 0;
  floats largest = {0};
  for (int c = 0; c < s->columns; c += BLOCK) {
    const int here = s->columns - c < BLOCK ? s->columns - c : BLOCK;
    load_weights(weights, dtype, at + c, here, t);
    for (int i = 0; i < here; i += LANES) {
      const floats value = load_lanes(t + i), size = choose(value < 0, -value, value);
      largest = choose(size > largest, size, largest);
    }
  }
  for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
  const float scale = most / 127, step = scale > 0 ? scale : 1;
  double lost[LANES] = {0}, all[LANES] = {0};
  for (int c = 0; c < s->columns; c += BLOCK) {
    const int here = s->columns - c < BLOCK ? s->columns - c : BLOCK;
    int8_t out[BLOCK];
    load_weights(weights, dtype, at + c, here, t);
    for (int i = 0; i < here; i += LANES) {
      const floats value = load_lanes(t + i), code = rounded(at_most(at_least(value / step, -127), 127));
      const ints whole = __builtin_convertvector(code, ints);
      add_squares(lost, code * scale - value);
      add_squares(all, value);
      for (int k = 0; k < LANES; k++) out[i + k] = (int8_t)whole[k];
    }
    memcpy(codes + at + c, out, here);
  }
  params[r] = scale;
  sums[0] = total(lost);
  sums[1] = total(all);
}

/* Quantise weights [rows, columns]. errors[0] and errors[1] get the sums of squared errors and weights; they are added up
 * in the order of the weights, so that they do not depend on the threads. */
int rl_encode(const Shape *s, const void *weights, int dtype, uint8_t *codes, void *params, double *errors, int threads) {
  const long groups = s->bits == 4 ? (long)s->rows * (s->padded / s->group) : s->rows;
  const long parts = s->bits == 4 ? (groups + LANES - 1) / LANES : groups;
  double *sums = scratch(&panel_sums, (size_t)parts * 2 * sizeof(double));
  if (!sums) return -1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (long part = 0; part < parts; part++) {
    if (s->bits == 4)
      encode_groups(s, weights, dtype, part * LANES, groups, codes, params, sums + 2 * part);
    else
      encode8_row(s, weights, dtype, (int)part, (int8_t *)codes, params, sums + 2 * part);
  }
  errors[0] = errors[1] = 0;
  for (long part = 0; part < parts; part++) {
    errors[0] += sums[2 * part];
    errors[1] += sums[2 * part + 1];
  }
  return 0;
}

/* 1 if products of inputs that need not be exact use the processor's integer dot products. */
int rl_integer_dot(void) { return INTEGER_DOT; }
