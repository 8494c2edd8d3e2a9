/* What whole-model decode steps share beside the products of panels.c, which comes along: tokens in, tokens out, sums
 * across lanes. For units that include this file.
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
    most = choose(v > most, v, most);
    spoiled |= v != v;
  }
  float best = -INFINITY;
  int32_t no_number = 0;
  for (int l = 0; l < LANES; l++) {
    best = most[l] > best ? most[l] : best;
    no_number |= spoiled[l];
  }
  for (ptrdiff_t i = 0; i < n; i++)
    if (no_number ? x[i] != x[i] : x[i] == best) return i;
  return 0;
}

/* Two vectors as blocks of 2h lanes each, of which the lower halves (or, with `upper` h, the upper ones) take turns. */
#define HALF_OF(h, l, upper) ((l) / (h) / 2 * 2 * (h) + (l) % (h) + (l) / (h) % 2 * LANES + (upper))
#define FOUR_OF(h, l, upper) HALF_OF(h, l, upper), HALF_OF(h, l + 1, upper), HALF_OF(h, l + 2, upper), HALF_OF(h, l + 3, upper)
#if LANES == 16
#define HALVES(h, upper) FOUR_OF(h, 0, upper), FOUR_OF(h, 4, upper), FOUR_OF(h, 8, upper), FOUR_OF(h, 12, upper)
#elif LANES == 8
#define HALVES(h, upper) FOUR_OF(h, 0, upper), FOUR_OF(h, 4, upper)
#else
#define HALVES(h, upper) FOUR_OF(h, 0, upper)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, h, upper) __builtin_shufflevector(a, b, HALVES(h, upper))
#else
#define SHUFFLE(a, b, h, upper) __builtin_shuffle(a, b, (vi){HALVES(h, upper)})
#endif
#define ADD_HALVES(h) \
  UNROLL \
  for (int i = 0; i < h; i++) v[i] = SHUFFLE(v[i], v[i + h], h, 0) + SHUFFLE(v[i], v[i + h], h, h);

/* Lane l becomes the sum of all lanes of v[l], in the order of `total`. */
INLINE vf sums_of(vf v[LANES]) {
#if LANES == 16
  ADD_HALVES(8)
#endif
#if LANES >= 8
  ADD_HALVES(4)
#endif
  ADD_HALVES(2)
  ADD_HALVES(1)
  return v[0];
}
