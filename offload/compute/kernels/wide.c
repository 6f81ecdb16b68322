/* Products with 4- and 8-bit weights for many tokens, where arithmetic is what takes the time, by integer dot products.
 * The weights stay as they are stored; the input becomes integers with a scale for each group of columns. Beside weights of
 * 4 bits those have 8 bits, as in llama.cpp, whose Q8_0 has groups of 32: twice as fast as bfloat16, and what that loses is
 * a tenth of what the weights have lost. Beside 8 bits they have 15, as in products.c: two instructions instead of one.
 *
 * A thread brings the codes of 32 rows into an order in which a vector holds four columns of 16 rows, and multiplies that
 * with all tokens, 6 at a time: their integer and float sums fill the registers.
 *
 * Weights are as in products.c. The result of a row and a token depends on nothing else: the sums of a group are exact,
 * and groups are added in order, in float32.
 */
#include "common.h"
#include "pool.h"

#define HALF 16        /* rows of a vector */
#define TOGETHER 6     /* tokens that share a pass over the rows */
#define GROUP8 64      /* columns of a scale of the input, where the weights have 8 bits and one scale a row */
#define AT_A_TIME 64   /* bytes of a row's codes that are brought into order together */

#if INTEGER_DOT
/* Rows of the input. `more` holds of each row first the scales of all groups, then the sums of what the values stand for,
 * then, as integers, what the products of the group's values start from. */
typedef struct {
  size_t width, groups; /* bytes and groups of a row */
  int8_t *values;       /* [rows, width]; with 4 bits of each 8 columns the even ones first, as nibbles come out; with 8
                           of each group the upper bytes, then the lower */
  float *more;          /* [rows, 3, groups] */
} Panel;

INLINE int group_of(const Shape *s) { return s->bits == 4 ? s->group : GROUP8; }

INLINE size_t columns_of(const Shape *s) { return s->bits == 4 ? (size_t)s->padded : round_up(s->columns, GROUP8); }

static int panel_init(Panel *p, const Shape *s, int rows, Scratch *values, Scratch *more) {
  p->width = columns_of(s) * (s->bits == 4 ? 1 : 2);
  p->groups = columns_of(s) / group_of(s);
  p->values = scratch(values, rows * p->width);
  p->more = scratch(more, rows * 3 * p->groups * sizeof(float));
  return p->values && p->more ? 0 : -1;
}

static void panel_fill(const Panel *p, const Shape *s, int row, const void *from, int dtype, size_t at) {
  const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const int group = group_of(s);
  const float levels = s->bits == 4 ? 127 : MOST_INTEGER;
  float *scales = p->more + row * 3 * p->groups, *sums = scales + p->groups;
  int32_t *starts = (int32_t *)(sums + p->groups);
  int8_t *to = p->values + row * p->width;
  for (size_t g = 0; g < p->groups; g++) {
    __m512 x[BLOCK / 16];
    __m512i q[BLOCK / 16];
    load_row(x, group / 16, from, dtype, at + g * group, s->columns - (long)(g * group));
    int32_t total;
    scales[g] = integers_of(x, group / 16, levels, q, &total);
    for (int i = 0; i < group / 16; i++, to += 16)
      if (s->bits == 4) _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q[i]), apart));
      else store_bytes(q[i], to, to + GROUP8);
    if (s->bits == 8) to += GROUP8;
    sums[g] = (float)total * scales[g];
    starts[g] = s->bits == 4 ? -8 * total : -total; /* weights count from 0; with 8 bits 128 of what is shifted by 7 */
  }
}

/* 32 rows of the weights. With 4 bits `factors` holds of each group the scales of both halves, then their shifts;
 * with 8 bits only the scales of the rows. */
typedef struct {
  __m512i *codes;  /* [four columns, half] */
  __m512 *factors;
} Rows;

static __thread Scratch ordered, values_of[2], more_of[2], states_of, runs_of;

static int rows_init(Rows *rows, const Shape *s) {
  const size_t width = round_up(columns_of(s), BLOCK); /* the codes come in whole vectors */
  const size_t factors = s->bits == 4 ? (size_t)s->padded / s->group * 4 : 2;
  rows->codes = scratch(&ordered, (width / 4 * 2 + factors) * 64);
  rows->factors = (__m512 *)(rows->codes + width / 4 * 2);
  return rows->codes ? 0 : -1;
}

/* Brings `count` rows from `row` on, at most 16, into half `half` of `to`; what is left of it becomes zero. */
INLINE void order_bits(const int bits, const Shape *s, const uint8_t *codes, const uint8_t *params, int row, int count, int half,
                       const Rows *to) {
  const size_t stride = row_bytes(s), param_stride = row_params(s);
  const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)0x80);
  codes += row * stride;
  params += row * param_stride;
  __m512i v[HALF];
  __m512i *into = to->codes + half;
  for (size_t at = 0; at < stride; at += AT_A_TIME) {
    if (count == HALF && stride - at >= 64) {
      UNROLL16
      for (int r = 0; r < HALF; r++) v[r] = _mm512_loadu_si512(codes + r * stride + at);
    } else {
      const __mmask64 there = stride - at >= 64 ? ~0ull : (1ull << (stride - at)) - 1;
      for (int r = 0; r < HALF; r++) v[r] = _mm512_maskz_loadu_epi8(r < count ? there : 0, codes + (r < count ? r : 0) * stride + at);
    }
    transpose16(v);
    if (bits == 8) {
      UNROLL16
      for (int k = 0; k < HALF; k++) into[2 * k] = _mm512_xor_si512(v[k], sign); /* the instruction takes no sign here */
      into += 2 * HALF;
    } else {
      UNROLL16
      for (int k = 0; k < HALF; k++) {
        into[4 * k] = _mm512_and_si512(v[k], nibble);
        into[4 * k + 2] = _mm512_and_si512(_mm512_srli_epi16(v[k], 4), nibble);
      }
      into += 4 * HALF;
    }
  }
  if (bits == 8) {
    to->factors[half] = _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), params);
    return;
  }
  for (size_t at = 0; at < param_stride; at += 64) {
    const int some = param_stride - at >= 64 ? 16 : (int)(param_stride - at) / 4;
    for (int r = 0; r < HALF; r++)
      v[r] = _mm512_maskz_loadu_epi32(r < count ? (1u << some) - 1 : 0, params + (r < count ? r : 0) * param_stride + at);
    transpose16(v);
    for (int g = 0; g < some; g++) {
      __m512 *factors = to->factors + (at / 4 + g) * 4 + half;
      factors[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v[g], 16));
      factors[2] = _mm512_castsi512_ps(_mm512_and_si512(v[g], _mm512_set1_epi32((int)0xffff0000)));
    }
  }
}

static void order_half(const Shape *s, const uint8_t *codes, const uint8_t *params, int row, int count, int half, const Rows *to) {
  if (s->bits == 8) order_bits(8, s, codes, params, row, count, half, to);
  else order_bits(4, s, codes, params, row, count, half, to);
}

/* Sums of 32 rows for T rows of the input from `row` on. */
INLINE void multiply(const int T, const int bits, const int group, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]) {
  const int8_t *x = p->values + row * p->width;
  const float *more = p->more + row * 3 * p->groups;
  const __m512i *w = rows->codes;
  const __m512 *factors = rows->factors;
  __m512 acc[TOGETHER][2];
  UNROLL
  for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (size_t g = 0; g < p->groups; g++) {
    __m512i dot[TOGETHER][2];
    UNROLL
    for (int t = 0; t < T; t++)
      dot[t][0] = dot[t][1] = _mm512_set1_epi32(((const int32_t *)more)[(t * 3 + 2) * p->groups + g]);
    for (int plane = bits == 8 ? 0 : 1; plane < 2; plane++) {
#pragma GCC unroll 4
      for (int q = 0; q < group / 4; q++, x += 4) {
        const __m512i first = w[2 * q], second = w[2 * q + 1];
        UNROLL
        for (int t = 0; t < T; t++) {
          int32_t four;
          memcpy(&four, x + t * p->width, sizeof four);
          dot[t][0] = _mm512_dpbusd_epi32(dot[t][0], first, _mm512_set1_epi32(four));
          dot[t][1] = _mm512_dpbusd_epi32(dot[t][1], second, _mm512_set1_epi32(four));
        }
      }
      if (plane) break;
      UNROLL
      for (int t = 0; t < T; t++) {
        dot[t][0] = _mm512_slli_epi32(dot[t][0], 7);
        dot[t][1] = _mm512_slli_epi32(dot[t][1], 7);
      }
    }
    w += group / 2;
    UNROLL
    for (int t = 0; t < T; t++) {
      const __m512 scale = _mm512_set1_ps(more[t * 3 * p->groups + g]);
      UNROLL
      for (int h = 0; h < 2; h++) {
        const __m512 product = _mm512_cvtepi32_ps(dot[t][h]);
        if (bits == 8) {
          acc[t][h] = _mm512_fmadd_ps(product, scale, acc[t][h]);
          continue;
        }
        acc[t][h] = _mm512_fmadd_ps(product, _mm512_mul_ps(factors[h], scale), acc[t][h]);
        acc[t][h] = _mm512_fmadd_ps(factors[2 + h], _mm512_set1_ps(more[(t * 3 + 1) * p->groups + g]), acc[t][h]);
      }
    }
    if (bits == 4) factors += 4;
  }
  UNROLL
  for (int t = 0; t < T; t++)
    UNROLL
    for (int h = 0; h < 2; h++) sums[t][h] = bits == 8 ? _mm512_mul_ps(acc[t][h], factors[h]) : acc[t][h];
}

#define MULTIPLY(BITS, GROUP)                                          \
  switch (tokens) {                                                    \
    case 1: multiply(1, BITS, GROUP, rows, p, row, sums); return;      \
    case 2: multiply(2, BITS, GROUP, rows, p, row, sums); return;      \
    case 3: multiply(3, BITS, GROUP, rows, p, row, sums); return;      \
    case 4: multiply(4, BITS, GROUP, rows, p, row, sums); return;      \
    case 5: multiply(5, BITS, GROUP, rows, p, row, sums); return;      \
    default: multiply(TOGETHER, BITS, GROUP, rows, p, row, sums); return; \
  }

static void multiply4_32(int tokens, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]) { MULTIPLY(4, 32) }
static void multiply4_64(int tokens, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]) { MULTIPLY(4, 64) }
static void multiply4_128(int tokens, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]) { MULTIPLY(4, 128) }
static void multiply8(int tokens, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]) { MULTIPLY(8, GROUP8) }

typedef void (*Multiply)(int tokens, const Rows *rows, const Panel *p, int row, __m512 (*sums)[2]);

static Multiply multiply_of(const Shape *s) {
  if (s->bits == 8) return multiply8;
  return s->group == 32 ? multiply4_32 : s->group == 64 ? multiply4_64 : multiply4_128;
}

/* A job's rows stand together in the panels: where they begin there. */
typedef struct {
  const Shape *shape;   /* of the matrix, or of gate and up together */
  const Expert *expert; /* NULL: a matrix alone */
  const Job *list;
  const int32_t *start, *row_of; /* a job's first row of a panel; the number that a row has for the caller */
  const void *x;
  const int32_t *token_of;
  Panel outer, inner;
  float *states; /* [rows, width of the inner matrix] */
  void *out;
  int out_dtype, threads, tiles, parts, failed;
} Wide;

static void fill_outer(void *context, int r) {
  const Wide *w = context;
  const int row = w->row_of[r];
  panel_fill(&w->outer, w->shape, r, w->x, BF16, (size_t)(w->token_of ? w->token_of[row] : row) * w->shape->columns);
}

static void fill_inner(void *context, int r) {
  const Wide *w = context;
  panel_fill(&w->inner, &w->expert->down, r, w->states, F32, (size_t)r * w->expert->down.columns);
}

INLINE __mmask16 first_of(int count) { return (__mmask16)((1u << count) - 1); }

/* Two times up to 16 rows of a matrix, which a thread brings into order and multiplies with all rows of a job. */
typedef struct {
  const Shape *shape;
  const uint8_t *codes, *params;
  int row[2], count[2];
} Tile;

/* Brings a tile into order. Returns 0, or -1 if there is no memory. */
static int order(Wide *w, const Tile *tile, Rows *rows) {
  if (rows_init(rows, tile->shape)) {
    __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
    return -1;
  }
  for (int h = 0; h < 2; h++) order_half(tile->shape, tile->codes, tile->params, tile->row[h], tile->count[h], h, rows);
  return 0;
}

/* Fetches part `part` of `parts` of a tile that is likely to come next: its codes come from memory, and 16 streams are
 * more than the hardware follows. All at once they would hold up the loads of this tile. Inline, since GCC takes a call
 * of what only fetches for one that does nothing. */
INLINE void fetch(const Tile *tile, int part, int parts) {
  const size_t stride = row_bytes(tile->shape), param_stride = row_params(tile->shape);
  for (int r = part * 2 * HALF / parts; r < (part + 1) * 2 * HALF / parts; r++) {
    if (r % HALF >= tile->count[r / HALF]) continue;
    const size_t row = tile->row[r / HALF] + r % HALF;
    for (size_t at = 0; at < stride; at += 64) __builtin_prefetch(tile->codes + row * stride + at, 0, 2);
    for (size_t at = 0; at < param_stride; at += 64) __builtin_prefetch(tile->params + row * param_stride + at, 0, 2);
  }
}

static Tile rows_of(const Shape *s, const uint8_t *codes, const uint8_t *params, int from) { /* 32 after each other */
  const int left = s->rows - from, first = left < HALF ? left : HALF, second = left < 2 * HALF ? left - first : HALF;
  return (Tile){s, codes, params, {from, second ? from + HALF : from}, {first, second}};
}

static Tile linear_tile(const Wide *w, int part) {
  const Job *job = &w->list[part / w->tiles];
  return rows_of(w->shape, job->codes, job->params, part % w->tiles * 2 * HALF);
}

static Tile down_tile(const Wide *w, int part) {
  const uint8_t *record = w->list[part / w->tiles].codes;
  return rows_of(&w->expert->down, record + w->expert->down_codes, record + w->expert->down_params,
                 part % w->tiles * 2 * HALF);
}

static Tile up_tile(const Wide *w, int part) { /* rows of the gate and the same of the up projection */
  const uint8_t *record = w->list[part / w->tiles].codes;
  const int from = part % w->tiles * HALF, width = w->expert->down.columns, some = width - from < HALF ? width - from : HALF;
  return (Tile){w->shape, record + w->expert->gate_up_codes, record + w->expert->gate_up_params,
                {from, width + from}, {some, some}};
}

typedef Tile (*TileOf)(const Wide *w, int part);
typedef void (*Take)(const Wide *w, const Tile *tile, int job, int at, int tokens, __m512 (*sums)[2]);

/* A tile times all rows of its job; `take` gets the sums of some of them, from row `at` of the job on. */
INLINE void multiply_tile(Wide *w, int part, const Panel *p, TileOf tile_of, Take take) {
  const int job = part / w->tiles, count = w->list[job].count, next = part + w->threads;
  const int groups = (count + TOGETHER - 1) / TOGETHER;
  const Tile tile = tile_of(w, part), ahead = tile_of(w, next < w->parts ? next : part);
  const Multiply run = multiply_of(tile.shape);
  Rows rows;
  if (order(w, &tile, &rows)) return;
  for (int g = 0; g < groups; g++) {
    const int at = g * TOGETHER, tokens = count - at < TOGETHER ? count - at : TOGETHER;
    __m512 sums[TOGETHER][2];
    if (next < w->parts) fetch(&ahead, g, groups);
    run(tokens, &rows, p, w->start[job] + at, sums);
    take(w, &tile, job, at, tokens, sums);
  }
}

INLINE void take_products(const Wide *w, const Tile *tile, int job, int at, int tokens, __m512 (*sums)[2]) {
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < 2; h++) {
      const size_t to = (size_t)(w->list[job].first + at + t) * tile->shape->rows + tile->row[h];
      const __mmask16 mask = first_of(tile->count[h]);
      if (w->out_dtype == BF16)
        _mm256_mask_storeu_epi16((uint16_t *)w->out + to, mask, bf16_of(sums[t][h]));
      else
        _mm512_mask_storeu_ps((float *)w->out + to, mask, sums[t][h]);
    }
}

INLINE void take_states(const Wide *w, const Tile *tile, int job, int at, int tokens, __m512 (*sums)[2]) {
  for (int t = 0; t < tokens; t++) {
    const f32x16 gate = (f32x16)sums[t][0];
    const f32x16 value = gate / (1.0f + exp16(-gate)) * (f32x16)sums[t][1];
    float *to = w->states + (size_t)(w->start[job] + at + t) * w->expert->down.columns + tile->row[0];
    _mm512_mask_storeu_ps(to, first_of(tile->count[0]), (__m512)value);
  }
}

static void linear_part(void *context, int part) {
  Wide *w = context;
  multiply_tile(w, part, &w->outer, linear_tile, take_products);
}

static void up_part(void *context, int part) {
  Wide *w = context;
  multiply_tile(w, part, &w->outer, up_tile, take_states);
}

static void down_part(void *context, int part) {
  Wide *w = context;
  multiply_tile(w, part, &w->inner, down_tile, take_products);
}

static void run_tiles(Wide *w, int jobs, int tiles, void (*work)(void *, int)) {
  w->tiles = tiles;
  w->parts = jobs * tiles;
  pool_run(w->threads, w->parts, work, w);
}

/* Makes the input of the first product ready; returns the rows of all jobs, or -1 if there is no memory. */
static int begin(Wide *w, int jobs) {
  int total = 0;
  for (int j = 0; j < jobs; j++) total += w->list[j].count;
  int32_t *start = scratch(&runs_of, (size_t)(total + jobs) * sizeof *start), *row_of = start + jobs;
  if (!start || panel_init(&w->outer, w->shape, total, &values_of[0], &more_of[0])) return -1;
  w->start = start;
  w->row_of = row_of;
  for (int j = 0, row = 0; j < jobs; j++) {
    start[j] = row;
    for (int i = 0; i < w->list[j].count; i++) row_of[row++] = w->list[j].first + i;
  }
  pool_run(w->threads, total, fill_outer, w);
  return total;
}
#endif

/* As rl_linear, with x in bfloat16, where rl_integer_dot gives 1. Returns 0, or -1 if there is no memory. */
int rl_wide_linear(const Shape *s, int jobs, const Job *list, const void *x, const int32_t *token_of, void *out,
                           int out_dtype, int threads) {
#if INTEGER_DOT
  Wide w = {.shape = s, .list = list, .x = x, .token_of = token_of, .out = out, .out_dtype = out_dtype};
  w.threads = threads;
  if (begin(&w, jobs) < 0) return -1;
  run_tiles(&w, jobs, (s->rows + 2 * HALF - 1) / (2 * HALF), linear_part);
  return -w.failed;
#else
  (void)s, (void)jobs, (void)list, (void)x, (void)token_of, (void)out, (void)out_dtype, (void)threads;
  return -1;
#endif
}

/* As rl_silu_experts, with x in bfloat16. */
int rl_wide_experts(const Expert *expert, int jobs, const Job *list, const void *x, const int32_t *token_of, float *out,
                            int threads) {
#if INTEGER_DOT
  const int width = expert->down.columns;
  Wide w = {.shape = &expert->gate_up, .expert = expert, .list = list, .x = x, .token_of = token_of, .out = out};
  w.out_dtype = F32;
  w.threads = threads;
  const int rows = begin(&w, jobs);
  if (rows < 0) return -1;
  w.states = scratch(&states_of, (size_t)rows * width * sizeof(float));
  if (!w.states || panel_init(&w.inner, &expert->down, rows, &values_of[1], &more_of[1])) return -1;
  run_tiles(&w, jobs, (width + HALF - 1) / HALF, up_part);
  pool_run(threads, rows, fill_inner, &w);
  run_tiles(&w, jobs, (expert->down.rows + 2 * HALF - 1) / (2 * HALF), down_part);
  return -w.failed;
#else
  (void)expert, (void)jobs, (void)list, (void)x, (void)token_of, (void)out, (void)threads;
  return -1;
#endif
}
