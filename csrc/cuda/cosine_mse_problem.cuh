// The arguments of cosine_mse's kernels, and the division of a call into blocks.
#pragma once

#include <cstdint>

#include "cuda/vectors.cuh"

namespace embkern::cuda {

constexpr char kOp[] = "cosine_mse";

enum Reduction : int64_t { kNone, kMean, kSum };  // as in embkern/ops/reference/cosine_mse.py

// The terms of the loss; a term of weight 0 is not computed.
template <class A>
struct LossTerms {
  A cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps;
  A mse_slope, rmse_slope, power_slope;  // 2 mse_weight / H, rmse_weight / H, power_weight alpha / H
};

// The arguments of one call.
template <class T>
struct LossProblem {
  using A = acc_t<T>;
  const T* output;
  const T* target;
  const A* row_weight;   // null: ones
  const A* target_norm;  // null: computed
  const A* grad_loss;    // null: ones
  int64_t grad_loss_stride;
  int64_t count;  // N
  int width;      // H
  Reduction reduction;
  LossTerms<A> terms;
  A* loss;
  T* grad_output;  // null: not wanted
  T* grad_target;  // null: not wanted
};

// Sums over rows of the batch, in double, because the squares of an fp32 row may be as large as 1e40.
constexpr int kBatchSums = 3;
enum BatchSum { kRowSum, kWeightSum, kSquareSum };  // sums of w row, w and w mse

struct Partials {
  double* sums;  // (count, kBatchSums)
  int count;
};

// The division of a call into blocks.
struct LossPlan {
  int lanes;        // threads that share a row: a power of two
  int chunks;       // parts of a row that they process in turn; 1 if the row fits in their registers
  int threads;      // of a block
  int blocks;       // block b has rows b groups + i, i < groups = threads / lanes, of every wave of blocks
  Partials before;  // for a gradient of the mean; none if it needs no sums or every block computes sum(w)
  Partials after;   // one per block
};

template <class T>
LossTerms<acc_t<T>> make_terms(double cosine_weight, double mse_weight, double rmse_weight, double power_weight,
                               double alpha, double eps, int64_t width) {
  using A = acc_t<T>;
  return {static_cast<A>(cosine_weight),
          static_cast<A>(mse_weight),
          static_cast<A>(rmse_weight),
          static_cast<A>(power_weight),
          static_cast<A>(alpha),
          static_cast<A>(eps),
          static_cast<A>(2 * mse_weight / width),
          static_cast<A>(rmse_weight / width),
          static_cast<A>(power_weight * alpha / width)};
}

}  // namespace embkern::cuda
