// Vectors of the processor that this is compiled for, by the compiler's own vector types.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// variants.py says the same
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__BMI2__)
#include <immintrin.h>
#define USE_AVX512 1
#define LANES 16
#else
#if defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__)
#include <immintrin.h>
#define USE_AVX2 1
#endif
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define FREQUENCIES 16  // tokens of a time block; transform.time_matrix

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec loose_vec __attribute__((may_alias, aligned(4)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load(const float *x) { return *(const loose_vec *)x; }

INLINE vec larger(vec a, vec b) {
#ifdef USE_AVX512
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif USE_AVX2
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  ivec take = a > b;
  return (vec)(((ivec)a & take) | ((ivec)b & ~take));
#endif
}
