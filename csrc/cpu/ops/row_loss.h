// The loss of one row and its gradient, from the results of the row kernels.
#pragma once

#include <cmath>

#include "checks.h"
#include "cpu/kernels/kernels.h"

namespace embkern {

enum Reduction : int64_t { kNone, kMean, kSum };  // as in embkern/ops/reference/cosine_mse.py

struct LossOptions {
  int64_t reduction;
  double cosine, mse, rmse, power;  // weights; a term of weight 0 is not computed
  double alpha, eps;
};

inline void check_options(const LossOptions& options) {
  check(options.reduction >= kNone && options.reduction <= kSum, "reduction: expected 0, 1 or 2, got ",
        options.reduction);
}

struct RowLoss {
  RowSums sums;
  double output_norm, target_norm, cosine;
  double mse, power;  // means over the row
  bool clamped;       // whether the product of the norms is below eps

  // The row's loss without its row weight and the root term.
  double value(const LossOptions& options) const {
    double loss = 0;
    if (options.cosine != 0) loss += options.cosine * (1 - cosine);
    if (options.mse != 0) loss += options.mse * mse;
    if (options.power != 0) loss += options.power * power;
    return loss;
  }
};

// The loss of a row from its sums. The caller sets `power`.
inline RowLoss row_loss(const RowSums& sums, const double* target_norm, int64_t width, double eps) {
  RowLoss row{sums, std::sqrt(sums.output_square), std::sqrt(sums.target_square), 0, 0, 0, false};
  if (target_norm) row.target_norm = *target_norm;
  const double product = row.output_norm * row.target_norm;
  row.clamped = product < eps;  // false for NaN, which has to reach the loss
  row.cosine = sums.dot / (row.clamped ? eps : product);
  row.mse = sums.error_square / width;
  return row;
}

// The coefficients of the gradient of `factor * loss` by the output. The cosine contributes those of y and x,
// the mean squared error and `from_root` that of e, and the power term that of the slope.
template <class A>
RowGradient<A> output_gradient(const RowLoss& row, const LossOptions& options, int64_t width, double factor,
                               double from_root, const A* slope) {
  RowGradient<A> to{};
  if (options.cosine != 0) {
    const double cosine = factor * options.cosine;
    to.from_target = -cosine / (row.clamped ? options.eps : row.output_norm * row.target_norm);
    to.from_output = row.clamped ? 0 : cosine * row.cosine / (row.output_norm * row.output_norm);
  }
  to.from_error = factor * 2 * options.mse / width + from_root;
  to.from_slope = factor * options.power / width;
  to.slope = options.power != 0 ? slope : nullptr;
  to.wide = row.sums.wide;
  return to;
}

// The same by the target. y, x and e remain output, target and output - target.
template <class A>
RowGradient<A> target_gradient(const RowLoss& row, const LossOptions& options, int64_t width, double factor,
                               double from_root, const A* slope) {
  RowGradient<A> to = output_gradient(row, options, width, factor, from_root, slope);
  std::swap(to.from_output, to.from_target);
  if (options.cosine != 0 && !row.clamped)
    to.from_target = factor * options.cosine * row.cosine / (row.target_norm * row.target_norm);
  to.from_error = -to.from_error;
  to.from_slope = -to.from_slope;
  return to;
}

// The coefficient of e in the gradient of the root term, where `root` is the root of a mean of squares; 0 at 0.
inline double root_slope(const LossOptions& options, double factor, double root, int64_t width) {
  return options.rmse == 0 || root == 0 ? 0 : factor * options.rmse / (width * root);
}

}  // namespace embkern
