/* Matrices as checkpoints publish them: decoded, and multiplied with a few tokens without being written to memory.
 *
 * Products multiply the weights that decoding gives, rounded to the model's dtype, and add in an order of their own, the
 * same for a row and a token whatever else is in the call.
 */
#include "by_inputs.h"
#include "pool.h"

#define TILE 16  /* rows of a thread's piece of work */
#define SHARED 4 /* tokens that share a pass over a decoded row */

enum { DONE = 0, NO_MEMORY = 1, NOT_KNOWN = 2 };

static __thread Scratch tile_codes, decoded_row, orders, own_inputs;

/* Rows of a piece of work. Where a matrix is held by its inputs, as many as share a line of memory in AWQ, unless there are too
 * few pieces for the threads then. */
static long tile_of(const Packed *m, int threads) {
  long tile = by_inputs(m) ? 128 : TILE;
  while (tile > TILE && m->rows < 2 * tile * threads) tile /= 2;
  return tile;
}

/* `m` such that the makers find the codes of `count` rows from `first` on; 0 without memory for them. */
static int prepare(Packed *m, long first, long count) {
  if (!by_inputs(m)) return 1;
  uint8_t *codes = scratch(&tile_codes, (size_t)count * m->columns / 2);
  if (!codes) return 0;
  codes_of_rows(m, first, count, codes);
  m->codes = codes - first * (m->columns / 2); /* where row 0 would be */
  return 1;
}

/* Puts the order of the inputs where the makers want it: more[1], or NULL there if it is their own. */
static int order_inputs(Packed *m) {
  if (m->format != GPTQ || !m->more[1]) return DONE;
  int32_t *order = scratch(&orders, 2 * sizeof *order * m->columns);
  if (!order) return NO_MEMORY;
  const int found = order_of_groups(m, order);
  m->more[1] = found ? order : NULL;
  return found < 0 ? NOT_KNOWN : DONE;
}

static void decode_row(const Packed *m, long row, void *out, int kind) {
  Make *make = maker_of(m->format, kind);
  for (long c = 0; c < m->columns; c += PART) {
    const long count = m->columns - c < PART ? m->columns - c : PART;
    make(m, row, c, count, (char *)out + size_of(kind) * c);
  }
}

/* --- decoding */

typedef struct {
  const Packed *m;
  void *out;
  long tile;
  int dtype, transposed, failed;
} Decoding;

static void decode_transposed(const Packed *m, long first, long count, void *out, int dtype) {
  float values[TILE][PART] __attribute__((aligned(64)));
  Make *make = maker_of(m->format, F32);
  for (long c = 0; c < m->columns; c += PART) {
    const long width = m->columns - c < PART ? m->columns - c : PART;
    for (long r = 0; r < count; r++) make(m, first + r, c, width, values[r]);
    for (long i = 0; i < width; i++) {
      const size_t at = (size_t)(c + i) * m->rows + first;
      for (long r = 0; r < count; r++) put(out, dtype, at + r, values[r][i]);
    }
  }
}

/* A row whose inputs were put into another order, back in theirs. */
static int decode_ordered(const Packed *m, long row, void *out, int kind) {
  const int32_t *order = m->more[1];
  void *own = scratch(&decoded_row, size_of(kind) * m->columns);
  if (!own) return 0;
  decode_row(m, row, own, kind);
  for (long c = 0; c < m->columns; c++)
    if (kind == F32) ((float *)out)[order[c]] = ((float *)own)[c];
    else ((uint16_t *)out)[order[c]] = ((uint16_t *)own)[c];
  return 1;
}

static void decode_part(void *context, int part) {
  Decoding *d = context;
  Packed m = *d->m;
  const long first = part * d->tile, count = m.rows - first < d->tile ? m.rows - first : d->tile;
  int done = prepare(&m, first, count);
  if (done && d->transposed) decode_transposed(&m, first, count, d->out, d->dtype);
  else
    for (long r = first; done && r < first + count; r++) {
      void *to = (char *)d->out + size_of(d->dtype) * r * m.columns;
      if (m.format == GPTQ && m.more[1]) done = decode_ordered(&m, r, to, d->dtype);
      else decode_row(&m, r, to, d->dtype);
    }
  if (!done) __atomic_store_n(&d->failed, 1, __ATOMIC_RELAXED);
}

/* The weights into out [rows, columns], or its transpose. Returns NO_MEMORY for a tile, or NOT_KNOWN, having done nothing. */
int rl_packed_decode(const Packed *matrix, void *out, int dtype, int transposed, int threads) {
  Packed m = *matrix;
  const int order = order_inputs(&m);
  if (order != DONE) return order;
  Decoding decoding = {&m, out, tile_of(&m, threads), dtype, transposed, 0};
  pool_run(threads, (m.rows + decoding.tile - 1) / decoding.tile, decode_part, &decoding);
  return decoding.failed ? NO_MEMORY : DONE;
}

/* --- products */

/* Sums of a decoded row, of DTYPE, with T tokens of float inputs, 32 columns at a time, each 16 lanes in two sums. */
INLINE void dots_floats(const int T, const int DTYPE, const void *row, const float *const *x, long columns, float *sums) {
  const float *floats = row;
  const uint16_t *halves = row;
  f32x16 acc[SHARED][2] = {0};
  long c = 0;
  for (; c + 32 <= columns; c += 32) {
    const f32x16 a = DTYPE == F16 ? from_f16_16(halves + c) : load16(floats + c);
    const f32x16 b = DTYPE == F16 ? from_f16_16(halves + c + 16) : load16(floats + c + 16);
    UNROLL
    for (int t = 0; t < T; t++) {
      acc[t][0] += a * load16(x[t] + c);
      acc[t][1] += b * load16(x[t] + c + 16);
    }
  }
  for (int t = 0; t < T; t++) {
    sums[t] = total16(acc[t][0] + acc[t][1]);
    for (long i = c; i < columns; i++) sums[t] += (DTYPE == F16 ? from_f16(halves[i]) : floats[i]) * x[t][i];
  }
}

INLINE void dots_f32(const int T, const void *row, const float *const *x, long columns, float *sums) {
  dots_floats(T, F32, row, x, columns, sums);
}

INLINE void dots_f16(const int T, const void *row, const float *const *x, long columns, float *sums) {
  dots_floats(T, F16, row, x, columns, sums);
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

#define BY_TOKENS(dots, type) \
  if (tokens == 1) dots(1, row, (const type *const *)x, columns, sums); \
  else if (tokens == 2) dots(2, row, (const type *const *)x, columns, sums); \
  else dots(SHARED, row, (const type *const *)x, columns, sums);

static void dots(int tokens, int dtype, const void *row, const void *const *x, long columns, float *sums) {
  if (dtype == F32) {
    BY_TOKENS(dots_f32, float)
  } else if (dtype == BF16) {
    BY_TOKENS(dots_bf16, uint16_t)
  } else {
    BY_TOKENS(dots_f16, float)
  }
}

typedef struct {
  const Packed *m;
  const char *x; /* [tokens, columns], float32 if dtype is F16 */
  char *out;     /* [tokens, stride], whose first values of each token are written */
  long tile, tokens, stride;
  int dtype, failed;
} Product;

static void product_part(void *context, int part) {
  Product *p = context;
  Packed m = *p->m;
  const size_t size = p->dtype == BF16 ? 2 : 4; /* of an input */
  const long first = part * p->tile, last = first + p->tile < m.rows ? first + p->tile : m.rows;
  void *row = scratch(&decoded_row, size_of(p->dtype) * m.columns);
  if (!row || !prepare(&m, first, last - first)) {
    __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (long r = first; r < last; r++) {
    decode_row(&m, r, row, p->dtype == BF16 ? NEAR_BF16 : p->dtype);
    for (long t = 0; t < p->tokens; t += SHARED) {
      const int some = p->tokens - t < SHARED ? (int)(p->tokens - t) : SHARED;
      const void *x[SHARED];
      float sums[SHARED];
      for (int i = 0; i < SHARED; i++) x[i] = p->x + size * m.columns * (t + (i < some ? i : 0));
      dots(some, p->dtype, row, x, m.columns, sums);
      for (int i = 0; i < some; i++) put(p->out, p->dtype, (t + i) * p->stride + r, sums[i]);
    }
  }
}

/* x [tokens, columns] in the order of the columns of m, and in float32 if it is F16; NULL without memory for it. */
static const void *inputs_for(const Packed *m, const void *x, int tokens, int dtype) {
  const int32_t *order = m->format == GPTQ ? m->more[1] : NULL;
  if (!order && dtype != F16) return x;
  void *own = scratch(&own_inputs, (dtype == BF16 ? 2 : 4) * (size_t)tokens * m->columns);
  if (!own) return NULL;
  for (long t = 0; t < tokens; t++)
    for (long c = 0; c < m->columns; c++) {
      const long from = t * m->columns + (order ? order[c] : c), to = t * m->columns + c;
      if (dtype == BF16) ((uint16_t *)own)[to] = ((const uint16_t *)x)[from];
      else ((float *)own)[to] = dtype == F32 ? ((const float *)x)[from] : from_f16(((const uint16_t *)x)[from]);
    }
  return own;
}

/* out[t][r] = weights[r] . x[t]; x and out are of one dtype. Returns NO_MEMORY for a tile or the inputs, or NOT_KNOWN,
 * having done nothing. */
int rl_packed_linear(const Packed *matrix, const void *x, int tokens, void *out, int stride, int dtype, int threads) {
  Packed m = *matrix;
  const int order = order_inputs(&m);
  if (order != DONE) return order;
  x = inputs_for(&m, x, tokens, dtype);
  if (!x) return NO_MEMORY;
  Product product = {&m, x, out, tile_of(&m, threads), tokens, stride, dtype, 0};
  pool_run(threads, (m.rows + product.tile - 1) / product.tile, product_part, &product);
  return product.failed ? NO_MEMORY : DONE;
}
