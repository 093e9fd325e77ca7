// The matrix products of MLX on a Linux CPU, passed on to oneDNN or OpenBLAS. extras/features/fast.py
// compiles this file, and sets the functions of one of the two libraries.

#include <stdlib.h>
#include <string.h>

typedef unsigned short bf16;

void (*openblas)(int, int, int, long, long, long, float, const float*, long, const float*, long,
                 float, float*, long);
int (*onednn)(char, char, long, long, long, float, const float*, long, const float*, long,
              float, float*, long);
int (*onednn_bf16)(char, char, long, long, long, float, const bf16*, long, const bf16*, long,
                   float, float*, long);
void (*set_threads)(int);  // oneDNN's counts for the calling thread alone, so before each product

int threads = 1;
int rounds_to_bf16 = 0;  // whether products round what they multiply

static __thread bf16* buffer = 0;
static __thread long room = 0;

// Adds 0x7fff, half of what is cut off, and for ties the last bit that is kept. A NaN keeps a bit.
static void round_row(const float* restrict from, long columns, bf16* restrict to) {
  for (long i = 0; i < columns; i++) {
    unsigned bits;
    memcpy(&bits, from + i, 4);
    unsigned rounded = bits + 0x7fff + (bits >> 16 & 1);
    to[i] = ((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16;
  }
}

static void round_to_bf16(const float* from, long rows, long columns, long stride, bf16* to) {
  #pragma omp parallel for num_threads(threads) if (rows * columns > 200000 && threads > 1)
  for (long row = 0; row < rows; row++)
    round_row(from + row * stride, columns, to + row * columns);
}

static float dot(const float* a, const float* b, long k) {
  double total = 0;  // of parts: a long sum of floats loses digits
  for (long start = 0; start < k; start += 1024) {
    long end = start + 1024 < k ? start + 1024 : k;
    float part = 0;
    for (long i = start; i < end; i++) part += a[i] * b[i];
    total += part;
  }
  return total;
}

// What MLX calls. order: 101 if matrices are stored by rows, as MLX's are; ta, tb: 111 for a matrix
// as it is, 112 for its transpose, as in x @ weight.T.
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha,
                 const float* a, int lda, const float* b, int ldb, float beta,
                 float* c, int ldc) {
  if (order == 102) {  // by columns, as other libraries may: the transposed product by rows
    cblas_sgemm(101, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
    return;
  }
  // A product with a vector is a sum, as in a norm, and never rounded.
  int a_in_rows = ta == 111 || (m == 1 && lda == 1);
  if (n == 1 && beta == 0 && a_in_rows && (tb == 112 || ldb == 1)) {
    for (long row = 0; row < m; row++) c[row * ldc] = alpha * dot(a + row * lda, b, k);
    return;
  }
  if (!onednn) {
    set_threads(threads);
    openblas(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  char ta_name = ta == 111 ? 'N' : 'T', tb_name = tb == 111 ? 'N' : 'T';
  // Waking a thread costs as much as 10 million multiplications, or as reading half a million
  // weights, as in decoding. Rounding costs as much as it saves in a product of 500,000, as in
  // attention.
  long size = (long) m * n * k;
  int is_large = size > 10000000 || (long) n * k > 500000;
  set_threads(is_large ? threads : 1);
  int rounds = rounds_to_bf16 && onednn_bf16 && n > 1 && size >= 500000;
  long needed = rounds ? (long) m * k + (long) k * n : 0;
  if (needed > room) {
    free(buffer);
    buffer = malloc(needed * sizeof(bf16));
    room = buffer ? needed : 0;
  }
  if (!rounds || !buffer) {  // without memory for rounded copies, nothing is rounded
    onednn(ta_name, tb_name, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  long a_rows = ta == 111 ? m : k, a_columns = ta == 111 ? k : m;
  long b_rows = tb == 111 ? k : n, b_columns = tb == 111 ? n : k;
  bf16* b_rounded = buffer + a_rows * a_columns;
  round_to_bf16(a, a_rows, a_columns, lda, buffer);
  round_to_bf16(b, b_rows, b_columns, ldb, b_rounded);
  onednn_bf16(ta_name, tb_name, m, n, k, alpha, buffer, a_columns, b_rounded, b_columns, beta, c,
              ldc);
}
