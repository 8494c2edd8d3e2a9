/* Selective scan (Mamba-1), forward and backward, computed in fp32.
 *
 *   step  = softplus(dt + dt_bias)
 *   h[n]  = exp(step A[n]) h[n] + step x B[n]
 *   y     = (sum_n C[n] h[n] + D x) silu(z)
 *
 * One job is one batch row and one group of channels, GROUP at most, all groups as equal as blocks allow. Inside a job
 * the outer loop runs over tokens and the inner one over blocks of LANES channels; inside a block, STATES state indices
 * at a time keep their h in registers. The forward pass goes by strips of STRIP tokens, whose rows it reads and writes
 * whole (walking down a block's column instead takes one cache line of each row, which no prefetcher foresees), and
 * keeps h at the chunk starts only ("starts"). The backward pass rebuilds one chunk of one block in scratch and sweeps
 * it in reverse. Nothing of size tokens x channels x states exists.
 *
 * Jobs never write to the same place and their extent does not depend on the number of threads: sums over channels
 * (dB, dC) and over rows (dA, dD, ddt_bias) leave here as one partial per job, added up by the caller in a fixed order.
 * So the result is the same, bit for bit, for any number of threads, and the outputs of a row for any batch.
 */
#include "lanes.c"

#define GROUP 384
#define STRIP 16
#define LOG2E 1.44269504f
#define LN2 0.69314718f

struct scan_args {
  int64_t n_batch, n_tokens, n_channels, n_states, chunk;
  int64_t half;                           /* whether x, dt, z, y, gy, gx, gdt and gz are bf16, else fp32 like the rest */
  struct rows x, dt, z, B, C;             /* z.p may be NULL */
  const float *A, *D, *dt_bias, *h0;      /* A (d, n); D, dt_bias (d) or NULL; h0 (b, d, n) or NULL */
  void *y;                                /* (b, t, d) */
  float *h_last, *starts;                 /* h_last (b, d, n); starts (b, chunks, n, d) or NULL */
  struct rows gy;                         /* backward: gradient of y, p may be NULL ... */
  const float *gh;                        /* ... and of h_last (b, d, n), or NULL */
  void *gx, *gdt, *gz;                    /* (b, t, d) */
  float *gA, *gh0;                        /* (b, d, n) */
  float *gB, *gC;                         /* (b, groups, t, n) */
  float *gD, *gbias;                      /* (b, d) */
};

int64_t archbench_scan_groups(int64_t n_channels) { return (n_channels + GROUP - 1) / GROUP; }

/* ---- small pieces ---- */

/* Between (channel, state) rows of the caller and state-major scratch [n][GROUP], times `scale`. */
static void to_lanes(float *to, const float *from, ptrdiff_t width, ptrdiff_t N, float scale) {
  for (ptrdiff_t c = 0; c < width; c++)
    for (ptrdiff_t n = 0; n < N; n++) to[n * GROUP + c] = scale * from[c * N + n];
}

static void from_lanes(float *to, const float *from, ptrdiff_t width, ptrdiff_t N) {
  for (ptrdiff_t c = 0; c < width; c++)
    for (ptrdiff_t n = 0; n < N; n++) to[c * N + n] = from[n * GROUP + c];
}

/* The numbers of some channels, zero where the caller gave none. */
INLINE vf channels(const float *p, ptrdiff_t c, ptrdiff_t m) { return p ? load(p + c, m) : splat(0.0f); }

/* What one run over some states of one block works on. Rows of B and C are scalars shared by all lanes. */
struct run {
  ptrdiff_t steps, B_row, C_row;
  int first;                   /* whether these are the first states that y hears of */
  vf skip;
  const vf *step, *x;          /* [t] */
  const float *A2, *B, *C;     /* A2 is state-major scratch: A times log2(e) */
  float *h;                    /* state-major scratch, updated */
  vf *y;                       /* [t], gathers skip x + C . h */
  vf *a_kept, *h_kept;         /* backward only: decays [t][i], states [t + 1][i] with the one before the chunk at 0 */
};

INLINE void advance_n(const int count, const int keep, const struct run *r) {
  vf A[STATES], h[STATES];
  UNROLL
  for (int i = 0; i < count; i++) {
    A[i] = load(r->A2 + i * GROUP, LANES);
    h[i] = load(r->h + i * GROUP, LANES);
    if (keep) r->h_kept[i] = h[i];
  }
  for (ptrdiff_t t = 0; t < r->steps; t++) {
    const float *B = r->B + t * r->B_row, *C = r->C + t * r->C_row;
    const vf step = r->step[t], input = step * r->x[t];
    vf y = r->first ? r->skip * r->x[t] : r->y[t];
    UNROLL
    for (int i = 0; i < count; i++) {
      const vf a = exp2v(step * A[i]);
      h[i] = a * h[i] + input * B[i];
      y += h[i] * C[i];
      if (keep) {
        r->a_kept[t * count + i] = a;
        r->h_kept[(t + 1) * count + i] = h[i];
      }
    }
    r->y[t] = y;
  }
  UNROLL
  for (int i = 0; i < count; i++) store(r->h + i * GROUP, h[i], LANES);
}

/* The recurrence, forward in time. Constant counts let the compiler keep the states in registers. */
INLINE void advance(int count, const int keep, const struct run *r) {
  if (count == STATES)
    advance_n(STATES, keep, r);
  else if (count == 4)
    advance_n(4, keep, r);
  else
    advance_n(1, keep, r);
}

/* What the reverse sweep of the same states adds to. */
struct reverse_run {
  ptrdiff_t N;                 /* rows of gB and gC lie so far apart */
  const vf *gy;                /* [t], gradient of y before the gate */
  float *g, *gA;               /* state-major scratch: decay * dL/dh of the token after; dA so far */
  vf *into_B, *into_A;         /* [t]: gather g B, and g a h_before A2 */
  float *gB, *gC;              /* [t][i]: dB and dC, summed over the lanes of each block */
};

INLINE void retreat_n(const int count, const struct run *r, const struct reverse_run *q) {
  vf A[STATES], g[STATES], gA[STATES];
  UNROLL
  for (int i = 0; i < count; i++) {
    A[i] = load(r->A2 + i * GROUP, LANES);
    g[i] = load(q->g + i * GROUP, LANES);
    gA[i] = load(q->gA + i * GROUP, LANES);
  }
  for (ptrdiff_t t = r->steps - 1; t >= 0; t--) {
    const float *B = r->B + t * r->B_row, *C = r->C + t * r->C_row;
    const vf *a = r->a_kept + t * count, *h = r->h_kept + t * count;
    const vf step = r->step[t], input = step * r->x[t], gy = q->gy[t];
    vf into_B = splat(0.0f), into_A = splat(0.0f);
    if (!r->first) into_B = q->into_B[t], into_A = q->into_A[t];
    vf of_B[STATES] = {{0}}, of_C[STATES] = {{0}};
    UNROLL
    for (int i = 0; i < count; i++) {
      const vf gh = g[i] + gy * C[i];
      of_C[i] = gy * h[count + i];
      of_B[i] = gh * input;
      into_B += gh * B[i];
      g[i] = gh * a[i];
      const vf w = g[i] * h[i];
      into_A += w * A[i];
      gA[i] += step * w;
    }
    add_totals(q->gC + t * q->N, of_C, count);
    add_totals(q->gB + t * q->N, of_B, count);
    q->into_B[t] = into_B;
    q->into_A[t] = into_A;
  }
  UNROLL
  for (int i = 0; i < count; i++) {
    store(q->g + i * GROUP, g[i], LANES);
    store(q->gA + i * GROUP, gA[i], LANES);
  }
}

/* The mirrored recurrence, backward in time, over states that `advance` has just kept. */
INLINE void retreat(int count, const struct run *r, const struct reverse_run *q) {
  if (count == STATES)
    retreat_n(STATES, r, q);
  else if (count == 4)
    retreat_n(4, r, q);
  else
    retreat_n(1, r, q);
}

/* ---- jobs ---- */

struct place { /* where a job or a block sits */
  ptrdiff_t b, group, first, width, n_chunks;
};

static struct place place_of(const struct scan_args *k, int64_t job) {
  const ptrdiff_t n_groups = archbench_scan_groups(k->n_channels);
  const ptrdiff_t n_blocks = (k->n_channels + LANES - 1) / LANES, width = (n_blocks + n_groups - 1) / n_groups * LANES;
  struct place at;
  at.b = job / n_groups;
  at.group = job % n_groups;
  at.first = at.group * width;
  at.width = at_most(width, k->n_channels - at.first);
  at.n_chunks = (k->n_tokens + k->chunk - 1) / k->chunk;
  return at;
}

/* Where the job's sums over channels for token t lie in gB and gC. */
static ptrdiff_t sums_of(const struct scan_args *k, const struct place *at, ptrdiff_t t) {
  return ((at->b * archbench_scan_groups(k->n_channels) + at->group) * k->n_tokens + t) * k->n_states;
}

struct strip { /* one block over some tokens */
  vf step[STRIP], x[STRIP], y[STRIP];
};

static void enter_strip(const struct scan_args *k, const struct place *at, ptrdiff_t t0, ptrdiff_t steps,
                        struct strip *strips) {
  const ptrdiff_t size = k->half ? 2 : 4;
  for (ptrdiff_t t = 0; t < steps; t++) {
    const ptrdiff_t x = row_at(&k->x, at->b, t0 + t) + at->first, dt = row_at(&k->dt, at->b, t0 + t) + at->first;
    struct strip *s = strips;
    for (ptrdiff_t i = 0; i < at->width; i += LANES, s++) {
      const ptrdiff_t m = at->width - i;
      const vf raw = load_as(k->half, k->dt.p, dt + i, m) + channels(k->dt_bias, at->first + i, m);
      s->x[t] = load_as(k->half, k->x.p, x + i, m);
      s->step[t] = softplus(raw, exp_minus_abs(raw));
      /* What the next strip reads, and the gates of this one; beyond the last token that reads nothing. */
      __builtin_prefetch((const char *)k->x.p + (x + i + STRIP * k->x.row) * size, 0, 2);
      __builtin_prefetch((const char *)k->dt.p + (dt + i + STRIP * k->dt.row) * size, 0, 2);
      if (k->z.p)
        __builtin_prefetch((const char *)k->z.p + (row_at(&k->z, at->b, t0 + t) + at->first + i) * size, 0, 2);
    }
  }
}

/* Gates the outputs and writes them. */
static void leave_strip(const struct scan_args *k, const struct place *at, ptrdiff_t t0, ptrdiff_t steps,
                        const struct strip *strips) {
  for (ptrdiff_t t = 0; t < steps; t++) {
    const ptrdiff_t z = row_at(&k->z, at->b, t0 + t) + at->first;
    const ptrdiff_t y = (at->b * k->n_tokens + t0 + t) * k->n_channels + at->first;
    const struct strip *s = strips;
    for (ptrdiff_t i = 0; i < at->width; i += LANES, s++) {
      const ptrdiff_t m = at->width - i;
      vf v = s->y[t];
      if (k->z.p) {
        const vf gate = load_as(k->half, k->z.p, z + i, m);
        v *= gate * logistic(gate, exp_minus_abs(gate));
      }
      store_as(k->half, k->y, y + i, v, m);
    }
  }
}

static void forward_job(const struct scan_args *k, int64_t job, float *A2, float *h, struct strip *strips) {
  const struct place at = place_of(k, job);
  const ptrdiff_t N = k->n_states, D = k->n_channels, b = at.b;
  to_lanes(A2, k->A + at.first * N, at.width, N, LOG2E);
  if (k->h0)
    to_lanes(h, k->h0 + (b * D + at.first) * N, at.width, N, 1.0f);
  else
    memset(h, 0, sizeof(float) * N * GROUP);
  for (ptrdiff_t t0 = 0, steps; t0 < k->n_tokens; t0 += steps) {
    steps = at_most(STRIP, at_most(k->n_tokens - t0, k->chunk - t0 % k->chunk)); /* a strip lies in one chunk */
    if (k->starts && t0 % k->chunk == 0)
      for (ptrdiff_t n = 0; n < N; n++)
        memcpy(k->starts + ((b * at.n_chunks + t0 / k->chunk) * N + n) * D + at.first, h + n * GROUP,
               sizeof(float) * at.width);
    enter_strip(k, &at, t0, steps, strips);
    for (ptrdiff_t i = 0; i < at.width; i += LANES) {
      struct strip *s = strips + i / LANES;
      const vf skip = channels(k->D, at.first + i, at.width - i);
      for (ptrdiff_t n = 0, count; n < N; n += count) {
        const struct run r = {
            .steps = steps, .B_row = k->B.row, .C_row = k->C.row, .first = n == 0, .skip = skip,
            .step = s->step, .x = s->x, .y = s->y, .B = row_of(&k->B, b, t0) + n,
            .C = row_of(&k->C, b, t0) + n, .A2 = A2 + n * GROUP + i, .h = h + n * GROUP + i,
        };
        count = together(N - n);
        advance((int)count, 0, &r);
      }
    }
    leave_strip(k, &at, t0, steps, strips);
  }
  from_lanes(k->h_last + (b * D + at.first) * N, h, at.width, N);
}

struct reverse_scratch {
  float *A2, *h, *g, *gA, *gD, *gbias;
  vf *strips, *a_kept, *h_kept;
};

/* One block over a chunk: what enters the reverse sweep, and what it gathers for the gradients that leave. */
struct reverse_strip {
  vf *x, *step, *slope, *y, *gy, *into_gz, *into_B, *into_A;
};

#define STRIP_FIELDS 8
/* Neighbouring arrays of chunks lie one vector further apart than they are long: at equal distances of a power of two
 * the vectors of one token would all compete for the same few places of a cache. */
#define STRIP_LENGTH(chunk) ((chunk) + 1)

static struct reverse_strip strip_of(const struct scan_args *k, const struct reverse_scratch *w, ptrdiff_t i) {
  const ptrdiff_t T = STRIP_LENGTH(k->chunk);
  vf *v = w->strips + i / LANES * STRIP_FIELDS * T;
  return (struct reverse_strip){v, v + T, v + 2 * T, v + 3 * T, v + 4 * T, v + 5 * T, v + 6 * T, v + 7 * T};
}

/* Rows are read and written whole, as in the forward pass, and exponentials made once. */
static void enter_chunk(const struct scan_args *k, const struct place *at, ptrdiff_t t0, ptrdiff_t steps,
                        const struct reverse_scratch *w) {
  const ptrdiff_t b = at->b, first = at->first;
  for (ptrdiff_t t = 0; t < steps; t++) {
    const ptrdiff_t x = row_at(&k->x, b, t0 + t) + first, dt = row_at(&k->dt, b, t0 + t) + first;
    const ptrdiff_t z = row_at(&k->z, b, t0 + t) + first, gy = row_at(&k->gy, b, t0 + t) + first;
    for (ptrdiff_t i = 0; i < at->width; i += LANES) {
      const struct reverse_strip s = strip_of(k, w, i);
      const ptrdiff_t m = at->width - i;
      const vf raw = load_as(k->half, k->dt.p, dt + i, m) + channels(k->dt_bias, first + i, m);
      const vf e = exp_minus_abs(raw);
      s.x[t] = load_as(k->half, k->x.p, x + i, m);
      s.step[t] = softplus(raw, e);
      s.slope[t] = logistic(raw, e);
      s.gy[t] = k->gy.p ? load_as(k->half, k->gy.p, gy + i, m) : splat(0.0f);
      if (k->z.p) {
        const vf gate = load_as(k->half, k->z.p, z + i, m), open = logistic(gate, exp_minus_abs(gate));
        s.into_gz[t] = s.gy[t] * open * (1.0f + gate * (1.0f - open));
        s.gy[t] *= gate * open;
      }
    }
  }
}

static void leave_chunk(const struct scan_args *k, const struct place *at, ptrdiff_t t0, ptrdiff_t steps,
                        const struct reverse_scratch *w) {
  for (ptrdiff_t t = 0; t < steps; t++) {
    const ptrdiff_t row = (at->b * k->n_tokens + t0 + t) * k->n_channels + at->first;
    for (ptrdiff_t i = 0; i < at->width; i += LANES) {
      const struct reverse_strip s = strip_of(k, w, i);
      const ptrdiff_t m = at->width - i;
      const vf skip = channels(k->D, at->first + i, m);
      const vf gdt = (s.x[t] * s.into_B[t] + LN2 * s.into_A[t]) * s.slope[t];
      store_as(k->half, k->gx, row + i, s.step[t] * s.into_B[t] + skip * s.gy[t], m);
      store_as(k->half, k->gdt, row + i, gdt, m);
      if (k->z.p) store_as(k->half, k->gz, row + i, s.into_gz[t] * s.y[t], m);
      store(w->gbias + i, load(w->gbias + i, LANES) + gdt, LANES);
      store(w->gD + i, load(w->gD + i, LANES) + s.gy[t] * s.x[t], LANES);
    }
  }
}

/* The sweeps of one block over one chunk, from states in h. */
static void reverse_block(const struct scan_args *k, const struct place *at, ptrdiff_t t0, ptrdiff_t steps,
                          ptrdiff_t i, const struct reverse_scratch *w) {
  const ptrdiff_t N = k->n_states, b = at->b, c = at->first + i, m = at->width - i;
  const ptrdiff_t out = sums_of(k, at, t0);
  const struct reverse_strip s = strip_of(k, w, i);
  for (ptrdiff_t n = 0, count; n < N; n += count) {
    const struct run r = {
        .steps = steps, .B_row = k->B.row, .C_row = k->C.row, .first = n == 0, .skip = channels(k->D, c, m),
        .step = s.step, .x = s.x, .y = s.y, .B = row_of(&k->B, b, t0) + n, .C = row_of(&k->C, b, t0) + n,
        .A2 = w->A2 + n * GROUP + i, .h = w->h + n * GROUP + i, .a_kept = w->a_kept, .h_kept = w->h_kept,
    };
    const struct reverse_run q = {
        .N = N, .gy = s.gy, .g = w->g + n * GROUP + i, .gA = w->gA + n * GROUP + i,
        .into_B = s.into_B, .into_A = s.into_A, .gB = k->gB + out + n, .gC = k->gC + out + n,
    };
    count = together(N - n);
    advance((int)count, 1, &r);
    retreat((int)count, &r, &q);
  }
}

static void backward_job(const struct scan_args *k, int64_t job, const struct reverse_scratch *w) {
  const struct place at = place_of(k, job);
  const ptrdiff_t N = k->n_states, D = k->n_channels, b = at.b;
  const size_t states = sizeof(float) * N * GROUP;
  memset(w->A2, 0, states); /* lanes beyond the last channel take part in sums over lanes: nothing may be left there */
  memset(w->h, 0, states);
  memset(w->g, 0, states);
  memset(w->gA, 0, states);
  memset(w->gD, 0, sizeof(float) * GROUP);
  memset(w->gbias, 0, sizeof(float) * GROUP);
  to_lanes(w->A2, k->A + at.first * N, at.width, N, LOG2E);
  if (k->gh) to_lanes(w->g, k->gh + (b * D + at.first) * N, at.width, N, 1.0f);
  for (ptrdiff_t j = at.n_chunks - 1; j >= 0; j--) {
    const ptrdiff_t t0 = j * k->chunk, steps = at_most(k->chunk, k->n_tokens - t0);
    memset(k->gB + sums_of(k, &at, t0), 0, sizeof(float) * steps * N);
    memset(k->gC + sums_of(k, &at, t0), 0, sizeof(float) * steps * N);
    for (ptrdiff_t n = 0; n < N; n++)
      memcpy(w->h + n * GROUP, k->starts + ((b * at.n_chunks + j) * N + n) * D + at.first, sizeof(float) * at.width);
    enter_chunk(k, &at, t0, steps, w);
    for (ptrdiff_t i = 0; i < at.width; i += LANES) reverse_block(k, &at, t0, steps, i, w);
    leave_chunk(k, &at, t0, steps, w);
  }
  from_lanes(k->gA + (b * D + at.first) * N, w->gA, at.width, N);
  from_lanes(k->gh0 + (b * D + at.first) * N, w->g, at.width, N);
  memcpy(k->gD + b * D + at.first, w->gD, sizeof(float) * at.width);
  memcpy(k->gbias + b * D + at.first, w->gbias, sizeof(float) * at.width);
}

/* Run jobs first .. last-1. */
int64_t archbench_scan_forward(const struct scan_args *k, int64_t first, int64_t last) {
  const size_t states = sizeof(float) * k->n_states * GROUP;
  char *room = scratch(2 * states + sizeof(struct strip) * (GROUP / LANES));
  if (!room) return NO_MEMORY;
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++)
    forward_job(k, job, (float *)room, (float *)(room + states), (struct strip *)(room + 2 * states));
  denormals_restore(mode);
  free(room);
  return OK;
}

int64_t archbench_scan_backward(const struct scan_args *k, int64_t first, int64_t last) {
  const size_t states = (size_t)k->n_states * GROUP, T = k->chunk;
  const size_t n_floats = 4 * states + 2 * GROUP, n_strips = STRIP_FIELDS * STRIP_LENGTH(T) * (GROUP / LANES);
  const size_t n_vectors = n_strips + 2 * (T + 1) * STATES;
  float *room = scratch(sizeof(float) * n_floats + sizeof(vf) * n_vectors);
  if (!room) return NO_MEMORY;
  vf *v = (vf *)(room + n_floats) + n_strips;
  const struct reverse_scratch w = {
      .A2 = room,
      .h = room + states,
      .g = room + 2 * states,
      .gA = room + 3 * states,
      .gD = room + 4 * states,
      .gbias = room + 4 * states + GROUP,
      .strips = (vf *)(room + n_floats),
      .a_kept = v,
      .h_kept = v + T * STATES + STATES, /* further apart than the first is long, as above */
  };
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++) backward_job(k, job, &w);
  denormals_restore(mode);
  free(room);
  return OK;
}

/* What a forward pass cannot do without, for measuring: the arithmetic of `tokens` tokens of LANES channels with
 * 8 `eighths` states each, exponentials, multiply-adds, softplus and gate, on registers alone. */
float archbench_scan_arithmetic(int64_t tokens, int64_t eighths) {
  vf A[8], h[8], y[4] = {{0}}, x = splat(-3.0f);
  for (int i = 0; i < 8; i++) {
    A[i] = splat(-1.0f - (float)i);
    h[i] = splat(0.0f);
  }
  for (int64_t t = 0; t < tokens; t++) {
    x += 1e-6f;
    const vf step = softplus(x, exp_minus_abs(x)), input = step * x;
    for (int64_t k = 0; k < eighths; k++) {
      UNROLL
      for (int i = 0; i < 8; i++) {
        h[i] = exp2v(step * A[i]) * h[i] + input * x;
        y[i % 4] += h[i] * x;
      }
    }
    const vf v = (y[0] + y[1]) + (y[2] + y[3]);
    y[t % 4] = v * logistic(v, exp_minus_abs(v)) * 1e-3f;
  }
  return total((y[0] + y[1]) + (y[2] + y[3]));
}
