// The kernels that ops call: tables of functions per element type, which kernels.inl fills once per instruction
// set. Operands are lists of pointers to contiguous vectors, so that gathering rows needs no copy.
#pragma once

#include "cpu/kernels/trellis_levels.h"
#include "cpu/simd/features.h"
#include "element_types.h"

namespace embkern {

// ---- products -----------------------------------------------------------------------------------------------

// The most rows of one product, which share its packed right operand: a multiple of the rows of every tile.
// Packed, they take 400 KB of L2 at rank 512.
constexpr int64_t kBlockRows = 192;

// out[i][j] = scale * (sum_p a[i][p] * b[p][j] + offset[j]) for i < m, first <= j < last. `a` holds a vector of
// k elements per row, `b` one of n per term, `out` one of n per row. m <= kBlockRows.
template <class T>
struct Projection {
  int64_t m, k, first, last;
  int64_t padding;  // columns beyond `last` that can be read from b, with any content
  const void* const* a;
  const T* const* b;
  const T* offset;
  acc_t<T> scale;
  T* const* out;
  int64_t packed_terms = 0;  // of a packed right operand that has more than k
};

// out[i][j] = scale * sum_p a[p][i] * b[p][j] for i < m, first <= j < last; both operands hold a vector per
// term. The terms are added in blocks, and then the sums of blocks. `out` is (m, n) with ld elements from row
// to row.
template <class T>
struct OuterSum {
  int64_t m, k, first, last;
  const T* const* a;
  const void* const* b;
  acc_t<T> scale;
  T* out;
  int64_t ld;
};

// out[i][j] (+)= sum_p a[p][i] * b[p][j] for i < m, j < n. Unlike OuterSum this adds to `out` unless
// `overwrite`, 128 terms at a time, and reads `b` in place.
template <class T>
struct OuterUpdate {
  int64_t m, k, n;
  const T* const* a;
  const T* const* b;
  bool overwrite;
  T* out;
  int64_t ld;
};

// ---- the loss -----------------------------------------------------------------------------------------------

// Sums over one row of the output y, the target x and the error e = y - x.
struct RowSums {
  double dot, output_square, target_square, error_square;
  bool wide;  // the squares leave the range of fp32, so the gradient has to be computed in double
};

// grad[j] = from_output * y[j] + from_target * x[j] + from_error * e[j] + from_slope * slope[j]
template <class A>
struct RowGradient {
  double from_output, from_target, from_error, from_slope;
  const A* slope;  // null if there is no power term
  bool wide;
};

// One step of Adam for n parameters. The gradient updates m and v, and p changes by
// -step_size * m / (root_correction * sqrt(v) + eps).
template <class T>
struct AdamStep {
  T beta1, rest1, beta2, rest2;  // rest = 1 - beta, rounded from double
  T step_size, root_correction, eps;
};

// ---- the softmax over a table -------------------------------------------------------------------------------

// Logits of some rows of a table, (rows, states): scales[i] * sums[i][n] + offsets[n] + biases[i], and cap *
// tanh(logit / cap) of that. Rows of sums have room for whole vectors of states.
template <class A>
struct LogitBlock {
  int64_t rows, states, stride;
  A* sums;
  const A *scales, *biases;  // null where they are 1 and 0
  const A* offsets;
  A cap;  // 0 for none
};

// The gradient of a logit is (factors[n] * exp(logit - shifts[n]) + uniform[n]) * slope of the cap.
template <class A>
struct SoftmaxGradient {
  const A *shifts, *factors, *uniform;
};

// ---- packed tables ------------------------------------------------------------------------------------------

constexpr int kTrellisBits = 4;  // codes of up to so many bits are trellis codes, wider ones are uniform
constexpr int kMostBits = 8;
constexpr int64_t kLevelTables = 17, kTableEntries = 16;

// Groups of 32 values that follow each other in a row and have as many bits each.
struct Run {
  int64_t groups;
  int bits;
};

// The parts of a record: the words of its stream of steps, a ring, and of the further bits of codes of 3 and 4
// bits; the words of its wider codes lie behind them. Each part has its groups in the order of the row.
struct RecordLayout {
  const Run *runs, *end;
  int64_t stream, further;
};

// A record of a packed table.
template <class T>
struct PackedRow {
  const int32_t* words;
  // By address, since it is loaded at once: of a copy, stores would be under way.
  const RecordLayout* layout;
  int64_t width;
  const int8_t* levels;  // kLevelTables of kTableEntries in steps of 2^-5
  acc_t<T> factor;
};

// A row to be quantized value by value, in units of a spread per column. A code stands for the level nearest to
// value / (root * factor), where root is the row's root mean square.
struct RowToPack {
  const float *values, *squares;  // squares of the spread, null if it is 1
  const uint8_t* bits;            // per group
  int64_t groups;
  const float *levels, *edges;  // 16 per number of bits 1 to 4; an edge lies between two levels
  const float* steps;           // of uniform codes, by the number of bits
  const float* factors;         // to be tried
  int64_t tries;
};

// A step of the stream of a row as the search reads it: one value or, at 1 bit, two. The error of a level is
// (scale * level / 2^15 - value) in units of the search, twice that at 4 bits; its square is divided by 2^15.
// If levels are not scaled, the scale is 1. At 1 bit value[0] is both values then, two numbers of 8 bits in
// steps of levels, and squares are not divided. All sums saturate.
struct TrellisStep {
  uint8_t bits;
  bool scaled;
  int16_t scale[2], value[2];
  uint16_t least;   // that all squared errors have if levels are scaled; it is subtracted
  uint16_t factor;  // of the costs of paths, in units of 2^-16, to be those of this step; 0 is 1
  uint16_t power;   // of two, another factor
};

// The steps of a row, a ring, and memory for the search for its codes.
struct TrellisRing {
  const TrellisLevels* levels;
  const TrellisStep* steps;
  int64_t count;                      // at least 16
  uint16_t (*costs)[kTrellisStates];  // two
  uint8_t* choices;                   // kChoiceBytes a step, for at least kLeastSteps
  static constexpr int64_t kLeastSteps = 64, kChoiceBytes = kTrellisStates / 4;
};

// The result of quantizing a row: the scale of the decoded row that is nearest to the row, and the length of
// the row's projection on it.
struct PackedFit {
  float scale, projection;
};

// ---- tables of functions ------------------------------------------------------------------------------------

constexpr int64_t kFewStates = 8;  // vectors that a row is multiplied with while it is decoded

template <class T>
struct Kernels {
  using A = acc_t<T>;
  // Whether sums of rows are kept in T, because the kernels multiply T (bf16 dot products), or in A.
  bool sums_in_element_type;
  void (*project)(const Projection<T>&);       // a[i] of T
  void (*project_sums)(const Projection<T>&);  // a[i] of the sums' type
  void (*outer_sum)(const OuterSum<T>&);       // b[p] of the sums' type
  // out (width,) = sum of rows, rounded once to the sums' type.
  void (*sum_rows)(const T* const* rows, int64_t count, int64_t width, void* out);
  // The same in A, for columns first to last.
  void (*total_rows)(const T* const* rows, int64_t count, int64_t first, int64_t last, A* out);
  RowSums (*row_sums)(const T* output, const T* target, int64_t width);
  // The sum of (|e| + 1e-10)^alpha. Its derivative by e is written to `slope` unless that is null.
  double (*row_power)(const T* output, const T* target, int64_t width, double alpha, A* slope);
  void (*row_gradient)(const T* output, const T* target, int64_t width, const RowGradient<A>& coefficients,
                       T* grad);  // may be `output`
  // to[j] = factor * value[j] + scale * offset[j] for j < width; values beyond the runs are 0.
  void (*decode_row)(const PackedRow<T>&, const T* offset, A scale, T* to);
  // to[j] = factor * value[j] in the sums' type, for project_sums; the width is a multiple of 32.
  void (*decode_coefficients)(const PackedRow<T>&, void* to);
  // Copies memory past the caches; both addresses and the size are multiples of 64 bytes.
  void (*copy_streamed)(const void* from, void* to, int64_t bytes);
  // out[n] = factor * sum of value[j] * factors[n][j] for n < count; count is 1, 2, 4 or kFewStates.
  void (*packed_products)(const PackedRow<A>&, const A* const* factors, int64_t count, A* out);
  // out[n] = sum of row[j] * factors[n][j] for j < width; the factors are 0 from there to a multiple of 32.
  void (*row_products)(const T* row, int64_t width, const A* const* factors, int64_t count, A* out);
};

// For float and double.
template <class T>
struct TrainingKernels {
  // The number of elements of a packed right operand of k terms and n columns.
  int64_t (*packed_size)(int64_t k, int64_t n);
  // Packs the right operand b[p][j], a vector per term, or b[j][p], a vector per column.
  void (*pack)(const T* const* b, int64_t k, int64_t n, T* packed);
  void (*pack_transposed)(const T* const* b, int64_t k, int64_t n, T* packed);
  // Kernels::project for all columns with a packed right operand; `first` is 0 and `b` is not used.
  void (*project_packed)(const Projection<T>&, const T* packed);
  void (*outer_update)(const OuterUpdate<T>&);
  void (*adam)(const AdamStep<T>&, int64_t n, const T* grad, T* p, T* m, T* v);
  // Writes the logits in place of the sums, and per state their maximum and, unless null, their sum.
  void (*finish_logits)(const LogitBlock<T>&, T* maxima, T* totals);
  // totals[n] = sum over rows of exp(sums[i][n] - shifts[n]) for finished logits. With `keep` these, times the
  // slope of the cap, replace the logits. The scales, biases and offsets are not read.
  void (*sum_exponentials)(const LogitBlock<T>&, const T* shifts, bool keep, T* totals);
  // The gradients of the logits of sums, which stay; `stride` is that of the gradients.
  void (*logit_gradients)(const LogitBlock<T>&, const SoftmaxGradient<T>&, T* gradients, int64_t stride);
  void (*exp_and_tanh)(const T* values, int64_t count, T* exponentials, T* tangents);
};

struct PackingKernels {
  // `codes` (32 groups) are written unless null.
  PackedFit (*quantize_row)(const RowToPack&, uint8_t* codes);
  // The two bits of every step on the best path through a ring.
  void (*search_trellis)(const TrellisRing&, uint8_t* bits);
};

// The tables of the level in use.
template <class T>
const Kernels<T>& kernels();
template <class T>
const TrainingKernels<T>& training_kernels();
template <class T = float>
const PackingKernels& packing_kernels();

#define EMBKERN_DECLARE_LEVEL(name)             \
  namespace name {                              \
  template <class T>                            \
  const Kernels<T>& kernels();                  \
  template <class T>                            \
  const TrainingKernels<T>& training_kernels(); \
  template <class T>                            \
  const PackingKernels& packing_kernels();      \
  }
EMBKERN_DECLARE_LEVEL(portable)
#if defined(EMBKERN_X86_LEVELS)
EMBKERN_DECLARE_LEVEL(avx2)
EMBKERN_DECLARE_LEVEL(avx512)
EMBKERN_DECLARE_LEVEL(avx512_bf16)
#endif
#undef EMBKERN_DECLARE_LEVEL

}  // namespace embkern
