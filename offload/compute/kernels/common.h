/* What all kernels share: vectors, bfloat16, the layout of a quantised matrix (docs/formats.md), scratch memory.
 *
 * Every entry point is for one calling thread at a time, and shares its work by pool.h. Vectors are written
 * with the extensions that GCC and clang share, so that any processor can run this.
 */
#pragma once

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
#define UNROLL _Pragma("GCC unroll 8") /* loops over rows and tokens: their arrays must become registers */
#define UNROLL16 _Pragma("GCC unroll 16")
#define BLOCK 128 /* columns that one 64-byte load of 4-bit codes holds */

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

/* Where the matrices of an expert that gates with silu stand in its record, whose first byte a job names as its codes.
 * gate_up has the gate's rows first, then the up projection's. */
typedef struct {
  Shape gate_up, down;
  int64_t gate_up_codes, gate_up_params, down_codes, down_params;
} Expert;

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

#if defined(__AVX512F__)
/* Row i of 16 vectors becomes lane i of each. */
INLINE void transpose16(__m512i v[16]) {
  __m512i t[16];
  UNROLL16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL16
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  UNROLL16
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if INTEGER_DOT
INLINE __m512 load_floats(const void *from, int dtype, size_t at, __mmask16 there) {
  if (dtype != BF16) return _mm512_maskz_loadu_ps(there, (const float *)from + at);
  const __m256i half = _mm256_maskz_loadu_epi16(there, (const uint16_t *)from + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Vectors of a row from its value `at` on, of which `left` values are there; zeros for the others. */
INLINE void load_row(__m512 *x, int vectors, const void *from, int dtype, size_t at, long left) {
  for (int i = 0; i < vectors; i++, left -= 16)
    x[i] = load_floats(from, dtype, at + i * 16, left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
}

#define MOST_INTEGER 16256 /* 127 * 128: the upper byte is then in -127 .. 127, the lower one in -64 .. 63 */

INLINE void store_bytes(__m512i q, int8_t *upper, int8_t *lower) { /* q = upper * 128 + lower */
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
  _mm_storeu_si128((__m128i *)upper, _mm512_cvtepi32_epi8(high));
  _mm_storeu_si128((__m128i *)lower, _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(high, 7))));
}

/* Some vectors as integers, the largest of which is `levels`; `total` is their sum. Returns the scale, which is NaN if a
 * value is not finite: that makes every product of its row NaN. */
INLINE float integers_of(const __m512 *x, int vectors, float levels, __m512i *q, int32_t *total) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 finite = 0xffff;
  for (int i = 0; i < vectors; i++) {
    finite &= _mm512_cmp_ps_mask(_mm512_sub_ps(x[i], x[i]), _mm512_setzero_ps(), _CMP_EQ_OQ);
    most = _mm512_max_ps(most, _mm512_abs_ps(x[i]));
  }
  const float largest = _mm512_reduce_max_ps(most);
  const int some = finite == 0xffff && largest > 1e-33f; /* smaller ones are nothing beside any other group */
  const __m512 inverse = _mm512_set1_ps(some ? levels / largest : 0);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < vectors; i++) {
    q[i] = some ? _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)) : _mm512_setzero_si512();
    sum = _mm512_add_epi32(sum, q[i]);
  }
  *total = _mm512_reduce_add_epi32(sum);
  return some ? largest / levels : finite == 0xffff ? 0 : NAN;
}

INLINE __m256i bf16_of(__m512 v) { /* to nearest, ties to even */
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
#endif
}
#endif
