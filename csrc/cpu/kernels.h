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
  int64_t packed_terms = 0;  // of the packed right operand, where these are more than k
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

// out[i][j] (+)= sum_p a[p][i] * b[p][j] for i < m, j < n: like OuterSum, but added to what `out` holds unless
// `overwrite`, 128 terms at a time, and with `b` read where it lies.
template <class T>
struct OuterUpdate {
  int64_t m, k, n;
  const T* const* a;
  const T* const* b;
  bool overwrite;
  T* out;
  int64_t ld;
};

// What the loss needs of one row: y the output, x the target, e = y - x.
struct RowSums {
  double dot, output_square, target_square, error_square;
  bool wide;  // the squares leave the range of fp32: the gradient is to be computed in double
};

// grad[j] = from_output * y[j] + from_target * x[j] + from_error * e[j] + from_slope * slope[j]
template <class A>
struct RowGradient {
  double from_output, from_target, from_error, from_slope;
  const A* slope;  // none if null
  bool wide;
};

// One step of Adam on n parameters: m and v are updated by the gradient, p by
// -step_size * m / (root_correction * sqrt(v) + eps).
template <class T>
struct AdamStep {
  T beta1, rest1, beta2, rest2;  // rest = 1 - beta, which is not exact in T
  T step_size, root_correction, eps;
};

// Levels of codes of up to four bits, by the code and those of the values before it: 7 bits together.
constexpr int kTrellisStates = 128;

// A record of a packed table: groups of 32 values, bit i of a group's word p is bit p of the code of value i.
template <class T>
struct PackedRow {
  const int32_t* words;
  const uint8_t* bits;  // of each group; words follow each other
  int64_t groups, width;
  const int16_t* levels;  // kTrellisStates steps of 2^-12 for codes of 1 bit, then 2, 3 and 4; then 2 readable
  acc_t<T> factor;
};

constexpr int64_t kFewStates = 8;  // vectors that a row is multiplied with while it is decoded

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
  RowSums (*row_sums)(const T* output, const T* target, int64_t width);
  // Sum of (|e| + 1e-10)^alpha; its derivative by e goes to `slope` unless that is null.
  double (*row_power)(const T* output, const T* target, int64_t width, double alpha, A* slope);
  void (*row_gradient)(const T* output, const T* target, int64_t width, const RowGradient<A>& coefficients,
                       T* grad);  // may be `output`
  // to[j] = factor * value[j] + scale * offset[j] for j < width; values beyond the groups are 0.
  void (*decode_row)(const PackedRow<T>&, const T* offset, A scale, T* to);
  // to[j] = factor * value[j], for project_sums: of the sums' type.
  void (*decode_coefficients)(const PackedRow<T>&, void* to);
  // out[n] = factor * sum of value[j] * factors[n][j] for n < count, which is 1, 2, 4 or kFewStates.
  void (*packed_products)(const PackedRow<A>&, const A* const* factors, int64_t count, A* out);
  // out[n] = sum of row[j] * factors[n][j] for j < width; factors are zero up to a multiple of 32 beyond it.
  void (*row_products)(const T* row, int64_t width, const A* const* factors, int64_t count, A* out);
};

// A row to be packed, values in units of `spread` (ones if null): codes of the nearest levels of value / (root
// * factor), root being the row's root mean square. `squares` are those of the spread.
struct RowToPack {
  const float *values, *squares;
  const uint8_t* bits;  // of each group
  int64_t groups;
  const float *levels, *edges;  // 16 per number of bits 1 to 4; edges lie between neighbours
  const float* steps;           // of uniform codes, per number of bits
  const float* factors;         // to try
  int64_t tries;
};

// The best of the factors: the scale of the decoded row that is nearest to it, and the length of its
// projection.
struct PackedFit {
  float scale, projection;
};

// The same for codes of a trellis. `scales` are what the values are divided by, to try.
struct TrellisRow {
  const float *values, *squares;
  const uint8_t* bits;  // of each group, up to 4
  int64_t groups;
  const float* levels;  // kTrellisStates per number of bits 1 to 4
  const float* scales;
  int64_t tries;
};

struct PackingKernels {
  // codes (32 groups) are written unless null.
  PackedFit (*quantize_row)(const RowToPack&, uint8_t* codes);
  PackedFit (*trellis_row)(const TrellisRow&, uint8_t* codes, uint8_t* scratch);  // of 32 groups each
};

// The kernels of training, for float and double.
template <class T>
struct TrainingKernels {
  // Elements of a right operand of k terms and n columns, packed.
  int64_t (*packed_size)(int64_t k, int64_t n);
  // Packs b[p][j], a row per term, or b[j][p], a row per column, for project_packed.
  void (*pack)(const T* const* b, int64_t k, int64_t n, T* packed);
  void (*pack_transposed)(const T* const* b, int64_t k, int64_t n, T* packed);
  // Kernels::project with a packed right operand of all columns: first is 0, b unused.
  void (*project_packed)(const Projection<T>&, const T* packed);
  void (*outer_update)(const OuterUpdate<T>&);
  void (*adam)(const AdamStep<T>&, int64_t n, const T* grad, T* p, T* m, T* v);
};

// The table of the level in use.
template <class T>
const Kernels<T>& kernels();
template <class T>
const TrainingKernels<T>& training_kernels();
template <class T = float>
const PackingKernels& packing_kernels();

#define EMBKERN_LEVEL(name)                     \
  namespace name {                              \
  template <class T>                            \
  const Kernels<T>& kernels();                  \
  template <class T>                            \
  const TrainingKernels<T>& training_kernels(); \
  template <class T>                            \
  const PackingKernels& packing_kernels();      \
  }
EMBKERN_LEVEL(portable)
#if defined(EMBKERN_X86_LEVELS)
EMBKERN_LEVEL(avx2)
EMBKERN_LEVEL(avx512)
EMBKERN_LEVEL(avx512_bf16)
#endif
#undef EMBKERN_LEVEL

}  // namespace embkern
