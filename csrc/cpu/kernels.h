// What the ops ask of an instruction set: one table of functions per element type, filled once per level by
// kernels.inl. Operands are lists of contiguous vectors, so that a gather costs no copy of its own.
#pragma once

#include "cpu/common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EMBKERN_X86_LEVELS 1
#endif

namespace embkern {

// Rows of one product that share its packed operand: a multiple of every tile; 400 KB of L2 at rank 512.
constexpr int64_t kBlockRows = 192;

// out[i][j] = scale * (sum_p a[i][p] * b[p][j] + offset[j]) for i < m, first <= j < last. `a` holds a
// vector of k per row, `b` one of n per term, `out` one of n per row. m <= kBlockRows.
template <class T>
struct Projection {
  int64_t m, k, first, last;
  int64_t padding;  // columns beyond `last` that can be read from b, whatever they hold
  const void* const* a;
  const T* const* b;
  const T* offset;
  acc_t<T> scale;
  T* const* out;
};

// out[i][j] = scale * sum_p a[p][i] * b[p][j] for i < m, first <= j < last: both operands hold a vector per
// term. The terms are added in blocks, and the sums of blocks in turn. `out` is (m, n), its rows ld apart.
template <class T>
struct OuterSum {
  int64_t m, k, first, last;
  const T* const* a;
  const void* const* b;
  acc_t<T> scale;
  T* out;
  int64_t ld;
};

template <class A>
struct RowSums {
  A dot, output_square, target_square, error_square;
};

template <class T>
struct Kernels {
  using A = acc_t<T>;
  // The type of sums of rows: T where that is what the kernels multiply (bf16 dot products), else A.
  bool sums_in_element_type;
  void (*project)(const Projection<T>&);       // a[i] of T
  void (*project_sums)(const Projection<T>&);  // a[i] of the sums' type
  void (*outer_sum)(const OuterSum<T>&);       // b[p] of the sums' type
  // out (width,) = sum of rows, rounded once, to the sums' type.
  void (*sum_rows)(const T* const* rows, int64_t count, int64_t width, void* out);
  // The same to A, of columns first to last.
  void (*total_rows)(const T* const* rows, int64_t count, int64_t first, int64_t last, A* out);
  RowSums<A> (*row_sums)(const T* output, const T* target, int64_t width);
  // grad = from_output * output + from_target * target + from_error * (output - target)
  void (*row_gradient)(const T* output, const T* target, int64_t width, A from_output, A from_target,
                       A from_error, T* grad);
};

// The table of the level in use.
template <class T>
const Kernels<T>& kernels();

#define EMBKERN_LEVEL(name)    \
  namespace name {             \
  template <class T>           \
  const Kernels<T>& kernels(); \
  }
EMBKERN_LEVEL(portable)
#if defined(EMBKERN_X86_LEVELS)
EMBKERN_LEVEL(avx2)
EMBKERN_LEVEL(avx512)
EMBKERN_LEVEL(avx512_bf16)
#endif
#undef EMBKERN_LEVEL

}  // namespace embkern
