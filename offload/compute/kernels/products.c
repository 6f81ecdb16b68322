/* Products with 4- and 8-bit weights, for one or a few tokens, where reading the weights is what takes the time.
 *
 * Layout of a matrix [rows, columns] (docs/formats.md):
 *   4 bits  codes uint8 [rows, padded / 2]: byte b of a row holds column 2b in its low half and column 2b + 1 in its high
 *           half; params bf16 [rows, padded / group, 2]: scale and shift. weight = (code - 8) * scale + shift.
 *           padded is columns rounded up to a multiple of group (32, 64 or 128).
 *   8 bits  codes int8 [rows, columns], params float [rows]: scale. weight = code * scale.
 *
 * The result of a row and a token depends on nothing else: not on other rows, tokens, experts or threads of the call.
 * Every entry point is for one calling thread at a time and thread; all work is shared by pool.h.
 * Vectors are written with the extensions that GCC and clang share, so that any processor can run this; the products
 * that decide the speed have versions of their own for AVX-512 with integer dot products. These take an input that is
 * not exact as integers. Beside weights of 4 bits they have 8 bits and a scale for each of the weights' groups, as in
 * llama.cpp, whose Q8_0 has groups of 32: what that loses is a tenth of what the weights have lost. Beside 8 bits they
 * have 15 and a scale for each block, in two bytes and so two instructions, and lose less than bf16 does.
 */
#include "common.h"
#include "pool.h"

#define TILE 128     /* most rows that a thread takes at a time: each start of a stream costs some lines that come late */
#define MAX_TOKENS 4 /* tokens that share one pass over the weights */
#define AHEAD 4096   /* bytes of codes to fetch ahead */
#define FETCH_AHEAD(at) (__builtin_prefetch((at) + 512), __builtin_prefetch((at) + 8192, 0, 2)) /* near, and far into L2 */
#define MAX_ROWS 4   /* rows that share one pass over the input */
#if defined(__AVX512F__)
#define CHAINS 4     /* sums of an 8-bit row that do not wait for each other */
#else
#define CHAINS 1     /* too few registers: rows side by side do not wait for each other either */
#endif

/* The input of a product, made ready once and used for every row of the weights. */
typedef struct {
  int exact;         /* float instead of integers */
  size_t width;      /* values of a row, padded to BLOCK */
  size_t groups;     /* sums of a row, padded to 16 */
  void *values;      /* float [rows, width], for 4 bits reordered as the codes come out of a vector; or integers: of
                        each block with 4 bits even columns, then odd ones; with 8 upper bytes, then lower ones */
  float *sums;       /* [rows, groups] of each group of columns; with 8 bits [0] is that of the whole row */
  float *scales;     /* of the integers: [rows, groups] with 4 bits, [rows, width / BLOCK] with 8 */
} Panel;

INLINE size_t panel_scales(const Panel *p, const Shape *s) { return s->bits == 4 ? p->groups : p->width / BLOCK; }

static int panel_init(Panel *p, const Shape *s, int rows, int exact, Scratch *values, Scratch *sums) {
  p->exact = exact || !INTEGER_DOT;
  p->width = round_up(s->bits == 4 ? s->padded : s->columns, BLOCK);
  p->groups = s->bits == 4 ? round_up(s->padded / s->group, 16) : 16;
  p->values = scratch(values, rows * p->width * (p->exact ? 4 : s->bits == 4 ? 1 : 2));
  p->sums = scratch(sums, rows * (p->groups + panel_scales(p, s)) * sizeof(float));
  p->scales = p->sums ? p->sums + rows * p->groups : NULL;
  return p->values && p->sums ? 0 : -1;
}

#if INTEGER_DOT
/* One row of the input as integers. */
static void panel_fill_integers(const Panel *p, const Shape *s, int row, const void *from, int dtype, size_t at) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const int bytes = s->bits == 4 ? 1 : 2, vectors = s->group / 16;
  float *sums = p->sums + row * p->groups, *scales = p->scales + row * panel_scales(p, s), whole = 0;
  int32_t total;
  for (size_t block = 0; block < p->width / BLOCK; block++) {
    int8_t *to = (int8_t *)p->values + (row * p->width + block * BLOCK) * bytes;
    __m512 x[BLOCK / 16];
    __m512i q[BLOCK / 16];
    load_row(x, BLOCK / 16, from, dtype, at + block * BLOCK, s->columns - (long)(block * BLOCK));
    if (s->bits == 8) {
      scales[block] = integers_of(x, BLOCK / 16, MOST_INTEGER, q, &total);
      whole += (float)total * scales[block];
      for (int i = 0; i < BLOCK / 16; i++) store_bytes(q[i], to + i * 16, to + BLOCK + i * 16);
      continue;
    }
    for (int i = 0; i < BLOCK / 16; i += vectors) {
      const size_t group = (block * BLOCK + i * 16) / s->group;
      scales[group] = integers_of(x + i, vectors, 127, q + i, &total);
      sums[group] = (float)total * scales[group];
    }
    for (int i = 0; i < BLOCK / 16; i += 2) {
      _mm_store_si128((__m128i *)(to + i * 8), _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(q[i], even, q[i + 1])));
      _mm_store_si128((__m128i *)(to + 64 + i * 8), _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(q[i], odd, q[i + 1])));
    }
  }
  if (s->bits == 8) {
    sums[0] = whole;
    return;
  }
  for (size_t group = p->width / s->group; group < p->groups; group++) sums[group] = scales[group] = 0; /* read, times 0 */
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
  const int8_t *x = (const int8_t *)p->values + token * p->width;
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
      FETCH_AHEAD(codes + at);
      const __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
      UNROLL
      for (int t = 0; t < T; t++) {
        const int8_t *at_x = x + t * p->width + block * BLOCK;
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_load_si512(at_x));
        sum = _mm512_dpbusd_epi32(sum, high, _mm512_load_si512(at_x + 64));
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
    FETCH_AHEAD(codes + at);
    FETCH_AHEAD(codes + at + 64);
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

/* Rows of a tile: fewer where there would be too few tiles to keep all threads busy to the end. */
static int tile_rows(int jobs, int rows, int threads) { return (long)jobs * rows >= 4L * threads * TILE ? TILE : TILE / 4; }

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

/* A product of all jobs: what its parts share. */
typedef struct {
  const Shape *shape;
  const Job *list;
  const void *x;
  const int32_t *token_of, *row_of, *start;
  void *out;
  Panel panel;
  int x_dtype, out_dtype, height, tiles;
} Linear;

static void linear_fill(void *context, int r) {
  const Linear *l = context;
  const int row = l->row_of[r], token = l->token_of ? l->token_of[row] : row;
  panel_fill(&l->panel, l->shape, r, l->x, l->x_dtype, (size_t)token * l->shape->columns);
}

static void linear_tile(void *context, int work) {
  const Linear *l = context;
  const Shape *s = l->shape;
  const Job *job = &l->list[work / l->tiles];
  const int first = l->start[work / l->tiles], from = work % l->tiles * l->height;
  const int to = from + l->height < s->rows ? from + l->height : s->rows;
  float part[MAX_TOKENS * TILE];
  for (int t = 0; t < job->count; t += MAX_TOKENS) {
    const int some = job->count - t < MAX_TOKENS ? job->count - t : MAX_TOKENS;
    tile(s, job->codes, job->params, &l->panel, first + t, some, from, to, part, TILE);
    for (int i = 0; i < some; i++)
      for (int r = from; r < to; r++)
        store_value(l->out, l->out_dtype, (size_t)(job->first + t + i) * s->rows + r, part[i * TILE + r - from]);
  }
}

/* out[row, :] = x[token_of[row], :] times each job's matrix, transposed, for the rows of each job.
 * x [tokens, columns], out [rows of all jobs, rows of the matrix]; token_of NULL means row r has token r.
 * Returns 0, or -1 if there is no memory. */
int rl_linear(const Shape *s, int jobs, const Job *list, const void *x, int x_dtype, const int32_t *token_of, int exact,
              void *out, int out_dtype, int threads) {
  Linear l = {s, list, x, token_of, NULL, NULL, out, {0}, x_dtype, out_dtype, 0, 0};
  int32_t *row_of, *start;
  const int rows = collect_rows(jobs, list, &row_of, &start);
  if (rows < 0 || panel_init(&l.panel, s, rows, exact, &panel_values, &panel_sums)) return -1;
  l.row_of = row_of;
  l.start = start;
  l.height = tile_rows(jobs, s->rows, threads);
  l.tiles = (s->rows + l.height - 1) / l.height;
  pool_run(threads, rows, linear_fill, &l);
  pool_run(threads, jobs * l.tiles, linear_tile, &l);
  return 0;
}

typedef struct {
  const Expert *expert;
  const Job *list;
  const void *x;
  const int32_t *token_of, *row_of, *start;
  float *states, *out; /* states [rows, stride]: between the two products */
  Panel outer, inner;
  size_t stride;
  int x_dtype, shared, up_height, up_tiles, down_height, down_tiles;
} Experts;

static void experts_fill_outer(void *context, int r) {
  const Experts *e = context;
  const size_t token = e->shared ? 0 : e->token_of[e->row_of[r]];
  panel_fill(&e->outer, &e->expert->gate_up, r, e->x, e->x_dtype, token * e->expert->gate_up.columns);
}

static void experts_up(void *context, int work) {
  const Experts *e = context;
  const Shape *s = &e->expert->gate_up;
  const int j = work / e->up_tiles, width = e->expert->down.columns, from = work % e->up_tiles * e->up_height;
  const int to = from + e->up_height < width ? from + e->up_height : width;
  const Job *job = &e->list[j];
  const uint8_t *codes = job->codes + e->expert->gate_up_codes, *params = job->codes + e->expert->gate_up_params;
  float gate[MAX_TOKENS * TILE] = {0}, up[MAX_TOKENS * TILE] = {0};
  for (int t = 0; t < job->count; t += MAX_TOKENS) {
    const int some = job->count - t < MAX_TOKENS ? job->count - t : MAX_TOKENS;
    const int token = e->shared ? 0 : e->start[j] + t;
    tile(s, codes, params, &e->outer, token, some, from, to, gate, TILE);
    tile(s, codes, params, &e->outer, token, some, width + from, width + to, up, TILE);
    for (int i = 0; i < some; i++)
      for (int r = 0; r < to - from; r += 16) {
        const f32x16 g = load16(gate + i * TILE + r);
        const f32x16 h = g / (1.0f + exp16(-g)) * load16(up + i * TILE + r);
        const size_t left = to - from - r < 16 ? to - from - r : 16;
        memcpy(e->states + (size_t)(e->start[j] + t + i) * e->stride + from + r, &h, left * sizeof(float));
      }
  }
}

static void experts_fill_inner(void *context, int r) {
  const Experts *e = context;
  panel_fill(&e->inner, &e->expert->down, r, e->states, F32, (size_t)r * e->stride);
}

static void experts_down(void *context, int work) {
  const Experts *e = context;
  const Shape *s = &e->expert->down;
  const int j = work / e->down_tiles, from = work % e->down_tiles * e->down_height;
  const int to = from + e->down_height < s->rows ? from + e->down_height : s->rows;
  const Job *job = &e->list[j];
  for (int t = 0; t < job->count; t += MAX_TOKENS) {
    const int some = job->count - t < MAX_TOKENS ? job->count - t : MAX_TOKENS;
    tile(s, job->codes + e->expert->down_codes, job->codes + e->expert->down_params, &e->inner, e->start[j] + t, some, from, to,
         e->out + (size_t)(job->first + t) * s->rows + from, s->rows);
  }
}

/* Whole experts that gate with silu: out[row] = down(silu(gate(x)) * up(x)), x[token_of[row]].
 * x [tokens, hidden], out float [rows of all jobs, hidden]. */
int rl_silu_experts(const Expert *expert, int jobs, const Job *list, const void *x, int x_dtype, int tokens,
                    const int32_t *token_of, int exact, float *out, int threads) {
  int32_t *row_of, *start;
  const int width = expert->down.columns, rows = collect_rows(jobs, list, &row_of, &start);
  if (rows < 0) return -1;
  Experts e = {.expert = expert, .list = list, .x = x, .token_of = token_of, .row_of = row_of, .start = start, .out = out};
  e.x_dtype = x_dtype;
  e.stride = round_up(width, 16);
  /* one token for all experts, as in decoding, is made ready once */
  e.shared = tokens == 1;
  for (int j = 0; j < jobs; j++) e.shared &= list[j].count <= 1; /* not if it goes through an expert twice */
  e.states = scratch(&inner_states, (size_t)rows * e.stride * sizeof(float));
  if (!e.states || panel_init(&e.outer, &expert->gate_up, e.shared ? 1 : rows, exact, &panel_values, &panel_sums) ||
      panel_init(&e.inner, &expert->down, rows, exact, &inner_values, &inner_sums))
    return -1;
  e.up_height = tile_rows(jobs, width, threads);
  e.up_tiles = (width + e.up_height - 1) / e.up_height;
  e.down_height = tile_rows(jobs, expert->down.rows, threads);
  e.down_tiles = (expert->down.rows + e.down_height - 1) / e.down_height;
  pool_run(threads, e.shared ? 1 : rows, experts_fill_outer, &e);
  pool_run(threads, jobs * e.up_tiles, experts_up, &e);
  pool_run(threads, rows, experts_fill_inner, &e);
  pool_run(threads, jobs * e.down_tiles, experts_down, &e);
  return 0;
}

/* 1 if products of inputs that need not be exact use the processor's integer dot products. */
int rl_integer_dot(void) { return INTEGER_DOT; }
