/* A whole-model step of Mamba or Mamba-2 over a few new tokens of every row, fp32 arithmetic, fp32 or bf16 weights.
 *
 * Per block, for the tokens of a row one after the other where the recurrence wants it:
 *
 *   Mamba      x, z = Win n(u)       x = silu(conv x)         r, B, C = Wx x         step = softplus(Wdt r + bias)
 *   Mamba-2    z, xBC, dt = Win n(u) x, B, C = silu(conv xBC)                        step = softplus(dt + bias), limited
 *              h = exp(step A) h + step x B        y = (C h + D x) silu(z)           u += Wout y
 *
 * with A a number a channel and state in Mamba, a number a head in Mamba-2, where y passes through RMSNorm a group.
 * States are the caller's, written in place: of each block the last width - 1 inputs of the convolution, and h with its
 * states side by side, so lanes hold states here (channels in scan.c).
 *
 * Every output is one chain of operations whatever stands beside it (see panels.c), and tokens of a row go through
 * convolution and recurrence one by one: results do not depend, to the last bit, on how many tokens or rows a call reads.
 */
#include "inference.c"

#define LOG2E 1.44269504f

struct mixer { /* one block */
  struct panels in_proj, x_proj, dt_proj, out_proj; /* x_proj and dt_proj: Mamba */
  const float *norm;                                /* (d) */
  const float *conv, *conv_bias;                    /* (width, convolved), (convolved) */
  const float *step_bias, *decay, *skip;            /* (D), (D, N), (D); of heads in Mamba-2. decay: A log2(e) */
  const float *inner_norm;                          /* (D): Mamba-2 */
};

struct recurrent_args {
  /* the model */
  int64_t n_layers, d_model, d_inner, n_states, width, n_vocab;
  int64_t rank;              /* of Mamba's steps */
  int64_t n_heads, n_groups; /* of Mamba-2; no heads: Mamba */
  double eps, step_floor, step_ceiling;
  const void *embedding; /* (n_vocab, d_model) */
  int64_t half_embedding;
  const struct mixer *mixers;
  const float *norm;
  struct panels unembedding;
  /* one call */
  int64_t n_rows, n_new;
  const int64_t *tokens;  /* (n_rows, n_new) */
  float *const *states;   /* window of block 0 (n_rows, width - 1, convolved), its h (n_rows, D, N), ... */
  float *hidden;          /* (n_rows, n_new, d_model): after the last norm, or NULL */
  float *logits;          /* (n_rows, n_new, n_vocab), or NULL */
  int64_t *best;          /* (n_rows): the most likely token after the last one, or NULL */
};

struct room { /* scratch of a call; of each token but for `steps` and `inputs`, which are of one */
  float *stream, *normed, *projected, *convolved, *selected, *raw_steps, *mixed, *steps, *inputs, *decays, *logits;
};

INLINE ptrdiff_t channels_of(const struct recurrent_args *a) { /* of the convolution */
  return a->d_inner + 2 * a->n_groups * a->n_states * (a->n_heads > 0);
}

INLINE ptrdiff_t projected_width(const struct recurrent_args *a) {
  return a->n_heads ? a->d_inner + channels_of(a) + a->n_heads : 2 * a->d_inner;
}

/* silu(conv) of the new tokens of one row, `x` their inputs (rows `x_row` apart), and the window after them. */
static void convolve(const struct recurrent_args *a, const struct mixer *w, float *window, const float *x,
                     ptrdiff_t x_row, float *y) {
  const ptrdiff_t channels = channels_of(a), before = a->width - 1, t = a->n_new;
  for (ptrdiff_t i = 0; i < t; i++, y += channels)
    for (ptrdiff_t c = 0; c < channels; c += LANES) {
      const ptrdiff_t m = channels - c;
      vf sum = load(w->conv_bias + c, m);
      for (ptrdiff_t j = 0; j < a->width; j++) {
        const ptrdiff_t at = i + j - before;
        const float *from = at < 0 ? window + (before + at) * channels : x + at * x_row;
        sum += load(w->conv + j * channels + c, m) * load(from + c, m);
      }
      store(y + c, siluv(sum), m);
    }
  const ptrdiff_t kept = t < before ? before - t : 0;
  memmove(window, window + (before - kept) * channels, sizeof(float) * kept * channels);
  for (ptrdiff_t i = kept; i < before; i++)
    memcpy(window + i * channels, x + (t - before + i) * x_row, sizeof(float) * channels);
}

/* LANES channels over one token: h = decay h + input B and its product with C. `decays` is of channel and state, to be
 * multiplied by the channel's step and taken to the power of 2, or with `shared` of the channel alone and final. */
INLINE vf advance(const int shared, ptrdiff_t N, ptrdiff_t n_channels, const float *steps, const float *inputs,
                  const float *decays, const float *B, const float *C, float *h) {
  vf sums[LANES] = {{0}};
  for (ptrdiff_t n = 0; n < N; n += LANES) {
    const ptrdiff_t m = N - n;
    const vf b = load(B + n, m), c = load(C + n, m);
    UNROLL
    for (int l = 0; l < LANES; l++) {
      if (l >= n_channels) break;
      float *state = h + l * N + n;
      const vf decay = shared ? splat(decays[l]) : exp2v(splat(steps[l]) * load(decays + l * N + n, m));
      const vf next = decay * load(state, m) + splat(inputs[l]) * b;
      store(state, next, m);
      sums[l] += next * c;
    }
  }
  return totals(sums);
}

INLINE vf positive(const struct recurrent_args *a, vf raw) { /* the step */
  const vf step = softplus(raw, exp_minus_abs(raw)), low = splat((float)a->step_floor), high = splat((float)a->step_ceiling);
  const vf limited = choose(step < low, low, step);
  return choose(limited > high, high, limited);
}

/* y = (C h + D x) silu(z) of one token, D and N wide. */
static void select_one(const struct recurrent_args *a, const struct mixer *w, const float *x, const float *z,
                       const float *raw, const float *B, const float *C, float *h, const struct room *room, float *y) {
  const ptrdiff_t D = a->d_inner, N = a->n_states;
  for (ptrdiff_t c = 0; c < D; c += LANES) {
    const vf step = positive(a, load(raw + c, D - c) + load(w->step_bias + c, D - c));
    store(room->steps + c, step, LANES);
    store(room->inputs + c, step * load(x + c, D - c), LANES);
  }
  for (ptrdiff_t c = 0; c < D; c += LANES) {
    const ptrdiff_t m = D - c;
    const float *steps = room->steps + c, *inputs = room->inputs + c, *decays = w->decay + c * N;
    const vf sums = N == LANES && m >= LANES ? advance(0, LANES, LANES, steps, inputs, decays, B, C, h + c * N)
                                             : advance(0, N, m, steps, inputs, decays, B, C, h + c * N);
    store(y + c, (sums + load(w->skip + c, m) * load(x + c, m)) * siluv(load(z + c, m)), m);
  }
}

/* y = (C h + D x) silu(z) of one token, normed a group. */
static void select_one_by_heads(const struct recurrent_args *a, const struct mixer *w, const float *x, const float *z,
                                const float *raw, const float *B, const float *C, float *h, const struct room *room,
                                float *y) {
  const ptrdiff_t D = a->d_inner, N = a->n_states, H = a->n_heads, P = D / H, of_group = H / a->n_groups;
  for (ptrdiff_t head = 0; head < H; head += LANES) {
    const ptrdiff_t m = H - head;
    const vf step = positive(a, load(raw + head, m) + load(w->step_bias + head, m));
    store(room->steps + head, step, LANES);
    store(room->decays + head, exp2v(step * load(w->decay + head, m)), LANES);
  }
  for (ptrdiff_t head = 0; head < H; head++) {
    const float *b = B + head / of_group * N, *c = C + head / of_group * N;
    float decays[LANES];
    for (int l = 0; l < LANES; l++) decays[l] = room->decays[head];
    for (ptrdiff_t p = 0; p < P; p += LANES) {
      const ptrdiff_t at = head * P + p, m = P - p;
      const vf channel = load(x + at, m);
      store(room->inputs, room->steps[head] * channel, LANES);
      const vf sums = m >= LANES ? advance(1, N, LANES, NULL, room->inputs, decays, b, c, h + at * N)
                                 : advance(1, N, m, NULL, room->inputs, decays, b, c, h + at * N);
      store(y + at, (sums + w->skip[head] * channel) * siluv(load(z + at, m)), m);
    }
  }
  const ptrdiff_t wide = D / a->n_groups;
  for (ptrdiff_t g = 0; g < D; g += wide) rms_norm(y + g, w->inner_norm + g, (float)a->eps, wide, y + g);
}

static void one_block(const struct recurrent_args *a, const struct mixer *w, float *windows, float *states,
                      const struct room *room) {
  const ptrdiff_t t = a->n_new, m = a->n_rows * t, d = a->d_model, D = a->d_inner, N = a->n_states;
  const ptrdiff_t wide = projected_width(a), channels = channels_of(a), selected = a->rank + 2 * N;
  const ptrdiff_t in = a->n_heads ? D : 0, gate = a->n_heads ? 0 : D; /* where in the projection these begin */
  for (ptrdiff_t r = 0; r < m; r++) rms_norm(room->stream + r * d, w->norm, (float)a->eps, d, room->normed + r * d);
  product(&w->in_proj, room->normed, d, m, room->projected, wide, 0);
  for (ptrdiff_t row = 0; row < a->n_rows; row++)
    convolve(a, w, windows + row * (a->width - 1) * channels, room->projected + row * t * wide + in, wide,
             room->convolved + row * t * channels);
  if (!a->n_heads) {
    product(&w->x_proj, room->convolved, channels, m, room->selected, selected, 0);
    product(&w->dt_proj, room->selected, selected, m, room->raw_steps, D, 0);
  }
  for (ptrdiff_t row = 0; row < a->n_rows; row++)
    for (ptrdiff_t r = row * t; r < (row + 1) * t; r++) {
      const float *x = room->convolved + r * channels, *from = room->projected + r * wide, *z = from + gate;
      float *h = states + row * D * N, *y = room->mixed + r * D;
      if (a->n_heads) {
        const float *B = x + D, *C = B + a->n_groups * N;
        select_one_by_heads(a, w, x, z, from + D + channels, B, C, h, room, y);
      } else {
        const float *B = room->selected + r * selected + a->rank, *C = B + N;
        select_one(a, w, x, z, room->raw_steps + r * D, B, C, h, room, y);
      }
    }
  product(&w->out_proj, room->mixed, D, m, room->stream, d, 1);
}

/* Scratch for one call, in one piece; it is not cleared. */
static float *make_room(const struct recurrent_args *a, struct room *room) {
  const ptrdiff_t m = a->n_rows * a->n_new, D = a->d_inner + LANES, H = a->n_heads + LANES;
  const ptrdiff_t sizes[] = {m * a->d_model, m * a->d_model, m * projected_width(a), m * channels_of(a),
                             m * (a->rank + 2 * a->n_states), m * a->d_inner, m * a->d_inner, D + H, D, H,
                             a->n_rows * a->n_vocab};
  float **const places[] = {&room->stream,    &room->normed, &room->projected, &room->convolved, &room->selected,
                            &room->raw_steps, &room->mixed,  &room->steps,     &room->inputs,    &room->decays,
                            &room->logits};
  const int count = sizeof sizes / sizeof *sizes;
  ptrdiff_t sum = 0;
  for (int i = 0; i < count; i++) sum += (sizes[i] + 15) / 16 * 16;
  void *memory = NULL;
  if (posix_memalign(&memory, 64, (size_t)sum * sizeof(float))) return NULL;
  float *next = memory;
  for (int i = 0; i < count; i++) {
    *places[i] = next;
    next += (sizes[i] + 15) / 16 * 16;
  }
  return memory;
}

/* The last norm, and what is wanted of the rest. */
static void predict(const struct recurrent_args *a, const struct room *room) {
  const ptrdiff_t t = a->n_new, m = a->n_rows * t, d = a->d_model, v = a->n_vocab;
  float *hidden = a->hidden ? a->hidden : room->normed;
  if (a->hidden || a->logits)
    for (ptrdiff_t r = 0; r < m; r++) rms_norm(room->stream + r * d, a->norm, (float)a->eps, d, hidden + r * d);
  if (a->logits) product(&a->unembedding, hidden, d, m, a->logits, v, 0);
  if (!a->best) return;
  for (ptrdiff_t row = 0; row < a->n_rows; row++) {
    rms_norm(room->stream + (row * t + t - 1) * d, a->norm, (float)a->eps, d, room->normed + row * d);
  }
  product(&a->unembedding, room->normed, d, a->n_rows, room->logits, v, 0);
  for (ptrdiff_t row = 0; row < a->n_rows; row++) a->best[row] = largest(room->logits + row * v, v);
}

static int64_t read_tokens(const struct recurrent_args *a, const struct room *room) {
  const ptrdiff_t m = a->n_rows * a->n_new;
  for (ptrdiff_t r = 0; r < m; r++)
    if (a->tokens[r] < 0 || a->tokens[r] >= a->n_vocab) return NO_SUCH_TOKEN; /* before any state is touched */
  look_up(a->embedding, a->half_embedding, a->n_vocab, a->d_model, a->tokens, m, room->stream);
  for (ptrdiff_t layer = 0; layer < a->n_layers; layer++)
    one_block(a, a->mixers + layer, a->states[2 * layer], a->states[2 * layer + 1], room);
  predict(a, room);
  return OK;
}

/* Reads n_new tokens of every row. */
int64_t archbench_recurrent_read(const struct recurrent_args *a) {
  struct room room;
  float *memory = make_room(a, &room);
  if (!memory) return NO_MEMORY;
  const uint64_t mode = denormals_off();
  const int64_t outcome = read_tokens(a, &room);
  denormals_restore(mode);
  free(memory);
  return outcome;
}

/* Reads a token of every row, then the most likely next one, and so on: n_new of them into `best` (n_rows, n_new). */
int64_t archbench_recurrent_write(const struct recurrent_args *all) {
  struct recurrent_args a = *all;
  struct room room;
  a.n_new = 1;
  float *memory = make_room(&a, &room);
  int64_t *next = malloc((size_t)a.n_rows * sizeof *next);
  int64_t outcome = memory && next ? OK : NO_MEMORY;
  const uint64_t mode = denormals_off();
  a.best = next;
  for (ptrdiff_t i = 0; outcome == OK && i < all->n_new; i++) {
    outcome = read_tokens(&a, &room);
    if (outcome == OK)
      for (ptrdiff_t row = 0; row < a.n_rows; row++) all->best[row * all->n_new + i] = next[row];
    a.tokens = next;
  }
  denormals_restore(mode);
  free(next);
  free(memory);
  return outcome;
}
