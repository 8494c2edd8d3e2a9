/* A whole-model step of a pre-norm decoder (RMSNorm, rotary or no positions, grouped-query attention, SwiGLU) over a few
 * new tokens of every row, fp32 arithmetic, fp32 or bf16 weights and caches.
 *
 * Keys and values go into the caller's caches at each row's own place, then every new position attends to those up to
 * itself. One chain of operations per output whatever stands beside it (see panels.c), and attention of each position
 * for itself in an order that depends on its place alone: what is computed for a position does not depend, to the last
 * bit, on how many positions or rows one call reads.
 */
#define PRODUCT_HERE
#include "inference.c"

struct block {
  struct panels qkv, kv, out, gate_up, down; /* kv: the rows of keys and values of qkv, for heads */
  const float *norm_attention, *norm_ffn;
};

struct decode_args {
  /* the model */
  int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ffn, n_vocab;
  double eps;
  const void *embedding; /* (n_vocab, d_model) */
  int64_t half_embedding;
  const struct block *blocks;
  const float *norm;
  struct panels unembedding;
  struct panels drafts; /* unembeddings of draft heads, one after the other */
  const struct block *heads; /* or draft heads that are blocks on what the first n_trunk blocks make */
  int64_t n_heads_kept, n_trunk;
  /* one call */
  int64_t n_rows, n_new;
  const int64_t *tokens;            /* (n_rows, n_new); NULL: the stream holds what stands for them */
  int64_t length;                   /* positions read so far: row b `length - behind[b]` */
  const int64_t *behind;            /* or NULL */
  const float *cos, *sin;           /* (positions from `first_angle` on, head_dim / 2), or NULL */
  int64_t first_angle;
  void *const *caches;              /* keys of layer 0, its values, keys of layer 1, ..., keys of head 0, ...: (n_rows, n_kv_heads, capacity, head_dim) */
  int64_t capacity, half_caches;
  float *stream;                    /* (n_rows, n_new, d_model): what the last block makes */
  float *trunk;                     /* the same of the trunk, where heads are blocks */
  float *logits;                    /* (n_rows, n_new, n_vocab), or NULL */
  int64_t *best;                    /* (n_rows, n_new): the most likely tokens, or NULL */
  /* drafting */
  int64_t n_drafts;
  const float *last;                /* (n_rows, d_model): stream or trunk at the last position read */
  float *draft_logits;              /* (n_rows, n_drafts, n_vocab), or NULL */
  int64_t *block_tokens, *counts, *pending; /* speculate: (n_rows, n_drafts + 1), (n_rows), (n_rows) */
  float *next_last;                 /* speculate: (n_rows, d_model) */
};

int64_t archbench_lanes(void) { return LANES; }

/* ---- half caches ---- */

/* To the nearest bf16, ties to even. */
INLINE uint16_t narrowed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void narrow(const float *from, ptrdiff_t n, uint16_t *to) {
  for (ptrdiff_t i = 0; i < n; i++) to[i] = narrowed(from[i]);
}

static void widen(const uint16_t *from, ptrdiff_t n, float *to) {
  for (ptrdiff_t i = 0; i < n; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

/* ---- attention of the queries that share a head of keys and values ---- */

/* Where vector v of a head begins. The last one may overlap the one before, so that nothing beyond the head is read. */
INLINE ptrdiff_t vector_at(ptrdiff_t v, ptrdiff_t e) { return at_most(v * LANES, e - LANES); }

INLINE vf products_of(ptrdiff_t vectors, const float *q, const float *key, ptrdiff_t e) {
  vf sum = {0};
  UNROLL
  for (ptrdiff_t v = 0; v < vectors; v++) sum += load(q + v * LANES, LANES) * load(key + vector_at(v, e), LANES);
  return sum;
}

/* Scores of n keys. A rest that fills no vector of scores is computed with some before it once more. */
INLINE void score_as(const ptrdiff_t vectors, const float *q, const float *keys, ptrdiff_t n, ptrdiff_t e, float *scores) {
  if (n < LANES) {
    for (ptrdiff_t s = 0; s < n; s++) scores[s] = total(products_of(vectors, q, keys + s * e, e));
    return;
  }
  for (ptrdiff_t s = 0; s < n; s += LANES) {
    const ptrdiff_t from = at_most(s, n - LANES);
    vf sums[LANES];
    UNROLL
    for (int l = 0; l < LANES; l++) sums[l] = products_of(vectors, q, keys + (from + l) * e, e);
    store(scores + from, totals(sums), LANES);
  }
}

/* Adds n weighted values to four chains of sums in turn. */
INLINE void mix_as(const int vectors, ptrdiff_t begin, const float *weights, const float *values, ptrdiff_t n, ptrdiff_t e,
                   float *sums) {
  const ptrdiff_t row = (e + LANES - 1) / LANES * LANES;
  vf sum[4][4];
  UNROLL
  for (int c = 0; c < 4; c++)
    UNROLL
    for (int v = 0; v < vectors; v++) sum[c][v] = load(sums + c * row + (begin + v) * LANES, LANES);
  ptrdiff_t s = 0;
  for (; s + 4 <= n; s += 4) {
    UNROLL
    for (int c = 0; c < 4; c++) {
      const vf w = splat(weights[s + c]);
      UNROLL
      for (int v = 0; v < vectors; v++) sum[c][v] += w * load(values + (s + c) * e + vector_at(begin + v, e), LANES);
    }
  }
  UNROLL
  for (int c = 0; c < 3; c++)
    if (s + c < n) {
      const vf w = splat(weights[s + c]);
      UNROLL
      for (int v = 0; v < vectors; v++) sum[c][v] += w * load(values + (s + c) * e + vector_at(begin + v, e), LANES);
    }
  UNROLL
  for (int c = 0; c < 4; c++)
    UNROLL
    for (int v = 0; v < vectors; v++) store(sums + c * row + (begin + v) * LANES, sum[c][v], LANES);
}

/* Heads narrower than a vector go one number after the other, all in the first chain. */
static void score(const float *q, const float *keys, ptrdiff_t n, ptrdiff_t e, float *scores) {
  if (e < LANES)
    for (ptrdiff_t s = 0; s < n; s++) {
      float sum = 0;
      for (ptrdiff_t i = 0; i < e; i++) sum += q[i] * keys[s * e + i];
      scores[s] = sum;
    }
  else if (e == 2 * LANES)
    score_as(2, q, keys, n, e, scores);
  else if (e == 4 * LANES)
    score_as(4, q, keys, n, e, scores);
  else
    score_as((e + LANES - 1) / LANES, q, keys, n, e, scores);
}

static void mix(const float *weights, const float *values, ptrdiff_t n, ptrdiff_t e, float *sums) {
  if (e < LANES) {
    for (ptrdiff_t s = 0; s < n; s++)
      for (ptrdiff_t i = 0; i < e; i++) sums[i] += weights[s] * values[s * e + i];
    return;
  }
  const ptrdiff_t vectors = (e + LANES - 1) / LANES;
  ptrdiff_t v = 0;
  for (; v + 4 <= vectors; v += 4) mix_as(4, v, weights, values, n, e, sums);
  for (; v < vectors; v += 1) mix_as(1, v, weights, values, n, e, sums);
}

/* Scores become weights; what they sum to. */
static float weigh(float *scores, ptrdiff_t n) {
  for (ptrdiff_t s = n; s % LANES; s++) scores[s] = -3e38f;
  vf most = load(scores, LANES);
  for (ptrdiff_t s = LANES; s < n; s += LANES) most = larger(load(scores + s, LANES), most);
  const float best = largest_lane(most);
  vf sum = {0};
  for (ptrdiff_t s = 0; s < n; s += LANES) {
    const vf weight = exp2v(load(scores + s, LANES) - splat(best));
    sum += weight;
    store(scores + s, weight, LANES);
  }
  return total(sum);
}

#define SOME 64 /* positions whose keys or values all queries go through while they lie in the nearest cache */

/* What a group of queries works on: query j sees keys 0 .. visible + j / heads - 1. */
struct queries {
  ptrdiff_t n, heads, visible;
  float *laid_out, *scores, *sums; /* rows of q_row, score_row and sum_row numbers */
  ptrdiff_t q_row, score_row, sum_row;
  float *wide; /* SOME keys or values of a half cache */
};

INLINE ptrdiff_t visible_to(const struct queries *q, ptrdiff_t j) { return q->visible + j / q->heads; }

/* Up to SOME keys or values from position s on. */
INLINE const float *some_of(const struct queries *q, int half, const void *cache, ptrdiff_t s, ptrdiff_t last, ptrdiff_t e) {
  if (!half) return (const float *)cache + s * e;
  widen((const uint16_t *)cache + s * e, (at_most(s + SOME, last) - s) * e, q->wide);
  return q->wide;
}

/* Softmax attention up to the last division: behind the sums stands what they are to be multiplied by.
 * Source: Vaswani et al. 2017, eq. 1. */
static void attend(int half, const struct queries *q, const void *keys, const void *values, ptrdiff_t e) {
  const ptrdiff_t last = visible_to(q, q->n - 1);
  for (ptrdiff_t s = 0; s < last; s += SOME) {
    const float *some = some_of(q, half, keys, s, last, e);
    for (ptrdiff_t j = 0; j < q->n; j++)
      score(q->laid_out + j * q->q_row, some, at_most(SOME, visible_to(q, j) - s), e, q->scores + j * q->score_row + s);
  }
  for (ptrdiff_t j = 0; j < q->n; j++) {
    float *sums = q->sums + j * q->sum_row;
    memset(sums, 0, (size_t)(q->sum_row - LANES) * sizeof *sums);
    sums[q->sum_row - LANES] = 1.0f / weigh(q->scores + j * q->score_row, visible_to(q, j));
  }
  for (ptrdiff_t s = 0; s < last; s += SOME) {
    const float *some = some_of(q, half, values, s, last, e);
    for (ptrdiff_t j = 0; j < q->n; j++)
      mix(q->scores + j * q->score_row + s, some, at_most(SOME, visible_to(q, j) - s), e, q->sums + j * q->sum_row);
  }
}

/* The query in whole vectors, scaled so that scores are exponents of 2; the last vector is zero where it overlaps. */
INLINE void lay_out(const float *q, ptrdiff_t e, float *to) {
  const float scale = 1.44269504f / sqrtf((float)e);
  const ptrdiff_t whole = e < LANES ? e : e / LANES * LANES;
  for (ptrdiff_t i = 0; i < whole; i++) to[i] = q[i] * scale;
  if (whole < e)
    for (ptrdiff_t l = 0; l < LANES; l++) {
      const ptrdiff_t i = e - LANES + l;
      to[whole + l] = i < whole ? 0 : q[i] * scale;
    }
}

/* The four chains together, times the scale behind them. */
INLINE void collect(const float *sums, ptrdiff_t sum_row, ptrdiff_t e, float *out) {
  const ptrdiff_t row = (e + LANES - 1) / LANES * LANES;
  const float scale = sums[sum_row - LANES];
  for (ptrdiff_t v = 0; v * LANES < e; v++) {
    vf sum[4];
    UNROLL
    for (int c = 0; c < 4; c++) sum[c] = load(sums + c * row + v * LANES, LANES);
    const vf mixed = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * scale;
    if (e < LANES)
      store(out, mixed, e);
    else
      store(out + vector_at(v, e), mixed, LANES);
  }
}

/* ---- the step ---- */

struct room {
  float *normed, *qkv, *mixed, *inner, *logits, *drafting;
  struct queries queries;
};

INLINE int64_t position_of(const struct decode_args *a, ptrdiff_t row, ptrdiff_t i) {
  return a->length - (a->behind ? a->behind[row] : 0) + i;
}

/* Rotary positions in half-split pairs (i, i + e/2). Source: Su et al. 2021, eq. 34. */
INLINE void rotate(const struct decode_args *a, ptrdiff_t position, float *restrict x) {
  const ptrdiff_t half = a->head_dim / 2;
  const float *cos = a->cos + (position - a->first_angle) * half, *sin = a->sin + (position - a->first_angle) * half;
  for (ptrdiff_t i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

INLINE void keep(const struct decode_args *a, void *cache, ptrdiff_t row, ptrdiff_t head, ptrdiff_t position,
                 const float *from) {
  const ptrdiff_t e = a->head_dim, place = ((row * a->n_kv_heads + head) * a->capacity + position) * e;
  if (a->half_caches)
    narrow(from, e, (uint16_t *)cache + place);
  else
    memcpy((float *)cache + place, from, (size_t)e * sizeof *from);
}

/* Turns the projected heads of every new position, `queries` of them and those of keys; keys and values go into the
 * caches. */
static void keep_all(const struct decode_args *a, void *keys, void *values, float *projected, ptrdiff_t queries) {
  const ptrdiff_t e = a->head_dim, shared = a->n_kv_heads, width = (queries + 2 * shared) * e;
  for (ptrdiff_t row = 0; row < a->n_rows; row++)
    for (ptrdiff_t i = 0; i < a->n_new; i++) {
      float *heads = projected + (row * a->n_new + i) * width;
      const ptrdiff_t position = position_of(a, row, i);
      if (a->cos)
        for (ptrdiff_t h = 0; h < queries + shared; h++) rotate(a, position, heads + h * e);
      for (ptrdiff_t g = 0; g < shared; g++) {
        keep(a, keys, row, g, position, heads + (queries + g) * e);
        keep(a, values, row, g, position, heads + (queries + shared + g) * e);
      }
    }
}

static void attention(const struct decode_args *a, void *keys, void *values, struct room *room) {
  const ptrdiff_t e = a->head_dim, heads = a->n_heads, shared = a->n_kv_heads, group = heads / shared;
  const ptrdiff_t width = (heads + 2 * shared) * e;
  keep_all(a, keys, values, room->qkv, heads);
  const size_t number = a->half_caches ? 2 : 4;
  for (ptrdiff_t row = 0; row < a->n_rows; row++)
    for (ptrdiff_t g = 0; g < shared; g++) {
      const struct queries *q = &room->queries;
      const ptrdiff_t r = row * a->n_new;
      for (ptrdiff_t j = 0; j < q->n; j++)
        lay_out(room->qkv + (r + j / group) * width + (g * group + j % group) * e, e, q->laid_out + j * q->q_row);
      room->queries.visible = position_of(a, row, 0) + 1;
      const size_t place = (size_t)((row * shared + g) * a->capacity * e) * number;
      attend((int)a->half_caches, q, (char *)keys + place, (char *)values + place, e);
      for (ptrdiff_t j = 0; j < q->n; j++)
        collect(q->sums + j * q->sum_row, q->sum_row, e, room->mixed + ((r + j / group) * heads + g * group + j % group) * e);
    }
}

static void norm_rows(const struct decode_args *a, const float *x, const float *gain, ptrdiff_t m, float *y) {
  const ptrdiff_t d = a->d_model;
  for (ptrdiff_t r = 0; r < m; r++) rms_norm(x + r * d, gain, (float)a->eps, d, y + r * d);
}

static void one_block(const struct decode_args *a, const struct block *block, void *keys, void *values,
                      struct room *room) {
  const ptrdiff_t m = a->n_rows * a->n_new, d = a->d_model, f = a->d_ffn, mixed = a->n_heads * a->head_dim;
  norm_rows(a, a->stream, block->norm_attention, m, room->normed);
  product(&block->qkv, room->normed, d, m, room->qkv, block->qkv.n_out, 0);
  attention(a, keys, values, room);
  product(&block->out, room->mixed, mixed, m, a->stream, d, 1);
  norm_rows(a, a->stream, block->norm_ffn, m, room->normed);
  product(&block->gate_up, room->normed, d, m, room->inner, 2 * f, 0);
  for (ptrdiff_t r = 0; r < m; r++) silu_times(room->inner + r * 2 * f, room->inner + r * 2 * f + f, f, room->inner + r * 2 * f);
  product(&block->down, room->inner, 2 * f, m, a->stream, d, 1);
}

/* Logits of m vectors of the stream through `heads`, to `logits` (in `room` if NULL), and their largest to `best`. */
static void predict(const struct decode_args *a, const struct panels *heads, const float *stream, ptrdiff_t m,
                    const struct room *room, float *logits, int64_t *best) {
  if (!logits && !best) return;
  float *to = logits ? logits : room->logits;
  norm_rows(a, stream, a->norm, m, room->normed);
  product(heads, room->normed, a->d_model, m, to, heads->n_out, 0);
  if (best)
    for (ptrdiff_t r = 0; r < m * heads->n_out / a->n_vocab; r++) best[r] = largest(to + r * a->n_vocab, a->n_vocab);
}

/* What the trunk makes, and the heads' keys and values of it. */
static void fill_heads(const struct decode_args *a, struct room *room) {
  const ptrdiff_t m = a->n_rows * a->n_new, d = a->d_model;
  memcpy(a->trunk, a->stream, (size_t)(m * d) * sizeof *a->stream);
  for (ptrdiff_t h = 0; h < a->n_heads_kept; h++) {
    const struct block *head = a->heads + h;
    void *const *caches = a->caches + 2 * (a->n_layers + h);
    norm_rows(a, a->trunk, head->norm_attention, m, room->normed);
    product(&head->kv, room->normed, d, m, room->qkv, head->kv.n_out, 0);
    keep_all(a, caches[0], caches[1], room->qkv, 0);
  }
}

static int64_t read_tokens(const struct decode_args *a, const int64_t *tokens, struct room *room) {
  if (tokens) {
    const ptrdiff_t m = a->n_rows * a->n_new;
    const int64_t outcome = look_up(a->embedding, a->half_embedding, a->n_vocab, a->d_model, tokens, m, a->stream);
    if (outcome != OK) return outcome;
  }
  for (ptrdiff_t layer = 0; layer < a->n_layers; layer++) {
    one_block(a, a->blocks + layer, a->caches[2 * layer], a->caches[2 * layer + 1], room);
    if (a->n_heads_kept && layer + 1 == a->n_trunk) fill_heads(a, room);
  }
  predict(a, &a->unembedding, a->stream, a->n_rows * a->n_new, room, a->logits, a->best);
  return OK;
}

/* A head that is a block reads the last position once more, now with its query: the keys and values it writes are those
 * that stand there. */
static void draft_by_blocks(const struct decode_args *a, const struct room *room, int64_t *best) {
  const ptrdiff_t d = a->d_model, rows = a->n_rows, n = a->n_drafts, v = a->n_vocab;
  struct decode_args one = *a;
  struct room its = *room;
  one.n_new = 1;
  one.length = a->length - 1;
  one.stream = room->drafting;
  its.queries.n = its.queries.heads;
  float *logits = a->draft_logits ? a->draft_logits : room->logits;
  for (ptrdiff_t h = 0; h < n; h++) {
    void *const *caches = a->caches + 2 * (a->n_layers + h);
    memcpy(one.stream, a->last, (size_t)(rows * d) * sizeof *one.stream);
    one_block(&one, a->heads + h, caches[0], caches[1], &its);
    norm_rows(a, one.stream, a->norm, rows, room->normed);
    product(&a->unembedding, room->normed, d, rows, logits + h * v, n * v, 0);
    if (best)
      for (ptrdiff_t r = 0; r < rows; r++) best[r * n + h] = largest(logits + (r * n + h) * v, v);
  }
}

static void draft(const struct decode_args *a, const struct room *room, int64_t *best) {
  if (a->n_heads_kept) {
    draft_by_blocks(a, room, best);
    return;
  }
  struct panels heads = a->drafts;
  heads.n_out = a->n_drafts * a->n_vocab;
  predict(a, &heads, a->last, a->n_rows, room, a->draft_logits, best);
}

INLINE ptrdiff_t whole_vectors(ptrdiff_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Scratch for one call, in one piece; it is not cleared. */
static float *make_room(const struct decode_args *a, struct room *room) {
  const ptrdiff_t m = a->n_rows * a->n_new, e = a->head_dim, drafted = a->n_rows * a->n_drafts;
  struct queries *q = &room->queries;
  q->heads = a->n_heads / a->n_kv_heads;
  q->n = a->n_new * q->heads;
  q->q_row = whole_vectors(e);
  q->score_row = whole_vectors(a->length + a->n_new);
  q->sum_row = 4 * whole_vectors(e) + LANES;
  const ptrdiff_t sizes[] = {m * a->d_model,    m * (a->n_heads + 2 * a->n_kv_heads) * e, m * a->n_heads * e,
                             m * 2 * a->d_ffn,  (m > drafted ? m : drafted) * a->n_vocab, q->n * q->q_row,
                             q->n * q->score_row, q->n * q->sum_row, a->half_caches ? SOME * e : 0,
                             a->n_heads_kept ? a->n_rows * a->d_model : 0};
  float **const places[] = {&room->normed, &room->qkv,   &room->mixed, &room->inner, &room->logits,
                            &q->laid_out,  &q->scores,   &q->sums,     &q->wide,     &room->drafting};
  ptrdiff_t sum = 0;
  for (int i = 0; i < 10; i++) sum += whole_vectors(sizes[i]);
  void *memory = NULL;
  if (posix_memalign(&memory, 64, (size_t)sum * sizeof(float))) return NULL;
  float *next = memory;
  for (int i = 0; i < 10; i++) {
    *places[i] = next;
    next += whole_vectors(sizes[i]);
  }
  return memory;
}

/* Reads n_new tokens of every row. */
int64_t archbench_decode_read(const struct decode_args *a) {
  struct room room;
  float *memory = make_room(a, &room);
  if (!memory) return NO_MEMORY;
  const int64_t outcome = read_tokens(a, a->tokens, &room);
  free(memory);
  return outcome;
}

/* Reads a token of every row, then the most likely next one, and so on: n_new tokens into `best`. The stream has one row
 * for each of n_rows. */
int64_t archbench_decode_write(const struct decode_args *all) {
  struct decode_args a = *all;
  struct room room;
  a.length += all->n_new - 1; /* scratch for the last step */
  a.n_new = 1;
  float *memory = make_room(&a, &room);
  int64_t *next = malloc((size_t)a.n_rows * sizeof *next);
  int64_t outcome = memory && next ? OK : NO_MEMORY;
  for (ptrdiff_t i = 0; outcome == OK && i < all->n_new; i++) {
    a.length = all->length + i;
    a.best = next;
    outcome = read_tokens(&a, i ? next : all->tokens, &room);
    for (ptrdiff_t row = 0; row < a.n_rows; row++) all->best[row * all->n_new + i] = next[row];
  }
  free(next);
  free(memory);
  return outcome;
}

/* Logits of the draft heads at `last`. */
int64_t archbench_decode_draft(const struct decode_args *a) {
  struct room room;
  float *memory = make_room(a, &room);
  if (!memory) return NO_MEMORY;
  draft(a, &room, NULL);
  free(memory);
  return OK;
}

/* A greedy step of self-speculation: drafts n_new - 1 tokens, reads them behind the token given (tokens is (n_rows)),
 * and keeps those that are the most likely ones. `best` holds what is written, `counts` how much of it. */
int64_t archbench_decode_speculate(const struct decode_args *a) {
  const ptrdiff_t k = a->n_new, d = a->d_model;
  struct room room;
  float *memory = make_room(a, &room);
  if (!memory) return NO_MEMORY;
  draft(a, &room, a->best);
  for (ptrdiff_t row = 0; row < a->n_rows; row++) {
    a->block_tokens[row * k] = a->tokens[row];
    memcpy(a->block_tokens + row * k + 1, a->best + row * (k - 1), (size_t)(k - 1) * sizeof *a->best);
  }
  const int64_t outcome = read_tokens(a, a->block_tokens, &room);
  for (ptrdiff_t row = 0; row < a->n_rows; row++) {
    const int64_t *drafts = a->block_tokens + row * k + 1, *best = a->best + row * k;
    ptrdiff_t kept = 0;
    while (kept < k - 1 && drafts[kept] == best[kept]) kept++;
    a->counts[row] = kept + 1;
    a->pending[row] = best[kept];
    const float *ends = a->n_heads_kept ? a->trunk : a->stream;
    memcpy(a->next_last + row * d, ends + (row * k + kept) * d, (size_t)d * sizeof *ends);
  }
  free(memory);
  return outcome;
}
