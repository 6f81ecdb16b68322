/* What stands between the products: norms, the attention of one token, and the sum of what a token's experts give. A few
 * microseconds each in a decode step, where the same as a row of library calls takes ten times as long.
 */
#include "common.h"
#include "pool.h"

#define MOST_WIDTH 512 /* of a head */

INLINE f32x16 float_of_bf16(const uint16_t *from) {
  f32x16 value;
#if defined(__AVX512F__)
  value = (f32x16)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
#elif defined(__AVX2__)
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 8))), 16);
  memcpy(&value, &low, sizeof low);
  memcpy((char *)&value + sizeof low, &high, sizeof high);
#else
  float lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = bf16_to_float(from[i]);
  memcpy(&value, lanes, sizeof value);
#endif
  return value;
}

INLINE f32x16 load_values(const void *from, int dtype, size_t at) {
  return dtype == BF16 ? float_of_bf16((const uint16_t *)from + at) : load16((const float *)from + at);
}

INLINE f32x16 rounded16(f32x16 v) { /* to bfloat16, as float_to_bf16 does */
  i32x16 bits, nan = v != v;
  memcpy(&bits, &v, sizeof bits);
  const i32x16 up = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff, quiet = (bits & ~0xffff) | 0x400000;
  bits = (quiet & nan) | (up & ~nan);
  memcpy(&v, &bits, sizeof v);
  return v;
}

INLINE void store_values(void *to, int dtype, size_t at, f32x16 v) {
  if (dtype != BF16) {
    memcpy((float *)to + at, &v, sizeof v);
    return;
  }
  v = rounded16(v);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)((uint16_t *)to + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512((__m512)v), 16)));
#else
  uint32_t bits[16];
  memcpy(bits, &v, sizeof bits);
  for (int i = 0; i < 16; i++) ((uint16_t *)to)[at + i] = (uint16_t)(bits[i] >> 16);
#endif
}

/* out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + epsilon), times `weight` in one of the ways of the model code:
 * 0 rounds to x's dtype before the product and after it, 1 only after it, 2 is as 1 with 1 + weight. */
enum { ROUND_FIRST = 0, ROUND_LAST = 1, ONE_PLUS = 2 };

typedef struct {
  const void *x, *weight;
  void *out;
  int width, dtype, way;
  float epsilon;
} Norm;

static void norm_row(void *context, int r) {
  const Norm *n = context;
  const int width = n->width, dtype = n->dtype, way = n->way;
  const size_t at = (size_t)r * width;
  f32x16 squares = {0}, more[3] = {{0}, {0}, {0}}; /* several sums, since each waits for itself */
  float rest = 0;
  int c = 0;
  for (; c + 64 <= width; c += 64) {
    const f32x16 v = load_values(n->x, dtype, at + c);
    squares += v * v;
    UNROLL
    for (int i = 0; i < 3; i++) {
      const f32x16 other = load_values(n->x, dtype, at + c + 16 * (i + 1));
      more[i] += other * other;
    }
  }
  squares += more[0] + (more[1] + more[2]);
  for (; c + 16 <= width; c += 16) {
    const f32x16 v = load_values(n->x, dtype, at + c);
    squares += v * v;
  }
  for (; c < width; c++) rest += load_value(n->x, dtype, at + c) * load_value(n->x, dtype, at + c);
  const float factor = 1 / sqrtf((total16(squares) + rest) / width + n->epsilon);
  for (c = 0; c + 16 <= width; c += 16) {
    f32x16 value = load_values(n->x, dtype, at + c) * factor;
    if (dtype == BF16 && way == ROUND_FIRST) value = rounded16(value);
    const f32x16 w = load_values(n->weight, dtype, c);
    store_values(n->out, dtype, at + c, value * (way == ONE_PLUS ? 1 + w : w));
  }
  for (; c < width; c++) {
    float value = load_value(n->x, dtype, at + c) * factor;
    if (dtype == BF16 && way == ROUND_FIRST) value = bf16_to_float(float_to_bf16(value));
    const float w = load_value(n->weight, dtype, c);
    store_value(n->out, dtype, at + c, value * (way == ONE_PLUS ? 1 + w : w));
  }
}

int rl_rms_norm(int rows, int width, const void *x, const void *weight, int dtype, float epsilon, int way, void *out, int threads) {
  Norm n = {x, weight, out, width, dtype, way, epsilon};
  pool_run((long)rows * width > 65536 ? threads : 1, rows, norm_row, &n);
  return 0;
}

/* Attention of one token: `heads` queries [width], of which heads / shared look at the same keys. Key t of shared head
 * h starts at h * key_head + t * key_step, in values; values likewise. out [heads, value_width]. Width and value_width
 * are multiples of 16, at most MOST_WIDTH. Scores and weights are float. */
typedef struct {
  const void *query, *key, *value;
  int64_t query_head, key_head, key_step, value_head, value_step;
  int32_t heads, shared, keys, width, value_width, dtype;
  float scale;
} Attention;

static __thread Scratch attention_scores;

INLINE void attend_head(const Attention *a, int head, const int parts, const int value_parts, float *scores, void *out) {
  const int key_of = head / (a->heads / a->shared);
  f32x16 query[MOST_WIDTH / 16], sum[MOST_WIDTH / 16];
  for (int i = 0; i < parts; i++) query[i] = load_values(a->query, a->dtype, head * a->query_head + i * 16) * a->scale;
  float most = -INFINITY;
  for (int t = 0; t < a->keys; t++) {
    const size_t at = key_of * a->key_head + t * a->key_step;
    f32x16 dot = {0};
    for (int i = 0; i < parts; i++) dot += query[i] * load_values(a->key, a->dtype, at + i * 16);
    scores[t] = total16(dot);
    most = scores[t] > most ? scores[t] : most;
  }
  float all = 0;
  for (int t = 0; t < a->keys; t += 16) {
    f32x16 score = all16(-INFINITY);
    const size_t left = a->keys - t < 16 ? a->keys - t : 16;
    memcpy(&score, scores + t, left * sizeof(float));
    const f32x16 weight = choose16(score == -INFINITY, all16(0), exp16(score - most));
    memcpy(scores + t, &weight, left * sizeof(float));
    all += total16(weight);
  }
  for (int i = 0; i < value_parts; i++) sum[i] = all16(0);
  for (int t = 0; t < a->keys; t++) {
    const size_t at = key_of * a->value_head + t * a->value_step;
    for (int i = 0; i < value_parts; i++) sum[i] += scores[t] * load_values(a->value, a->dtype, at + i * 16);
  }
  for (int i = 0; i < a->value_width; i++)
    store_value(out, a->dtype, (size_t)head * a->value_width + i, sum[i / 16][i % 16] / all);
}

typedef struct {
  const Attention *what;
  float *scores; /* [heads, stride] */
  size_t stride;
  void *out;
} Attend;

static void attend_part(void *context, int head) {
  const Attend *all = context;
  const Attention *a = all->what;
  float *scores = all->scores + head * all->stride;
  if (a->width == 128 && a->value_width == 128) attend_head(a, head, 8, 8, scores, all->out); /* the usual ones, unrolled */
  else if (a->width == 64 && a->value_width == 64) attend_head(a, head, 4, 4, scores, all->out);
  else attend_head(a, head, a->width / 16, a->value_width / 16, scores, all->out);
}

int rl_attend(const Attention *a, void *out, int threads) {
  Attend all = {a, NULL, round_up(a->keys, 16), out};
  all.scores = scratch(&attention_scores, a->heads * all.stride * sizeof(float));
  if (!all.scores) return -1;
  pool_run((long)a->keys * a->heads * a->width > 65536 ? threads : 1, a->heads, attend_part, &all);
  return 0;
}

/* out[t, :] = the sum of weights[r] * products[r, :] over the rows r of token t, in the order of r; 0 without rows. */
typedef struct {
  const float *products, *weights;
  const int32_t *row_of, *start; /* rows, token after token; where those of each begin */
  void *out;
  int hidden, dtype;
} Combine;

#define SUMS 8 /* vectors that are summed together */

INLINE void combine_columns(const Combine *c, int token, int column, const int parts) {
  f32x16 sum[SUMS];
  UNROLL
  for (int i = 0; i < parts; i++) sum[i] = all16(0);
  for (int n = c->start[token]; n < c->start[token + 1]; n++) {
    const int r = c->row_of[n];
    const float *product = c->products + (size_t)r * c->hidden + column;
    UNROLL
    for (int i = 0; i < parts; i++) sum[i] += c->weights[r] * load16(product + 16 * i);
  }
  UNROLL
  for (int i = 0; i < parts; i++) store_values(c->out, c->dtype, (size_t)token * c->hidden + column + 16 * i, sum[i]);
}

static void combine_token(void *context, int token) {
  const Combine *c = context;
  int column = 0;
  for (; column + 16 * SUMS <= c->hidden; column += 16 * SUMS) combine_columns(c, token, column, SUMS);
  for (; column + 16 <= c->hidden; column += 16) combine_columns(c, token, column, 1);
  for (; column < c->hidden; column++) {
    float sum = 0;
    for (int n = c->start[token]; n < c->start[token + 1]; n++) sum += c->weights[c->row_of[n]] * c->products[(size_t)c->row_of[n] * c->hidden + column];
    store_value(c->out, c->dtype, (size_t)token * c->hidden + column, sum);
  }
}

static __thread Scratch rows_of_tokens;

int rl_combine(int rows, int hidden, const float *products, const float *weights, const int32_t *token_of, int tokens, void *out,
               int out_dtype, int threads) {
  int32_t *start = scratch(&rows_of_tokens, ((size_t)tokens + 2 + rows) * sizeof *start), *row_of = start + tokens + 2;
  if (!start) return -1;
  memset(start, 0, ((size_t)tokens + 2) * sizeof *start);
  for (int r = 0; r < rows; r++) start[token_of[r] + 2]++;
  for (int t = 1; t <= tokens; t++) start[t + 1] += start[t];
  for (int r = 0; r < rows; r++) row_of[start[token_of[r] + 1]++] = r; /* a token's next row; in the end its end */
  Combine c = {products, weights, row_of, start, out, hidden, out_dtype};
  pool_run(rows > 64 ? threads : 1, tokens, combine_token, &c);
  return 0;
}
