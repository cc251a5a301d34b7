// The search of trellis.py: codes of blocks of 16 tokens, `LANES` blocks side by side.
//
// flags: -ffp-contract=off
// Without multiply-add, codes are the same to the bit on every processor.

#include "vectors.h"

#define CELLS 256  // per standard deviation, quantizer.CELLS
#define REACH 16   // standard deviations to either side, quantizer.REACH
#define SPAN (2 * REACH * CELLS)
#define LEVELS 256
#define STATES 32
#define WIDEST 4  // bits of a code that has a path bit

typedef struct {
  int32_t groups, blocks, rank, first, count;  // `count` blocks from `first` on, of `blocks` of a sequence
  const float *z, *weights;  // [batch][groups][blocks][FREQUENCIES][rank]; without [rank], or null: nearest codes
  const float *gain, *cost;  // [groups][FREQUENCIES][rank]
  const int32_t *slots;      // likewise: number of the coefficient's width
  const int32_t *order;      // [FREQUENCIES][groups * rank]: coefficients of a frequency as the path visits them
  const float *time;         // [frequency][token]
  const uint8_t *cells;      // [widths][SPAN]: code of every cell, of coefficients without a path
  const float *levels, *decoded;  // [widths][LEVELS]: what the search takes codes for, and what they are decoded to
  uint8_t *output;           // as z
} Search;

static const int BITS[8] = {0, 1, 2, 3, 4, 5, 6, 8};  // quantizer.BIT_WIDTHS

INLINE vec smaller(vec a, vec b) { return -larger(-a, -b); }

INLINE vec select_vec(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

// Quarter of a codebook that the last six path bits choose, the newest lowest: Ungerboeck's code of 32 states.
#define LABEL(z) ((((z) ^ (z) >> 3 ^ (z) >> 5) & 1) << 1 | ((z) >> 2 & 1))

// Costs of all paths after one more coefficient: the better of two into every state, and which that was.
INLINE ivec advance(const vec *cost, vec *next, const vec *error) {
  ivec took = {0};
#pragma GCC unroll 16
  for (int j = 0; j < STATES / 2; j++)
#pragma GCC unroll 2
    for (int b = 0; b < 2; b++) {
      const int low = 2 * j + b;
      const vec p = cost[j] + error[LABEL(low)], q = cost[j + STATES / 2] + error[LABEL(low + STATES)];
      took |= (q < p) & (ivec)((ivec){0} + (int32_t)(1u << low));
      next[low] = smaller(p, q);
    }
  return took;
}

// Squared errors of x at the nearest level of every quarter.
INLINE void distances(vec x, vec weight, const float *levels, int count, vec *error) {
  for (int u = 0; u < 4; u++) {
    vec d = x - levels[u];
    error[u] = d * d;
  }
  for (int v = 4; v < count; v++) {
    vec d = x - levels[v];
    error[v & 3] = smaller(error[v & 3], d * d);
  }
  for (int u = 0; u < 4; u++) error[u] *= weight;
}

// What an error costs by the weights of its block's tokens: F diag(w) F'.
INLINE void weigh(const float *time, const vec *w, vec *metric) {
  for (int f = 0; f < FREQUENCIES; f++)
    for (int h = 0; h < FREQUENCIES; h++) {
      vec sum = {0};
      for (int t = 0; t < FREQUENCIES; t++) sum += time[f * FREQUENCIES + t] * time[h * FREQUENCIES + t] * w[t];
      metric[f * FREQUENCIES + h] = sum;
    }
}

// One tile: lanes beyond `count` repeat the last.
static void search(const Search *c, long first, int count, float *memory) {
  const int all = c->groups * c->rank, stride = all * LANES;
  vec *z = (vec *)memory, *error = z + FREQUENCIES * all, *target = error + FREQUENCIES * all;
  vec *metric = target + all;            // [groups][FREQUENCIES][FREQUENCIES]
  ivec *took = (ivec *)(metric + c->groups * FREQUENCIES * FREQUENCIES);  // [all]
  uint8_t *codes = (uint8_t *)(took + all);  // [FREQUENCIES][all][LANES]
  const long group = (long)c->blocks * FREQUENCIES * c->rank, sequence = group * c->groups;
  long at[LANES], weights_at[LANES];
  for (int l = 0; l < LANES; l++) {
    const long n = first + (l < count ? l : count - 1);
    at[l] = n / c->blocks * sequence + n % c->blocks * FREQUENCIES * c->rank;
    weights_at[l] = at[l] / c->rank;
  }
  for (int g = 0; g < c->groups; g++)
    for (int f = 0; f < FREQUENCIES; f++)
      for (int r = 0; r < c->rank; r++)
        for (int l = 0; l < LANES; l++)
          ((float *)z)[(long)f * stride + (g * c->rank + r) * LANES + l] = c->z[at[l] + g * group + f * c->rank + r];
  for (int g = 0; g < c->groups; g++) {
    vec w[FREQUENCIES];
    for (int t = 0; t < FREQUENCIES; t++)
      for (int l = 0; l < LANES; l++)
        ((float *)w)[t * LANES + l] = c->weights ? c->weights[weights_at[l] + g * (long)c->blocks * FREQUENCIES + t] : 1;
    weigh(c->time, w, metric + g * FREQUENCIES * FREQUENCIES);
  }
  vec costs[2][STATES];
  for (int pass = 0; pass < (c->weights ? 2 : 1); pass++)
    for (int f = 0; f < FREQUENCIES; f++) {
      const int32_t *order = c->order + (long)f * all;
      int now = 0;
      costs[0][0] = (vec){0};
      for (int s = 1; s < STATES; s++) costs[0][s] = splat(1e30f);
      for (int i = 0; i < all; i++) {
        const int item = order[i], g = item / c->rank;
        const long place = ((long)g * FREQUENCIES + f) * c->rank + item % c->rank;
        const int slot = c->slots[place], bits = BITS[slot];
        const vec *line = metric + (g * FREQUENCIES + f) * FREQUENCIES, x = z[f * all + item];
        const float gain = c->gain[place];
        if (!bits) {
          error[f * all + item] = x * gain;
          for (int l = 0; l < LANES; l++) codes[((long)f * all + item) * LANES + l] = 0;
          continue;
        }
        vec aim = x;
        if (pass) {
          vec others = {0};
          for (int h = 0; h < FREQUENCIES; h++) others += line[h] * error[h * all + item];
          aim = x + (others / line[f] - error[f * all + item]) / gain;
        }
        aim = smaller(larger(aim, splat(-REACH)), splat(REACH));
        if (bits > WIDEST) {
          ivec cell = __builtin_convertvector(aim * CELLS + REACH * CELLS, ivec);
          cell -= (cell == SPAN) & 1;
          vec level;
          for (int l = 0; l < LANES; l++) {
            const uint8_t code = c->cells[slot * SPAN + cell[l]];
            codes[((long)f * all + item) * LANES + l] = code;
            level[l] = c->decoded[slot * LEVELS + code];
          }
          error[f * all + item] = (x - level) * gain;
          continue;
        }
        target[i] = aim;
        vec e[4];
        distances(aim, c->cost[place] * line[f], c->levels + slot * LEVELS, 2 << bits, e);
        took[i] = advance(costs[now], costs[1 - now], e);
        now = 1 - now;
      }
      ivec state = {0};
      vec best = costs[now][0];
      for (int s = 1; s < STATES; s++) {
        const ivec less = costs[now][s] < best;
        best = select_vec(less, costs[now][s], best);
        state = (less & s) | (~less & state);
      }
      for (int i = all - 1; i >= 0; i--) {
        const int item = order[i], g = item / c->rank;
        const long place = ((long)g * FREQUENCIES + f) * c->rank + item % c->rank;
        const int slot = c->slots[place], bits = BITS[slot];
        if (!bits || bits > WIDEST) continue;
        const ivec before = (state >> 1) | ((took[i] >> state & 1) << 4), label = LABEL(before << 1 | (state & 1));
        const float *levels = c->levels + slot * LEVELS, *decoded = c->decoded + slot * LEVELS;
        ivec code = {0};
        vec least = splat(1e30f), level = {0};
        for (int v = 0; v < 2 << bits; v++) {
          const vec d = target[i] - levels[v];
          const ivec take = (d * d < least) & (label == (v & 3));
          least = select_vec(take, d * d, least);
          level = select_vec(take, splat(decoded[v]), level);
          code = (take & (v >> 2)) | (~take & code);
        }
        code = code << 1 | (state & 1);
        for (int l = 0; l < LANES; l++) codes[((long)f * all + item) * LANES + l] = code[l];
        error[f * all + item] = (z[f * all + item] - level) * c->gain[place];
        state = before;
      }
    }
  for (int g = 0; g < c->groups; g++)
    for (int f = 0; f < FREQUENCIES; f++)
      for (int l = 0; l < count; l++)
        for (int r = 0; r < c->rank; r++)
          c->output[at[l] + g * group + f * c->rank + r] = codes[((long)f * all + g * c->rank + r) * LANES + l];
}

#if defined(USE_AVX512) || defined(USE_AVX2)
#define PARTS (STATES / LANES)
#define QUARTER (1 << WIDEST >> 1)  // levels of a quarter of the largest codebook

#ifdef USE_AVX512
INLINE vec permute(vec x, ivec from) { return (vec)_mm512_permutexvar_ps((__m512i)from, (__m512)x); }
INLINE vec widened(__m128 x) { return (vec)_mm512_castps128_ps512(x); }
INLINE uint32_t less_bits(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE __m256 halved(vec x) {
  return _mm256_min_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
}
#else
INLINE vec permute(vec x, ivec from) { return (vec)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from); }
INLINE vec widened(__m128 x) { return (vec)_mm256_castps128_ps256(x); }
INLINE uint32_t less_bits(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)); }
INLINE __m256 halved(vec x) { return (__m256)x; }
#endif

// The codebooks of all widths: level by level, and quarter by quarter; short ones are repeated.
typedef struct {
  float levels[8][4 * QUARTER], quarters[8][4][QUARTER];
} Books;

static void fill_books(const Search *c, Books *books) {
  for (int slot = 0; slot < 8; slot++)
    for (int v = 0; v < 4 * QUARTER; v++) {
      const int count = BITS[slot] && BITS[slot] <= WIDEST ? 2 << BITS[slot] : 4;
      books->levels[slot][v] = books->quarters[slot][v & 3][v >> 2] = c->levels[slot * LEVELS + v % count];
    }
}

// Least squared error of x in every quarter.
INLINE __m128 nearest(float x, const float *levels) {
  vec d = x - load(levels), least = d * d;
  for (int v = LANES; v < 4 * QUARTER; v += LANES) {
    d = x - load(levels + v);
    least = smaller(least, d * d);
  }
  const __m256 half = halved(least);
  return _mm_min_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Which level of a quarter is the nearest to x.
INLINE int nearest_of(float x, const float *quarter) {
  const __m256 d = _mm256_sub_ps(_mm256_set1_ps(x), _mm256_loadu_ps(quarter)), error = _mm256_mul_ps(d, d);
  __m256 least = _mm256_min_ps(error, _mm256_permute2f128_ps(error, error, 1));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4e));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xb1));
  return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps(error, least, _CMP_EQ_OQ)));
}

// `search` for one block, the states of the trellis side by side: the same operations on every number, so the same codes.
static void search_alone(const Search *c, long n, float *memory) {
  const int all = c->groups * c->rank;
  float *z = memory, *error = z + FREQUENCIES * all, *target = error + FREQUENCIES * all, *metric = target + all;
  uint32_t *took = (uint32_t *)(metric + c->groups * FREQUENCIES * FREQUENCIES);
  uint8_t *codes = (uint8_t *)(took + all);  // [FREQUENCIES][all]
  const long group = (long)c->blocks * FREQUENCIES * c->rank, sequence = group * c->groups;
  const long at = n / c->blocks * sequence + n % c->blocks * FREQUENCIES * c->rank;
  for (int g = 0; g < c->groups; g++)
    for (int f = 0; f < FREQUENCIES; f++)
      memcpy(z + f * all + g * c->rank, c->z + at + g * group + f * c->rank, c->rank * sizeof(float));
  for (int g = 0; g < c->groups; g++) {
    vec w[FREQUENCIES], whole[FREQUENCIES * FREQUENCIES];
    for (int t = 0; t < FREQUENCIES; t++)
      w[t] = splat(c->weights ? c->weights[at / c->rank + g * (long)c->blocks * FREQUENCIES + t] : 1);
    weigh(c->time, w, whole);
    for (int i = 0; i < FREQUENCIES * FREQUENCIES; i++) metric[g * FREQUENCIES * FREQUENCIES + i] = whole[i][0];
  }
  Books books;
  fill_books(c, &books);
  ivec twice[2], label[2][PARTS];  // lanes that a state comes from, and the quarter that it chooses on the way
  for (int i = 0; i < LANES; i++)
    for (int k = 0; k < PARTS; k++) {
      twice[k & 1][i] = (k & 1) * (LANES / 2) + i / 2;
      label[0][k][i] = LABEL(k * LANES + i);
      label[1][k][i] = LABEL(k * LANES + i + STATES);
    }
  for (int pass = 0; pass < (c->weights ? 2 : 1); pass++)
    for (int f = 0; f < FREQUENCIES; f++) {
      for (int g = 0; g < c->groups; g++) {
        const float *line = metric + (g * FREQUENCIES + f) * FREQUENCIES, *gain = c->gain + (g * FREQUENCIES + f) * (long)c->rank;
        const float *own = error + f * all + g * c->rank, *x = z + f * all + g * c->rank;
        float *aim = target + g * c->rank;
        if (!pass) {
          memcpy(aim, x, c->rank * sizeof(float));
          continue;
        }
        for (int r = 0; r < c->rank; r++) aim[r] = 0;
        for (int h = 0; h < FREQUENCIES; h++)
          for (int r = 0; r < c->rank; r++) aim[r] += line[h] * error[h * all + g * c->rank + r];
        for (int r = 0; r < c->rank; r++) aim[r] = x[r] + (aim[r] / line[f] - own[r]) / gain[r];
      }
      const int32_t *order = c->order + (long)f * all;
      vec cost[PARTS];
      for (int k = 0; k < PARTS; k++) cost[k] = splat(1e30f);
      cost[0][0] = 0;
      for (int i = 0; i < all; i++) {
        const int item = order[i], g = item / c->rank;
        const long place = ((long)g * FREQUENCIES + f) * c->rank + item % c->rank;
        const int slot = c->slots[place], bits = BITS[slot];
        if (!bits) {
          error[f * all + item] = z[f * all + item] * c->gain[place];
          codes[f * all + item] = 0;
          continue;
        }
        const float aim = fminf(fmaxf(target[item], -REACH), REACH);
        target[item] = aim;
        if (bits > WIDEST) {
          int32_t cell = aim * CELLS + REACH * CELLS;
          cell -= cell == SPAN;
          const uint8_t code = codes[f * all + item] = c->cells[slot * SPAN + cell];
          error[f * all + item] = (z[f * all + item] - c->decoded[slot * LEVELS + code]) * c->gain[place];
          continue;
        }
        const float weight = c->cost[place] * metric[(g * FREQUENCIES + f) * FREQUENCIES + f];
        const vec e = widened(_mm_mul_ps(nearest(aim, books.levels[slot]), _mm_set1_ps(weight)));
        vec next[PARTS];
        took[item] = 0;
        for (int k = 0; k < PARTS; k++) {
          const vec p = permute(cost[k / 2], twice[k & 1]) + permute(e, label[0][k]);
          const vec q = permute(cost[PARTS / 2 + k / 2], twice[k & 1]) + permute(e, label[1][k]);
          took[item] |= less_bits(q, p) << k * LANES;
          next[k] = smaller(p, q);
        }
        for (int k = 0; k < PARTS; k++) cost[k] = next[k];
      }
      int state = 0;
      for (int s = 1; s < STATES; s++)
        if (((float *)cost)[s] < ((float *)cost)[state]) state = s;
      for (int i = all - 1; i >= 0; i--) {
        const int item = order[i], g = item / c->rank;
        const long place = ((long)g * FREQUENCIES + f) * c->rank + item % c->rank;
        const int slot = c->slots[place], bits = BITS[slot];
        if (!bits || bits > WIDEST) continue;
        const int before = state >> 1 | (took[item] >> state & 1) << 4, quarter = LABEL(before << 1 | (state & 1));
        const int best = nearest_of(target[item], books.quarters[slot][quarter]);
        codes[f * all + item] = best << 1 | (state & 1);
        error[f * all + item] = (z[f * all + item] - c->decoded[slot * LEVELS + best * 4 + quarter]) * c->gain[place];
        state = before;
      }
    }
  for (int g = 0; g < c->groups; g++)
    for (int f = 0; f < FREQUENCIES; f++)
      memcpy(c->output + at + g * group + f * c->rank, codes + f * all + g * c->rank, c->rank);
}
#define ALONE (LANES / 4)  // so few blocks take less time one by one
#else
#define ALONE 0
static void search_alone(const Search *c, long n, float *memory) {}
#endif

// Returns 0, or 1 without memory.
int spectralkv_trellis(const Search *c) {
  const long all = (long)c->groups * c->rank;
  const long vectors = (2 * FREQUENCIES + 2) * all + c->groups * FREQUENCIES * FREQUENCIES;
  float *memory = aligned_alloc(64, (vectors * sizeof(vec) + FREQUENCIES * all * LANES + 63) / 64 * 64);
  if (!memory) return 1;
  for (int done = 0; done < c->count; done += LANES) {
    const int count = c->count - done < LANES ? c->count - done : LANES;
    if (count > ALONE) search(c, c->first + done, count, memory);
    else
      for (int i = 0; i < count; i++) search_alone(c, c->first + done + i, memory);
  }
  free(memory);
  return 0;
}
