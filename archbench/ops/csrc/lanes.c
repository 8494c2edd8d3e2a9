/* Vector lanes and the few functions the kernels need, for those that include this file.
 *
 * Lanes hold neighbouring channels. Everything is written with compiler vector types (gcc and clang, any processor);
 * what names a processor (a part of a vector, the denormal switch at the end) has a form for all others beside it.
 * Accuracy of each function is about one unit in the last place of fp32.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* whose sums may wrap */

/* Lanes of two vectors, chosen by constants: those of b follow those of a. */
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define HALVE(n, one, other) \
  UNROLL                     \
  for (int i = 0; i < n; i++) s[i] = PICK_OF(s[i], s[i + n], one) + PICK_OF(s[i], s[i + n], other);
#define PICK_OF(a, b, lanes) PICK_EXPANDED(a, b, UNPACK lanes)
#define PICK_EXPANDED(...) PICK(__VA_ARGS__)
#define UNPACK(...) __VA_ARGS__

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* What a kernel returns. */
enum { OK = 0, NO_MEMORY = 1, NO_SUCH_TOKEN = 2 };

_Static_assert(sizeof(void *) == 8, "the Python side lays structures out with 8-byte fields");

/* Strided input: row t of batch row b starts at p + b * batch + t * row; its last dimension is contiguous. */
struct rows {
  const float *p;
  int64_t batch, row;
};

INLINE ptrdiff_t row_at(const struct rows *r, ptrdiff_t b, ptrdiff_t t) { return b * r->batch + t * r->row; }

INLINE const float *row_of(const struct rows *r, ptrdiff_t b, ptrdiff_t t) { return r->p + row_at(r, b, t); }

/* Recurrences keep STATES state indices of a block of lanes in registers. */
#if LANES == 16 || defined(__aarch64__)
#define STATES 16 /* 32 vector registers */
#else
#define STATES 8
#endif

/* States taken together when `left` remain. */
INLINE int together(ptrdiff_t left) { return left >= STATES ? STATES : left >= 4 ? 4 : 1; }

INLINE ptrdiff_t at_most(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

INLINE vf splat(float s) { return s - (vf){0}; }

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* Load or store the first m lanes; the others read as 0. Memory need not be aligned. */
INLINE vf load(const float *p, ptrdiff_t m) {
  vf v = {0};
  if (m >= LANES) {
    memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__AVX512F__)
  if (m > 0) v = (vf)__builtin_ia32_loadups512_mask(p, v, (unsigned short)((1u << m) - 1));
#else
  for (ptrdiff_t l = 0; l < m; l++) v[l] = p[l];
#endif
  return v;
}

INLINE void store(float *p, vf v, ptrdiff_t m) {
  if (m >= LANES) {
    memcpy(p, &v, sizeof v);
    return;
  }
#if defined(__AVX512F__)
  if (m > 0) __builtin_ia32_storeups512_mask(p, v, (unsigned short)((1u << m) - 1));
#else
  for (ptrdiff_t l = 0; l < m; l++) p[l] = v[l];
#endif
}

typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef short shorts __attribute__((vector_size(2 * LANES))); /* as gcc's builtins want halves */

INLINE vf from_halves(vh h) {
#if defined(__AVX512BW__) && !defined(__clang__) /* gcc goes by quarters */
  return (vf)(vi)((vi)__builtin_ia32_pmovzxwd512_mask((shorts)h, (vi){0}, 0xffff) << 16);
#else
  return (vf)(__builtin_convertvector(h, vi) << 16);
#endif
}

/* Rounded to nearest, ties to even; a NaN stays one. */
INLINE vh to_halves(vf v) {
  vh h;
#if defined(__AVX512BF16__) && !defined(__clang__)
  __typeof__(__builtin_ia32_cvtneps2bf16_v16sf(v)) rounded = __builtin_ia32_cvtneps2bf16_v16sf(v);
  memcpy(&h, &rounded, sizeof h);
#else
  const vi bits = (vi)v, missing = v != v;
  const vi upper = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  h = __builtin_convertvector((upper & ~missing) | (0x7fc0 & missing), vh);
#endif
  return h;
}

/* The same for elements that are fp32 or, with `half`, bf16: `at` counts elements. */
INLINE vf load_as(const int64_t half, const void *p, ptrdiff_t at, ptrdiff_t m) {
  if (!half) return load((const float *)p + at, m);
  const uint16_t *from = (const uint16_t *)p + at;
  vh h = {0};
  if (m >= LANES)
    memcpy(&h, from, sizeof h);
  else
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    h = (vh)__builtin_ia32_loaddquhi256_mask((const void *)from, (shorts)h, (unsigned short)((1u << m) - 1));
#else
    for (ptrdiff_t l = 0; l < m; l++) h[l] = from[l];
#endif
  return from_halves(h);
}

INLINE void store_as(const int64_t half, void *p, ptrdiff_t at, vf v, ptrdiff_t m) {
  if (!half) {
    store((float *)p + at, v, m);
    return;
  }
  uint16_t *to = (uint16_t *)p + at;
  const vh h = to_halves(v);
  if (m >= LANES)
    memcpy(to, &h, sizeof h);
  else
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __builtin_ia32_storedquhi256_mask((void *)to, (shorts)h, (unsigned short)((1u << m) - 1));
#else
    for (ptrdiff_t l = 0; l < m; l++) to[l] = h[l];
#endif
}

/* Makes one number of all lanes: half of them `both` with the other half, until one is left. */
#if LANES == 16
#define FOLD(v, both)                                                           \
  v = both(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = both(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = both(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = both(v, PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif LANES == 8
#define FOLD(v, both)                              \
  v = both(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3)); \
  v = both(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5)); \
  v = both(v, PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define FOLD(v, both)                  \
  v = both(v, PICK(v, v, 2, 3, 0, 1)); \
  v = both(v, PICK(v, v, 1, 0, 3, 2));
#endif

INLINE vf sum_of(vf a, vf b) { return a + b; }

/* Sum of all lanes, always in the same order. */
INLINE float total(vf v) {
  FOLD(v, sum_of)
  return v[0];
}

/* NaN is never the larger one. */
INLINE vf larger(vf x, vf best) {
#if defined(__AVX512F__) && !defined(__clang__) /* gcc makes four instructions of the comparison */
  return __builtin_ia32_maxps512_mask(x, best, best, 0xffff, 4);
#else
  return choose(x > best, x, best);
#endif
}

INLINE float largest_lane(vf v) {
  FOLD(v, larger)
  return v[0];
}

/* The totals of LANES vectors, each of the bits that `total` gives it: half of the lanes added to the other half until
 * one is left, two vectors becoming one each time. */
INLINE vf totals(const vf *v) {
  vf s[LANES];
  memcpy(s, v, sizeof s);
#if LANES == 16
  HALVE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  HALVE(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  HALVE(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  HALVE(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif LANES == 8
  HALVE(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
  HALVE(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
  HALVE(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
#else
  HALVE(2, (0, 1, 4, 5), (2, 3, 6, 7))
  HALVE(1, (0, 4, 2, 6), (1, 5, 3, 7))
#endif
  return s[0];
}

/* Adds the totals of `count` vectors to as many numbers; `v` has zeros up to a multiple of LANES. For sums that a
 * backward pass wants of each token and state: kept as whole vectors they would fill the nearest cache. */
INLINE void add_totals(float *to, const vf *v, const int count) {
  UNROLL
  for (int i = 0; i < count; i += LANES) {
    const ptrdiff_t m = at_most(LANES, count - i);
    store(to + i, load(to + i, m) + totals(v + i), m);
  }
}

/* 2^x for x <= 127. Exactly 0 from x = -126 down, so that a strong decay forgets and leaves no denormal. NaN, as
 * arithmetic makes it, stays NaN.
 * Adding 1.5 * 2^23 rounds to the nearest integer and leaves that integer in the low bits, which move to the exponent;
 * the rest, in [-1/2, 1/2], goes through a minimax polynomial of degree 6 with relative error 2e-9. Where a register
 * holds a table of 16 numbers, 1.5 * 2^19 leaves sixteenths, which are looked up; for the rest, in [-1/32, 1/32], degree 3
 * is as good, with two multiplications less. */
INLINE vf exp2v(vf x) {
#if LANES == 16 && !defined(__clang__) /* which has no such shuffle */
  const vf sixteenths = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                         1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                         1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
  const float magic = 786432.0f;
  vf r = x + magic;
  vf f = x - (r - magic);
  vf t = __builtin_shuffle(sixteenths, (vi)r); /* by the low four bits */
  vf p = 5.55021365e-2f * f + 2.40234288e-1f;
  p = p * f + 6.93147183e-1f;
  p = t * (p * f) + t;
  vi bits = (vi)((vu)p + (((vu)r & -16u) << 19));
#else
  const float magic = 12582912.0f;
  vf r = x + magic;
  vf f = x - (r - magic);
  vf p = 1.5353362e-4f * f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  vi bits = (vi)((vu)p + ((vu)r << 23));
#endif
  return (vf)(bits & ~(x <= -126.0f));
}

/* exp(-|x|), in [0, 1]. */
INLINE vf exp_minus_abs(vf x) { return exp2v((vf)((vi)x & 0x7fffffff) * -1.44269504f); }

/* 1 / (1 + exp(-x)), given e = exp(-|x|). */
INLINE vf logistic(vf x, vf e) {
  vf above = 1.0f / (1.0f + e);
  return choose(x >= 0.0f, above, e * above);
}

/* log(1 + exp(x)) = max(x, 0) + log1p(e), given e = exp(-|x|). log1p(e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, which
 * keeps its relative accuracy for tiny e; the series in s^2 is minimax with relative error 4e-9. */
INLINE vf softplus(vf x, vf e) {
  vf s = e / (2.0f + e), q = s * s;
  vf p = 0.14089167f * q + 0.13980302f;
  p = p * q + 0.20012455f;
  p = p * q + 0.33333158f;
  p = p * q + 1.0f;
  return (vf)((vi)x & (x > 0.0f)) + 2.0f * s * p;
}

/* Flush denormals to zero while a kernel runs: decaying states and gradients pass through them on their way to 0, and
 * some processors then run ten times slower. The value returned goes back to denormals_restore. */
INLINE uint64_t denormals_off(void) {
#if defined(__x86_64__)
  unsigned int old = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(old | 0x8040u);
  return old;
#elif defined(__aarch64__)
  uint64_t old;
  __asm__ volatile("mrs %0, fpcr" : "=r"(old));
  __asm__ volatile("msr fpcr, %0" : : "r"(old | (1u << 24)));
  return old;
#else
  return 0;
#endif
}

INLINE void denormals_restore(uint64_t old) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr((unsigned int)old);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(old));
#else
  (void)old;
#endif
}

/* Zeroed scratch, aligned for lanes; NULL when there is no memory. Freed with free(). */
INLINE void *scratch(size_t bytes) {
  void *p = NULL;
  if (posix_memalign(&p, 64, bytes ? bytes : 64)) return NULL;
  memset(p, 0, bytes);
  return p;
}
