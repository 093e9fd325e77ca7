// What main.py's LanguageModel computes in sampling, on a Linux CPU and without MLX: a pass over a
// token of each of several texts, or over part of a prompt, then the choice of a token. step.py
// compiles this file and calls `read_tokens` and `sample_token`.
//
// Names and order are main.py's. Weights are the model's own arrays, all float32. Shapes: N tokens
// of a pass, of any of B texts; V, D, H, K and d as in main.py's Config; F is its mlp_dim.

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

typedef struct {  // a block's weights; those that it does not have are 0
  const float* input_layernorm;           // [D]
  const float *q_proj, *q_bias;           // [H * d, D], [H * d]
  const float *k_proj, *k_bias;           // [K * d, D], [K * d]
  const float *v_proj, *v_bias;           // [K * d, D], [K * d]
  const float* o_proj;                    // [D, H * d]
  const float *q_norm, *k_norm;           // [d]
  const float* post_attention_layernorm;  // [D]
  const float *gate_proj, *up_proj;       // [F, D]; gate_proj: of SwiGLU alone
  const float* down_proj;                 // [D, F]
} Block;

enum { RELU2, GELU, SWIGLU };

typedef struct {
  long V, D, H, K, d, F, num_blocks, mlp, threads;
  double norm_eps;
  const double* frequencies;              // [d / 2] in radians per position
  const float *embed_tokens, *lm_head;    // [V, D], the same if they are tied
  const float* norm;                      // [D]
  const Block* layers;
  // fast.c's cblas_sgemm, or 0 where there is no fast BLAS.
  void (*sgemm)(int, int, int, int, int, int, float, const float*, int, const float*, int, float,
                float*, int);
} Model;

typedef struct {  // what main.py's KVCaches hold
  float* keys;    // [num_blocks, B, K, capacity, d]
  float* values;  // [num_blocks, B, K, d, capacity], so that `attend` sums along rows
  long B, capacity;  // capacity: a multiple of PAD
} Cache;

// ---- Products -----------------------------------------------------------------------------------
#if defined __AVX512F__
#define WIDTH 16
#elif defined __AVX__
#define WIDTH 8
#else
#define WIDTH 4  // SSE, NEON
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int ints __attribute__((vector_size(4 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define PAD 16  // rows of buffers have a multiple of this length
#define MOST_TOKENS 512  // of a pass, as each needs memory
#define FEW 16  // rows of x that are multiplied here; more, as of a prompt, by a BLAS

typedef struct {
  const float* data;
  long rows, columns, stride;
} Matrix;

INLINE long padded(long n) { return (n + PAD - 1) / PAD * PAD; }

INLINE float sum_of(vec v) {
  float total = 0;
  UNROLL for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
}

// The dot product of two vectors [n]: four sums, as each addition waits for the one before.
static float dot(const float* x, const float* w, long n) {
  vec sums[4] = {0};
  long i = 0;
  for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
    UNROLL for (int u = 0; u < 4; u++) {
      const float* at = w + i + u * WIDTH;
      __builtin_prefetch(at + 256);  // the next rows, too: memory is what takes the time
      sums[u] += *(const vec*) (x + i + u * WIDTH) * *(const vec*) at;
    }
  }
  for (; i + WIDTH <= n; i += WIDTH) sums[0] += *(const vec*) (x + i) * *(const vec*) (w + i);
  float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) total += x[i] * w[i];
  return total;
}

#define ROWS 2  // of w, and
#define TEXTS 4  // of x, that are multiplied together: their sums stay in registers

// out[t * stride + r] = x row t . w row r
static void dots(Matrix x, Matrix w, float* out, long stride) {
  vec sums[ROWS][TEXTS] = {0};
  long i = 0;
  for (; i + WIDTH <= w.columns; i += WIDTH) {
    vec weights[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
      const float* at = w.data + r * w.stride + i;
      __builtin_prefetch(at + ROWS * w.stride);
      weights[r] = *(const vec*) at;
    }
    UNROLL for (int t = 0; t < TEXTS; t++) {
      vec xs = *(const vec*) (x.data + t * x.stride + i);
      UNROLL for (int r = 0; r < ROWS; r++) sums[r][t] += weights[r] * xs;
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int t = 0; t < TEXTS; t++) {
      const float *at = w.data + r * w.stride, *xs = x.data + t * x.stride;
      float total = sum_of(sums[r][t]);
      for (long j = i; j < w.columns; j++) total += at[j] * xs[j];
      out[t * stride + r] = total;
    }
}

// out [x.rows, w.rows] = x @ w.T, by one thread; rows of `out` lie `stride` apart.
static void multiply(const Model* model, Matrix x, Matrix w, float* out, long stride) {
  if (x.rows >= FEW && model->sgemm) {
    model->sgemm(101, 111, 112, x.rows, w.rows, w.columns, 1, x.data, x.stride, w.data, w.stride,
                 0, out, stride);
    return;
  }
  for (long r = 0; r < w.rows; r += ROWS) {
    Matrix some = {w.data + r * w.stride, ROWS, w.columns, w.stride};
    long num_rows = r + ROWS <= w.rows ? ROWS : w.rows - r, t = 0;
    for (; num_rows == ROWS && t + TEXTS <= x.rows; t += TEXTS) {
      Matrix texts = {x.data + t * x.stride, TEXTS, x.columns, x.stride};
      dots(texts, some, out + t * stride + r, stride);
    }
    for (; t < x.rows; t++)
      for (long i = 0; i < num_rows; i++)
        out[t * stride + r + i] = dot(x.data + t * x.stride, some.data + i * w.stride, w.columns);
  }
}

// Where this thread's share of n rows begins or, if `next` is 1, that of the next thread: its end.
static long share(long n, int next) {
  long t = omp_get_thread_num() + next, threads = omp_get_num_threads();
  return t == threads ? n : n / PAD * t / threads * PAD;
}

typedef struct { atomic_int arrived, round; } Meeting;

// Waits until all threads are here. OpenMP's own barrier would soon sleep, as training needs it:
// then a token took up to three times as long. Soon, other programs get the core meanwhile.
static void meet(Meeting* meeting) {
  int round = atomic_load(&meeting->round);
  if (atomic_fetch_add(&meeting->arrived, 1) == omp_get_num_threads() - 1) {
    atomic_store(&meeting->arrived, 0);
    atomic_store(&meeting->round, round + 1);
    return;
  }
  for (int i = 0; atomic_load(&meeting->round) == round; i++) {
    if (i > 100) sched_yield();
#ifdef __x86_64__
    else __builtin_ia32_pause();
#endif
  }
}

// This thread's share of the rows of out [N, rows] = x [N, columns] @ weight.T + bias.
static void linear(const Model* model, const float* weight, const float* bias, long rows,
                   long columns, const float* x, long N, float* out) {
  long begin = share(rows, 0), end = share(rows, 1);
  Matrix w = {weight + begin * columns, end - begin, columns, columns};
  multiply(model, (Matrix){x, N, columns, columns}, w, out + begin, rows);
  if (!bias) return;
  for (long n = 0; n < N; n++)
    for (long r = begin; r < end; r++) out[n * rows + r] += bias[r];
}

// ---- Model --------------------------------------------------------------------------------------
// Without branches, so that loops with it use the vector units.
INLINE float exp_of(float x) {  // of x <= 0, within 5e-7 of the result
  unsigned bits;
  memcpy(&bits, &x, 4);
  // The bits of numbers below 0 grow as they fall: these are those of -87.
  bits = bits < 0xC2AE0000 ? bits : 0xC2AE0000;
  memcpy(&x, &bits, 4);
  int whole = (int) (x * 1.44269504f - 0.5f);
  float f = x - whole * 0.693147181f;
  float p = 1 + f * (1 + f * (0.5f + f * (1.f / 6 + f * (1.f / 24 + f * (1.f / 120 + f / 720)))));
  bits = (unsigned) (whole + 127) << 23;  // of 2 to the `whole`
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

static float largest_of(const float* x, long n) {
  float largest = x[0];
  long i = 0;
  if (n >= WIDTH) {
    vec maxima = *(const vec*) x;
    for (; i + WIDTH <= n; i += WIDTH) {
      vec xs = *(const vec*) (x + i);
      ints is_larger = xs > maxima;  // -1, all bits, or 0
      maxima = (vec) (((ints) xs & is_larger) | ((ints) maxima & ~is_larger));
    }
    for (int j = 0; j < WIDTH; j++) largest = maxima[j] > largest ? maxima[j] : largest;
  }
  for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

static void softmax(float* scores, long n) {
  float largest = largest_of(scores, n), total = 0;
  for (long j = 0; j < n; j++) scores[j] = exp_of(scores[j] - largest);
  for (long j = 0; j < n; j++) total += scores[j];
  for (long j = 0; j < n; j++) scores[j] /= total;
}

static void rms_norm(const Model* model, const float* x, const float* weight, long n, float* out) {
  float squares = 0;
  for (long i = 0; i < n; i++) squares += x[i] * x[i];
  float factor = 1 / sqrtf(squares / n + (float) model->norm_eps);
  for (long i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

// RoPE of one head [d], after its norm if there is one; turn: cosines [d / 2], then sines.
static void rotate(const Model* model, const float* x, const float* norm, const float* turn,
                   float* out) {
  long half = model->d / 2;
  if (norm) rms_norm(model, x, norm, model->d, out);
  else memcpy(out, x, model->d * sizeof(float));
  for (long i = 0; i < half; i++) {
    float a = out[i], b = out[i + half];
    out[i] = a * turn[i] - b * turn[half + i];
    out[i + half] = b * turn[i] + a * turn[half + i];
  }
}

static void fill_turn(const Model* model, long position, float* turn) {
  for (long i = 0; i < model->d / 2; i++) {
    double angle = position * model->frequencies[i];
    turn[i] = cos(angle);
    turn[model->d / 2 + i] = sin(angle);
  }
}

// Adds this thread's share of the columns of x [N, D] to hidden [N, D].
static void add(long D, long N, const float* x, float* hidden) {
  long begin = share(D, 0), end = share(D, 1);
  for (long n = 0; n < N; n++)
    for (long i = begin; i < end; i++) hidden[n * D + i] += x[n * D + i];
}

typedef struct {  // some tokens of one text, one after the other
  long begin, end;      // among the N of a pass
  long text, position;  // of the first
} Piece;

typedef struct {  // what a pass computes
  float *hidden, *output;      // [N, D]
  float *q, *attended;         // [N, H, d]
  float *k, *v;                // [N, K, d]
  float *up, *gate;            // [N, F]
  float* turns;                // [N, d], see fill_turn
} State;

// The index of a head's keys and values of a text, in a block, among all of the cache.
static long place_of(const Model* model, const Cache* cache, long layer, long text, long head) {
  return (layer * cache->B + text) * model->K + head;
}

// Adds a head's keys and values of a piece to a block's cache.
static void update_cache(const Model* model, const Cache* cache, long layer, const State* state,
                         Piece piece, long head) {
  long K = model->K, d = model->d, capacity = cache->capacity;
  long place = place_of(model, cache, layer, piece.text, head);
  float *keys = cache->keys + place * capacity * d, *values = cache->values + place * capacity * d;
  for (long n = piece.begin; n < piece.end; n++) {
    long position = piece.position + n - piece.begin;
    const float *k = state->k + (n * K + head) * d, *v = state->v + (n * K + head) * d;
    const float* norm = model->layers[layer].k_norm;
    rotate(model, k, norm, state->turns + n * d, keys + position * d);
    for (long i = 0; i < d; i++) values[i * capacity + position] = v[i];
  }
}

// Causal attention of a piece's queries to a head of keys, which `shared` heads of queries share.
// buffer: [L * shared, 2 * d + padded(positions)].
static void attend(const Model* model, const Cache* cache, long layer, const State* state,
                   Piece piece, long head, float* buffer) {
  long H = model->H, d = model->d, shared = H / model->K, L = piece.end - piece.begin;
  long place = place_of(model, cache, layer, piece.text, head);
  const float* keys = cache->keys + place * cache->capacity * d;
  const float* values = cache->values + place * cache->capacity * d;
  long positions = piece.position + L, stride = padded(positions), rows = L * shared;
  float *queries = buffer, *sums = queries + rows * d, *scores = sums + rows * d;
  float scale = 1 / sqrtf(d);
  for (long i = 0; i < rows; i++) {
    long n = piece.begin + i / shared, h = head * shared + i % shared;
    const float* norm = model->layers[layer].q_norm;
    rotate(model, state->q + (n * H + h) * d, norm, state->turns + n * d, queries + i * d);
    for (long j = 0; j < d; j++) queries[i * d + j] *= scale;
  }
  Matrix of_queries = {queries, rows, d, d}, of_keys = {keys, positions, d, d};
  multiply(model, of_queries, of_keys, scores, stride);
  for (long i = 0; i < rows; i++) {
    long seen = piece.position + i / shared + 1;
    softmax(scores + i * stride, seen);
    memset(scores + i * stride + seen, 0, (positions - seen) * sizeof(float));
  }
  Matrix of_scores = {scores, rows, positions, stride};
  Matrix of_values = {values, d, positions, cache->capacity};
  multiply(model, of_scores, of_values, sums, d);
  for (long i = 0; i < rows; i++) {
    long n = piece.begin + i / shared, h = head * shared + i % shared;
    memcpy(state->attended + (n * H + h) * d, sums + i * d, d * sizeof(float));
  }
}

// The activation of this thread's share of `up` [N, F]; gate: as `up`, of SwiGLU.
static void activate(const Model* model, long N, float* up, const float* gate) {
  long F = model->F, begin = share(F, 0), end = share(F, 1);
  for (long n = 0; n < N; n++) {
    float* x = up + n * F;
    const float* g = gate + n * F;
    if (model->mlp == RELU2)
      for (long i = begin; i < end; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
    else if (model->mlp == GELU)
      for (long i = begin; i < end; i++) x[i] = x[i] * (1 + erff(x[i] * 0.707106781f)) / 2;
    else
      for (long i = begin; i < end; i++) {
        float e = exp_of(g[i] > 0 ? -g[i] : g[i]);  // of -|g|
        x[i] *= g[i] * (g[i] > 0 ? 1 : e) / (1 + e);
      }
  }
}

// The part of one thread in a pass; normed: [N, D], buffer: as in `attend`.
static void run_blocks(const Model* model, const Cache* cache, long N, const State* state,
                       const Piece* pieces, long num_pieces, Meeting* meeting, float* normed,
                       float* buffer) {
  long t = omp_get_thread_num(), threads = omp_get_num_threads();
  long D = model->D, K = model->K, queries = model->H * model->d, keys = K * model->d, F = model->F;
  for (long layer = 0; layer < model->num_blocks; layer++) {
    const Block* block = model->layers + layer;
    for (long n = 0; n < N; n++)
      rms_norm(model, state->hidden + n * D, block->input_layernorm, D, normed + n * D);
    linear(model, block->q_proj, block->q_bias, queries, D, normed, N, state->q);
    linear(model, block->k_proj, block->k_bias, keys, D, normed, N, state->k);
    linear(model, block->v_proj, block->v_bias, keys, D, normed, N, state->v);
    meet(meeting);
    for (long i = t; i < num_pieces * K; i += threads)
      update_cache(model, cache, layer, state, pieces[i / K], i % K);
    meet(meeting);
    for (long i = t; i < num_pieces * K; i += threads)
      attend(model, cache, layer, state, pieces[i / K], i % K, buffer);
    meet(meeting);
    linear(model, block->o_proj, 0, D, queries, state->attended, N, state->output);
    add(D, N, state->output, state->hidden);
    meet(meeting);
    for (long n = 0; n < N; n++)
      rms_norm(model, state->hidden + n * D, block->post_attention_layernorm, D, normed + n * D);
    linear(model, block->up_proj, 0, F, D, normed, N, state->up);
    if (model->mlp == SWIGLU) linear(model, block->gate_proj, 0, F, D, normed, N, state->gate);
    activate(model, N, state->up, state->gate);
    meet(meeting);
    linear(model, block->down_proj, 0, D, F, state->up, N, state->output);
    add(D, N, state->output, state->hidden);
    meet(meeting);
  }
}

// Takes `size` floats from `memory`, and more up to a multiple of PAD.
static float* take(float** memory, long size) {
  float* taken = *memory;
  *memory += padded(size);
  return taken;
}

// A pass over N tokens, see read_tokens; logits [num_kept, V] are those after the tokens `kept`.
// Returns whether there was enough memory.
static int read_some(const Model* model, const Cache* cache, long N, const int* tokens,
                     const int* texts, const int* positions, long num_kept, const int* kept,
                     float* logits) {
  long D = model->D, H = model->H, K = model->K, d = model->d, F = model->F;
  long longest = 0, num_pieces = 0;
  for (long n = 0; n < N; n++) longest = positions[n] >= longest ? positions[n] + 1 : longest;
  // A piece has 64 tokens at most, or about 2^20 scores.
  long most = 1 + (1 << 20) / padded(longest) / (H / K);
  most = most < 64 ? most : 64;
  long own = padded(N * D) + padded(most * (H / K) * (2 * d + padded(longest)));  // of a thread
  long all = 2 * padded(N * D) + 2 * padded(N * H * d) + 2 * padded(N * K * d) + 2 * padded(N * F);
  all += padded(N * d);
  float* memory = aligned_alloc(64, (all + model->threads * own) * sizeof(float));
  Piece* pieces = malloc(N * sizeof(Piece));
  if (!memory || !pieces) {
    free(memory);
    free(pieces);
    return 0;
  }
  for (long n = 0; n < N; n++) {
    Piece* last = pieces + num_pieces - 1;
    if (n && texts[n] == last->text && n - last->begin < most) last->end = n + 1;
    else pieces[num_pieces++] = (Piece){n, n + 1, texts[n], positions[n]};
  }
  float* rest = memory;
  State state = {take(&rest, N * D), take(&rest, N * D), take(&rest, N * H * d),
                 take(&rest, N * H * d), take(&rest, N * K * d), take(&rest, N * K * d),
                 take(&rest, N * F), take(&rest, N * F), take(&rest, N * d)};
  for (long n = 0; n < N; n++) {
    memcpy(state.hidden + n * D, model->embed_tokens + tokens[n] * D, D * sizeof(float));
    fill_turn(model, positions[n], state.turns + n * d);
  }
  // Each thread computes its share of the rows of each matrix, and all of the norms.
  Meeting meeting = {0};
  #pragma omp parallel num_threads(model->threads)
  {
    float* normed = rest + omp_get_thread_num() * own;  // at the end, of the tokens `kept`
    float* buffer = normed + padded(N * D);
    run_blocks(model, cache, N, &state, pieces, num_pieces, &meeting, normed, buffer);
    for (long i = 0; i < num_kept; i++)
      rms_norm(model, state.hidden + kept[i] * D, model->norm, D, normed + i * D);
    linear(model, model->lm_head, 0, model->V, D, normed, num_kept, logits);
  }
  free(memory);
  free(pieces);
  return 1;
}

// Reads N tokens, those of a text one after the other: token n has an id, `tokens`, the index of
// its text, `texts`, and a position in it, up to which the text was read. Adds their keys and values
// to the cache; writes logits [num_kept, V] after the tokens `kept`, which ascend. Returns whether
// there was enough memory.
int read_tokens(const Model* model, const Cache* cache, long N, const int* tokens,
                const int* texts, const int* positions, long num_kept, const int* kept,
                float* logits) {
  int here[MOST_TOKENS];
  long num_done = 0;
  for (long begin = 0; begin < N; begin += MOST_TOKENS) {
    long end = begin + MOST_TOKENS < N ? begin + MOST_TOKENS : N, count = 0;
    for (; num_done + count < num_kept && kept[num_done + count] < end; count++)
      here[count] = kept[num_done + count] - begin;
    if (!read_some(model, cache, end - begin, tokens + begin, texts + begin, positions + begin,
                   count, here, logits + num_done * model->V))
      return 0;
    num_done += count;
  }
  return 1;
}

// ---- Sampling -----------------------------------------------------------------------------------
// A word of the random bits [n] that MLX draws with a key: Threefry (Salmon et al. 2011).
static unsigned random_word(const unsigned* key, unsigned i, unsigned n) {
  static const int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  unsigned keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  // Words i and i + half come from one pair; an odd n has a last pair with a 0.
  unsigned half = (n + 1) / 2, is_second = i >= half, first = is_second ? i - half : i;
  unsigned a = first + keys[0], b = (first + half < n ? first + half : 0) + keys[1];
  for (int round = 0; round < 5; round++) {
    for (int j = 0; j < 4; j++) {
      int turn = turns[round % 2][j];
      a += b;
      b = (b << turn | b >> (32 - turn)) ^ a;
    }
    a += keys[(round + 1) % 3];
    b += keys[(round + 2) % 3] + round + 1;
  }
  return is_second ? b : a;
}

// Moves the number at index i of a heap, the least on top, down to where it belongs.
static void sift_down(float* heap, long size, long i) {
  float moved = heap[i];
  for (long child; (child = 2 * i + 1) < size; i = child) {
    if (child + 1 < size && heap[child + 1] < heap[child]) child++;
    if (heap[child] >= moved) break;
    heap[i] = heap[child];
  }
  heap[i] = moved;
}

// From i on, the index in x [n] of the next number that is at least `least`; n: there is none.
// Blocks of 64 are passed over at once.
static long next_of(const float* x, long i, long n, float least) {
  for (;;) {
    while (i % 64 == 0 && n - i >= 64 && largest_of(x + i, 64) < least) i += 64;
    if (i >= n || x[i] >= least) return i;
    i++;
  }
}

// The k-th largest of x [n].
static float top_k_threshold(const float* x, long n, long k, float* heap) {
  memcpy(heap, x, k * sizeof(float));
  for (long i = k / 2 - 1; i >= 0; i--) sift_down(heap, k, i);
  for (long i = next_of(x, k, n, heap[0]); i < n; i = next_of(x, i + 1, n, heap[0])) {
    heap[0] = x[i];
    sift_down(heap, k, 0);
  }
  return heap[0];
}

// The least of the nucleus of those x [n] that are at least `threshold`.
static float top_p_threshold(const float* x, long n, float threshold, float largest, float p,
                             float* heap) {
  float total = 0, above = 0, least = largest;
  long size = 0;
  for (long i = next_of(x, 0, n, threshold); i < n; i = next_of(x, i + 1, n, threshold)) {
    heap[size++] = -x[i];
    total += exp_of(x[i] - largest);
  }
  for (long i = size / 2 - 1; i >= 0; i--) sift_down(heap, size, i);
  while (size && above < p * total) {
    least = -heap[0];
    above += exp_of(least - largest);
    heap[0] = heap[--size];
    sift_down(heap, size, 0);
  }
  return least;
}

// main.py's process_logits, then its sample_token, of logits [V]; window: the `length` ids that the
// penalty is for; key: [2]; buffer: [2, V].
long sample_token(const float* logits, long V, double temperature, long top_k, double top_p,
                  double min_p, double penalty, const int* window, long length,
                  const unsigned* key, float* buffer) {
  float *x = buffer, *heap = buffer + V, factor = penalty, divisor = temperature;
  memcpy(x, logits, V * sizeof(float));
  if (penalty != 1)
    for (long i = 0; i < length; i++) {
      float logit = logits[window[i]];
      x[window[i]] = logit > 0 ? logit / factor : logit * factor;
    }
  float largest = largest_of(x, V), threshold = -INFINITY;
  long best = next_of(x, 0, V, largest) % V;  // 0 if no number is comparable
  if (temperature < 1e-6) return best;
  for (long i = 0; i < V; i++) x[i] /= divisor;
  largest /= divisor;
  if (top_k > 0 && top_k < V) threshold = top_k_threshold(x, V, top_k, heap);
  if (top_p < 1) threshold = top_p_threshold(x, V, threshold, largest, top_p, heap);
  if (min_p > 0) {
    float least = largest + (float) log(min_p);
    threshold = least > threshold ? least : threshold;
  }
  // The largest of the sums with Gumbel noise, as MLX draws it; 17 is more than noise can be.
  float score = -INFINITY, least = threshold;
  for (long i = next_of(x, 0, V, least); i < V; i = next_of(x, i + 1, V, least)) {
    float uniform = random_word(key, i, V) / 4294967296.0f;
    float noisy = x[i] - logf(-logf(uniform < 0.99999994f ? uniform : 0.99999994f));
    if (noisy > score) {
      score = noisy;
      best = i;
      least = score - 17 > threshold ? score - 17 : threshold;
    }
  }
  return best;
}
