/* Attention of many tokens in bfloat16, on processors that multiply it (AVX-512 BF16), where a library's is limited by
 * what stands between its products. The keys come block after block, with a running maximum and sum (Milakov and
 * Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
 *
 * A vector holds sixteen queries: keys and values are then broadcast, pair by pair, and the softmax needs no sums
 * across a vector. Only queries and results are transposed, once each; keys are read as they lie. Scores, sums and the
 * softmax are float32, its weights bfloat16 where they meet the values. One thread computes a head's 64 queries, key
 * after key, so a token's result depends on nothing but its own query and on where the blocks of keys begin.
 */
#include "common.h"
#include "pool.h"

#define QUERIES 64 /* that are computed together */
#define VECTORS (QUERIES / 16)
#define KEYS 64 /* of a block */
#define TILE 4  /* keys, or columns of the values, whose sums fill the registers with those of all vectors */

/* `tokens` queries, the last of `keys` positions, of `heads` heads, of which heads / shared look at the same keys. Query t
 * of head h starts at h * query_head + t * query_step, in values; keys and values likewise. out [tokens, heads,
 * value_width]. A token sees itself and what comes before, at most `window` positions in all (0: any number). */
typedef struct {
  const uint16_t *query, *key, *value;
  uint16_t *out;
  int64_t query_head, query_step, key_head, key_step, value_head, value_step;
  int32_t heads, shared, tokens, keys, width, value_width, window;
  float scale;
} Prompt;

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PROMPTS 1

typedef struct {
  const Prompt *prompt;
  int failed;
} PromptCall;

static __thread Scratch prompt_memory;

INLINE __m512bh pair_of(const void *two) { /* of bfloat16, in every lane */
  int32_t both;
  memcpy(&both, two, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

/* 2^x for x <= 0, within 5e-6 of it; 0 far below. */
INLINE __m512 power(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.5714e-3f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5503294e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  /* what is no number stays none */
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ), y, whole);
}

/* Scores of TILE keys for N vectors of queries. */
INLINE void score_tile(const int N, const __m512i *queries, int pairs, const uint16_t *const keys[TILE], float scale, __m512 *scores) {
  __m512 sum[TILE][VECTORS];
  UNROLL
  for (int k = 0; k < TILE; k++)
    UNROLL
    for (int n = 0; n < N; n++) sum[k][n] = _mm512_setzero_ps();
  for (int p = 0; p < pairs; p++, queries += VECTORS) {
    UNROLL
    for (int k = 0; k < TILE; k++) {
      const __m512bh key = pair_of(keys[k] + 2 * p);
      UNROLL
      for (int n = 0; n < N; n++) sum[k][n] = _mm512_dpbf16_ps(sum[k][n], (__m512bh)queries[n], key);
    }
  }
  UNROLL
  for (int k = 0; k < TILE; k++)
    UNROLL
    for (int n = 0; n < N; n++) scores[k * VECTORS + n] = _mm512_mul_ps(sum[k][n], _mm512_set1_ps(scale));
}

/* sums[column] = sums[column] * factor + the products of TILE columns of the values with N vectors of weights. */
INLINE void value_tile(const int N, const __m512i *weights, int pairs, const uint32_t *values, int width, const __m512 *factor, __m512 *sums) {
  __m512 sum[TILE][VECTORS];
  UNROLL
  for (int c = 0; c < TILE; c++)
    UNROLL
    for (int n = 0; n < N; n++) sum[c][n] = _mm512_mul_ps(sums[c * VECTORS + n], factor[n]);
  for (int p = 0; p < pairs; p++, weights += VECTORS, values += width) {
    UNROLL
    for (int c = 0; c < TILE; c++) {
      const __m512bh value = pair_of(values + c);
      UNROLL
      for (int n = 0; n < N; n++) sum[c][n] = _mm512_dpbf16_ps(sum[c][n], (__m512bh)weights[n], value);
    }
  }
  UNROLL
  for (int c = 0; c < TILE; c++)
    UNROLL
    for (int n = 0; n < N; n++) sums[c * VECTORS + n] = sum[c][n];
}

#define BY_VECTORS(n, CALL) \
  switch (n) {              \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    default: CALL(4);       \
  }

/* One vector of queries, at positions `own`, meets `count` keys, an even number, from `first` on: scores become weights,
 * pair by pair. Returns by how much what was summed before counts less. */
INLINE __m512 weigh(const Prompt *a, __m512i own, int first, int count, int edge, __m512 *scores, __m512i *weights, __m512 *most, __m512 *total) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                              20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512 highest = *most;
  for (int k = 0; k < count; k++) {
    __m512 score = scores[k * VECTORS];
    if (edge) {
      const __m512i at = _mm512_set1_epi32(first + k);
      __mmask16 seen = _mm512_cmple_epi32_mask(at, own);
      if (a->window) seen &= _mm512_cmpgt_epi32_mask(at, _mm512_sub_epi32(own, _mm512_set1_epi32(a->window)));
      scores[k * VECTORS] = score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, score);
    }
    highest = _mm512_max_ps(highest, score);
  }
  const __m512 zero = _mm512_max_ps(highest, _mm512_set1_ps(-1e30f)); /* a number, where nothing was seen yet */
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (int k = 0; k < count; k += 2) {
    const __m512 low = power(_mm512_sub_ps(scores[k * VECTORS], zero)), high = power(_mm512_sub_ps(scores[(k + 1) * VECTORS], zero));
    even = _mm512_add_ps(even, low);
    odd = _mm512_add_ps(odd, high);
    weights[k / 2 * VECTORS] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  const __m512 factor = power(_mm512_sub_ps(*most, zero));
  *total = _mm512_fmadd_ps(*total, factor, _mm512_add_ps(even, odd));
  *most = highest;
  return factor;
}

/* Values of `count` keys, pair by pair: a column's two beside each other. What follows the last is zero. */
static void pair_values(const uint16_t *values, int64_t step, int count, int width, uint32_t *to) {
  for (int k = 0; k < count; k += 2, values += 2 * step)
    for (int c = 0; c < width; c += 16, to += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + c)));
      __m512i high = _mm512_setzero_si512();
      if (k + 1 < count) high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + step + c))), 16);
      _mm512_store_si512(to, _mm512_or_si512(low, high));
    }
}

static void prompt_part(void *context, int part) {
  PromptCall *call = context;
  const Prompt *a = call->prompt;
  const int blocks = (a->tokens + QUERIES - 1) / QUERIES, head = part % a->heads;
  const int token = (blocks - 1 - part / a->heads) * QUERIES; /* the longest first */
  const int queries = a->tokens - token < QUERIES ? a->tokens - token : QUERIES, N = (queries + 15) / 16;
  const int pairs = a->width / 2, width = a->value_width, position = a->keys - a->tokens + token, shared = head / (a->heads / a->shared);
  const uint16_t *query = a->query + head * a->query_head + token * a->query_step;
  const uint16_t *keys = a->key + shared * a->key_head, *values = a->value + shared * a->value_head;

  const size_t vectors = (size_t)pairs * VECTORS + KEYS * VECTORS + KEYS / 2 * VECTORS + (size_t)KEYS / 2 * width / 16 + (size_t)width * VECTORS;
  __m512i *turned = scratch(&prompt_memory, vectors * sizeof *turned);
  if (!turned) {
    __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  __m512 *scores = (__m512 *)(turned + (size_t)pairs * VECTORS);
  __m512i *weights = (__m512i *)(scores + KEYS * VECTORS);
  uint32_t *paired = (uint32_t *)(weights + KEYS / 2 * VECTORS);
  __m512 *sums = (__m512 *)(paired + KEYS / 2 * width);

  __m512 most[VECTORS], total[VECTORS], factor[VECTORS];
  __m512i own[VECTORS];
  for (int n = 0; n < N; n++) {
    for (int p = 0; p < pairs; p += 16) {
      const __mmask16 there = pairs - p < 16 ? (1 << (pairs - p)) - 1 : 0xffff;
      __m512i v[16];
      for (int i = 0; i < 16; i++) { /* what follows the last query is the last one again */
        const int q = 16 * n + i < queries ? 16 * n + i : queries - 1;
        v[i] = _mm512_maskz_loadu_epi32(there, query + q * a->query_step + 2 * p);
      }
      transpose16(v);
      for (int i = 0; i < 16 && p + i < pairs; i++) turned[(p + i) * VECTORS + n] = v[i];
    }
    most[n] = _mm512_set1_ps(-INFINITY);
    total[n] = _mm512_setzero_ps();
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    own[n] = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * n));
    own[n] = _mm512_add_epi32(_mm512_min_epi32(own[n], _mm512_set1_epi32(queries - 1)), _mm512_set1_epi32(position));
  }
  for (int i = 0; i < width * VECTORS; i++) sums[i] = _mm512_setzero_ps();

  const int end = position + queries; /* of the keys that any of them sees */
  int first = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
  for (first -= first % KEYS; first < end; first += KEYS) {
    const int count = end - first < KEYS ? end - first : KEYS;
    for (int k = 0; k < count; k += TILE) {
      const uint16_t *tile[TILE];
      for (int i = 0; i < TILE; i++) tile[i] = keys + (first + k + i < end ? first + k + i : end - 1) * a->key_step;
      const int skipped = first + k > position ? (first + k - position) / 16 : 0; /* vectors of earlier tokens */
#define SCORES(n) score_tile(n, turned + skipped, pairs, tile, a->scale * 1.44269504f, scores + k * VECTORS + skipped)
      BY_VECTORS(N - skipped, SCORES)
    }
    const int even = (count + 1) / 2 * 2;
    for (int n = 0; n < N; n++) {
      const int from = position + 16 * n, to = from + 15 < end ? from + 15 : end - 1;
      const int seen = to - first + 1 < even ? (to - first + 2) / 2 * 2 : even;
      const int edge = first + seen - 1 > from || (a->window && first <= to - a->window);
      factor[n] = weigh(a, own[n], first, seen > 0 ? seen : 0, edge, scores + n, weights + n, &most[n], &total[n]);
      for (int k = seen > 0 ? seen : 0; k < even; k += 2) weights[k / 2 * VECTORS + n] = _mm512_setzero_si512();
    }
    pair_values(values + first * a->value_step, a->value_step, count, width, paired);
    for (int c = 0; c < width; c += TILE) {
#define VALUES(n) value_tile(n, weights, even / 2, paired + c, width, factor, sums + c * VECTORS)
      BY_VECTORS(N, VALUES)
    }
  }

  for (int n = 0; n < N; n++) {
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1), total[n]);
    for (int c = 0; c < width; c += 16) {
      __m512i v[16];
      for (int i = 0; i < 16; i++) v[i] = (__m512i)_mm512_mul_ps(sums[(c + i) * VECTORS + n], share);
      transpose16(v);
      for (int i = 0; i < 16 && 16 * n + i < queries; i++) {
        uint16_t *to = a->out + ((size_t)(token + 16 * n + i) * a->heads + head) * width + c;
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)v[i]));
      }
    }
  }
}

int rl_attend_prompt(const Prompt *a, int threads) {
  PromptCall call = {a, 0};
  pool_run(threads, (a->tokens + QUERIES - 1) / QUERIES * a->heads, prompt_part, &call);
  return call.failed ? -1 : 0;
}
#else
#define PROMPTS 0
int rl_attend_prompt(const Prompt *a, int threads) { return (void)a, (void)threads, -1; }
#endif

/* 1 if there is rl_attend_prompt. */
int rl_prompts(void) { return PROMPTS; }
