// One row of cosine_mse: sums over lanes, the terms and gradient coefficients that follow, and the power term.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/cosine_mse_problem.cuh"

namespace embkern::cuda {

constexpr int kMostSums = 5;
constexpr int kSumsBytes = 2 * kWarps * kMostSums * static_cast<int>(sizeof(double));

// Sums `values` over `lanes` adjacent threads in a fixed order; every thread receives the sums. More lanes than
// a warp are the whole block; two alternating buffers in shared memory then save a barrier.
template <int kCount, class A>
EMBKERN_DEVICE void sum_over(A (&values)[kCount], int lanes, int& turn) {
  static_assert(kCount <= kMostSums, "");
#pragma unroll 1
  for (int mask = smaller(lanes, kLanes) / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += ptx::shuffle_xor(values[i], mask);
  }
  if (lanes <= kLanes) return;
  A* of_warps = reinterpret_cast<A*>(ptx::shared_memory() + turn * (kSumsBytes / 2));  // (warps, kCount)
  turn ^= 1;
  if (threadIdx.x % kLanes == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_warps[threadIdx.x / kLanes * kCount + i] = values[i];
  }
  ptx::sync_block();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = of_warps[i];
#pragma unroll 1
  for (int warp = 1; warp < lanes / kLanes; ++warp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += of_warps[warp * kCount + i];
  }
}

enum RowSum { kDot, kOutputSquare, kTargetSquare, kErrorSquare, kRowSums, kPower = kRowSums };

// Inputs of a row besides output and target.
template <class A>
struct RowFactors {
  A weight;       // w
  A slope;        // the incoming gradient times d loss / d row
  A target_norm;  // 0 if not given
};

// Results from the sums of a row: its term of the loss without w, and the coefficients of the gradients.
template <class S>
struct RowResult {
  S loss, square;
  S own_output, own_target, other, error, power;  // a, b, c, p, q in cosine_mse.cuh
};

// `root` is the batch's RMSE, for the mean.
template <class S, class T>
EMBKERN_DEVICE RowResult<S> row_result(const LossProblem<T>& problem, const S* sums, S power_sum,
                                       const RowFactors<acc_t<T>>& factors, acc_t<T> root) {
  RowResult<S> row{};
  const S width = static_cast<S>(problem.width), slope = static_cast<S>(factors.slope);
  row.square = sums[kErrorSquare] / width;
  if (problem.terms.cosine_weight != 0) {
    const S output_norm = std::sqrt(sums[kOutputSquare]);
    const S target_norm =
        problem.target_norm ? static_cast<S>(factors.target_norm) : std::sqrt(sums[kTargetSquare]);
    const S product = output_norm * target_norm;
    const bool clamped = product < problem.terms.eps;  // false for NaN, which so reaches the loss
    const S norms = clamped ? static_cast<S>(problem.terms.eps) : product;
    const S cosine = sums[kDot] / norms;
    row.loss = problem.terms.cosine_weight * (1 - cosine);
    const S cosine_slope = slope * problem.terms.cosine_weight;
    row.other = -cosine_slope / norms;
    if (!clamped) {
      row.own_output = cosine_slope * cosine / sums[kOutputSquare];
      if (problem.grad_target) row.own_target = cosine_slope * cosine / (target_norm * target_norm);
    }
  }
  row.loss += problem.terms.mse_weight * row.square;
  if (problem.terms.power_weight != 0) row.loss += problem.terms.power_weight * (power_sum / width);
  row.error = slope * problem.terms.mse_slope;
  if (problem.terms.rmse_weight != 0) {
    S rmse = static_cast<S>(root);
    if (problem.reduction != kMean) {
      rmse = std::sqrt(row.square);
      row.loss += problem.terms.rmse_weight * rmse;
    }
    if (rmse != 0) row.error += slope * problem.terms.rmse_slope / rmse;
  }
  row.power = slope * problem.terms.power_slope;
  return row;
}

// Squares of fp16 fit in fp32, and for fp64 there is nothing wider.
template <class T>
constexpr bool kMayLeaveRange = std::is_same_v<acc_t<T>, float> && !std::is_same_v<T, torch::headeronly::Half>;

// Whether fp32 sums of squares have left, or may have left, the range in which they are accurate. NaN counts as
// outside.
template <class T>
EMBKERN_DEVICE bool left_range(const LossProblem<T>& problem, const float* sums, float target_norm) {
  constexpr float kLargest = 1e20f, kSmallest = 1e-20f;
  const auto left = [](float sum, float smallest) { return !(sum >= smallest && sum <= kLargest); };
  bool result = left(sums[kErrorSquare], problem.terms.rmse_weight != 0 ? kSmallest : 0);
  if (problem.terms.cosine_weight != 0)
    result |= left(sums[kOutputSquare], kSmallest) ||
              left(problem.target_norm ? target_norm * target_norm : sums[kTargetSquare], kSmallest);
  return result;
}

// magnitude^alpha; `slope` becomes magnitude^(alpha - 1). magnitude >= 1e-10. The library's powf takes 80
// instructions, which would make the kernel compute-bound.
template <class T>
EMBKERN_DEVICE acc_t<T> power(acc_t<T> magnitude, acc_t<T> alpha, acc_t<T>& slope) {
  slope = 1;
  if (alpha == 1) return magnitude;
  if constexpr (std::is_same_v<T, double>) {
    const double result = std::pow(magnitude, alpha);
    slope = result / magnitude;
    return result;
  } else if constexpr (sizeof(T) == 2) {  // within 1e-6, a thousandth of a 16-bit ulp
    const float log2 = ptx::log2_approximate(magnitude);
    slope = ptx::exp2_approximate((alpha - 1) * log2);
    return ptx::exp2_approximate(alpha * log2);
  } else {  // within 3 ulp: logarithm and result are kept as integer and fraction
    int bits;
    memcpy(&bits, &magnitude, sizeof(bits));
    const int exponent = (bits - 0x3f2aaaab) >> 23;  // so that 2/3 <= fraction < 4/3
    bits -= exponent * (1 << 23);
    float fraction;
    memcpy(&fraction, &bits, sizeof(fraction));
    const float integer = static_cast<float>(exponent), log2 = ptx::log2_approximate(fraction);
    const float whole = std::rint(alpha * (integer + log2));
    const float rest = std::fma(alpha, log2, std::fma(alpha, integer, -whole));
    float result = ptx::exp2_approximate(rest) * ptx::exp2_approximate(whole);
    if (!(magnitude < INFINITY)) result = magnitude;  // infinity and NaN
    slope = result * ptx::reciprocal_approximate(magnitude);
    return result;
  }
}

// The power of |e| + 1e-10; `slope` becomes its derivative by e, without alpha.
template <class T>
EMBKERN_DEVICE acc_t<T> power_of_error(acc_t<T> e, acc_t<T> alpha, acc_t<T>& slope) {
  const acc_t<T> result = power<T>(std::fabs(e) + static_cast<acc_t<T>>(1e-10), alpha, slope);
  slope = e == 0 ? 0 : std::copysign(slope, e);
  return result;
}

}  // namespace embkern::cuda
