/* What functions that make weights of published formats share: numbers of 16 bits, codes, and how a weight is written. */
#pragma once

#include "common.h"

#define PART 256 /* columns that a format makes at a time: a multiple of every block of codes */

/* A matrix as its parts hold it, a row an output. block_*: what shares a scale; 0 where the format says it itself. What else
 * there is in `more` and `variant`, published.c says of each format. */
typedef struct {
  const uint8_t *codes;
  const void *scales;
  const void *more[4];
  int32_t format, rows, columns, block_rows, block_columns, variant;
} Packed;

/* Writes `count` weights of a row, from the column `first` on, a multiple of PART, to `out` as `kind` says. */
typedef void Make(const Packed *m, long row, long first, long count, void *out);

/* What weights are written as, beside F32 and BF16. NEAR_BF16 takes the processor's own rounding to bfloat16, which makes
 * zeros of numbers below 2^-126, where it has one. */
enum { NEAR_BF16 = 2, F16 = 3 };

INLINE size_t size_of(int kind) { return kind == F32 ? 4 : 2; }

/* The function of published.c that makes the weights of a format. */
Make *maker_of(int format, int kind);

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

/* --- numbers of 16 bits with 5 in the exponent */

INLINE float from_f16(uint16_t half) {
  float value = as_float((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
  if ((half & 0x7c00) == 0x7c00) value = half & 0x3ff ? NAN : INFINITY;
  return half & 0x8000 ? -value : value;
}

INLINE uint16_t to_f16(float value) { /* to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) { /* the sum's last bits are the result's: half a step of 2^-24 is half a step of 0.5 */
    const float sum = as_float(bits) + 0.5f;
    uint32_t found;
    memcpy(&found, &sum, 4);
    return sign | (uint16_t)(found - 0x3f000000);
  }
  return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

INLINE f32x16 from_f16_16(const uint16_t *from) {
  f32x16 value;
#if defined(__AVX512F__)
  value = (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)));
  memcpy(&value, &low, sizeof low);
  memcpy((char *)&value + sizeof low, &high, sizeof high);
#else
  for (int i = 0; i < 16; i++) value[i] = from_f16(from[i]);
#endif
  return value;
}

INLINE void to_f16_16(uint16_t *to, f32x16 value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 half[2];
  memcpy(half, &value, sizeof value);
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(to + 8), _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; i++) to[i] = to_f16(value[i]);
#endif
}

INLINE f32x16 to_f16_and_back(f32x16 value) {
  uint16_t halves[16];
  to_f16_16(halves, value);
  return from_f16_16(halves);
}

INLINE f32x16 to_bf16_and_back(f32x16 value) { /* of what is a number */
  i32x16 bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & (int32_t)0xffff0000;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* --- writing weights */

INLINE void put16(void *out, const int kind, long at, f32x16 value) {
  if (kind == F32) {
    memcpy((float *)out + at, &value, sizeof value);
    return;
  }
  uint16_t *to = (uint16_t *)out + at;
  if (kind == F16) {
    to_f16_16(to, value);
    return;
  }
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
  else ((uint16_t *)out)[at] = kind == F16 ? to_f16(value) : to_bf16(value);
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

INLINE float rounded1(float value) {
  __asm__("" : "+m"(value));
  return value;
}

/* --- codes */

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

/* 32 weights of a table that holds 16 as `kind` writes them. */
INLINE void pick32(const void *table, u8x16 first, u8x16 second, const int kind, void *out, long at) {
  if (kind == F32) {
    put16(out, F32, at, pick16(table, first));
    put16(out, F32, at + 16, pick16(table, second));
    return;
  }
  uint16_t *to = (uint16_t *)out + at;
#if defined(__AVX512BW__)
  const __m512i index = _mm512_cvtepu8_epi16(_mm256_set_m128i((__m128i)second, (__m128i)first));
  const __m512i weights = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)table));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, weights));
#else
  for (int i = 0; i < 16; i++) {
    to[i] = ((const uint16_t *)table)[first[i]];
    to[16 + i] = ((const uint16_t *)table)[second[i]];
  }
#endif
}

/* 32 codes of 16 bytes, which hold the first of two in their low half, or the high one. */
INLINE void pairs(const uint8_t *from, const int high_first, u8x16 *first, u8x16 *second) {
  u8x16 one = bytes16(from) & 15, other = bytes16(from) >> 4;
  if (high_first) {
    const u8x16 low = one;
    one = other;
    other = low;
  }
#if defined(__AVX2__)
  *first = (u8x16)_mm_unpacklo_epi8((__m128i)one, (__m128i)other);
  *second = (u8x16)_mm_unpackhi_epi8((__m128i)one, (__m128i)other);
#else
  for (int i = 0; i < 16; i++) {
    (*first)[i] = i % 2 ? other[i / 2] : one[i / 2];
    (*second)[i] = i % 2 ? other[8 + i / 2] : one[8 + i / 2];
  }
#endif
}
