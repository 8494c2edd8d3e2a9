/* Depthwise causal convolution followed by silu, forward and backward, computed in fp32.
 *
 *   pre[t] = bias + sum_j weight[j] x[t - W + 1 + j]       y = silu(pre)
 *
 * with x before the first token taken from the window, or 0. One job is one batch row and one group of GROUP channels. It
 * goes by strips of STRIP tokens and blocks of LANES channels, so that the last W inputs of a block, its weights, and on
 * the way back the last W gradients of `pre` and the sums over tokens, stay in registers. Backward runs in reverse time.
 * Sums over rows leave as one partial per row.
 */
#include "lanes.c"

#define GROUP 256
#define STRIP 16

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

struct spot { /* one job */
  ptrdiff_t b, first, width;
};

static struct spot spot_of(const struct conv_args *k, int64_t job) {
  const ptrdiff_t n_groups = (k->n_channels + GROUP - 1) / GROUP, first = job % n_groups * GROUP;
  return (struct spot){job / n_groups, first, at_most(GROUP, k->n_channels - first)};
}

/* The input of a block at token s, which may lie before the first one. */
INLINE vf input_at(const struct conv_args *k, const struct spot *at, ptrdiff_t s, ptrdiff_t c, ptrdiff_t m) {
  const ptrdiff_t channel = at->first + c, width = k->width;
  if (s >= 0) return load_as(k->half, k->x, at->b * k->x_batch + s * k->x_row + channel, m);
  if (k->window) return load(k->window + (at->b * (width - 1) + s + width - 1) * k->n_channels + channel, m);
  return splat(0.0f);
}

/* What a neighbouring strip reads; an address beyond the tensor costs nothing. */
INLINE void foresee(const struct conv_args *k, const void *p, ptrdiff_t element) {
  __builtin_prefetch((const char *)p + element * (k->half ? 2 : 4), 0, 2);
}

/* `taps` and `weight` hold W vectors each, as do `taps`, `weight` and `ring` below, and `sums` W + 1. */
INLINE void forward_block(const struct conv_args *k, const ptrdiff_t W, const struct spot *at, ptrdiff_t t0,
                          ptrdiff_t steps, ptrdiff_t c, vf *taps, vf *weight) {
  const ptrdiff_t m = at->width - c;
  const vf bias = load(k->bias + at->first + c, m);
  for (ptrdiff_t j = 0; j < W; j++) weight[j] = load(k->weight + j * k->n_channels + at->first + c, m);
  for (ptrdiff_t j = 1; j < W; j++) taps[j] = input_at(k, at, t0 - W + j, c, m);
  for (ptrdiff_t t = t0; t < t0 + steps; t++) {
    for (ptrdiff_t j = 1; j < W; j++) taps[j - 1] = taps[j];
    taps[W - 1] = input_at(k, at, t, c, m);
    foresee(k, k->x, at->b * k->x_batch + (t + STRIP) * k->x_row + at->first + c);
    vf pre = bias;
    for (ptrdiff_t j = 0; j < W; j++) pre += weight[j] * taps[j];
    store_as(k->half, k->y, (at->b * k->n_tokens + t) * k->n_channels + at->first + c,
             pre * logistic(pre, exp_minus_abs(pre)), m);
  }
}

/* What the gradients of `pre` at some token and the W - 1 after it, in `ring`, are to the input there. */
INLINE vf passed_back(const ptrdiff_t W, const vf *weight, const vf *ring) {
  vf out = splat(0.0f);
  for (ptrdiff_t ahead = 0; ahead < W; ahead++) out += weight[W - 1 - ahead] * ring[ahead];
  return out;
}

INLINE void push(const ptrdiff_t W, vf *ring, vf newest) {
  for (ptrdiff_t j = W - 1; j > 0; j--) ring[j] = ring[j - 1];
  ring[0] = newest;
}

/* `kept` holds ring and sums of the block between its strips. */
INLINE void backward_block(const struct conv_args *k, const ptrdiff_t W, const struct spot *at, ptrdiff_t t0,
                           ptrdiff_t steps, ptrdiff_t c, vf *kept, vf *taps, vf *weight, vf *ring, vf *sums) {
  const ptrdiff_t m = at->width - c, D = k->n_channels;
  const vf bias = load(k->bias + at->first + c, m);
  for (ptrdiff_t j = 0; j < W; j++) weight[j] = load(k->weight + j * D + at->first + c, m);
  for (ptrdiff_t j = 0; j < W; j++) ring[j] = kept[j];
  for (ptrdiff_t j = 0; j <= W; j++) sums[j] = kept[W + j];
  for (ptrdiff_t j = 1; j < W; j++) taps[j - 1] = input_at(k, at, t0 + steps - 1 - W + 1 + j, c, m);
  for (ptrdiff_t t = t0 + steps - 1; t >= t0; t--) {
    push(W, taps, input_at(k, at, t - W + 1, c, m));
    const ptrdiff_t gy = at->b * k->gy_batch + t * k->gy_row + at->first + c;
    foresee(k, k->x, at->b * k->x_batch + (t - STRIP) * k->x_row + at->first + c);
    foresee(k, k->gy, gy - STRIP * k->gy_row);
    vf pre = bias;
    for (ptrdiff_t j = 0; j < W; j++) pre += weight[j] * taps[j];
    const vf s = logistic(pre, exp_minus_abs(pre));
    const vf gpre = load_as(k->half, k->gy, gy, m) * s * (1.0f + pre * (1.0f - s));
    for (ptrdiff_t j = 0; j < W; j++) sums[j] += gpre * taps[j];
    sums[W] += gpre;
    push(W, ring, gpre);
    store_as(k->half, k->gx, (at->b * k->n_tokens + t) * D + at->first + c, passed_back(W, weight, ring), m);
  }
  for (ptrdiff_t j = 0; j < W; j++) kept[j] = ring[j];
  for (ptrdiff_t j = 0; j <= W; j++) kept[W + j] = sums[j];
}

/* The window has a gradient but no output; then the sums leave. */
static void backward_end(const struct conv_args *k, const struct spot *at, ptrdiff_t c, vf *kept, vf *weight) {
  const ptrdiff_t W = k->width, D = k->n_channels, m = at->width - c;
  for (ptrdiff_t j = 0; j < W; j++) weight[j] = load(k->weight + j * D + at->first + c, m);
  for (ptrdiff_t t = -1; t > -W; t--) {
    push(W, kept, splat(0.0f));
    store(k->gwindow + (at->b * (W - 1) + t + W - 1) * D + at->first + c, passed_back(W, weight, kept), m);
  }
  for (ptrdiff_t j = 0; j < W; j++) store(k->gweight + (at->b * W + j) * D + at->first + c, kept[W + j], m);
  store(k->gbias + at->b * D + at->first + c, kept[2 * W], m);
}

/* Run jobs first .. last-1. Width 4, the usual one, is constant
 * for the compiler, which then keeps what a block works on in registers. */
int64_t archbench_conv_forward(const struct conv_args *k, int64_t first, int64_t last) {
  const ptrdiff_t W = k->width;
  vf *room = scratch(sizeof(vf) * 2 * W);
  if (!room) return NO_MEMORY;
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++) {
    const struct spot at = spot_of(k, job);
    for (ptrdiff_t t0 = 0; t0 < k->n_tokens; t0 += STRIP)
      for (ptrdiff_t c = 0; c < at.width; c += LANES) {
        const ptrdiff_t steps = at_most(STRIP, k->n_tokens - t0);
        if (W == 4) {
          vf taps[4], weight[4];
          forward_block(k, 4, &at, t0, steps, c, taps, weight);
        } else {
          forward_block(k, W, &at, t0, steps, c, room, room + W);
        }
      }
  }
  denormals_restore(mode);
  free(room);
  return OK;
}

int64_t archbench_conv_backward(const struct conv_args *k, int64_t first, int64_t last) {
  const ptrdiff_t W = k->width, each = 2 * W + 1;
  const size_t n_kept = GROUP / LANES * each;
  vf *kept = scratch(sizeof(vf) * (n_kept + 4 * W + 1));
  if (!kept) return NO_MEMORY;
  vf *room = kept + n_kept;
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++) {
    const struct spot at = spot_of(k, job);
    memset(kept, 0, sizeof(vf) * n_kept);
    for (ptrdiff_t t0 = (k->n_tokens - 1) / STRIP * STRIP; t0 >= 0; t0 -= STRIP)
      for (ptrdiff_t c = 0; c < at.width; c += LANES) {
        const ptrdiff_t steps = at_most(STRIP, k->n_tokens - t0);
        vf *const own = kept + c / LANES * each;
        if (W == 4) {
          vf taps[4], weight[4], ring[4], sums[5];
          backward_block(k, 4, &at, t0, steps, c, own, taps, weight, ring, sums);
        } else {
          backward_block(k, W, &at, t0, steps, c, own, room, room + W, room + 2 * W, room + 3 * W);
        }
      }
    for (ptrdiff_t c = 0; c < at.width; c += LANES) backward_end(k, &at, c, kept + c / LANES * each, room);
  }
  denormals_restore(mode);
  free(kept);
  return OK;
}
