/* What whole-model decode steps share beside the products of panels.c, which comes along: tokens in, tokens out.
 * For units that include this file.
 */
#include "panels.c"

/* Rows of an embedding (n_vocab, d), fp32 or bf16, for m tokens. */
static int64_t look_up(const void *embedding, int64_t half, ptrdiff_t n_vocab, ptrdiff_t d, const int64_t *tokens,
                       ptrdiff_t m, float *to) {
  for (ptrdiff_t r = 0; r < m; r++, to += d) {
    if (tokens[r] < 0 || tokens[r] >= n_vocab) return NO_SUCH_TOKEN;
    if (half)
      for (ptrdiff_t i = 0; i < d; i++) {
        const uint32_t bits = (uint32_t)((const uint16_t *)embedding)[tokens[r] * d + i] << 16;
        memcpy(to + i, &bits, sizeof bits);
      }
    else
      memcpy(to, (const float *)embedding + tokens[r] * d, (size_t)d * sizeof *to);
  }
  return OK;
}

/* The first of the largest numbers, or the first that is none, as torch has it. */
static int64_t largest(const float *x, ptrdiff_t n) {
  vf most = splat(-INFINITY);
  vi spoiled = {0};
  for (ptrdiff_t i = 0; i < n; i += LANES) {
    vf v = load(x + i, n - i);
    for (ptrdiff_t l = n - i; l < LANES; l++) v[l] = -INFINITY;
    most = larger(v, most);
    spoiled |= v != v;
  }
  const float best = largest_lane(most);
  int32_t no_number = 0;
  for (int l = 0; l < LANES; l++) no_number |= spoiled[l];
  for (ptrdiff_t i = 0; i < n; i++)
    if (no_number ? x[i] != x[i] : x[i] == best) return i;
  return 0;
}
