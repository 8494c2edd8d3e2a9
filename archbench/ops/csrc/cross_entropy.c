/* Cross-entropy of rows of logits and its gradient, computed in fp32.
 *
 *   loss = log sum_i exp(x_i) - x_target       gradient_i = share (softmax(x)_i - [i = target])
 *
 * One job is one row. Its exponentials, shifted by the largest logit, wait in scratch for their sum, so that a row is
 * read twice and written once. Where the target is NONE, loss and gradient are 0.
 */
#include "lanes.c"

#include <math.h>

#define NONE -100 /* the target of a row that says nothing */

struct cross_entropy_args {
  int64_t n_vocab, half;  /* whether logits and gradient are bf16, else fp32 */
  const void *logits;     /* (n, v), rows with a stride */
  int64_t row;
  const int64_t *targets; /* (n): a token or NONE */
  const float *share;     /* (n) */
  float *loss;            /* (n) */
  void *gradient;         /* (n, v) */
};

/* The first m logits from element `at` on; the other lanes are the least there is. */
INLINE vf logits_at(const struct cross_entropy_args *k, const int64_t half, ptrdiff_t at, ptrdiff_t m) {
  static const int32_t counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf x = load_as(half, k->logits, at, m);
  if (m >= LANES) return x;
  vi lane;
  memcpy(&lane, counting, sizeof lane);
  return choose(lane < (int32_t)m, x, splat(-INFINITY));
}

/* exp(x - shift), where NaN of any bits stays NaN: exp2v keeps only those that arithmetic makes. */
INLINE vf exponential(vf x, float shift) { return (vf)((vi)exp2v((x - shift) * 1.44269504f) | (x != x)); }

INLINE int64_t one_row(const struct cross_entropy_args *k, const int64_t half, int64_t n, float *waiting) {
  const ptrdiff_t V = k->n_vocab, from = n * k->row, to = n * V, full = V / LANES * LANES;
  const int64_t target = k->targets[n];
  if (target == NONE) {
    k->loss[n] = 0.0f;
    for (ptrdiff_t i = 0; i < V; i += LANES) store_as(half, k->gradient, to + i, splat(0.0f), V - i);
    return OK;
  }
  if (target < 0 || target >= V) return NO_SUCH_TOKEN;
  vf best = logits_at(k, half, from + full, V - full);
  for (ptrdiff_t i = 0; i < full; i += LANES) best = larger(logits_at(k, half, from + i, LANES), best);
  const float shift = largest_lane(best);
  vf sum = exponential(logits_at(k, half, from + full, V - full), shift);
  store(waiting + full, sum, V - full);
  for (ptrdiff_t i = 0; i < full; i += LANES) {
    const vf e = exponential(logits_at(k, half, from + i, LANES), shift);
    store(waiting + i, e, LANES);
    sum += e;
  }
  const float denominator = total(sum), scale = k->share[n] / denominator;
  k->loss[n] = logf(denominator) - (logits_at(k, half, from + target, 1)[0] - shift);
  for (ptrdiff_t i = 0; i < V; i += LANES) store_as(half, k->gradient, to + i, load(waiting + i, V - i) * scale, V - i);
  store_as(half, k->gradient, to + target, splat((waiting[target] - denominator) * scale), 1);
  return OK;
}

/* Run jobs first .. last-1. */
int64_t archbench_cross_entropy(const struct cross_entropy_args *k, int64_t first, int64_t last) {
  float *waiting = scratch(sizeof(float) * k->n_vocab);
  if (!waiting) return NO_MEMORY;
  const uint64_t mode = denormals_off();
  int64_t outcome = OK;
  for (int64_t n = first; n < last && outcome == OK; n++)
    outcome = k->half ? one_row(k, 1, n, waiting) : one_row(k, 0, n, waiting);
  denormals_restore(mode);
  free(waiting);
  return outcome;
}
