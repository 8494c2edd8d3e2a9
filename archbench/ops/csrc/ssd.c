/* State-space duality (Mamba-2) as a recurrence, forward and backward, fp32.
 *
 *   h[p][n] = exp(step A) h[p][n] + step x[p] B[n]        A, step and so the decay are scalars of a head
 *   y[p]    = sum_n C[n] h[p][n] + D x[p]
 *
 * Lanes hold neighbouring channels p of one head. One job is one batch row and some heads of one group, GROUP channels
 * or a little less; as in scan.c, STATES state indices at a time keep their h in registers over a chunk of tokens, the
 * forward pass keeps h at the chunk starts only ("starts"), and the backward pass rebuilds one chunk of one block of
 * lanes in scratch and sweeps it in reverse. With one exponential a head and token, this is three multiply-adds a
 * channel and state, fewer than the matrix products of the chunked form take.
 *
 * Jobs never write to the same place and do not depend on the number of threads; sums over heads (dB, dC) and over rows
 * (dA, dD) leave here as one partial per job or row, added up by the caller in a fixed order.
 */
#include "lanes.c"

#define GROUP 256
#define LOG2E 1.44269504f

struct ssd_args {
  int64_t n_batch, n_tokens, n_heads, width, n_groups, n_states, chunk;
  struct rows x, step, B, C;     /* rows of (h p), (h), (g n), (g n) */
  const float *A, *D, *h0;       /* A (h); D (h) or NULL; h0 (b, h, p, n) or NULL */
  float *y, *h_last, *starts;    /* y (b, t, h, p); h_last (b, h, p, n); starts (b, chunks, h, n, p) or NULL */
  struct rows gy;                /* backward: gradient of y, p may be NULL ... */
  const float *gh;               /* ... and of h_last, or NULL */
  float *gx, *gstep;             /* (b, t, h, p); (b, t, h) */
  float *gA, *gD, *gh0;          /* (b, h); (b, h); (b, h, p, n) */
  float *gB, *gC;                /* (b, jobs of a row, t, n) */
};

/* ---- jobs ---- */

struct place { /* where a job sits */
  ptrdiff_t b, of_row, group, first, heads, n_chunks;
};

/* Heads of one job: as many of a group as make up GROUP channels. */
INLINE ptrdiff_t heads_per_job(const struct ssd_args *k) {
  const ptrdiff_t of_group = k->n_heads / k->n_groups, wanted = GROUP / k->width;
  return wanted < 1 ? 1 : at_most(wanted, of_group);
}

INLINE ptrdiff_t jobs_per_group(const struct ssd_args *k) {
  const ptrdiff_t each = heads_per_job(k);
  return (k->n_heads / k->n_groups + each - 1) / each;
}

int64_t archbench_ssd_jobs_per_group(const struct ssd_args *k) { return jobs_per_group(k); }

static struct place place_of(const struct ssd_args *k, int64_t job) {
  const ptrdiff_t each = heads_per_job(k), per_group = jobs_per_group(k), of_group = k->n_heads / k->n_groups;
  struct place at;
  at.b = job / (per_group * k->n_groups);
  at.of_row = job % (per_group * k->n_groups);
  at.group = at.of_row / per_group;
  const ptrdiff_t inside = at.of_row % per_group * each;
  at.first = at.group * of_group + inside;
  at.heads = at_most(each, of_group - inside);
  at.n_chunks = (k->n_tokens + k->chunk - 1) / k->chunk;
  return at;
}

/* Width of a head in scratch: whole blocks of lanes. */
INLINE ptrdiff_t padded(const struct ssd_args *k) { return (k->width + LANES - 1) / LANES * LANES; }

/* Between the caller's (p, n) and state-major scratch [n][padded p]. */
static void to_lanes(float *to, const float *from, ptrdiff_t P, ptrdiff_t N, ptrdiff_t row) {
  for (ptrdiff_t p = 0; p < P; p++)
    for (ptrdiff_t n = 0; n < N; n++) to[n * row + p] = from[p * N + n];
}

static void from_lanes(float *to, const float *from, ptrdiff_t P, ptrdiff_t N, ptrdiff_t row) {
  for (ptrdiff_t p = 0; p < P; p++)
    for (ptrdiff_t n = 0; n < N; n++) to[p * N + n] = from[n * row + p];
}

/* ---- the recurrence of one block of lanes over a chunk ---- */

struct run {
  ptrdiff_t steps, B_row, C_row, h_row;
  const float *decay;          /* [t] */
  const vf *input;             /* [t]: step x */
  const float *B, *C;
  float *h;                    /* [n][h_row], updated */
  vf *y;                       /* [t], gathers C . h */
  vf *h_kept;                  /* backward only: [t + 1][i], the state before the chunk at 0 */
};

INLINE void advance_n(const int count, const int keep, const struct run *r) {
  vf h[STATES];
  UNROLL
  for (int i = 0; i < count; i++) {
    h[i] = load(r->h + i * r->h_row, LANES);
    if (keep) r->h_kept[i] = h[i];
  }
  for (ptrdiff_t t = 0; t < r->steps; t++) {
    const float *B = r->B + t * r->B_row, *C = r->C + t * r->C_row;
    const vf a = splat(r->decay[t]), input = r->input[t];
    vf y = keep ? input : r->y[t];
    UNROLL
    for (int i = 0; i < count; i++) {
      h[i] = a * h[i] + input * B[i];
      if (keep)
        r->h_kept[(t + 1) * count + i] = h[i];
      else
        y += h[i] * C[i];
    }
    if (!keep) r->y[t] = y;
  }
  UNROLL
  for (int i = 0; i < count; i++) store(r->h + i * r->h_row, h[i], LANES);
}

/* Forward in time. Constant counts let the compiler keep the states in registers. */
INLINE void advance(int count, const int keep, const struct run *r) {
  if (count == STATES)
    advance_n(STATES, keep, r);
  else if (count == 4)
    advance_n(4, keep, r);
  else
    advance_n(1, keep, r);
}

struct reverse_run {
  ptrdiff_t N;                 /* rows of gB and gC lie so far apart */
  const vf *gy;                /* [t] */
  float *g;                    /* [n][h_row]: decay * dL/dh of the token after */
  vf *into_B, *into_decay;     /* [t]: sums over states of g B, and of g a h_before */
  float *gB, *gC;              /* [t][i]: dB and dC, summed over the lanes of each block */
};

INLINE void retreat_n(const int count, const struct run *r, const struct reverse_run *q) {
  vf g[STATES];
  UNROLL
  for (int i = 0; i < count; i++) g[i] = load(q->g + i * r->h_row, LANES);
  for (ptrdiff_t t = r->steps - 1; t >= 0; t--) {
    const float *B = r->B + t * r->B_row, *C = r->C + t * r->C_row;
    const vf *h = r->h_kept + t * count;
    const vf a = splat(r->decay[t]), input = r->input[t], gy = q->gy[t];
    vf into_B = q->into_B[t], into_decay = q->into_decay[t];
    vf of_B[STATES] = {{0}}, of_C[STATES] = {{0}};
    UNROLL
    for (int i = 0; i < count; i++) {
      const vf gh = g[i] + gy * C[i];
      of_C[i] = gy * h[count + i];
      of_B[i] = gh * input;
      into_B += gh * B[i];
      g[i] = gh * a;
      into_decay += g[i] * h[i];
    }
    add_totals(q->gC + t * q->N, of_C, count);
    add_totals(q->gB + t * q->N, of_B, count);
    q->into_B[t] = into_B;
    q->into_decay[t] = into_decay;
  }
  UNROLL
  for (int i = 0; i < count; i++) store(q->g + i * r->h_row, g[i], LANES);
}

/* Backward in time, over states that `advance` has just kept. */
INLINE void retreat(int count, const struct run *r, const struct reverse_run *q) {
  if (count == STATES)
    retreat_n(STATES, r, q);
  else if (count == 4)
    retreat_n(4, r, q);
  else
    retreat_n(1, r, q);
}

/* Decays of one head over a chunk, LANES tokens at a time; `decay` has room for whole blocks. */
static void enter_head(const struct ssd_args *k, ptrdiff_t b, ptrdiff_t t0, ptrdiff_t steps, ptrdiff_t head,
                       float *decay) {
  const float A2 = k->A[head] * LOG2E;
  for (ptrdiff_t t = 0; t < steps; t++) decay[t] = A2 * row_of(&k->step, b, t0 + t)[head];
  for (ptrdiff_t t = 0; t < steps; t += LANES) store(decay + t, exp2v(load(decay + t, LANES)), LANES);
}

/* step x and D x of one block of lanes over a chunk. */
INLINE void enter_block(const struct ssd_args *k, ptrdiff_t b, ptrdiff_t t0, ptrdiff_t steps, ptrdiff_t head,
                        ptrdiff_t i, ptrdiff_t m, vf *input, vf *y) {
  const float skip = k->D ? k->D[head] : 0.0f;
  for (ptrdiff_t t = 0; t < steps; t++) {
    const vf x = load(row_of(&k->x, b, t0 + t) + head * k->width + i, m);
    input[t] = row_of(&k->step, b, t0 + t)[head] * x;
    y[t] = skip * x;
  }
}

static void forward_job(const struct ssd_args *k, int64_t job, float *h, float *decay, vf *input, vf *y) {
  const struct place at = place_of(k, job);
  const ptrdiff_t N = k->n_states, P = k->width, H = k->n_heads, row = padded(k), b = at.b;
  for (ptrdiff_t head = at.first; head < at.first + at.heads; head++) {
    memset(h, 0, sizeof(float) * N * row);
    if (k->h0) to_lanes(h, k->h0 + (b * H + head) * P * N, P, N, row);
    for (ptrdiff_t j = 0; j < at.n_chunks; j++) {
      const ptrdiff_t t0 = j * k->chunk, steps = at_most(k->chunk, k->n_tokens - t0);
      if (k->starts)
        for (ptrdiff_t n = 0; n < N; n++)
          memcpy(k->starts + (((b * at.n_chunks + j) * H + head) * N + n) * P, h + n * row, sizeof(float) * P);
      enter_head(k, b, t0, steps, head, decay);
      for (ptrdiff_t i = 0; i < P; i += LANES) {
        enter_block(k, b, t0, steps, head, i, P - i, input, y);
        for (ptrdiff_t n = 0, count; n < N; n += count) {
          const struct run r = {
              .steps = steps, .B_row = k->B.row, .C_row = k->C.row, .h_row = row, .decay = decay, .input = input,
              .B = row_of(&k->B, b, t0) + at.group * N + n, .C = row_of(&k->C, b, t0) + at.group * N + n,
              .h = h + n * row + i, .y = y,
          };
          count = together(N - n);
          advance((int)count, 0, &r);
        }
        for (ptrdiff_t t = 0; t < steps; t++)
          store(k->y + ((b * k->n_tokens + t0 + t) * H + head) * P + i, y[t], P - i);
      }
    }
    from_lanes(k->h_last + (b * H + head) * P * N, h, P, N, row);
  }
}

/* Where the job's sums over channels for token t lie in gB and gC. */
static ptrdiff_t sums_of(const struct ssd_args *k, const struct place *at, ptrdiff_t t) {
  const ptrdiff_t jobs_of_row = jobs_per_group(k) * k->n_groups;
  return ((at->b * jobs_of_row + at->of_row) * k->n_tokens + t) * k->n_states;
}

struct reverse_scratch {
  float *h, *g, *decay, *gA, *gD;  /* h of one head, g of every head of the job; gA and gD of every head */
  vf *input, *y, *gy, *into_B, *into_decay, *of_step, *h_kept;
};

/* Gradients of one head over one chunk; what its channels give to dB and dC is added there. */
static void reverse_head(const struct ssd_args *k, const struct place *at, ptrdiff_t j, ptrdiff_t of_job,
                         const struct reverse_scratch *w) {
  const ptrdiff_t N = k->n_states, P = k->width, H = k->n_heads, row = padded(k), b = at->b, head = at->first + of_job;
  const ptrdiff_t t0 = j * k->chunk, steps = at_most(k->chunk, k->n_tokens - t0);
  const ptrdiff_t sums = sums_of(k, at, t0);
  const float skip = k->D ? k->D[head] : 0.0f;
  vf gD = splat(0.0f);
  enter_head(k, b, t0, steps, head, w->decay);
  memset(w->into_decay, 0, sizeof(vf) * steps);
  memset(w->of_step, 0, sizeof(vf) * steps);
  for (ptrdiff_t i = 0; i < P; i += LANES) {
    const ptrdiff_t m = P - i;
    enter_block(k, b, t0, steps, head, i, m, w->input, w->y);
    for (ptrdiff_t t = 0; t < steps; t++) {
      w->gy[t] = k->gy.p ? load(row_of(&k->gy, b, t0 + t) + head * P + i, m) : splat(0.0f);
      w->into_B[t] = splat(0.0f);
    }
    for (ptrdiff_t n = 0; n < N; n++)
      store(w->h + n * row + i, load(k->starts + (((b * at->n_chunks + j) * H + head) * N + n) * P + i, m), LANES);
    for (ptrdiff_t n = 0, count; n < N; n += count) {
      const struct run r = {
          .steps = steps, .B_row = k->B.row, .C_row = k->C.row, .h_row = row, .decay = w->decay, .input = w->input,
          .B = row_of(&k->B, b, t0) + at->group * N + n, .C = row_of(&k->C, b, t0) + at->group * N + n,
          .h = w->h + n * row + i, .h_kept = w->h_kept,
      };
      const struct reverse_run q = {
          .N = N, .gy = w->gy, .g = w->g + (of_job * N + n) * row + i, .into_B = w->into_B,
          .into_decay = w->into_decay, .gB = k->gB + sums + n, .gC = k->gC + sums + n,
      };
      count = together(N - n);
      advance((int)count, 1, &r);
      retreat((int)count, &r, &q);
    }
    for (ptrdiff_t t = 0; t < steps; t++) {
      const vf x = load(row_of(&k->x, b, t0 + t) + head * P + i, m);
      const float step = row_of(&k->step, b, t0 + t)[head];
      store(k->gx + ((b * k->n_tokens + t0 + t) * H + head) * P + i, step * w->into_B[t] + skip * w->gy[t], m);
      w->of_step[t] += x * w->into_B[t];
      gD += x * w->gy[t];
    }
  }
  float gA = 0.0f;
  for (ptrdiff_t t = 0; t < steps; t++) {
    const float into_exponent = total(w->into_decay[t]);
    k->gstep[(b * k->n_tokens + t0 + t) * H + head] = total(w->of_step[t]) + k->A[head] * into_exponent;
    gA += row_of(&k->step, b, t0 + t)[head] * into_exponent;
  }
  w->gA[of_job] += gA;
  w->gD[of_job] += total(gD);
}

static void backward_job(const struct ssd_args *k, int64_t job, const struct reverse_scratch *w) {
  const struct place at = place_of(k, job);
  const ptrdiff_t N = k->n_states, P = k->width, H = k->n_heads, row = padded(k), b = at.b;
  memset(w->g, 0, sizeof(float) * at.heads * N * row);
  memset(w->gA, 0, sizeof(float) * at.heads);
  memset(w->gD, 0, sizeof(float) * at.heads);
  if (k->gh)
    for (ptrdiff_t i = 0; i < at.heads; i++)
      to_lanes(w->g + i * N * row, k->gh + (b * H + at.first + i) * P * N, P, N, row);
  for (ptrdiff_t j = at.n_chunks - 1; j >= 0; j--) {
    const ptrdiff_t t0 = j * k->chunk, steps = at_most(k->chunk, k->n_tokens - t0);
    memset(k->gB + sums_of(k, &at, t0), 0, sizeof(float) * steps * N);
    memset(k->gC + sums_of(k, &at, t0), 0, sizeof(float) * steps * N);
    for (ptrdiff_t i = 0; i < at.heads; i++) reverse_head(k, &at, j, i, w);
  }
  for (ptrdiff_t i = 0; i < at.heads; i++) {
    from_lanes(k->gh0 + (b * H + at.first + i) * P * N, w->g + i * N * row, P, N, row);
    k->gA[b * H + at.first + i] = w->gA[i];
    k->gD[b * H + at.first + i] = w->gD[i];
  }
}

/* Run jobs first .. last-1. */
int64_t archbench_ssd_forward(const struct ssd_args *k, int64_t first, int64_t last) {
  const size_t T = k->chunk, states = (size_t)k->n_states * padded(k);
  vf *room = scratch(sizeof(vf) * 2 * T + sizeof(float) * (T + LANES + states));
  if (!room) return NO_MEMORY;
  float *decay = (float *)(room + 2 * T);
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++)
    forward_job(k, job, decay + T + LANES, decay, room, room + T);
  denormals_restore(mode);
  free(room);
  return OK;
}

int64_t archbench_ssd_backward(const struct ssd_args *k, int64_t first, int64_t last) {
  const size_t T = k->chunk, states = (size_t)k->n_states * padded(k), heads = heads_per_job(k);
  const size_t n_vectors = 6 * T + (T + 1) * STATES;
  const size_t n_floats = T + LANES + states * (1 + heads) + 2 * heads;
  vf *v = scratch(sizeof(vf) * n_vectors + sizeof(float) * n_floats);
  if (!v) return NO_MEMORY;
  float *f = (float *)(v + n_vectors);
  const struct reverse_scratch w = {
      .input = v,
      .y = v + T,
      .gy = v + 2 * T,
      .into_B = v + 3 * T,
      .into_decay = v + 4 * T,
      .of_step = v + 5 * T,
      .h_kept = v + 6 * T,
      .decay = f,
      .h = f + T + LANES,
      .g = f + T + LANES + states,
      .gA = f + T + LANES + states * (1 + heads),
      .gD = f + T + LANES + states * (1 + heads) + heads,
  };
  const uint64_t mode = denormals_off();
  for (int64_t job = first; job < last; job++) backward_job(k, job, &w);
  denormals_restore(mode);
  free(v);
  return OK;
}
