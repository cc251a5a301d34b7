// Rounding in time, rounding.round_in_time, on the CPU: the codes of one block of one group at a time.
//
// flags: -ffp-contract=off
// Without multiply-add, codes are the same to the bit on every processor.

#include "threads.h"
#include "vectors.h"

#define CELLS 256  // per standard deviation, quantizer.CELLS
#define REACH 16   // standard deviations to either side, quantizer.REACH
#define SPAN (2 * REACH * CELLS)
#define LEVELS 256
#define LINES (FREQUENCIES / LANES)  // vectors of one row of a matrix over frequencies

typedef struct {
  int32_t batch, groups, blocks, rank, threads;
  const float *z, *weights;  // [batch][groups][blocks][FREQUENCIES][rank], without [rank]
  const float *gain;         // [groups][FREQUENCIES][rank]
  const int32_t *slots;      // [groups][FREQUENCIES][rank]: number of the row's width
  const float *time;         // [frequency][token]
  const uint8_t *codes;      // [widths][SPAN]: code of every cell
  const float *levels;       // [widths][LEVELS]
  uint8_t *output;           // as z
} Rounding;

// Codes of the values `at`; returns what their levels leave of z.
INLINE vec quantize(const Rounding *c, vec z, vec at, const int32_t *slot, uint8_t *code) {
  vec x = larger(at, splat(-REACH));
  x = -larger(-x, splat(-REACH));
  ivec cell = __builtin_convertvector(x * CELLS + REACH * CELLS, ivec);
  cell -= (cell == SPAN) & 1;
  vec level;
  for (int i = 0; i < LANES; i++) {
    code[i] = c->codes[slot[i] * SPAN + cell[i]];
    level[i] = c->levels[slot[i] * LEVELS + code[i]];
  }
  return z - level;
}

// `LANES` components of a block; rows are `stride` apart. `metric` [f][g] is F diag(w) F' over its diagonal.
INLINE void round_lanes(const Rounding *c, const float *z, const float *gain, const int32_t *slots, long stride,
                        const float metric[FREQUENCIES][FREQUENCIES], uint8_t *output) {
  vec error[FREQUENCIES];
  for (int f = 0; f < FREQUENCIES; f++) {
    vec x = load(z + f * stride);
    error[f] = quantize(c, x, x, slots + f * stride, output + f * stride) * load(gain + f * stride);
  }
  for (int f = 0; f < FREQUENCIES; f++) {
    vec others = {0}, x = load(z + f * stride), g = load(gain + f * stride);
    for (int j = 0; j < FREQUENCIES; j++) others += metric[f][j] * error[j];
    vec target = x + (others - error[f]) / g;
    error[f] = quantize(c, x, target, slots + f * stride, output + f * stride) * g;
  }
}

// The last components of a block, fewer than `LANES`: through copies that are long enough.
static void round_rest(const Rounding *c, const float *z, const float *gain, const int32_t *slots, int count,
                       const float metric[FREQUENCIES][FREQUENCIES], uint8_t *output) {
  float some_z[FREQUENCIES * LANES] = {0}, some_gain[FREQUENCIES * LANES];
  int32_t some_slots[FREQUENCIES * LANES] = {0};
  uint8_t codes[FREQUENCIES * LANES];
  for (int i = 0; i < FREQUENCIES * LANES; i++) some_gain[i] = 1;
  for (long f = 0; f < FREQUENCIES; f++) {
    memcpy(some_z + f * LANES, z + f * c->rank, sizeof(float) * count);
    memcpy(some_gain + f * LANES, gain + f * c->rank, sizeof(float) * count);
    memcpy(some_slots + f * LANES, slots + f * c->rank, sizeof(int32_t) * count);
  }
  round_lanes(c, some_z, some_gain, some_slots, LANES, metric, codes);
  for (long f = 0; f < FREQUENCIES; f++) memcpy(output + f * c->rank, codes + f * LANES, count);
}

#define BLOCKS 16  // that a thread takes at a time

typedef struct {
  const Rounding *call;
  float turned[FREQUENCIES][FREQUENCIES];  // [token][frequency]
  long next;                               // block that nobody has taken
} Work;

static void round_block(const Rounding *c, const float turned[FREQUENCIES][FREQUENCIES], long n) {
  const long block = (long)FREQUENCIES * c->rank;
  const float *z = c->z + n * block, *gain = c->gain + n / c->blocks % c->groups * block, *w = c->weights + n * FREQUENCIES;
  const int32_t *slots = c->slots + n / c->blocks % c->groups * block;
  uint8_t *output = c->output + n * block;
  float metric[FREQUENCIES][FREQUENCIES];
  for (int f = 0; f < FREQUENCIES; f++)
    for (int v = 0; v < LINES; v++) {
      vec line = {0};
      for (int t = 0; t < FREQUENCIES; t++) line += turned[t][f] * w[t] * load(&turned[t][v * LANES]);
      memcpy(&metric[f][v * LANES], &line, sizeof line);
    }
  for (int f = 0; f < FREQUENCIES; f++) {
    const float diagonal = metric[f][f];
    for (int j = 0; j < FREQUENCIES; j++) metric[f][j] /= diagonal;
  }
  int r = 0;
  for (; r + LANES <= c->rank; r += LANES) round_lanes(c, z + r, gain + r, slots + r, c->rank, metric, output + r);
  if (r < c->rank) round_rest(c, z + r, gain + r, slots + r, c->rank - r, metric, output + r);
}

static void round_blocks(void *data) {
  Work *work = data;
  const long all = (long)work->call->batch * work->call->groups * work->call->blocks;
  for (long first; (first = take(&work->next, BLOCKS)) < all;)
    for (long n = first; n < first + BLOCKS && n < all; n++) round_block(work->call, work->turned, n);
}

void spectralkv_round(const Rounding *c) {
  Work work = {.call = c};
  for (int f = 0; f < FREQUENCIES; f++)
    for (int t = 0; t < FREQUENCIES; t++) work.turned[t][f] = c->time[f * FREQUENCIES + t];
  in_parallel(round_blocks, &work, c->threads);
}
