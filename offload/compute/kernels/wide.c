/* Products with 4- and 8-bit weights for many tokens, where arithmetic is what takes the time, on processors that multiply
 * bfloat16 (AVX-512 BF16). A thread decodes 32 rows of the weights to bfloat16 into memory that stays in its cache, laid
 * out so that a vector holds a pair of columns of 16 rows, and multiplies that with all tokens, 12 at a time. So no
 * decoded matrix goes through memory, as it must for a library's product: with 64 tokens that took half of the time.
 *
 * Weights are as in products.c; those that are multiplied are bit for bit what rl_decode gives. The result of a row and a
 * token depends on nothing else: columns are added in order, pair by pair, in float32.
 */
#include "common.h"
#include "pool.h"

#define HALF 16     /* rows of a vector */
#define TOGETHER 12 /* tokens that share a pass over the rows: their sums fill the registers */

#if defined(__AVX512BF16__) && INTEGER_DOT
#define WIDE 1
#else
#define WIDE 0
#endif

#if WIDE
INLINE __m512i bf16_of_floats(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* The 16 weights that a code of a group can stand for. */
INLINE __m512i table_of(const uint8_t *info) {
  const __m512 level = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  uint16_t pair[2];
  memcpy(pair, info, sizeof pair);
  const __m512 all = _mm512_fmadd_ps(level, _mm512_set1_ps(bf16_to_float(pair[0])), _mm512_set1_ps(bf16_to_float(pair[1])));
  return bf16_of_floats(all, all);
}

#if defined(__AVX512VBMI__)
/* 32 columns. Four codes to 64 bits, each then shifted to a place of its own: of what comes with it the permutation looks
 * at one bit, which chooses between two equal halves of the table. */
INLINE __m512i weights4(const uint8_t *codes, __m512i table) {
  const __m512i fours = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)codes));
  const __m512i each = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0c0c080804040000), fours);
  return _mm512_permutexvar_epi16(each, table);
}
#else
INLINE __m512i weights4(const uint8_t *codes, __m512i table) { /* 32 columns */
  const __m128i both = _mm_loadu_si128((const __m128i *)codes), nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(both, nibble), odd = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
  const __m256i in_order = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(in_order), table);
}
#endif

INLINE __m512i weights8(const uint8_t *codes, float scale) {
  const __m512 low = (__m512)float_of_int8(codes), high = (__m512)float_of_int8(codes + 16);
  return bf16_of_floats(_mm512_mul_ps(low, _mm512_set1_ps(scale)), _mm512_mul_ps(high, _mm512_set1_ps(scale)));
}

/* Row i of 16 vectors becomes lane i of each. */
INLINE void transpose(__m512i v[16]) {
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

/* Decodes `count` rows from `row` on, at most 16 (zeros for the others), into every second vector from `to` on. */
static void decode_half(const Shape *s, const uint8_t *codes, const uint8_t *params, int row, int count, __m512i *to) {
  const size_t stride = row_bytes(s), param_stride = row_params(s);
  codes += row * stride;
  params += row * param_stride;
  __m512i v[HALF], tables[HALF];
  float scales[HALF] = {0};
  for (int r = 0; r < HALF; r++) tables[r] = _mm512_setzero_si512();
  if (s->bits == 8)
    for (int r = 0; r < count; r++) memcpy(&scales[r], params + r * param_stride, sizeof scales[r]);
  for (int c = 0; c < s->columns; c += 32, to += 32) {
    if (s->bits == 4) {
      if (c % s->group == 0)
        for (int r = 0; r < count; r++) tables[r] = table_of(params + r * param_stride + (size_t)c / s->group * 4);
      UNROLL16
      for (int r = 0; r < HALF; r++) v[r] = weights4(codes + (r < count ? r : 0) * stride + c / 2, tables[r]);
    } else {
      UNROLL16
      for (int r = 0; r < HALF; r++) v[r] = weights8(codes + (r < count ? r : 0) * stride + c, scales[r]);
    }
    transpose(v);
    UNROLL16
    for (int k = 0; k < 16; k++) to[2 * k] = v[k];
  }
}

/* Sums of 32 rows for T tokens: `x` holds a pair of columns of TOGETHER tokens, then the next pair. */
INLINE void multiply(const int T, const __m512i *rows, int pairs, const uint32_t *x, __m512 (*sums)[2]) {
  __m512 acc[TOGETHER][2];
  UNROLL16
  for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (int k = 0; k < pairs; k++, rows += 2, x += TOGETHER) {
    const __m512bh first = (__m512bh)rows[0], second = (__m512bh)rows[1];
    UNROLL16
    for (int t = 0; t < T; t++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[t]);
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], pair, first);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], pair, second);
    }
  }
  UNROLL16
  for (int t = 0; t < T; t++) {
    sums[t][0] = acc[t][0];
    sums[t][1] = acc[t][1];
  }
}

static void multiply_some(int tokens, const __m512i *rows, int pairs, const uint32_t *x, __m512 (*sums)[2]) {
  if (tokens > 8) multiply(12, rows, pairs, x, sums);
  else if (tokens > 4) multiply(8, rows, pairs, x, sums);
  else multiply(4, rows, pairs, x, sums);
}

static __thread Scratch decoded, outer_panel, inner_panel, groups_of;

/* Up to TOGETHER of a job's rows. */
typedef struct {
  int32_t job, first, count;
} Group;

typedef struct {
  const Shape *shape;          /* of the matrix, or of gate and up together */
  const Expert *expert;        /* NULL: a matrix alone */
  const Job *list;
  const Group *groups;
  const int32_t *of_job;       /* the first group of each job, and of the job after the last */
  const uint16_t *x;
  const int32_t *token_of;
  uint32_t *outer, *inner;     /* [groups, pairs of columns, TOGETHER] */
  void *out;
  int out_dtype, tiles, failed;
} Wide;

static void fill(void *context, int g) {
  const Wide *w = context;
  const Group *group = &w->groups[g];
  const size_t pairs = w->shape->columns / 2;
  uint32_t *to = w->outer + g * pairs * TOGETHER;
  for (int t = 0; t < TOGETHER; t++) {
    if (t >= group->count) {
      for (size_t k = 0; k < pairs; k++) to[k * TOGETHER + t] = 0;
      continue;
    }
    const int row = group->first + t;
    const uint16_t *from = w->x + (size_t)(w->token_of ? w->token_of[row] : row) * w->shape->columns;
    for (size_t k = 0; k < pairs; k++) memcpy(&to[k * TOGETHER + t], from + 2 * k, sizeof *to);
  }
}

static __m512i *tile_memory(Wide *w, int columns) {
  __m512i *rows = scratch(&decoded, (size_t)columns / 2 * 2 * sizeof *rows);
  if (!rows) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
  return rows;
}

/* 32 rows of a matrix, for all rows of its job. */
static void product_tile(Wide *w, const Shape *s, const uint8_t *codes, const uint8_t *params, int job, int from,
                         const uint32_t *x) {
  const int pairs = s->columns / 2, left = s->rows - from, first = left < HALF ? left : HALF;
  const int second = left < 2 * HALF ? left - first : HALF;
  __m512i *rows = tile_memory(w, s->columns);
  if (!rows) return;
  decode_half(s, codes, params, from, first, rows);
  decode_half(s, codes, params, second ? from + HALF : from, second, rows + 1);
  for (int g = w->of_job[job]; g < w->of_job[job + 1]; g++) {
    const Group *group = &w->groups[g];
    __m512 sums[TOGETHER][2];
    multiply_some(group->count, rows, pairs, x + (size_t)g * pairs * TOGETHER, sums);
    for (int t = 0; t < group->count; t++) {
      const size_t at = (size_t)(group->first + t) * s->rows + from;
      const __mmask16 masks[2] = {(__mmask16)((1u << first) - 1), (__mmask16)((1u << second) - 1)};
      for (int h = 0; h < 2; h++)
        if (w->out_dtype == BF16)
          _mm256_mask_storeu_epi16((uint16_t *)w->out + at + h * HALF, masks[h], (__m256i)_mm512_cvtneps_pbh(sums[t][h]));
        else
          _mm512_mask_storeu_ps((float *)w->out + at + h * HALF, masks[h], sums[t][h]);
    }
  }
}

static void linear_part(void *context, int part) {
  Wide *w = context;
  const int job = part / w->tiles;
  product_tile(w, w->shape, w->list[job].codes, w->list[job].params, job, part % w->tiles * 2 * HALF, w->outer);
}

/* 16 rows of the gate and the same of the up projection: the inner states of 16 columns, in bfloat16. */
static void up_part(void *context, int part) {
  Wide *w = context;
  const Shape *s = w->shape;
  const int job = part / w->tiles, from = part % w->tiles * HALF, width = w->expert->down.columns;
  const uint8_t *record = w->list[job].codes, *codes = record + w->expert->gate_up_codes;
  const uint8_t *params = record + w->expert->gate_up_params;
  const size_t pairs = s->columns / 2, inner_pairs = width / 2;
  __m512i *rows = tile_memory(w, s->columns);
  if (!rows) return;
  decode_half(s, codes, params, from, HALF, rows);
  decode_half(s, codes, params, width + from, HALF, rows + 1);
  for (int g = w->of_job[job]; g < w->of_job[job + 1]; g++) {
    __m512 sums[TOGETHER][2];
    multiply_some(w->groups[g].count, rows, pairs, w->outer + g * pairs * TOGETHER, sums);
    uint32_t *to = w->inner + (g * inner_pairs + from / 2) * TOGETHER;
    for (int t = 0; t < TOGETHER; t++) {
      uint32_t states[HALF / 2] = {0};
      if (t < w->groups[g].count) {
        const f32x16 gate = (f32x16)sums[t][0];
        const f32x16 value = gate / (1.0f + exp16(-gate)) * (f32x16)sums[t][1];
        _mm256_storeu_si256((__m256i *)states, (__m256i)_mm512_cvtneps_pbh((__m512)value));
      }
      for (int k = 0; k < HALF / 2; k++) to[k * TOGETHER + t] = states[k];
    }
  }
}

static void down_part(void *context, int part) {
  Wide *w = context;
  const int job = part / w->tiles;
  const uint8_t *record = w->list[job].codes;
  product_tile(w, &w->expert->down, record + w->expert->down_codes, record + w->expert->down_params, job,
               part % w->tiles * 2 * HALF, w->inner);
}

/* Makes the groups of all jobs; returns how many, or -1 if there is no memory. */
static int make_groups(Wide *w, int jobs) {
  int total = 0;
  for (int j = 0; j < jobs; j++) total += (w->list[j].count + TOGETHER - 1) / TOGETHER;
  Group *groups = scratch(&groups_of, total * sizeof *groups + (jobs + 1) * sizeof(int32_t));
  if (!groups) return -1;
  int32_t *of_job = (int32_t *)(groups + total);
  w->groups = groups;
  w->of_job = of_job;
  total = 0;
  for (int j = 0; j < jobs; j++) {
    of_job[j] = total;
    for (int t = 0; t < w->list[j].count; t += TOGETHER) {
      const int left = w->list[j].count - t;
      groups[total++] = (Group){j, w->list[j].first + t, left < TOGETHER ? left : TOGETHER};
    }
  }
  of_job[jobs] = total;
  return total;
}

static int panel(Wide *w, int jobs, int threads) {
  const int groups = make_groups(w, jobs);
  if (groups < 0) return -1;
  w->outer = scratch(&outer_panel, (size_t)groups * TOGETHER * w->shape->columns * sizeof(uint16_t));
  if (!w->outer) return -1;
  pool_run(threads, groups, fill, w);
  return groups;
}
#endif

/* 1 if this processor has these products, for matrices whose columns divide by 32; else the others do nothing. */
int rl_wide(void) { return WIDE; }

/* As rl_linear, with x in bfloat16. Returns 0, or -1 if there is no memory. */
int rl_wide_linear(const Shape *s, int jobs, const Job *list, const void *x, const int32_t *token_of, void *out,
                   int out_dtype, int threads) {
#if WIDE
  Wide w = {.shape = s, .list = list, .x = x, .token_of = token_of, .out = out, .out_dtype = out_dtype};
  w.tiles = (s->rows + 2 * HALF - 1) / (2 * HALF);
  if (panel(&w, jobs, threads) < 0) return -1;
  pool_run(threads, jobs * w.tiles, linear_part, &w);
  return -w.failed;
#else
  (void)s, (void)jobs, (void)list, (void)x, (void)token_of, (void)out, (void)out_dtype, (void)threads;
  return -1;
#endif
}

/* As rl_silu_experts, with x in bfloat16, which the inner states become, too. */
int rl_wide_experts(const Expert *expert, int jobs, const Job *list, const void *x, const int32_t *token_of, float *out,
                    int threads) {
#if WIDE
  Wide w = {.shape = &expert->gate_up, .expert = expert, .list = list, .x = x, .token_of = token_of, .out = out};
  w.out_dtype = F32;
  const int groups = panel(&w, jobs, threads), width = expert->down.columns;
  if (groups < 0) return -1;
  w.inner = scratch(&inner_panel, (size_t)groups * TOGETHER * width * sizeof(uint16_t));
  if (!w.inner) return -1;
  w.tiles = width / HALF;
  pool_run(threads, jobs * w.tiles, up_part, &w);
  w.tiles = (expert->down.rows + 2 * HALF - 1) / (2 * HALF);
  pool_run(threads, jobs * w.tiles, down_part, &w);
  return -w.failed;
#else
  (void)expert, (void)jobs, (void)list, (void)x, (void)token_of, (void)out, (void)threads;
  return -1;
#endif
}
