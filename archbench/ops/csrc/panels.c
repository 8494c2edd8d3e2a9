/* Products of a few rows with matrices that lie in panels, and the row operations around them, for decode kernels, which
 * include this file. All of it is static; lanes.c comes along.
 *
 * A matrix W (n_out, n_in) is cut into panels of PANEL output columns: panel p holds, for each input k in turn, the PANEL
 * weights W[p * PANEL ..][k], zeros beyond n_out. So a product reads the whole matrix once, front to back, however many
 * of up to ROWS rows it has; more rows go through a panel while it lies in cache.
 *
 * Every output is one chain of multiply-adds over k = 0 .. n_in - 1 in a lane of its own, whatever the number of rows:
 * a row's results do not depend, to the last bit, on which other rows are computed beside it.
 *
 * fp32 or bf16 weights, fp32 rows and sums. A bf16 panel row is made of 32-bit words that hold a weight of one vector of
 * columns in the low half and its neighbour of the next vector in the high half; both become fp32 by one instruction.
 */
#include "lanes.c"

#include <math.h>

#define PANEL 32
#define PAIR (2 * LANES)        /* columns that are worked on together */
#define PAIRS (PANEL / PAIR)    /* such pairs of vectors in a panel */

#if LANES == 16 || defined(__aarch64__)
#define ROWS 12 /* 24 sums, 32 vector registers */
#define SUMS 8  /* rows times panels taken at once, where there is a choice */
#else
#define ROWS 4
#define SUMS 4
#endif

#define AHEAD 32          /* inputs */
#define FAR (512 << 10)   /* bytes of a matrix from which on it is asked for ahead */

struct panels {
  const void *p;
  int64_t n_out, n_in, half; /* half: bf16, else fp32 */
};

/* Two vectors of weights: columns `pair` of input k in the panel at p. */
INLINE void two_weights(const void *p, const int half, ptrdiff_t k, ptrdiff_t pair, vf *low, vf *high) {
  if (half) {
    vi both;
    memcpy(&both, (const uint16_t *)p + k * PANEL + pair * PAIR, sizeof both);
    *low = (vf)(both << 16);
    *high = (vf)(both & (int32_t)0xffff0000);
  } else {
    const float *from = (const float *)p + k * PANEL + pair * PAIR;
    memcpy(low, from, sizeof *low);
    memcpy(high, from + LANES, sizeof *high);
  }
}

INLINE const void *panel_at(const struct panels *w, const int half, ptrdiff_t panel) {
  return (const char *)w->p + panel * w->n_in * PANEL * (half ? 2 : 4);
}

/* y = x W^T for m rows; rows of x and y begin x_row and y_row floats apart. `add` adds to what is in y. */
void archbench_product(const struct panels *w, const float *x, ptrdiff_t x_row, ptrdiff_t m, float *y, ptrdiff_t y_row,
                       int add);
#define product archbench_product

#if defined(PRODUCT_HERE) /* one unit of the library compiles it */

/* Sums go out, of which the first `left` are columns of the matrix; `add` adds them to what is there. */
static __attribute__((noinline)) void put(float *to, vf sum, ptrdiff_t left, int add) {
  if (left > 0) store(to, add ? sum + load(to, left) : sum, left);
}

/* `rows` rows times `count` panels from `panel` on, of each the columns of one pair. rows * count <= 12. `far` asks for
 * weights ahead of their use: with several rows the processor's own guesses come too late for a large matrix. */
INLINE void tile(const int rows, const int count, const int half, const int far, const struct panels *w, ptrdiff_t panel,
                 ptrdiff_t pair, const float *x, ptrdiff_t x_row, float *y, ptrdiff_t y_row, int add) {
  vf low[12] = {{0}}, high[12] = {{0}};
  const void *from[4];
  UNROLL
  for (int c = 0; c < count; c++) from[c] = panel_at(w, half, panel + c);
  const ptrdiff_t n_in = w->n_in;
  for (ptrdiff_t k = 0; k < n_in; k++) {
    vf a[4], b[4];
    if (far) {
      UNROLL
      for (int c = 0; c < count; c++) {
        const char *ahead = (const char *)from[c] + (k + AHEAD) * PANEL * (half ? 2 : 4);
        __builtin_prefetch(ahead);
        if (!half) __builtin_prefetch(ahead + 64);
      }
    }
    UNROLL
    for (int c = 0; c < count; c++) two_weights(from[c], half, k, pair, &a[c], &b[c]);
    UNROLL
    for (int r = 0; r < rows; r++) {
      const vf s = splat(x[r * x_row + k]);
      UNROLL
      for (int c = 0; c < count; c++) {
        low[r * count + c] += a[c] * s;
        high[r * count + c] += b[c] * s;
      }
    }
  }
  UNROLL
  for (int r = 0; r < rows; r++)
    UNROLL
    for (int c = 0; c < count; c++) {
      const ptrdiff_t column = (panel + c) * PANEL + pair * PAIR, left = w->n_out - column;
      put(y + r * y_row + column, low[r * count + c], left, add);
      put(y + r * y_row + column + LANES, high[r * count + c], left - LANES, add);
    }
}

/* Panels taken at once with so many rows, of `left` ones: enough sums to keep the multipliers busy, few enough for the
 * registers. */
INLINE int beside(ptrdiff_t rows, ptrdiff_t left) {
  const int most = rows == 1 ? 4 : rows == 2 ? SUMS / 2 : rows <= SUMS / 2 ? SUMS / 4 : 1;
  return left >= most ? most : left >= 2 ? 2 : 1;
}

INLINE void product_of(const int half, const struct panels *w, const float *x, ptrdiff_t x_row, ptrdiff_t m, float *y,
                       ptrdiff_t y_row, int add) {
  const ptrdiff_t n_panels = (w->n_out + PANEL - 1) / PANEL;
  const int far = w->n_out * w->n_in * (half ? 2 : 4) >= FAR;
  ptrdiff_t count;
  for (ptrdiff_t panel = 0; panel < n_panels; panel += count) {
    count = beside(m, n_panels - panel);
    for (ptrdiff_t r = 0; r < m; r += ROWS)
      for (ptrdiff_t pair = 0; pair < PAIRS; pair++) {
        const float *from = x + r * x_row;
        float *to = y + r * y_row;
#define TILE(R, C, F) tile(R, C, half, F, w, panel, pair, from, x_row, to, y_row, add)
        switch (at_most(ROWS, m - r) * 8 + count) {
          case 1 * 8 + 1: TILE(1, 1, 0); break;
          case 1 * 8 + 2: TILE(1, 2, 0); break;
          case 1 * 8 + 4: TILE(1, 4, 0); break;
          case 2 * 8 + 1: TILE(2, 1, 0); break;
          case 2 * 8 + 2: TILE(2, 2, 0); break;
          case 3 * 8 + 1: TILE(3, 1, 0); break;
          case 4 * 8 + 1: TILE(4, 1, 0); break;
#if ROWS == 12
          case 2 * 8 + 4: TILE(2, 4, 0); break;
          case 3 * 8 + 2: far ? TILE(3, 2, 1) : TILE(3, 2, 0); break;
          case 4 * 8 + 2: far ? TILE(4, 2, 1) : TILE(4, 2, 0); break;
          case 5 * 8 + 1: TILE(5, 1, 1); break;
          case 6 * 8 + 1: TILE(6, 1, 1); break;
          case 7 * 8 + 1: TILE(7, 1, 1); break;
          case 8 * 8 + 1: TILE(8, 1, 1); break;
          case 9 * 8 + 1: TILE(9, 1, 1); break;
          case 10 * 8 + 1: TILE(10, 1, 1); break;
          case 11 * 8 + 1: TILE(11, 1, 1); break;
          case 12 * 8 + 1: TILE(12, 1, 1); break;
#endif
        }
#undef TILE
        (void)far;
      }
  }
}

void product(const struct panels *w, const float *x, ptrdiff_t x_row, ptrdiff_t m, float *y, ptrdiff_t y_row, int add) {
  if (w->half)
    product_of(1, w, x, x_row, m, y, y_row, add);
  else
    product_of(0, w, x, x_row, m, y, y_row, add);
}

#endif

/* y = x / sqrt(mean(x^2) + eps) * gain, over d numbers. */
static void rms_norm(const float *x, const float *gain, float eps, ptrdiff_t d, float *y) {
  vf sum = {0};
  for (ptrdiff_t i = 0; i < d; i += LANES) {
    const vf v = load(x + i, d - i);
    sum += v * v;
  }
  const float scale = 1.0f / sqrtf(total(sum) / (float)d + eps);
  for (ptrdiff_t i = 0; i < d; i += LANES) store(y + i, load(x + i, d - i) * scale * load(gain + i, d - i), d - i);
}

INLINE vf siluv(vf x) { return x * logistic(x, exp_minus_abs(x)); }

/* y = silu(gate) * up, over n numbers; y may be gate. */
static void silu_times(const float *gate, const float *up, ptrdiff_t n, float *y) {
  for (ptrdiff_t i = 0; i < n; i += LANES) store(y + i, siluv(load(gate + i, n - i)) * load(up + i, n - i), n - i);
}
