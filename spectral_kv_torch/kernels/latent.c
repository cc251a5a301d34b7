// Attention over packed codes on the CPU: one call is the whole decode step of one layer.
//
// Codes are read once, as they are stored, and never rebuilt as keys or values: a query is projected on the basis and
// scaled row by row (a row is one component at one frequency), a row of codes is looked up in its quantizer's levels in
// registers and multiplied with all query rows of its KV head; the time transform is applied to scores and to
// probabilities. All arithmetic is float32. Layout of codes: quantizer.pack_rows; formulas: codec.SpectralCodec.attend.
//
// Work is split over (sequence, KV head) and groups of chunks, whose softmaxes are partial and merged at the end.

#include "vectors.h"

#if USE_AVX512
#define AT_ONCE 4  // vectors of a row that are kept in registers for all query rows
#else
#define AT_ONCE 2
#endif
#define UNIT 8          // codes of a packed unit
#define BLOCKS 64       // time blocks of a full chunk
#define VECTORS (BLOCKS / LANES)
#define SPAN 4          // chunks that share one partial softmax
#define ROWS 4          // query rows that share one pass over the codes
#define MAX_WIDTHS 8
#define LOWEST (-1e30f)

typedef uint32_t __attribute__((may_alias, aligned(1))) word;
typedef uint64_t __attribute__((may_alias, aligned(1))) long_word;
typedef float v4 __attribute__((vector_size(4 * ROWS)));

// What all sequences share. Groups are the KV heads' keys, then their values.
typedef struct {
  int32_t kv_heads, dim, rank, widths;
  int32_t bits[MAX_WIDTHS];
  const int32_t *first[MAX_WIDTHS];       // [groups * FREQUENCIES + 1]: where the rows of (group, frequency) start
  const uint16_t *component[MAX_WIDTHS];  // [rows]
  const float *scale[MAX_WIDTHS];         // [rows]: standard deviations
  const float *levels[MAX_WIDTHS];        // [256]
  const float *time;                      // [frequency][token]
  const float *basis;                     // [groups][dim][rank]
  const float *mean;                      // [groups][dim]
} Codec;

typedef struct {
  int32_t batch, rows, length, chunks, exact, exact_is_bfloat16, threads;
  float scale;
  const int32_t *blocks;                   // [chunks]: time blocks held
  const uint8_t *const *codes;             // [chunks][widths][2]: whole units, and the rest
  const float *queries;                    // [batch][kv_heads][rows][dim]
  const void *exact_keys, *exact_values;   // [batch][kv_heads][exact][dim]
  float *output;                           // [batch][kv_heads][rows][dim]
} Call;

// ---------------------------------------------------------------------------------------------------- vectors

INLINE float sum(vec x) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += x[i];
  return s;
}

INLINE float largest(vec x) {
  float s = x[0];
  for (int i = 1; i < LANES; i++) s = x[i] > s ? x[i] : s;
  return s;
}

// 2^x for x <= 0, relative error below 1e-7; 0 below the normal numbers.
INLINE vec power_of_two(vec x) {
  const vec shifter = splat(12582912.f);  // 1.5 * 2^23: the sum has x, rounded, in its last bits
  ivec tiny = x < splat(-126.f);
  x = larger(x, splat(-126.f));
  vec rounded = x + shifter, f = x - (rounded - shifter);
  vec p = splat(1.540353e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return (vec)(((ivec)p + (((ivec)rounded - (ivec)shifter) << 23)) & ~tiny);
}

// Four vectors -> partial sums of a, b, c, d in every four lanes.
INLINE vec reduce(vec a, vec b, vec c, vec d) {
#if LANES == 16
#define PICK(x, y, i, j, k, l) \
  __builtin_shufflevector(x, y, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l, 8 + i, 8 + j, 8 + k, 8 + l, 12 + i, 12 + j, 12 + k, 12 + l)
#else
#define PICK(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l)
#endif
  vec ab = PICK(a, b, 0, LANES, 1, LANES + 1) + PICK(a, b, 2, LANES + 2, 3, LANES + 3);
  vec cd = PICK(c, d, 0, LANES, 1, LANES + 1) + PICK(c, d, 2, LANES + 2, 3, LANES + 3);
  return PICK(ab, cd, 0, 1, LANES, LANES + 1) + PICK(ab, cd, 2, 3, LANES + 2, LANES + 3);
}

// ---------------------------------------------------------------------------------------------------- codes

// Eight codes of one unit as bytes, the first in the lowest.
INLINE uint64_t unpack_unit(const int bits, const uint8_t *p) {
  if (bits == 8) return *(const long_word *)p;
  uint64_t codes = 0;
  for (int width = 4, shift = 0; width; width >>= 1) {  // planes: quantizer.planes
    if (!(bits & width)) continue;
    uint64_t plane = 0;
    memcpy(&plane, p, width);
#if USE_AVX512 || USE_AVX2
    const uint64_t mask = width == 4 ? 0x0f0f0f0f0f0f0f0full : width == 2 ? 0x0303030303030303ull : 0x0101010101010101ull;
    plane = _pdep_u64(plane, mask);
#else
    uint64_t spread = 0;
    for (int i = 0; i < UNIT; i++) spread |= (plane >> (i * width) & ((1u << width) - 1)) << (8 * i);
    plane = spread;
#endif
    codes |= plane << shift;
    shift += width;
    p += width;
  }
  return codes;
}

__attribute__((unused)) INLINE uint32_t short_word(const uint8_t *p) { return p[0] | (uint32_t)p[1] << 8; }

#if USE_AVX512
typedef struct {
  __m512 t[4];
  const float *levels;
} Levels;

// `levels` arranged as `decode` reads them.
INLINE Levels arrange(const int bits, const float *levels) {
  Levels l = {.levels = levels};
  const __m512i quad = _mm512_set_epi32(3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0);
  if (bits == 1) {
    l.t[0] = _mm512_set1_ps(levels[0]), l.t[1] = _mm512_set1_ps(levels[1]);
  } else if (bits <= 3) {  // the upper bits of an index belong to its neighbour
    l.t[0] = _mm512_permutexvar_ps(quad, _mm512_loadu_ps(levels));
    l.t[1] = _mm512_permutexvar_ps(quad, _mm512_loadu_ps(levels + 4));
  } else if (bits <= 6) {
    for (int i = 0; i < 1 << (bits - 4); i++) l.t[i] = _mm512_loadu_ps(levels + LANES * i);
  }
  return l;
}

INLINE __m512i nibbles(const uint8_t *low, const uint8_t *high) {
  const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  __m512i w = _mm512_mask_set1_epi32(_mm512_set1_epi32(*(const word *)low), 0xff00, *(const word *)high);
  return _mm512_srlv_epi32(w, shifts);
}

INLINE __m512i pairs(uint32_t w) {
  const __m512i shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_srlv_epi32(_mm512_set1_epi32(w), shifts);
}

// Levels of the codes of one vector, whose units begin at `p`.
INLINE vec decode(const int bits, const Levels *l, const uint8_t *p) {
  if (bits == 1) return (vec)_mm512_mask_blend_ps(short_word(p), l->t[0], l->t[1]);
  if (bits == 2) return (vec)_mm512_permutexvar_ps(pairs(*(const word *)p), l->t[0]);
  if (bits == 3) {
    __m512i i = pairs(short_word(p) | short_word(p + 3) << 16);
    return (vec)_mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(i, l->t[0]), p[2] | p[5] << 8, i, l->t[1]);
  }
  if (bits == 8) {
    __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return (vec)_mm512_i32gather_ps(i, l->levels, 4);
  }
  __m512i i = nibbles(p, p + bits);
  __m512 y = _mm512_permutexvar_ps(i, l->t[0]);
  if (bits == 5) y = _mm512_mask_permutexvar_ps(y, p[4] | p[9] << 8, i, l->t[1]);
  if (bits == 6) {
    __m512i j = pairs(short_word(p + 4) | short_word(p + 10) << 16);
    __mmask16 odd = _mm512_test_epi32_mask(j, _mm512_set1_epi32(1));
    y = _mm512_mask_permutexvar_ps(y, odd, i, l->t[1]);
    __m512 upper = _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(i, l->t[2]), odd, i, l->t[3]);
    y = _mm512_mask_blend_ps(_mm512_test_epi32_mask(j, _mm512_set1_epi32(2)), y, upper);
  }
  return (vec)y;
}

// Levels of codes that lie one in a byte, the first eight in `low`.
INLINE vec decode_bytes(const int bits, const Levels *l, uint64_t low, uint64_t high) {
  __m512i i = _mm512_cvtepu8_epi32(_mm_set_epi64x(high, low));
  if (bits <= 4) return (vec)_mm512_permutexvar_ps(i, _mm512_loadu_ps(l->levels));
  return (vec)_mm512_i32gather_ps(i, l->levels, 4);
}
#elif USE_AVX2
typedef struct {
  __m256 t[2];
  const float *levels;
} Levels;

INLINE Levels arrange(const int bits, const float *levels) {
  Levels l = {.levels = levels};
  l.t[0] = _mm256_loadu_ps(levels), l.t[1] = _mm256_loadu_ps(levels + 8);
  if (bits == 1) l.t[0] = _mm256_set1_ps(levels[0]), l.t[1] = _mm256_set1_ps(levels[1]);
  if (bits == 2) l.t[0] = _mm256_permute2f128_ps(l.t[0], l.t[0], 0);  // the third bit belongs to the neighbour
  return l;
}

INLINE vec decode_bytes(const int bits, const Levels *l, uint64_t low, uint64_t high) {
  (void)high;
  __m256i i = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low));
  if (bits == 1) return (vec)_mm256_i32gather_ps(l->levels, i, 4);
  if (bits <= 3) return (vec)_mm256_permutevar8x32_ps(l->t[0], i);
  return (vec)_mm256_i32gather_ps(l->levels, i, 4);
}

INLINE vec decode(const int bits, const Levels *l, const uint8_t *p) {
  const __m256i ones = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31), twos = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
  if (bits == 1) {
    __m256i sign = _mm256_sllv_epi32(_mm256_set1_epi32(*p), ones);
    return (vec)_mm256_blendv_ps(l->t[0], l->t[1], (__m256)sign);
  }
  if (bits == 2) {
    __m256i i = _mm256_srlv_epi32(_mm256_set1_epi32(short_word(p)), twos);
    return (vec)_mm256_permutevar8x32_ps(l->t[0], i);
  }
  if (bits == 4) {
    __m256i i = _mm256_srlv_epi32(_mm256_set1_epi32(*(const word *)p), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    __m256 low = _mm256_permutevar8x32_ps(l->t[0], i), high = _mm256_permutevar8x32_ps(l->t[1], i);
    return (vec)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(i, 28));
  }
  return decode_bytes(bits, l, unpack_unit(bits, p), 0);
}
#else
typedef struct {
  const float *levels;
} Levels;

INLINE Levels arrange(const int bits, const float *levels) { return (void)bits, (Levels){levels}; }

INLINE vec decode_bytes(const int bits, const Levels *l, uint64_t low, uint64_t high) {
  (void)bits, (void)high;
  float y[LANES];
  for (int i = 0; i < LANES; i++) y[i] = l->levels[low >> (8 * i) & 255];
  return load(y);
}

INLINE vec decode(const int bits, const Levels *l, const uint8_t *p) {
  return decode_bytes(bits, l, unpack_unit(bits, p), 0);
}
#endif

// The codes of one width of one chunk that belong to one group and frequency.
typedef struct {
  const uint8_t *units;  // of the first row
  const uint8_t *rest;   // of all rows
  long stride, row;      // bytes of a row's units; number of the first row in `rest`
  int count, blocks;
} Rows;

// Codes that wait for their unit: one byte each, [count][blocks % 8], into `bytes`; returns where the first row starts.
INLINE const uint8_t *unpack_rest(const int bits, const Rows *r, uint8_t *bytes) {
  long left = r->blocks % UNIT, start = r->row * left, stop = start + r->count * left;
  for (long unit = start / UNIT; unit * UNIT < stop; unit++) {
    uint64_t codes = unpack_unit(bits, r->rest + unit * bits);
    memcpy(bytes + unit * UNIT - start / UNIT * UNIT, &codes, UNIT);
  }
  return bytes + start % UNIT;
}

// ---------------------------------------------------------------------------------------------------- passes

// sums[m][v] += q[row][m] y[row][v] over rows.
INLINE void score_rows(const int bits, const int m_rows, const int vectors, const Rows *r, int vector, const Levels *given,
                       const v4 *q, vec sums[ROWS][VECTORS]) {
  const Levels l = *given;
  vec acc[ROWS][VECTORS];
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) acc[m][v] = sums[m][vector + v];
  const uint8_t *p = r->units + vector * (LANES / UNIT) * bits;
  for (int row = 0; row < r->count; row++, p += r->stride, q++) {
    vec y[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) y[v] = decode(bits, &l, p + v * (LANES / UNIT) * bits);
#pragma GCC unroll 4
    for (int m = 0; m < m_rows; m++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) acc[m][v] += (*q)[m] * y[v];
  }
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) sums[m][vector + v] = acc[m][v];
}

// pooled[component][m] += scale w[m][v] . y[row][v] over rows, as `reduce` leaves them.
INLINE void pool_rows(const int bits, const int m_rows, const int vectors, const Rows *r, int vector, const Levels *given,
                      const float *scale, const uint16_t *component, vec weights[ROWS][VECTORS], vec *pooled) {
  const Levels l = *given;
  vec w[ROWS][VECTORS];
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) w[m][v] = weights[m][vector + v];
  const uint8_t *p = r->units + vector * (LANES / UNIT) * bits;
  for (int row = 0; row < r->count; row++, p += r->stride) {
    vec dot[ROWS] = {{0}};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      vec y = decode(bits, &l, p + v * (LANES / UNIT) * bits);
#pragma GCC unroll 4
      for (int m = 0; m < m_rows; m++) dot[m] += w[m][v] * y;
    }
    pooled[component[row]] += scale[row] * reduce(dot[0], dot[1], dot[2], dot[3]);
  }
}

// The vector that is not made of whole units alone: an odd unit where a vector takes two, and what waits for its unit.
INLINE vec decode_tail(const int bits, const Levels *l, const Rows *r, int row, const uint8_t *rest) {
  int units = r->blocks / UNIT, left = r->blocks % UNIT, odd = units % (LANES / UNIT);
  uint64_t whole = odd ? unpack_unit(bits, r->units + row * r->stride + (units - 1) * bits) : 0, waiting = 0;
  if (left) memcpy(&waiting, rest + (long)row * left, UNIT);  // more than `left` are read, and weigh nothing
  return decode_bytes(bits, l, odd ? whole : waiting, waiting);
}

INLINE void score_tail(const int bits, const int m_rows, const Rows *r, const Levels *l, const v4 *q, uint8_t *bytes,
                       vec sums[ROWS][VECTORS]) {
  const uint8_t *rest = unpack_rest(bits, r, bytes);
  int vector = r->blocks / LANES;
  for (int row = 0; row < r->count; row++, q++) {
    vec y = decode_tail(bits, l, r, row, rest);
    for (int m = 0; m < m_rows; m++) sums[m][vector] += (*q)[m] * y;
  }
}

INLINE void pool_tail(const int bits, const int m_rows, const Rows *r, const Levels *l, const float *scale,
                      const uint16_t *component, uint8_t *bytes, vec weights[ROWS][VECTORS], vec *pooled) {
  const uint8_t *rest = unpack_rest(bits, r, bytes);
  int vector = r->blocks / LANES;
  for (int row = 0; row < r->count; row++) {
    vec y = decode_tail(bits, l, r, row, rest), dot[ROWS] = {{0}};
    for (int m = 0; m < m_rows; m++) dot[m] = weights[m][vector] * y;
    pooled[component[row]] += scale[row] * reduce(dot[0], dot[1], dot[2], dot[3]);
  }
}

// One body for every width and number of query rows, so that both are constants in it.
#define SCORE(bits, m_rows)                                                                                     \
  static void score_##bits##_##m_rows(const Rows *r, const float *levels, const v4 *q, uint8_t *bytes,          \
                                      vec sums[ROWS][VECTORS]) {                                                \
    Levels l = arrange(bits, levels);                                                                           \
    int whole = r->blocks / LANES, v = 0;                                                                       \
    for (; v + AT_ONCE <= whole; v += AT_ONCE) score_rows(bits, m_rows, AT_ONCE, r, v, &l, q, sums);            \
    for (; v < whole; v++) score_rows(bits, m_rows, 1, r, v, &l, q, sums);                                      \
    if (r->blocks % LANES) score_tail(bits, m_rows, r, &l, q, bytes, sums);                                     \
  }
#define POOL(bits, m_rows)                                                                                      \
  static void pool_##bits##_##m_rows(const Rows *r, const float *levels, const float *scale,                    \
                                     const uint16_t *component, uint8_t *bytes, vec weights[ROWS][VECTORS],     \
                                     vec *pooled) {                                                             \
    Levels l = arrange(bits, levels);                                                                           \
    int whole = r->blocks / LANES, v = 0;                                                                       \
    for (; v + AT_ONCE <= whole; v += AT_ONCE)                                                                  \
      pool_rows(bits, m_rows, AT_ONCE, r, v, &l, scale, component, weights, pooled);                            \
    for (; v < whole; v++) pool_rows(bits, m_rows, 1, r, v, &l, scale, component, weights, pooled);             \
    if (r->blocks % LANES) pool_tail(bits, m_rows, r, &l, scale, component, bytes, weights, pooled);            \
  }
#define BOTH(bits) \
  SCORE(bits, 1) SCORE(bits, 2) SCORE(bits, 3) SCORE(bits, 4) POOL(bits, 1) POOL(bits, 2) POOL(bits, 3) POOL(bits, 4)
BOTH(1) BOTH(2) BOTH(3) BOTH(4) BOTH(5) BOTH(6) BOTH(8)

typedef void (*Score)(const Rows *, const float *, const v4 *, uint8_t *, vec[ROWS][VECTORS]);
typedef void (*Pool)(const Rows *, const float *, const float *, const uint16_t *, uint8_t *, vec[ROWS][VECTORS], vec *);
#define EACH(name, bits) {name##_##bits##_1, name##_##bits##_2, name##_##bits##_3, name##_##bits##_4}
#define NONE {0, 0, 0, 0}
#define TABLE(name) \
  {NONE, EACH(name, 1), EACH(name, 2), EACH(name, 3), EACH(name, 4), EACH(name, 5), EACH(name, 6), NONE, EACH(name, 8)}
static const Score score_table[9][ROWS] = TABLE(score);
static const Pool pool_table[9][ROWS] = TABLE(pool);

// ---------------------------------------------------------------------------------------------------- a group of chunks

// Query rows of one KV head on the basis of its keys, times the softmax's scale; logits are to the base 2.
typedef struct {
  const float *latent;  // [rows][rank]
  const float *offset;  // [rows]: the part of the mean
} Projected;

typedef struct {
  float *pooled;  // [rows][rank], or [rows][dim] for exact tokens: sum of exp(s - top) v
  float *top;     // [rows]
  float *total;   // [rows]: sum of exp(s - top)
} Partial;

static Rows rows_of(const Codec *codec, const Call *call, int chunk, int sequence, int width, int slot) {
  const int32_t *first = codec->first[width];
  int bits = codec->bits[width], blocks = call->blocks[chunk], left = blocks % UNIT;
  long all = first[2 * codec->kv_heads * FREQUENCIES], stride = (long)(blocks / UNIT) * bits;
  long rest = (all * left + UNIT - 1) / UNIT * bits;
  const uint8_t *const *codes = call->codes + ((long)chunk * codec->widths + width) * 2;
  return (Rows){codes[0] + (sequence * all + first[slot]) * stride, codes[1] + sequence * rest, stride, first[slot],
                first[slot + 1] - first[slot], blocks};
}

// Apply the time transform to [FREQUENCIES][VECTORS], from frequencies to tokens or back.
INLINE void transform(const float *time, const int to_time, const vec *in, vec *out) {
  for (int i = 0; i < FREQUENCIES; i += 4) {
    for (int v = 0; v < VECTORS; v++) {
      vec a[4] = {{0}};
      for (int j = 0; j < FREQUENCIES; j++)
        for (int k = 0; k < 4; k++) {
          float c = to_time ? time[j * FREQUENCIES + i + k] : time[(i + k) * FREQUENCIES + j];
          a[k] += c * in[j * VECTORS + v];
        }
      for (int k = 0; k < 4; k++) out[(i + k) * VECTORS + v] = a[k];
    }
  }
}

// Lanes of vector `v` that hold no block.
INLINE ivec beyond(int blocks, int v) {
#if LANES == 16
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
#endif
  return lane >= blocks - v * LANES;
}

typedef struct {
  vec spectrum[FREQUENCIES][ROWS][VECTORS];
  vec turned[FREQUENCIES * VECTORS], line[FREQUENCIES * VECTORS];
  vec scores[SPAN][ROWS][FREQUENCIES * VECTORS];
} Scratch;

// What every row of codes of a head's keys is multiplied with, in the order in which they are read.
static void scale_queries(const Codec *codec, int head, int from, int m_rows, Projected query, v4 *q) {
  const int rank = codec->rank;
  v4 latent[rank];
  for (int r = 0; r < rank; r++)
    for (int m = 0; m < ROWS; m++) latent[r][m] = m < m_rows ? query.latent[(from + m) * rank + r] : 0;
  for (int slot = head * FREQUENCIES; slot < (head + 1) * FREQUENCIES; slot++)
    for (int w = 0; w < codec->widths; w++)
      for (int row = codec->first[w][slot]; row < codec->first[w][slot + 1]; row++)
        *q++ = latent[codec->component[w][row]] * codec->scale[w][row];
}

// Partial softmax of query rows [from, from + m_rows) of one KV head over chunks [start, stop).
static void attend_chunks(const Codec *codec, const Call *call, int sequence, int head, int start, int stop, int from,
                          int m_rows, Projected query, Partial out, Scratch *s, v4 *q, vec *pooled, uint8_t *bytes) {
  const int rank = codec->rank;
  scale_queries(codec, head, from, m_rows, query, q);
  vec top[ROWS];
  for (int m = 0; m < ROWS; m++) top[m] = splat(LOWEST);
  for (int chunk = start; chunk < stop; chunk++) {
    memset(s->spectrum, 0, sizeof s->spectrum);
    const v4 *row = q;
    for (int f = 0; f < FREQUENCIES; f++)
      for (int w = 0; w < codec->widths; w++) {
        Rows r = rows_of(codec, call, chunk, sequence, w, head * FREQUENCIES + f);
        if (r.count) score_table[codec->bits[w]][m_rows - 1](&r, codec->levels[w], row, bytes, s->spectrum[f]);
        row += r.count;
      }
    int blocks = call->blocks[chunk];
    for (int m = 0; m < m_rows; m++) {
      for (int f = 0; f < FREQUENCIES; f++) memcpy(s->line + f * VECTORS, s->spectrum[f][m], sizeof s->spectrum[f][m]);
      vec *scores = s->scores[chunk - start][m];
      transform(codec->time, 1, s->line, scores);
      for (int v = 0; v < VECTORS; v++) {
        ivec none = beyond(blocks, v), low = (ivec)splat(LOWEST);
        for (int t = 0; t < FREQUENCIES; t++) {
          vec x = scores[t * VECTORS + v] + query.offset[from + m];
          x = (vec)(((ivec)x & ~none) | (low & none));
          scores[t * VECTORS + v] = x;
          top[m] = larger(top[m], x);
        }
      }
    }
  }
  vec total[ROWS] = {{0}};
  for (int m = 0; m < m_rows; m++) out.top[from + m] = largest(top[m]);
  memset(pooled, 0, sizeof(vec) * rank);
  for (int chunk = start; chunk < stop; chunk++) {
    for (int m = 0; m < m_rows; m++) {
      vec *scores = s->scores[chunk - start][m], highest = splat(out.top[from + m]);
      for (int i = 0; i < FREQUENCIES * VECTORS; i++) {
        scores[i] = power_of_two(scores[i] - highest);
        total[m] += scores[i];
      }
      transform(codec->time, 0, scores, s->turned);
      for (int f = 0; f < FREQUENCIES; f++) memcpy(s->spectrum[f][m], s->turned + f * VECTORS, sizeof s->spectrum[f][m]);
    }
    for (int f = 0; f < FREQUENCIES; f++)
      for (int w = 0; w < codec->widths; w++) {
        Rows r = rows_of(codec, call, chunk, sequence, w, (codec->kv_heads + head) * FREQUENCIES + f);
        if (!r.count) continue;
        pool_table[codec->bits[w]][m_rows - 1](&r, codec->levels[w], codec->scale[w] + r.row,
                                               codec->component[w] + r.row, bytes, s->spectrum[f], pooled);
      }
  }
  for (int m = 0; m < m_rows; m++) {
    out.total[from + m] = sum(total[m]);
    for (int r = 0; r < rank; r++) {
      float sum = 0;
      for (int i = m; i < LANES; i += 4) sum += pooled[r][i];
      out.pooled[(from + m) * rank + r] = sum;
    }
  }
}

// ---------------------------------------------------------------------------------------------------- exact tokens

static const float *exact_row(const Call *call, const void *side, long row, int dim, float *buffer) {
  if (!call->exact_is_bfloat16) return (const float *)side + row * dim;
  const uint16_t *x = (const uint16_t *)side + row * dim;
  for (int d = 0; d < dim; d++) {
    uint32_t wide = (uint32_t)x[d] << 16;
    memcpy(buffer + d, &wide, sizeof wide);
  }
  return buffer;
}

// Partial softmax over the exact tokens; query row m is token m % length, and sees the exact ones up to itself.
static void attend_exact(const Codec *codec, const Call *call, int head, Partial out, float *scores, float *buffer) {
  const int dim = codec->dim, exact = call->exact;
  const float *queries = call->queries + (long)head * call->rows * dim, scale = call->scale * 1.44269504f;
  for (int j = 0; j < exact; j++) {
    const float *key = exact_row(call, call->exact_keys, (long)head * exact + j, dim, buffer);
    for (int m = 0; m < call->rows; m++) {
      const float *q = queries + (long)m * dim;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int d = 0; d < dim; d++) dot += q[d] * key[d];
      int seen = exact - call->length + m % call->length + 1;
      scores[(long)m * exact + j] = j < seen ? dot * scale : LOWEST;
    }
  }
  memset(out.pooled, 0, sizeof(float) * call->rows * dim);
  for (int m = 0; m < call->rows; m++) {
    float *row = scores + (long)m * exact, top = LOWEST, total = 0;
    for (int j = 0; j < exact; j++) top = row[j] > top ? row[j] : top;
    for (int j = 0; j < exact; j++) total += row[j] = row[j] > LOWEST ? exp2f(row[j] - top) : 0;
    out.top[m] = top, out.total[m] = total;
  }
  for (int j = 0; j < exact; j++) {
    const float *value = exact_row(call, call->exact_values, (long)head * exact + j, dim, buffer);
    for (int m = 0; m < call->rows; m++) {
      float p = scores[(long)m * exact + j], *sum = out.pooled + (long)m * dim;
#pragma omp simd
      for (int d = 0; d < dim; d++) sum[d] += p * value[d];
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the whole step

static void project(const Codec *codec, const Call *call, int head, float *latent, float *offset) {
  const int dim = codec->dim, rank = codec->rank, group = head % codec->kv_heads;
  const float *basis = codec->basis + (long)group * dim * rank, *mean = codec->mean + (long)group * dim;
  const float scale = call->scale * 1.44269504f;
  for (int m = 0; m < call->rows; m++, latent += rank) {
    const float *q = call->queries + ((long)head * call->rows + m) * dim;
    float sum = 0;
    memset(latent, 0, sizeof(float) * rank);
    for (int d = 0; d < dim; d++) {
      float x = q[d] * scale;
      sum += x * mean[d];
#pragma omp simd
      for (int r = 0; r < rank; r++) latent[r] += x * basis[(long)d * rank + r];
    }
    offset[m] = sum;
  }
}

// Weighted mean of `spans` partials over chunks and of the one over exact tokens.
static void merge(const Codec *codec, const Call *call, int head, int spans, const Partial *parts, float *sum) {
  const int dim = codec->dim, rank = codec->rank, group = codec->kv_heads + head % codec->kv_heads;
  const float *basis = codec->basis + (long)group * dim * rank, *mean = codec->mean + (long)group * dim;
  for (int m = 0; m < call->rows; m++) {
    float top = LOWEST, total = 0, sealed = 0;
    for (int i = 0; i <= spans; i++) top = parts[i].top[m] > top ? parts[i].top[m] : top;
    memset(sum, 0, sizeof(float) * rank);
    for (int i = 0; i < spans; i++) {
      float weight = exp2f(parts[i].top[m] - top);
      sealed += weight * parts[i].total[m];
#pragma omp simd
      for (int r = 0; r < rank; r++) sum[r] += weight * parts[i].pooled[(long)m * rank + r];
    }
    float weight = exp2f(parts[spans].top[m] - top), *out = call->output + ((long)head * call->rows + m) * dim;
    total = sealed + weight * parts[spans].total[m];
    for (int d = 0; d < dim; d++) {
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int r = 0; r < rank; r++) dot += sum[r] * basis[(long)d * rank + r];
      out[d] = (dot + sealed * mean[d] + weight * parts[spans].pooled[(long)m * dim + d]) / total;
    }
  }
}

static void *allocate(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

// Returns 0, or 1 when memory is short.
int spectralkv_attend(const Codec *codec, const Call *call) {
  const int heads = call->batch * codec->kv_heads, rank = codec->rank, dim = codec->dim, rows = call->rows;
  const int spans = (call->chunks + SPAN - 1) / SPAN, items = spans + 1, wide = rank > dim ? rank : dim;
  const size_t projected = (size_t)heads * rows * (rank + 1), partial = (size_t)rows * (wide + 2);
  float *store = allocate(sizeof(float) * (projected + heads * items * partial));
  Partial *parts = allocate(sizeof(Partial) * heads * items);
  int failed = !store || !parts;
  for (int i = 0; i < heads * items && !failed; i++) {
    float *at = store + projected + i * partial;
    parts[i] = (Partial){at + 2 * rows, at, at + rows};
  }
  const size_t floats = (size_t)rows * (call->exact + rank) + 2 * (size_t)wide;
  if (!failed) {
#pragma omp parallel num_threads(call->threads)
    {
      Scratch *scratch = allocate(sizeof *scratch);
      vec *pooled = allocate(sizeof *pooled * rank);
      v4 *scaled = allocate(sizeof *scaled * rank * FREQUENCIES);
      float *buffer = allocate(sizeof(float) * floats);
      uint8_t *bytes = allocate((size_t)rank * UNIT + 4 * UNIT);
      int short_of_memory = !scratch || !pooled || !scaled || !buffer || !bytes;
      if (short_of_memory) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp barrier
      if (!failed) {
#pragma omp for schedule(static)
        for (int head = 0; head < heads; head++)
          project(codec, call, head, store + (size_t)head * rows * rank, store + (size_t)heads * rows * rank + head * rows);
#pragma omp for schedule(dynamic)
        for (int item = 0; item < heads * items; item++) {
          int head = item % heads, span = item / heads;  // the longest items first
          Partial out = parts[head * items + span];
          if (span == spans) {
            attend_exact(codec, call, head, out, buffer, buffer + floats - wide);
            continue;
          }
          Projected query = {store + (size_t)head * rows * rank, store + (size_t)heads * rows * rank + head * rows};
          int stop = (span + 1) * SPAN < call->chunks ? (span + 1) * SPAN : call->chunks;
          for (int from = 0; from < rows; from += ROWS)
            attend_chunks(codec, call, head / codec->kv_heads, head % codec->kv_heads, span * SPAN, stop, from,
                          rows - from < ROWS ? rows - from : ROWS, query, out, scratch, scaled, pooled, bytes);
        }
#pragma omp for schedule(static)
        for (int head = 0; head < heads; head++) merge(codec, call, head, spans, parts + head * items, buffer);
      }
      free(scratch), free(pooled), free(scaled), free(buffer), free(bytes);
    }
  }
  free(store), free(parts);
  return failed;
}
