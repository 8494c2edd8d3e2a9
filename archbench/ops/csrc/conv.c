/* Depthwise causal convolution followed by silu, forward and backward, computed in fp32.
 *
 *   pre[t] = bias + sum_j weight[j] x[t - W + 1 + j]       y = silu(pre)
 *
 * with x before the first token taken from the window, or 0. One job is one batch row and one group of GROUP channels;
 * tokens are the outer loop and channels the inner one, so every row streams once and its W - 1 predecessors are in cache.
 * Backward runs in reverse time with a ring of the last W gradients of `pre`. Sums over rows leave as one partial per row.
 * Rows of x in bf16 are widened once, into a ring of W of them.
 */
#include "lanes.c"

#define GROUP 256

_Static_assert(sizeof(void *) == 8, "conv_native.py lays this structure out with 8-byte fields");

struct conv_args {
  int64_t n_batch, n_tokens, n_channels, width;
  int64_t half;                       /* whether x, y, gy and gx are bf16, else fp32 like the rest */
  const void *x;
  int64_t x_batch, x_row;             /* strides; the last dimension is contiguous */
  const float *weight, *bias, *window; /* (w, d), tap-major; (d); (b, w - 1, d) or NULL */
  void *y;                            /* (b, t, d) */
  const void *gy;                     /* backward: (b, t, d) with strides */
  int64_t gy_batch, gy_row;
  void *gx;                           /* (b, t, d) */
  float *gwindow;                     /* (b, w - 1, d) */
  float *gweight, *gbias;             /* (b, w, d), (b, d) */
};

int64_t archbench_conv_group(void) { return GROUP; }

struct spot { /* one job, and scratch that all jobs of a call share */
  ptrdiff_t b, first, width;
  float *zeros, *widened; /* widened holds row t of x at t % W */
  const float **taps;
};

static void spot_of(const struct conv_args *k, int64_t job, struct spot *at) {
  const ptrdiff_t n_groups = (k->n_channels + GROUP - 1) / GROUP;
  at->b = job / n_groups;
  at->first = job % n_groups * GROUP;
  at->width = at_most(GROUP, k->n_channels - at->first);
}

/* Puts row s of x where `aim` finds it. */
static void widen(const struct conv_args *k, const struct spot *at, ptrdiff_t s) {
  const ptrdiff_t from = at->b * k->x_batch + s * k->x_row + at->first;
  for (ptrdiff_t c = 0; c < at->width; c += LANES)
    store(at->widened + s % k->width * GROUP + c, load_as(1, k->x, from + c, at->width - c), LANES);
}

/* Point taps[j] at the input that weight[j] multiplies for the output at t. */
static void aim(const struct conv_args *k, const struct spot *at, ptrdiff_t t) {
  for (ptrdiff_t j = 0; j < k->width; j++) {
    const ptrdiff_t s = t - k->width + 1 + j;
    if (s >= 0 && k->half)
      at->taps[j] = at->widened + s % k->width * GROUP;
    else if (s >= 0)
      at->taps[j] = (const float *)k->x + at->b * k->x_batch + s * k->x_row + at->first;
    else if (k->window)
      at->taps[j] = k->window + (at->b * (k->width - 1) + s + k->width - 1) * k->n_channels + at->first;
    else
      at->taps[j] = at->zeros;
  }
}

INLINE vf before_silu(const struct conv_args *k, const ptrdiff_t W, const struct spot *at, ptrdiff_t c, ptrdiff_t m) {
  vf pre = load(k->bias + at->first + c, m);
  for (ptrdiff_t j = 0; j < W; j++)
    pre += load(k->weight + j * k->n_channels + at->first + c, m) * load(at->taps[j] + c, m);
  return pre;
}

INLINE void forward_job(const struct conv_args *k, const ptrdiff_t W, const struct spot *at) {
  for (ptrdiff_t t = 0; t < k->n_tokens; t++) {
    if (k->half) widen(k, at, t);
    aim(k, at, t);
    const ptrdiff_t y = (at->b * k->n_tokens + t) * k->n_channels + at->first;
    for (ptrdiff_t c = 0; c < at->width; c += LANES) {
      const ptrdiff_t m = at->width - c;
      const vf pre = before_silu(k, W, at, c, m);
      store_as(k->half, k->y, y + c, pre * logistic(pre, exp_minus_abs(pre)), m);
    }
  }
}

/* ring holds the gradient of `pre` at t in row t % W; sums holds those of the W weights, then of the bias. */
INLINE void backward_job(const struct conv_args *k, const ptrdiff_t W, const struct spot *at, float *ring, float *sums) {
  const ptrdiff_t D = k->n_channels, T = k->n_tokens;
  memset(ring, 0, sizeof(float) * W * GROUP);
  memset(sums, 0, sizeof(float) * (W + 1) * GROUP);
  for (ptrdiff_t s = T - 1; k->half && s >= 0 && s > T - W; s--) widen(k, at, s);
  for (ptrdiff_t t = T - 1; t > -W; t--) {
    const int real = t >= 0; /* below 0 lies the window: it has a gradient but no output */
    if (k->half && t - W + 1 >= 0) widen(k, at, t - W + 1);
    if (real) aim(k, at, t);
    const ptrdiff_t gy = at->b * k->gy_batch + t * k->gy_row + at->first;
    void *const into = real ? k->gx : k->gwindow;
    const ptrdiff_t gx = (real ? (at->b * T + t) * D : (at->b * (W - 1) + t + W - 1) * D) + at->first;
    float *newest = ring + (t + W) % W * GROUP;
    for (ptrdiff_t c = 0; c < at->width; c += LANES) {
      const ptrdiff_t m = at->width - c;
      vf gpre = splat(0.0f);
      if (real) {
        const vf pre = before_silu(k, W, at, c, m), s = logistic(pre, exp_minus_abs(pre));
        gpre = load_as(k->half, k->gy, gy + c, m) * s * (1.0f + pre * (1.0f - s));
        for (ptrdiff_t j = 0; j < W; j++) {
          float *sum = sums + j * GROUP + c;
          store(sum, load(sum, LANES) + gpre * load(at->taps[j] + c, m), LANES);
        }
        float *sum = sums + W * GROUP + c;
        store(sum, load(sum, LANES) + gpre, LANES);
      }
      store(newest + c, gpre, LANES);
      vf out = splat(0.0f);
      for (ptrdiff_t ahead = 0; ahead < W; ahead++)
        out += load(k->weight + (W - 1 - ahead) * D + at->first + c, m) *
               load(ring + (t + ahead + W) % W * GROUP + c, LANES);
      store_as(real ? k->half : 0, into, gx + c, out, m);
    }
  }
  for (ptrdiff_t j = 0; j < W; j++)
    memcpy(k->gweight + (at->b * W + j) * D + at->first, sums + j * GROUP, sizeof(float) * at->width);
  memcpy(k->gbias + at->b * D + at->first, sums + W * GROUP, sizeof(float) * at->width);
}

/* Run jobs first .. last-1. Return 0, or 1 when there was no memory for the scratch. Width 4, the usual one, is constant
 * for the compiler. */
int64_t archbench_conv_forward(const struct conv_args *k, int64_t first, int64_t last) {
  struct spot at = {
      .zeros = scratch(sizeof(float) * GROUP),
      .widened = scratch(sizeof(float) * k->width * GROUP),
      .taps = scratch(sizeof(float *) * k->width),
  };
  const int64_t failed = !at.zeros || !at.widened || !at.taps;
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last && !failed; job++) {
    spot_of(k, job, &at);
    if (k->width == 4)
      forward_job(k, 4, &at);
    else
      forward_job(k, k->width, &at);
  }
  denormals_restore(mode);
  free(at.zeros);
  free(at.widened);
  free(at.taps);
  return failed;
}

int64_t archbench_conv_backward(const struct conv_args *k, int64_t first, int64_t last) {
  struct spot at = {
      .zeros = scratch(sizeof(float) * GROUP),
      .widened = scratch(sizeof(float) * k->width * GROUP),
      .taps = scratch(sizeof(float *) * k->width),
  };
  float *ring = scratch(sizeof(float) * k->width * GROUP), *sums = scratch(sizeof(float) * (k->width + 1) * GROUP);
  const int64_t failed = !at.zeros || !at.widened || !at.taps || !ring || !sums;
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last && !failed; job++) {
    spot_of(k, job, &at);
    if (k->width == 4)
      backward_job(k, 4, &at, ring, sums);
    else
      backward_job(k, k->width, &at, ring, sums);
  }
  denormals_restore(mode);
  free(at.zeros);
  free(at.widened);
  free(at.taps);
  free(ring);
  free(sums);
  return failed;
}
