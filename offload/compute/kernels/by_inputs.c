/* Both formats hold words of 8 codes. GPTQ's are of 8 inputs and stand output after output, so that turning a matrix means
 * turning one of words. AWQ's are of 8 outputs, for each input; 8 of them first become the 8 words that GPTQ would have.
 */
#include "by_inputs.h"

#define SIDE 16  /* words that are turned at a time, either way */
#define AHEAD 16 /* rows of words that are fetched ahead: they are far apart, so the processor does not see it coming */

typedef uint32_t u32x16 __attribute__((vector_size(64)));

int order_of_groups(const Packed *m, int32_t *order) {
  const int32_t *group_of = m->more[1];
  const long size = m->block_columns, groups = m->columns / size;
  int32_t others = 0, *taken = order + m->columns;
  for (long g = 0; g < groups; g++)
    for (long i = g * size; i < (g + 1) * size; i++) others |= group_of[i] ^ (int32_t)g;
  if (!others) return 0;
  memset(taken, 0, sizeof *taken * groups);
  for (long i = 0; i < m->columns; i++) {
    const long g = group_of[i];
    if (g < 0 || g >= groups || taken[g] == size) return -1;
    order[g * size + taken[g]++] = (int32_t)i;
  }
  return 1; /* no group has too many, so none too few */
}

/* `count` words, and zeros behind them. */
INLINE u32x16 words(const uint32_t *from, long count) {
#if defined(__AVX512F__)
  return (u32x16)_mm512_maskz_loadu_epi32(count < SIDE ? (__mmask16)((1 << count) - 1) : (__mmask16)-1, from);
#else
  u32x16 found = {0};
  memcpy(&found, from, sizeof *from * (count < SIDE ? count : SIDE));
  return found;
#endif
}

/* Word j of vector i becomes word i of vector j. */
INLINE void turn(u32x16 v[SIDE]) {
#if defined(__AVX512F__)
  transpose16((__m512i *)v);
#else
  uint32_t from[SIDE][SIDE], to[SIDE][SIDE];
  memcpy(from, v, sizeof from);
  for (int i = 0; i < SIDE; i++)
    for (int j = 0; j < SIDE; j++) to[j][i] = from[i][j];
  memcpy(v, to, sizeof to);
#endif
}

/* Code j of vector i's words becomes code i of vector j's. */
INLINE void turn_codes(u32x16 v[8]) {
  const uint32_t low[] = {0x0f0f0f0f, 0x00ff00ff, 0x0000ffff};
  UNROLL
  for (int step = 2; step >= 0; step--) {
    const uint32_t by = 1u << step;
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
      if (i & by) continue;
      const u32x16 differ = (v[i] >> 4 * by ^ v[i + by]) & low[step];
      v[i + by] ^= differ;
      v[i] ^= differ << 4 * by;
    }
  }
}

/* Words of 8 inputs of up to 16 outputs from `output` on: `word` is the number of the 8. */
INLINE u32x16 words_of_gptq(const Packed *m, long word, long output, long count) {
  const uint32_t *codes = (const uint32_t *)m->codes + output;
  const int32_t *order = m->more[1];
  if (!order) return words(codes + word * m->rows, count);
  u32x16 found = {0};
  UNROLL
  for (uint32_t i = 0; i < 8; i++) {
    const uint32_t input = order[8 * word + i];
    found |= (words(codes + (long)(input / 8) * m->rows, count) >> 4 * (input % 8) & 15) << 4 * i;
  }
  return found;
}

/* Writes turned words of the inputs 8 * word and on, of every `step`th of up to 16 rows. */
INLINE void store(const Packed *m, const u32x16 v[SIDE], uint8_t *codes, long word, int step, long rows) {
  const long left = m->columns / 8 - word, size = 4 * (left < SIDE ? left : SIDE);
  for (long i = 0; i < SIDE && i < rows; i++) {
    uint8_t *to = codes + i * step * (m->columns / 2) + 4 * word;
    if (size == 4 * SIDE) memcpy(to, &v[i], 4 * SIDE);
    else memcpy(to, &v[i], size);
  }
}

static void tile_of_gptq(const Packed *m, long first, long count, uint8_t *codes) {
  for (long word = 0; word < m->columns / 8; word += SIDE)
    for (long output = 0; output < count; output += SIDE) {
      u32x16 v[SIDE];
      const long left = m->columns / 8 - word;
      UNROLL16
      for (long i = 0; i < SIDE; i++) {
        const u32x16 none = {0};
        v[i] = i < left ? words_of_gptq(m, word + i, first + output, count - output) : none;
        if (!m->more[1]) __builtin_prefetch((const uint32_t *)m->codes + (word + AHEAD + i) * m->rows + first + output);
      }
      turn(v);
      store(m, v, codes + output * (m->columns / 2), word, 1, count - output);
    }
}

static void tile_of_awq(const Packed *m, long first, long count, uint8_t *codes) {
  static const int OUTPUT[] = {0, 2, 4, 6, 1, 3, 5, 7}; /* of each place in a word */
  const uint32_t *from = (const uint32_t *)m->codes + first / 8;
  for (long output = 0; output < count; output += 8 * SIDE) /* all 8 of each word */
    for (long word = 0; word < m->columns / 8; word += SIDE) {
      u32x16 v[8][SIDE] = {0};
      for (long i = 0; i < SIDE && word + i < m->columns / 8; i++) {
        u32x16 some[8];
        UNROLL
        for (int j = 0; j < 8; j++) {
          const uint32_t *at = from + (8 * (word + i) + j) * (m->rows / 8) + output / 8;
          some[j] = words(at, (count - output) / 8);
          __builtin_prefetch(at + AHEAD * (m->rows / 8)); /* also beyond the end: it is no access */
        }
        turn_codes(some);
        UNROLL
        for (int j = 0; j < 8; j++) v[j][i] = some[j];
      }
      for (int place = 0; place < 8; place++) {
        turn(v[place]);
        store(m, v[place], codes + (output + OUTPUT[place]) * (m->columns / 2), word, 8, (count - output) / 8);
      }
    }
}

void codes_of_rows(const Packed *m, long first, long count, uint8_t *codes) {
  if (m->format == GPTQ) tile_of_gptq(m, first, count, codes);
  else tile_of_awq(m, first, count, codes);
}
