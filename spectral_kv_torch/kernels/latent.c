// Attention over packed codes on the CPU: one call is the whole decode step of one layer.
//
// Codes are read once, as they are stored, and never rebuilt as keys or values: a query is projected on the basis and
// scaled coefficient by coefficient (one component at one frequency); the codes of a coefficient are looked up in its
// quantizer's levels in registers and multiplied with all query rows of its KV head; the time transform is applied to
// scores and to probabilities. All arithmetic is float32. Layout of codes: packing.pack_rows; formulas:
// codec.SpectralCodec.attend.
//
// Work is split over (sequence, KV head) and groups of chunks, whose softmaxes are partial and merged at the end.
//
// Codes of a trellis (trellis.py) say their level together with the path bits of three coefficients before, of any head.
// So the path bits of some chunks are laid out first, one *path row* for every such coefficient of the layer, and the
// labels of a coefficient are made of path rows when it is decoded.

#include "threads.h"
#include "vectors.h"

#if USE_AVX512
#define AT_ONCE 4  // vectors of a coefficient that are kept in registers for all query rows
#else
#define AT_ONCE 2
#endif
#define UNIT 8          // codes of a packed unit
#define PATH_ROW 16     // bytes of a path row: two bits for each of 64 blocks
#define BLOCKS 64       // time blocks of a full chunk
#define VECTORS (BLOCKS / LANES)
#define PARTS 8         // that the path rows of a chunk are laid out in
#define SPAN 4          // chunks that share one partial softmax
#define WAVE 4          // items per thread, at least, that path rows are laid out for at a time
#define QUERY_ROWS 4    // query rows that share one pass over the codes
#define AHEAD 4         // coefficients whose labels are made before those of one are used
#define MAX_WIDTHS 8
#define LOWEST (-1e30f)

typedef uint32_t __attribute__((may_alias, aligned(1))) word;
typedef uint64_t __attribute__((may_alias, aligned(1))) long_word;
typedef uint16_t __attribute__((may_alias)) half_word;
typedef float v4 __attribute__((vector_size(4 * QUERY_ROWS)));

// What all sequences share. Groups are the KV heads' keys, then their values.
typedef struct {
  int32_t kv_heads, dim, rank, widths;
  int32_t bits[MAX_WIDTHS];
  const int32_t *first[MAX_WIDTHS];       // [groups * FREQUENCIES + 1]: where (group, frequency) starts among the coefficients
  const uint16_t *component[MAX_WIDTHS];  // [coefficients]
  const float *scale[MAX_WIDTHS];         // [coefficients]: standard deviations
  const float *levels[MAX_WIDTHS];        // [256]
  const float *time;                      // [frequency][token]
  const float *basis;                     // [groups][dim][rank]
  const float *mean;                      // [groups][dim]
  int32_t coupled, paths;                 // widths whose codes are those of a trellis, the first ones; coefficients they have
  int32_t path[MAX_WIDTHS];               // number of a width's first path row
  const int32_t *before[3];               // [paths]: the path rows 2, 3 and 5 before, `paths` for none
} Codec;

typedef struct {
  int32_t batch, query_rows, length, chunks, exact, exact_is_bfloat16, threads;
  float scale;
  const int32_t *blocks;                   // [chunks]: time blocks held
  const uint8_t *const *codes;             // [chunks][widths][2]: whole units, and the rest
  const float *queries;                    // [batch][kv_heads][query_rows][dim]
  const void *exact_keys, *exact_values;   // [batch][kv_heads][exact][dim]
  float *output;                           // [batch][kv_heads][query_rows][dim]
} Call;

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

INLINE uint32_t short_word(const uint8_t *p) { return p[0] | (uint32_t)p[1] << 8; }

// Eight codes of one unit as bytes, the first in the lowest.
INLINE uint64_t unpack_unit(const int bits, const uint8_t *p) {
  if (bits == 8) return *(const long_word *)p;
  uint64_t codes = 0;
  for (int width = 4, shift = 0; width; width >>= 1) {  // planes: packing.planes
    if (!(bits & width)) continue;
    uint64_t plane = width == 4 ? *(const word *)p : width == 2 ? short_word(p) : *p;
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

// The bits of `x` under `mask`, side by side from the lowest; and back.
INLINE uint64_t gather_bits(uint64_t x, uint64_t mask) {
#if USE_AVX512 || USE_AVX2
  return _pext_u64(x, mask);
#else
  uint64_t out = 0;
  for (int to = 0; mask; mask &= mask - 1, to++) out |= (uint64_t)((x & (mask & -mask)) != 0) << to;
  return out;
#endif
}

INLINE uint64_t scatter_bits(uint64_t x, uint64_t mask) {
#if USE_AVX512 || USE_AVX2
  return _pdep_u64(x, mask);
#else
  uint64_t out = 0;
  for (; mask; mask &= mask - 1, x >>= 1) out |= x & 1 ? mask & -mask : 0;
  return out;
#endif
}

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
  } else if (bits <= 3) {  // the upper bits of an index belong to its neighbor
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
  if (bits == 2) l.t[0] = _mm256_permute2f128_ps(l.t[0], l.t[0], 0);  // the third bit belongs to the neighbor
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
  const uint8_t *units;  // of the first coefficient
  const uint8_t *rest;   // of all
  long stride, first;    // bytes of a coefficient's units; number of the first one in `rest`
  int count, blocks;
  const uint8_t *paths;      // path rows of the chunk
  const int32_t *before[3];  // numbers of path rows, for each coefficient
  long path;                 // number of the first one's
} Coefficients;

// Codes that wait for their unit: one byte each, [count][blocks % 8], into `bytes`; returns where the first one starts.
INLINE const uint8_t *unpack_rest(const int bits, const Coefficients *r, uint8_t *bytes) {
  long left = r->blocks % UNIT, start = r->first * left, stop = start + r->count * left;
  for (long unit = start / UNIT; unit * UNIT < stop; unit++) {
    uint64_t codes = unpack_unit(bits, r->rest + unit * bits);
    memcpy(bytes + unit * UNIT - start / UNIT * UNIT, &codes, UNIT);
  }
  return bytes + start % UNIT;
}

// The two lowest bits of up to 64 codes of `bits` bits, side by side; the upper one of codes of one bit is 0.
INLINE void lowest_bits(const int bits, const uint8_t *units, uint64_t out[2]) {
  const long_word *p = (const long_word *)units;
  const uint64_t even = 0x5555555555555555ull, nibble = 0x3333333333333333ull;
  if (bits == 1) {
    out[0] = scatter_bits(p[0] & 0xffffffff, even), out[1] = scatter_bits(p[0] >> 32, even);
  } else if (bits == 2) {
    out[0] = p[0], out[1] = p[1];
  } else if (bits == 3) {  // two bytes of every three
    uint64_t a = gather_bits(p[0], 0xffff00ffff00ffffull), b = gather_bits(p[1], 0xff00ffff00ffff00ull);
    uint64_t c = gather_bits(p[2], 0x00ffff00ffff00ffull);
    out[0] = a | b << 48, out[1] = b >> 16 | c << 24;
  } else {
    out[0] = gather_bits(p[0], nibble) | gather_bits(p[1], nibble) << 32;
    out[1] = gather_bits(p[2], nibble) | gather_bits(p[3], nibble) << 32;
  }
}

// Path rows of coefficients [start, stop) of all those of one width, `start` a multiple of 8.
INLINE void lay_paths(const int bits, const Coefficients *r, long start, long stop, uint64_t (*out)[2]) {
  const int blocks = r->blocks, left = blocks % UNIT;
  const long bytes = r->stride, all = r->count;
  uint64_t held[2], codes[UNIT + 1] = {0};
  for (int i = 0, n = blocks - left; i < 2; i++, n -= 32) held[i] = n >= 32 ? ~0ull : n > 0 ? (1ull << 2 * n) - 1 : 0;
  if (blocks == BLOCKS) {
    for (long c = start; c < stop; c++) {
      const uint8_t *p = r->units + c * UNIT * bits;
      __builtin_prefetch(p + 2048, 0, 3);  // past the end of a page, where the processor's own stop
      lowest_bits(bits, p, out[c]);
    }
    return;
  }
  for (long c = start; c < stop; c++) {
    const uint8_t *p = r->units + c * bytes;
    uint8_t end[UNIT * 4] = {0};
    if (c * bytes + UNIT * bits > all * bytes) p = memcpy(end, p, bytes);
    lowest_bits(bits, p, out[c]);
    out[c][0] &= held[0], out[c][1] &= held[1];
    if (!left) continue;
    if (c % UNIT == 0)  // eight coefficients wait in whole units
      for (long i = 0, n = (all * left + UNIT - 1) / UNIT - c / UNIT * left; i < left && i < n; i++)
        codes[i] = unpack_unit(bits, r->rest + (c / UNIT * left + i) * bits);
    uint64_t waiting = *(long_word *)((uint8_t *)codes + c % UNIT * left) & ((1ull << 8 * left) - 1);
    out[c][blocks / 32] |= gather_bits(waiting, 0x0303030303030303ull) << blocks / UNIT % 4 * 16;
  }
}

// Indices of levels of eight codes, one in a byte: path rows `x`, the sum of three, and `second` are of the same unit.
INLINE uint64_t indices(uint64_t codes, const uint8_t *x, const uint8_t *second) {
  const uint64_t ones = 0x0101010101010101ull;
  return (codes & ~ones) << 1 | (unpack_unit(2, x) & ones) << 1 | (unpack_unit(2, second) & ones);
}

INLINE const uint8_t *path_row(const Coefficients *r, const int i, int c) {
  return r->paths + (long)r->before[i][c] * PATH_ROW;
}

// The sum modulo 2 of the path bits of a coefficient, of the third and of the fifth before it, in every other bit.
INLINE void add_paths(const Coefficients *r, int c, uint64_t sum[2]) {
  const long_word *own = (const long_word *)(r->paths + (r->path + c) * PATH_ROW);
  const long_word *third = (const long_word *)path_row(r, 1, c), *fifth = (const long_word *)path_row(r, 2, c);
  for (int i = 0; i < 2; i++) sum[i] = own[i] ^ third[i] ^ fifth[i];
}

#if USE_AVX512
typedef struct {
  uint64_t words[4] __attribute__((aligned(32)));
} Labels;

// Up to 3 bits: a nibble for every code, of the upper bit of its label, of its second bit, and of the lower bit of its label;
// those of vector v are word v, even codes in its lower half. 4 bits: what the path bits of others add to the upper bit
// of every label (words 0, 1 as bits of 64 codes), and the lower bits of all labels.
INLINE void prepare(const int bits, const Coefficients *r, int c, Labels *l) {
  const long_word *second = (const long_word *)path_row(r, 0, c);
  const long_word *third = (const long_word *)path_row(r, 1, c), *fifth = (const long_word *)path_row(r, 2, c);
  if (bits == 4) {
    const uint64_t even = 0x5555555555555555ull;
    l->words[0] = _pext_u64(third[0] ^ fifth[0], even) | _pext_u64(third[1] ^ fifth[1], even) << 32;
    l->words[1] = _pext_u64(second[0], even) | _pext_u64(second[1], even) << 32;
    return;
  }
  const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  const __m256i odd = _mm256_set_epi32(2, 0, 2, 0, 2, 0, 2, 0), even = _mm256_set_epi32(0, 2, 0, 2, 0, 2, 0, 2);
  __m128i own = _mm_load_si128((const __m128i *)(r->paths + (r->path + c) * PATH_ROW));
  __m128i others = _mm_ternarylogic_epi32(_mm_load_si128((const __m128i *)third), _mm_load_si128((const __m128i *)fifth),
                                          _mm_set1_epi8(0x55), 0x28);  // (a ^ b) & c
  __m256i low = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_xor_si128(own, others)), twice);
  __m256i high = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)second), twice);
  low = _mm256_srlv_epi32(low, odd), high = _mm256_sllv_epi32(high, even);
  __m256i nibbles = _mm256_ternarylogic_epi32(_mm256_set1_epi8(0x33), low, high, 0xca);  // a ? b : c
  _mm256_store_si256((__m256i *)l->words, nibbles);
  __asm__("" : "+m"(l->words));  // broadcasts from memory cost no shuffle
}

// `levels` as `decode_coupled` reads them: by nibble, and for its third bit or the lower bit of its label.
INLINE Levels arrange_coupled(const int bits, const float *levels) {
  Levels l = {.levels = levels};
  __m512 low = _mm512_loadu_ps(levels), high = _mm512_loadu_ps(levels + LANES);
  if (bits == 4) {  // labels of 0 and 2
    __m512i i = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    l.t[0] = _mm512_permutex2var_ps(low, i, high);
    l.t[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(i, _mm512_set1_epi32(1)), high);
    return l;
  }
  __m512i i = _mm512_set_epi32(7, 5, 3, 1, 6, 4, 2, 0, 7, 5, 3, 1, 6, 4, 2, 0);
  if (bits == 1) i = _mm512_set_epi32(3, 1, 3, 1, 2, 0, 2, 0, 3, 1, 3, 1, 2, 0, 2, 0);
  l.t[0] = _mm512_permutexvar_ps(i, low);
  l.t[1] = _mm512_permutexvar_ps(_mm512_add_epi32(i, _mm512_set1_epi32(8)), low);
  return l;
}

// Levels of the codes of vector v of a coefficient, whose units begin at `p`.
INLINE vec decode_coupled(const int bits, const Levels *l, const Labels *labels, const uint8_t *p, int v) {
  if (bits == 4) {
    __mmask16 flip = ((const half_word *)labels->words)[v], odd = ((const half_word *)labels->words)[4 + v];
    __m512i i = nibbles(p + v * 8, p + v * 8 + 4);
    i = _mm512_mask_xor_epi32(i, flip, i, _mm512_set1_epi32(1));
    return (vec)_mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(i, l->t[0]), odd, i, l->t[1]);
  }
  const __m512i shifts = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
  __m512i i = _mm512_srlv_epi32(_mm512_set1_epi64(labels->words[v]), shifts);
  __m512 y = _mm512_permutexvar_ps(i, l->t[0]);
  if (bits == 3) y = _mm512_mask_permutexvar_ps(y, p[v * 6 + 2] | p[v * 6 + 5] << 8, i, l->t[1]);
  return (vec)y;
}
#else
typedef struct {
  uint64_t sum[2];
  const uint8_t *second;
} Labels;

INLINE void prepare(const int bits, const Coefficients *r, int c, Labels *l) {
  (void)bits;
  add_paths(r, c, l->sum);
  l->second = path_row(r, 0, c);
}

INLINE Levels arrange_coupled(const int bits, const float *levels) { return arrange(bits + 1, levels); }

INLINE vec decode_coupled(const int bits, const Levels *l, const Labels *labels, const uint8_t *p, int v) {
  uint64_t codes = unpack_unit(bits, p + v * bits);
  return decode_bytes(bits + 1, l, indices(codes, (const uint8_t *)labels->sum + 2 * v, labels->second + 2 * v), 0);
}
#endif

INLINE vec decode_vector(const int bits, const int coupled, const Levels *l, const Labels *labels, const uint8_t *p, int v) {
  return coupled ? decode_coupled(bits, l, labels, p, v) : decode(bits, l, p + v * (LANES / UNIT) * bits);
}

// sums[m][v] += q[c][m] y[c][v] over coefficients.
INLINE void score_vectors(const int bits, const int coupled, const int m_rows, const int vectors, const Coefficients *r,
                          int vector, const Levels *given, const v4 *q, vec sums[QUERY_ROWS][VECTORS]) {
  const Levels l = *given;
  vec acc[QUERY_ROWS][VECTORS];
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) acc[m][v] = sums[m][vector + v];
  const uint8_t *p = r->units;
  Labels labels[AHEAD];
  for (int c = 0; coupled && c < AHEAD && c < r->count; c++) prepare(bits, r, c, labels + c);
  for (int c = 0; c < r->count; c++, p += r->stride, q++) {
    vec y[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) y[v] = decode_vector(bits, coupled, &l, labels + c % AHEAD, p, vector + v);
    if (coupled && c + AHEAD < r->count) prepare(bits, r, c + AHEAD, labels + c % AHEAD);
#pragma GCC unroll 4
    for (int m = 0; m < m_rows; m++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) acc[m][v] += (*q)[m] * y[v];
  }
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) sums[m][vector + v] = acc[m][v];
}

// pooled[component][m] += scale w[m][v] . y[c][v] over coefficients, as `reduce` leaves them.
INLINE void pool_vectors(const int bits, const int coupled, const int m_rows, const int vectors, const Coefficients *r,
                         int vector, const Levels *given, const float *scale, const uint16_t *component,
                         vec weights[QUERY_ROWS][VECTORS], vec *pooled) {
  const Levels l = *given;
  vec w[QUERY_ROWS][VECTORS];
  for (int m = 0; m < m_rows; m++)
    for (int v = 0; v < vectors; v++) w[m][v] = weights[m][vector + v];
  const uint8_t *p = r->units;
  Labels labels[AHEAD];
  for (int c = 0; coupled && c < AHEAD && c < r->count; c++) prepare(bits, r, c, labels + c);
  for (int c = 0; c < r->count; c++, p += r->stride) {
    vec dot[QUERY_ROWS] = {{0}};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      vec y = decode_vector(bits, coupled, &l, labels + c % AHEAD, p, vector + v);
#pragma GCC unroll 4
      for (int m = 0; m < m_rows; m++) dot[m] += w[m][v] * y;
    }
    if (coupled && c + AHEAD < r->count) prepare(bits, r, c + AHEAD, labels + c % AHEAD);
    pooled[component[c]] += scale[c] * reduce(dot[0], dot[1], dot[2], dot[3]);
  }
}

// The vector that is not made of whole units alone: an odd unit where a vector takes two, and what waits for its unit.
INLINE vec decode_tail(const int bits, const int coupled, const Levels *l, const Coefficients *r, int c,
                       const uint8_t *rest) {
  int units = r->blocks / UNIT, left = r->blocks % UNIT, odd = units % (LANES / UNIT);
  uint64_t first = odd ? unpack_unit(bits, r->units + c * r->stride + (units - 1) * bits) : 0, second = 0;
  if (left) memcpy(&second, rest + (long)c * left, UNIT);  // more than `left` are read, and weigh nothing
  if (!odd) first = second;
  if (!coupled) return decode_bytes(bits, l, first, second);
  uint64_t sum[2];
  add_paths(r, c, sum);
  const uint8_t *x = (const uint8_t *)sum + 2 * (units - odd), *y = path_row(r, 0, c) + 2 * (units - odd);
  return decode_bytes(bits + 1, l, indices(first, x, y), units - odd < 7 ? indices(second, x + 2, y + 2) : 0);
}

INLINE void score_tail(const int bits, const int coupled, const int m_rows, const Coefficients *r, const Levels *l,
                       const v4 *q, uint8_t *bytes, vec sums[QUERY_ROWS][VECTORS]) {
  const uint8_t *rest = unpack_rest(bits, r, bytes);
  int vector = r->blocks / LANES;
  for (int c = 0; c < r->count; c++, q++) {
    vec y = decode_tail(bits, coupled, l, r, c, rest);
    for (int m = 0; m < m_rows; m++) sums[m][vector] += (*q)[m] * y;
  }
}

INLINE void pool_tail(const int bits, const int coupled, const int m_rows, const Coefficients *r, const Levels *l,
                      const float *scale, const uint16_t *component, uint8_t *bytes, vec weights[QUERY_ROWS][VECTORS],
                      vec *pooled) {
  const uint8_t *rest = unpack_rest(bits, r, bytes);
  int vector = r->blocks / LANES;
  for (int c = 0; c < r->count; c++) {
    vec y = decode_tail(bits, coupled, l, r, c, rest), dot[QUERY_ROWS] = {{0}};
    for (int m = 0; m < m_rows; m++) dot[m] = weights[m][vector] * y;
    pooled[component[c]] += scale[c] * reduce(dot[0], dot[1], dot[2], dot[3]);
  }
}

// Vectors of a coefficient that are decoded from its own units, or from its labels alone.
INLINE int whole_vectors(const int bits, const int coupled, int blocks) {
  (void)bits, (void)coupled;
#if USE_AVX512
  if (coupled && bits <= 2) return VECTORS;
#endif
  return blocks / LANES;
}

INLINE void score(const int bits, const int coupled, const int m_rows, const Coefficients *r, const float *levels,
                  const v4 *q, uint8_t *bytes, vec sums[QUERY_ROWS][VECTORS]) {
  const Levels l = coupled ? arrange_coupled(bits, levels) : arrange(bits, levels);
  int whole = whole_vectors(bits, coupled, r->blocks), v = 0;
  for (; v + AT_ONCE <= whole; v += AT_ONCE) score_vectors(bits, coupled, m_rows, AT_ONCE, r, v, &l, q, sums);
  if (coupled && AT_ONCE == 4 && v + 2 <= whole) {  // so that labels are made once
    if (v + 3 == whole) score_vectors(bits, coupled, m_rows, 3, r, v, &l, q, sums);
    else score_vectors(bits, coupled, m_rows, 2, r, v, &l, q, sums);
    v = whole;
  }
  for (; v < whole; v++) score_vectors(bits, coupled, m_rows, 1, r, v, &l, q, sums);
  if (v * LANES < r->blocks) score_tail(bits, coupled, m_rows, r, &l, q, bytes, sums);
}

INLINE void pool(const int bits, const int coupled, const int m_rows, const Coefficients *r, const float *levels,
                 const float *scale, const uint16_t *component, uint8_t *bytes, vec weights[QUERY_ROWS][VECTORS],
                 vec *pooled)
                 {
  const Levels l = coupled ? arrange_coupled(bits, levels) : arrange(bits, levels);
  int whole = whole_vectors(bits, coupled, r->blocks), v = 0;
  for (; v + AT_ONCE <= whole; v += AT_ONCE)
    pool_vectors(bits, coupled, m_rows, AT_ONCE, r, v, &l, scale, component, weights, pooled);
  if (coupled && AT_ONCE == 4 && v + 2 <= whole) {
    if (v + 3 == whole) pool_vectors(bits, coupled, m_rows, 3, r, v, &l, scale, component, weights, pooled);
    else pool_vectors(bits, coupled, m_rows, 2, r, v, &l, scale, component, weights, pooled);
    v = whole;
  }
  for (; v < whole; v++) pool_vectors(bits, coupled, m_rows, 1, r, v, &l, scale, component, weights, pooled);
  if (v * LANES < r->blocks) pool_tail(bits, coupled, m_rows, r, &l, scale, component, bytes, weights, pooled);
}

// One body for every width and number of query rows, so that both are constants in it.
#define BODY(bits, coupled, m_rows)                                                                                   \
  static void score_##bits##_##coupled##_##m_rows(const Coefficients *r, const float *levels, const v4 *q, uint8_t *bytes, \
                                                  vec sums[QUERY_ROWS][VECTORS]) {                                    \
    score(bits, coupled, m_rows, r, levels, q, bytes, sums);                                                          \
  }                                                                                                                   \
  static void pool_##bits##_##coupled##_##m_rows(const Coefficients *r, const float *levels, const float *scale,      \
                                                 const uint16_t *component, uint8_t *bytes,                           \
                                                 vec weights[QUERY_ROWS][VECTORS], vec *pooled) {                     \
    pool(bits, coupled, m_rows, r, levels, scale, component, bytes, weights, pooled);                                 \
  }
#define BODIES(bits, coupled) BODY(bits, coupled, 1) BODY(bits, coupled, 2) BODY(bits, coupled, 3) BODY(bits, coupled, 4)
BODIES(1, 0) BODIES(2, 0) BODIES(3, 0) BODIES(4, 0) BODIES(5, 0) BODIES(6, 0) BODIES(8, 0)
BODIES(1, 1) BODIES(2, 1) BODIES(3, 1) BODIES(4, 1)

typedef void (*Score)(const Coefficients *, const float *, const v4 *, uint8_t *, vec[QUERY_ROWS][VECTORS]);
typedef void (*Pool)(const Coefficients *, const float *, const float *, const uint16_t *, uint8_t *,
                     vec[QUERY_ROWS][VECTORS], vec *);
#define EACH(name, bits, coupled) \
  {name##_##bits##_##coupled##_1, name##_##bits##_##coupled##_2, name##_##bits##_##coupled##_3, name##_##bits##_##coupled##_4}
#define NONE {0, 0, 0, 0}
#define LOW(name, coupled) EACH(name, 1, coupled), EACH(name, 2, coupled), EACH(name, 3, coupled), EACH(name, 4, coupled)
#define TABLE(name)                                                                             \
  {                                                                                             \
    {NONE, LOW(name, 0), EACH(name, 5, 0), EACH(name, 6, 0), NONE, EACH(name, 8, 0)}, { NONE, LOW(name, 1) } \
  }
static const Score score_table[2][9][QUERY_ROWS] = TABLE(score);
static const Pool pool_table[2][9][QUERY_ROWS] = TABLE(pool);

// Query rows of one KV head on the basis of its keys, times the softmax's scale; logits are to the base 2.
typedef struct {
  const float *latent;  // [query_rows][rank]
  const float *offset;  // [query_rows]: the part of the mean
} Projected;

typedef struct {
  float *pooled;  // [query_rows][rank], or [query_rows][dim] for exact tokens: sum of exp(s - top) v
  float *top;     // [query_rows]
  float *total;   // [query_rows]: sum of exp(s - top)
} Partial;

static long stored(const Codec *codec, int width) { return codec->first[width][2 * codec->kv_heads * FREQUENCIES]; }

// Coefficients [start, stop) of one width of a chunk that has `paths`.
INLINE Coefficients coefficients_of(const Codec *codec, const Call *call, int chunk, int sequence, int width, long start,
                                    long stop, const uint8_t *paths) {
  int bits = codec->bits[width], blocks = call->blocks[chunk], left = blocks % UNIT;
  long all = stored(codec, width), stride = (long)(blocks / UNIT) * bits, rest = (all * left + UNIT - 1) / UNIT * bits;
  const uint8_t *const *codes = call->codes + ((long)chunk * codec->widths + width) * 2;
  Coefficients r;
  r.units = codes[0] + (sequence * all + start) * stride, r.rest = codes[1] + sequence * rest;
  r.stride = stride, r.first = start, r.count = stop - start, r.blocks = blocks;
  if (width < codec->coupled) {
    r.paths = paths, r.path = codec->path[width] + start;
    for (int i = 0; i < 3; i++) r.before[i] = codec->before[i] + r.path;
  }
  return r;
}

// Of one KV head's keys or values, at one frequency.
INLINE Coefficients coefficients_at(const Codec *codec, const Call *call, int chunk, int sequence, int width, int slot,
                                    const uint8_t *paths) {
  const int32_t *first = codec->first[width];
  return coefficients_of(codec, call, chunk, sequence, width, first[slot], first[slot + 1], paths);
}

static long path_bytes(const Codec *codec) { return ((long)codec->paths * PATH_ROW + 127) / 64 * 64; }

// Fill part `part` of the path rows of a chunk; the last is the row of zeros that stands for none, and is read beyond.
static void lay_part(const Codec *codec, const Call *call, int chunk, int sequence, int part, uint8_t *paths) {
  for (int w = 0; w < codec->coupled; w++) {
    long all = stored(codec, w), step = (all + PARTS * UNIT - 1) / (PARTS * UNIT) * UNIT, start = part * step;
    long stop = start + step < all ? start + step : all;
    Coefficients r = coefficients_of(codec, call, chunk, sequence, w, 0, all, paths);
    uint64_t(*out)[2] = (uint64_t(*)[2])(paths + r.path * PATH_ROW);
    if (codec->bits[w] == 1) lay_paths(1, &r, start, stop, out);
    if (codec->bits[w] == 2) lay_paths(2, &r, start, stop, out);
    if (codec->bits[w] == 3) lay_paths(3, &r, start, stop, out);
    if (codec->bits[w] == 4) lay_paths(4, &r, start, stop, out);
  }
  long laid = (long)codec->paths * PATH_ROW;
  if (part == 0) memset(paths + laid, 0, path_bytes(codec) - laid);
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
  vec spectrum[FREQUENCIES][QUERY_ROWS][VECTORS];
  vec turned[FREQUENCIES * VECTORS], line[FREQUENCIES * VECTORS];
  vec scores[SPAN][QUERY_ROWS][FREQUENCIES * VECTORS];
} Scratch;

// What the codes of every coefficient of a head's keys are multiplied with, in the order in which they are read.
static void scale_queries(const Codec *codec, int head, int from, int m_rows, Projected query, v4 *q) {
  const int rank = codec->rank;
  v4 latent[rank];
  for (int r = 0; r < rank; r++)
    for (int m = 0; m < QUERY_ROWS; m++) latent[r][m] = m < m_rows ? query.latent[(from + m) * rank + r] : 0;
  for (int slot = head * FREQUENCIES; slot < (head + 1) * FREQUENCIES; slot++)
    for (int w = 0; w < codec->widths; w++)
      for (int c = codec->first[w][slot]; c < codec->first[w][slot + 1]; c++)
        *q++ = latent[codec->component[w][c]] * codec->scale[w][c];
}

// Partial softmax of query rows [from, from + m_rows) of one KV head over chunks [start, stop), which have `paths`.
static void attend_chunks(const Codec *codec, const Call *call, int sequence, int head, int start, int stop, int from,
                          int m_rows, Projected query, Partial out, Scratch *s, v4 *q, vec *pooled, uint8_t *bytes,
                          const uint8_t *paths) {
  const int rank = codec->rank;
  const long laid = paths ? path_bytes(codec) : 0;
  scale_queries(codec, head, from, m_rows, query, q);
  vec top[QUERY_ROWS];
  for (int m = 0; m < QUERY_ROWS; m++) top[m] = splat(LOWEST);
  for (int chunk = start; chunk < stop; chunk++) {
    memset(s->spectrum, 0, sizeof s->spectrum);
    const v4 *scaled = q;
    for (int f = 0; f < FREQUENCIES; f++)
      for (int w = 0; w < codec->widths; w++) {
        Coefficients r = coefficients_at(codec, call, chunk, sequence, w, head * FREQUENCIES + f, paths + (chunk -
                                         start) * laid);
        Score score = score_table[w < codec->coupled][codec->bits[w]][m_rows - 1];
        if (r.count) score(&r, codec->levels[w], scaled, bytes, s->spectrum[f]);
        scaled += r.count;
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
  vec total[QUERY_ROWS] = {{0}};
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
        int slot = (codec->kv_heads + head) * FREQUENCIES + f;
        Coefficients r = coefficients_at(codec, call, chunk, sequence, w, slot, paths + (chunk - start) * laid);
        Pool pool = pool_table[w < codec->coupled][codec->bits[w]][m_rows - 1];
        if (r.count)
          pool(&r, codec->levels[w], codec->scale[w] + r.first, codec->component[w] + r.first, bytes, s->spectrum[f], pooled);
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
  const float *queries = call->queries + (long)head * call->query_rows * dim, scale = call->scale * 1.44269504f;
  for (int j = 0; j < exact; j++) {
    const float *key = exact_row(call, call->exact_keys, (long)head * exact + j, dim, buffer);
    for (int m = 0; m < call->query_rows; m++) {
      const float *q = queries + (long)m * dim;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int d = 0; d < dim; d++) dot += q[d] * key[d];
      int seen = exact - call->length + m % call->length + 1;
      scores[(long)m * exact + j] = j < seen ? dot * scale : LOWEST;
    }
  }
  memset(out.pooled, 0, sizeof(float) * call->query_rows * dim);
  for (int m = 0; m < call->query_rows; m++) {
    float *row = scores + (long)m * exact, top = LOWEST, total = 0;
    for (int j = 0; j < exact; j++) top = row[j] > top ? row[j] : top;
    for (int j = 0; j < exact; j++) total += row[j] = row[j] > LOWEST ? exp2f(row[j] - top) : 0;
    out.top[m] = top, out.total[m] = total;
  }
  for (int j = 0; j < exact; j++) {
    const float *value = exact_row(call, call->exact_values, (long)head * exact + j, dim, buffer);
    for (int m = 0; m < call->query_rows; m++) {
      float p = scores[(long)m * exact + j], *sum = out.pooled + (long)m * dim;
#pragma omp simd
      for (int d = 0; d < dim; d++) sum[d] += p * value[d];
    }
  }
}

static void project(const Codec *codec, const Call *call, int head, float *latent, float *offset) {
  const int dim = codec->dim, rank = codec->rank, group = head % codec->kv_heads;
  const float *basis = codec->basis + (long)group * dim * rank, *mean = codec->mean + (long)group * dim;
  const float scale = call->scale * 1.44269504f;
  for (int m = 0; m < call->query_rows; m++, latent += rank) {
    const float *q = call->queries + ((long)head * call->query_rows + m) * dim;
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
  for (int m = 0; m < call->query_rows; m++) {
    float top = LOWEST, total = 0, sealed = 0;
    for (int i = 0; i <= spans; i++) top = parts[i].top[m] > top ? parts[i].top[m] : top;
    memset(sum, 0, sizeof(float) * rank);
    for (int i = 0; i < spans; i++) {
      float weight = exp2f(parts[i].top[m] - top);
      sealed += weight * parts[i].total[m];
#pragma omp simd
      for (int r = 0; r < rank; r++) sum[r] += weight * parts[i].pooled[(long)m * rank + r];
    }
    float weight = exp2f(parts[spans].top[m] - top), *out = call->output + ((long)head * call->query_rows + m) * dim;
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

// One call as its threads see it.
typedef struct {
  const Codec *codec;
  const Call *call;
  int spans, wave;  // partial softmaxes over chunks of a sequence; (sequence, span)s whose path rows there is room for
  long laid;        // bytes of a chunk's path rows, 0 for none
  float *store;     // queries on the basis [batch * kv_heads][query_rows][rank], their offsets, then what `parts` holds
  Partial *parts;   // [batch * kv_heads][spans + 1], the last over exact tokens
  uint8_t *paths;
  long *next;       // items taken of every loop, in their order
  int failed;
} Work;

typedef struct {
  Scratch *scratch;
  vec *pooled;
  v4 *scaled;
  float *buffer;  // [query_rows][exact + rank] and two rows of the wider of rank and dim
  uint8_t *bytes;
} Memory;  // of one thread

static long widest(const Work *w) { return w->codec->rank > w->codec->dim ? w->codec->rank : w->codec->dim; }

static long heads_of(const Work *w) { return (long)w->call->batch * w->codec->kv_heads; }

static float *latent_of(const Work *w, long head) { return w->store + head * w->call->query_rows * w->codec->rank; }

static float *offset_of(const Work *w, long head) { return latent_of(w, heads_of(w)) + head * w->call->query_rows; }

// Item `i` of a wave that starts at (sequence, span) `first`: a part of the path rows of a chunk.
static void lay_item(const Work *w, int first, int i) {
  int pair = first + i / (SPAN * PARTS), sequence = pair / w->spans, at = i / PARTS % SPAN, chunk = pair % w->spans * SPAN + at;
  if (chunk < w->call->chunks) lay_part(w->codec, w->call, chunk, sequence, i % PARTS, w->paths + i / PARTS * w->laid);
}

// Likewise: one KV head of one span.
static void attend_item(const Work *w, const Memory *m, int first, int i) {
  const Codec *codec = w->codec;
  const Call *call = w->call;
  int pair = first + i / codec->kv_heads, sequence = pair / w->spans, span = pair % w->spans, query_rows = call->query_rows;
  long head = (long)sequence * codec->kv_heads + i % codec->kv_heads;
  Projected query = {latent_of(w, head), offset_of(w, head)};
  int stop = (span + 1) * SPAN < call->chunks ? (span + 1) * SPAN : call->chunks;
  for (int from = 0; from < query_rows; from += QUERY_ROWS) {
    const int m_rows = query_rows - from < QUERY_ROWS ? query_rows - from : QUERY_ROWS;
    attend_chunks(codec, call, sequence, i % codec->kv_heads, span * SPAN, stop, from, m_rows, query,
                  w->parts[head * (w->spans + 1) + span], m->scratch, m->scaled, m->pooled, m->bytes,
                  w->laid ? w->paths + (long)(i / codec->kv_heads) * SPAN * w->laid : 0);
  }
}

// All loops of a call, shared with the other threads; a loop that reads what another writes waits for it.
static void run_loops(Work *w, const Memory *m) {
  const Codec *codec = w->codec;
  const Call *call = w->call;
  const long heads = heads_of(w), all = (long)call->batch * w->spans;
  long *next = w->next, i;
  for (; (i = take(next, 1)) < heads;) project(codec, call, i, latent_of(w, i), offset_of(w, i));
  next++, wait_for_all();
  for (long first = 0; first < all; first += w->wave) {
    long held = first + w->wave < all ? w->wave : all - first;
    if (w->laid) {
      if (first) wait_for_all();  // until nobody reads the path rows before
      for (; (i = take(next, 1)) < held * SPAN * PARTS;) lay_item(w, first, i);
      next++, wait_for_all();
    }
    for (; (i = take(next, 1)) < held * codec->kv_heads;) attend_item(w, m, first, i);
    next++;
  }
  float *row = m->buffer + (long)call->query_rows * (call->exact + codec->rank) + widest(w);
  for (; (i = take(next, 1)) < heads;) attend_exact(codec, call, i, w->parts[i * (w->spans + 1) + w->spans], m->buffer, row);
  next++, wait_for_all();
  for (; (i = take(next, 1)) < heads;) merge(codec, call, i, w->spans, w->parts + i * (w->spans + 1), m->buffer);
}

static void attend_on_thread(void *data) {
  Work *w = data;
  const long rank = w->codec->rank, query_rows = w->call->query_rows;
  Memory m = {
      allocate(sizeof *m.scratch),
      allocate(sizeof *m.pooled * rank),
      allocate(sizeof *m.scaled * rank * FREQUENCIES),
      allocate(sizeof(float) * (query_rows * (w->call->exact + rank) + 2 * widest(w))),
      allocate(rank * UNIT + 4 * UNIT),
  };
  if (!m.scratch || !m.pooled || !m.scaled || !m.buffer || !m.bytes) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
  wait_for_all();
  if (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) run_loops(w, &m);
  free(m.scratch), free(m.pooled), free(m.scaled), free(m.buffer), free(m.bytes);
}

// Returns 0, or 1 when memory is short.
int spectralkv_attend(const Codec *codec, const Call *call) {
  Work w = {codec, call, .spans = (call->chunks + SPAN - 1) / SPAN};
  const long heads = heads_of(&w), query_rows = call->query_rows, items = w.spans + 1, all = (long)call->batch * w.spans;
  const long enough = (WAVE * call->threads + codec->kv_heads - 1) / codec->kv_heads;
  const long partial = query_rows * (widest(&w) + 2), queries = heads * query_rows * (codec->rank + 1);
  w.wave = codec->coupled && enough < all ? enough : all;
  w.laid = codec->coupled ? path_bytes(codec) : 0;
  const size_t loops = 3 + 2 * (w.wave ? (all + w.wave - 1) / w.wave : 0);
  w.store = allocate(sizeof(float) * (queries + heads * items * partial));
  w.parts = allocate(sizeof(Partial) * heads * items);
  w.paths = w.laid ? allocate((size_t)w.wave * SPAN * w.laid) : 0;
  w.next = calloc(loops, sizeof *w.next);
  w.failed = !w.store || !w.parts || !w.next || (w.laid && !w.paths);
  for (long i = 0; i < heads * items && !w.failed; i++) {
    float *at = w.store + queries + i * partial;
    w.parts[i] = (Partial){at + 2 * query_rows, at, at + query_rows};
  }
  if (!w.failed) in_parallel(attend_on_thread, &w, call->threads);
  free(w.store), free(w.parts), free(w.paths), free(w.next);
  return w.failed;
}
