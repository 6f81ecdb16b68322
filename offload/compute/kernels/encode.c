/* Quantising and decoding matrices: codes and params from weights, and back. */
#include "common.h"
#include "pool.h"

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

#define DECODE_ROWS 32 /* that a thread takes at a time */

typedef struct {
  const Shape *shape;
  const uint8_t *codes, *params;
  void *out;
  int out_dtype;
} Decode;

static void decode_row(const Decode *d, int r) {
  const Shape *s = d->shape;
  const uint8_t *row = d->codes + (size_t)r * row_bytes(s), *info = d->params + (size_t)r * row_params(s);
  const size_t at = (size_t)r * s->columns;
  if (s->bits == 4) {
    decode4_row(s, row, info, d->out, d->out_dtype, at);
    return;
  }
  float scale;
  memcpy(&scale, info, sizeof scale);
  if (d->out_dtype == BF16)
    for (int c = 0; c < s->columns; c++) ((uint16_t *)d->out)[at + c] = (uint16_t)round_bf16((float)(int8_t)row[c] * scale);
  else
    for (int c = 0; c < s->columns; c++) ((float *)d->out)[at + c] = (float)(int8_t)row[c] * scale;
}

static void decode_part(void *context, int part) {
  const Decode *d = context;
  for (int r = part * DECODE_ROWS; r < (part + 1) * DECODE_ROWS && r < d->shape->rows; r++) decode_row(d, r);
}

/* The weights themselves: out [rows, columns]. */
int rl_decode(const Shape *s, const uint8_t *codes, const void *params, void *out, int out_dtype, int threads) {
  Decode d = {s, codes, params, out, out_dtype};
  pool_run(threads, (s->rows + DECODE_ROWS - 1) / DECODE_ROWS, decode_part, &d);
  return 0;
}

static __thread Scratch encode_sums;

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

#define ENCODE_PARTS 16 /* vectors of groups, or rows, that a thread takes at a time */

typedef struct {
  const Shape *shape;
  const void *weights;
  uint8_t *codes;
  void *params;
  double *sums; /* [parts, 2] */
  long groups, parts;
  int dtype;
} Encode;

static void encode_part(void *context, int number) {
  const Encode *e = context;
  for (long part = (long)number * ENCODE_PARTS; part < ((long)number + 1) * ENCODE_PARTS && part < e->parts; part++) {
    if (e->shape->bits == 4)
      encode_groups(e->shape, e->weights, e->dtype, part * LANES, e->groups, e->codes, e->params, e->sums + 2 * part);
    else
      encode8_row(e->shape, e->weights, e->dtype, (int)part, (int8_t *)e->codes, e->params, e->sums + 2 * part);
  }
}

/* Quantise weights [rows, columns]. errors[0] and errors[1] get the sums of squared errors and weights; they are added up
 * in the order of the weights, so that they do not depend on the threads. */
int rl_encode(const Shape *s, const void *weights, int dtype, uint8_t *codes, void *params, double *errors, int threads) {
  const long groups = s->bits == 4 ? (long)s->rows * (s->padded / s->group) : s->rows;
  const long parts = s->bits == 4 ? (groups + LANES - 1) / LANES : groups;
  double *sums = scratch(&encode_sums, (size_t)parts * 2 * sizeof(double));
  if (!sums) return -1;
  Encode e = {s, weights, codes, params, sums, groups, parts, dtype};
  pool_run(threads, (int)((parts + ENCODE_PARTS - 1) / ENCODE_PARTS), encode_part, &e);
  errors[0] = errors[1] = 0;
  for (long part = 0; part < parts; part++) {
    errors[0] += sums[2 * part];
    errors[1] += sums[2 * part + 1];
  }
  return 0;
}
