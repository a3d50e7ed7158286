// The matrix product of common.h, compiled once per instruction-set level.
//
// A tile of 6 rows x 64 bytes of running sums fills 12 of AVX2's 16 vector registers (6 of AVX-512's 32) and
// reads each line of b once for six rows. The sums are vectors of the compiler's own (GCC, Clang): GCC 12 left
// plain arrays in memory, and the forward of 4096 tokens at r = 75 took twenty times as long.
#include <cstring>

#include "cpu/common.h"

namespace embkern {
namespace {

template <class A>
struct Line {
  static constexpr int kSize = 64 / sizeof(A);
#if defined(__GNUC__)
  typedef A Vector __attribute__((vector_size(64)));
#else
  struct Vector {
    A lane[kSize];
    Vector& operator+=(const Vector& other) {
      for (int j = 0; j < kSize; ++j) lane[j] += other.lane[j];
      return *this;
    }
    friend Vector operator*(A factor, Vector vector) {
      for (int j = 0; j < kSize; ++j) vector.lane[j] *= factor;
      return vector;
    }
  };
#endif
};

// Partial sums of this many terms are added up, so that over a long k (the backward's H and N) the rounding
// error grows with k / 64 and not with k.
constexpr int64_t kPartialTerms = 64;

// `lanes` columns of a line: all of them (a constant, so that the copies are plain loads) or a tail.
template <class A, int ROWS>
EMBKERN_INLINE void tile(int64_t k, size_t lanes, const A* a, int64_t lda, const A* b, int64_t ldb,
                         const A* init, A* c, int64_t ldc) {
  typename Line<A>::Vector total[ROWS] = {}, line = {};
  const size_t bytes = lanes * sizeof(A);
  if (init) {
    std::memcpy(&line, init, bytes);
    for (int i = 0; i < ROWS; ++i) total[i] = line;
  }
  for (int64_t begin = 0; begin < k; begin += kPartialTerms) {
    const int64_t end = std::min(k, begin + kPartialTerms);
    typename Line<A>::Vector sum[ROWS] = {};
    for (int64_t p = begin; p < end; ++p) {
      std::memcpy(&line, b + p * ldb, bytes);
      for (int i = 0; i < ROWS; ++i) sum[i] += a[i * lda + p] * line;
    }
    for (int i = 0; i < ROWS; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < ROWS; ++i) std::memcpy(c + i * ldc, &total[i], bytes);
}

template <class A>
EMBKERN_INLINE void gemm_inline(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b,
                                int64_t ldb, const A* init, A* c, int64_t ldc) {
  constexpr int rows = 6, lanes = Line<A>::kSize;
  const auto column = [&](int64_t j, size_t width) {
    const A* start = init ? init + j : nullptr;
    int64_t i = 0;
    for (; i + rows <= m; i += rows)
      tile<A, rows>(k, width, a + i * lda, lda, b + j, ldb, start, c + i * ldc + j, ldc);
    for (; i < m; ++i) tile<A, 1>(k, width, a + i * lda, lda, b + j, ldb, start, c + i * ldc + j, ldc);
  };
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) column(j, lanes);
  if (j < n) column(j, n - j);
}

}  // namespace

EMBKERN_CPU_CLONES void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                             int64_t ldb, const float* init, float* c, int64_t ldc) {
  gemm_inline(m, n, k, a, lda, b, ldb, init, c, ldc);
}

EMBKERN_CPU_CLONES void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                             int64_t ldb, const double* init, double* c, int64_t ldc) {
  gemm_inline(m, n, k, a, lda, b, ldb, init, c, ldc);
}

}  // namespace embkern
