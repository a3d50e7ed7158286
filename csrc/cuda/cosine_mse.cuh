// cosine_mse, loss and gradients: per row, with y of output, x of target, e = y - x and w of row_weight (or 1)
//
//   cos  = <x, y> / max(|y| |x|, eps)            mse = |e|^2 / H
//   row  = cosine_weight (1 - cos) + mse_weight mse + power_weight mean((|e| + 1e-10)^alpha)
//   none: loss (N,) = w (row + rmse_weight sqrt(mse)); sum: its sum;
//   mean: sum(w row) / sum(w) + rmse_weight sqrt(sum(w mse) / sum(w))
//   grad_output = a y + c x + d, grad_target = b x + c y - d, d = p e + q sign(e) (|e| + 1e-10)^(alpha - 1)
//
// with five numbers a, b, c, p, q per row. output, target and the gradients (N, H), row-major and of one dtype:
// bf16, fp16, fp32 (sums in fp32) or fp64. A gradient that is not wanted costs nothing.
//
// One pass: 8 to 256 lanes own a row and keep it in registers, with 4 to 8 vectors of 16 bytes in flight per
// thread and tensor. Sums go through shuffles (and shared memory beyond a warp) in a fixed order, then the
// gradient is written. If a row does not fit in the registers, its last chunk stays there and the others are
// read again, the latest first, from L2. Launch: as many blocks as are resident at once; each strides over the
// rows. Bytes: 2 N H read, N H written per gradient.
//
// The loss: every block writes its sums in double, and a kernel of one block adds them in order. There are no
// atomics, so the bits are the same every time on the same device. A gradient of the mean first needs sum(w),
// and with rmse_weight sum(w mse), which takes a pass over output and target; both are computed in the same
// way.
//
// Rows whose sums leave [1e-20, 1e20] in fp32 (or are zero) are summed again in double, from L1 or L2.
// These headers need no CUDA beyond ptx.cuh and launch.cuh, so that tests/cuda can run them on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/cosine_mse_chunk.cuh"
#include "cuda/launch.cuh"

namespace embkern::cuda {

// ---- kernels ------------------------------------------------------------------------------------------------

// Adds the blocks' partial sums to `batch`, by one block.
EMBKERN_DEVICE void add_partials(double (&batch)[kBatchSums], const Partials& partials, int threads,
                                 int& turn) {
#pragma unroll 1
  for (int i = threadIdx.x; i < partials.count; i += threads) {
#pragma unroll
    for (int j = 0; j < kBatchSums; ++j) batch[j] += partials.sums[int64_t{i} * kBatchSums + j];
  }
  sum_over(batch, threads, turn);
}

// The loss for reductions mean and sum.
template <class A>
EMBKERN_DEVICE A loss_of(const double (&batch)[kBatchSums], Reduction reduction, A rmse_weight) {
  if (reduction == kSum) return static_cast<A>(batch[kRowSum]);
  const double loss = batch[kRowSum] / batch[kWeightSum];
  if (rmse_weight == 0) return static_cast<A>(loss);
  return static_cast<A>(loss + rmse_weight * std::sqrt(batch[kSquareSum] / batch[kWeightSum]));
}

// At most 128 registers, hence 512 threads per multiprocessor, with 64 to 128 KiB of loads in flight at first.
template <class T, bool kWithPower, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    cosine_mse_rows_kernel(const LossProblem<T> problem, const LossPlan plan) {
  using A = acc_t<T>;
  const int thread = threadIdx.x, groups = plan.threads / plan.lanes, width = problem.width;
  const bool gradients = problem.grad_output || problem.grad_target;
  Share<T, kAligned> share{thread % plan.lanes, plan.lanes, width};
  const int chunk_width = kHeldElements<T, kWithPower, kAligned> * plan.lanes;
  const int last_chunk = (plan.chunks - 1) * chunk_width;
  int turn = 0;

  A total = 1, root = 0;
  if (problem.reduction == kMean && gradients) {
    total = static_cast<A>(problem.count);
    if (plan.before.count > 0 || problem.row_weight) {
      double batch[kBatchSums] = {};
      if (plan.before.count == 0)
        for (int64_t n = thread; n < problem.count; n += plan.threads)
          batch[kWeightSum] += problem.row_weight[n];
      add_partials(batch, plan.before, plan.threads, turn);
      total = static_cast<A>(batch[kWeightSum]);
      root = static_cast<A>(std::sqrt(batch[kSquareSum] / batch[kWeightSum]));
    }
  }

  double batch[kBatchSums] = {};
  const int64_t wave = static_cast<int64_t>(plan.blocks) * groups;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < problem.count; first += wave) {
    const int64_t n = first + thread / plan.lanes;
    const bool exists = n < problem.count;
    const int64_t offset = exists ? n * width : 0;
    share.width = exists ? width : 0;
    RowFactors<A> factors{1, 1, 0};
    if (exists) {
      if (problem.row_weight) factors.weight = problem.row_weight[n];
      if (problem.target_norm) factors.target_norm = problem.target_norm[n];
      if (gradients && problem.grad_loss) factors.slope = problem.grad_loss[n * problem.grad_loss_stride];
    }

    Chunk<T, kWithPower, kAligned> held;
    A sums[kRowSums + kWithPower] = {};
#pragma unroll 1
    for (int chunk = 0;;) {
      held.load(share, problem.output + offset, problem.target + offset, chunk);
      held.add_to(sums, share, chunk);
      if constexpr (kWithPower) sums[kPower] += held.take_powers(share, chunk, problem.terms.alpha);
      if (chunk == last_chunk) break;
      chunk += chunk_width;
    }
    sum_over(sums, plan.lanes, turn);

    factors.slope *= factors.weight / total;
    A power_sum = 0;
    if constexpr (kWithPower) power_sum = sums[kPower];
    bool left = false;
    if constexpr (kMayLeaveRange<T>) left = exists && left_range(problem, sums, factors.target_norm);
    const auto row = row_result<A, T>(problem, sums, power_sum, factors, root);
    if (gradients && !left)
#pragma unroll 1
      for (int chunk = last_chunk;;) {
        held.store_gradients(share, problem, offset, chunk, row);
        if (chunk == 0) break;
        chunk -= chunk_width;
        held.load(share, problem.output + offset, problem.target + offset, chunk);
        if constexpr (kWithPower) held.take_powers(share, chunk, problem.terms.alpha);
      }
    double loss = row.loss, square = row.square;
    if constexpr (kMayLeaveRange<T>)
      if (ptx::any(left)) {
        const auto wide = wide_row<T, kWithPower>(problem, offset, share.lane, share.lanes, left ? width : 0,
                                                  power_sum, factors, root, turn);
        if (left) loss = wide.loss, square = wide.square;
      }

    if (!exists || share.lane != 0) continue;
    if (problem.reduction == kNone) {
      problem.loss[n] = static_cast<A>(factors.weight * loss);
    } else {
      batch[kRowSum] += factors.weight * loss;
      batch[kWeightSum] += factors.weight;
      batch[kSquareSum] += factors.weight * square;
    }
  }

  if (problem.reduction == kNone) return;
  sum_over(batch, plan.threads, turn);
  if (thread != 0) return;
  if (plan.blocks == 1 && problem.loss) {
    *problem.loss = loss_of(batch, problem.reduction, problem.terms.rmse_weight);
  } else {
#pragma unroll
    for (int i = 0; i < kBatchSums; ++i)
      plan.after.sums[static_cast<int64_t>(blockIdx.x) * kBatchSums + i] = batch[i];
  }
}

// Computes the loss from the partial sums of the blocks, by one block.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cosine_mse_loss_kernel(const Partials partials, Reduction reduction, A rmse_weight, A* loss) {
  double batch[kBatchSums] = {};
  int turn = 0;
  add_partials(batch, partials, kThreads, turn);
  if (threadIdx.x == 0) *loss = loss_of(batch, reduction, rmse_weight);
}

// Computes sum(w): block b adds the weights of every `partials.count`-th run of kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cosine_mse_weights_kernel(const A* row_weight, int64_t count, const Partials partials) {
  double sum[1] = {};
  int turn = 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 4
  for (int64_t n = first; n < count; n += static_cast<int64_t>(partials.count) * kThreads)
    sum[0] += row_weight[n];
  sum_over(sum, kThreads, turn);
  if (threadIdx.x == 0) {
    double* to = partials.sums + static_cast<int64_t>(blockIdx.x) * kBatchSums;
    to[kRowSum] = to[kSquareSum] = 0;
    to[kWeightSum] = sum[0];
  }
}

// ---- host ---------------------------------------------------------------------------------------------------

constexpr int kResidentThreads = 2 * kThreads;  // per multiprocessor, by the launch bounds
constexpr int kLeastLanes = 8;                  // with 16 bytes each, a whole cache line
// Up to this many weights per thread, every block adds up all weights, which is faster than another kernel.
constexpr int kWeightsPerThread = 16;

inline int most_blocks(const Device& device) { return device.multiprocessors * (kResidentThreads / kLanes); }

// The number of doubles that a call needs for partial sums.
inline int64_t loss_scratch(const Device& device) { return int64_t{2} * kBatchSums * most_blocks(device); }

// `held` is the number of elements of a row that a thread keeps.
inline LossPlan plan_rows(int64_t count, int width, int held, const Device& device) {
  LossPlan plan{};
  plan.lanes = kLeastLanes;
  while (plan.lanes < kThreads && plan.lanes * held < width) plan.lanes *= 2;
  plan.chunks = static_cast<int>(ceil_div(width, plan.lanes * held));
  // A row of more lanes than a warp has a block of its own. Others share a block, which has fewer threads if
  // otherwise some multiprocessors had no block.
  plan.threads = plan.lanes > kLanes ? plan.lanes : kThreads;
  const auto blocks = [&] { return ceil_div(count, plan.threads / plan.lanes); };
  while (plan.threads > std::max(plan.lanes, kLanes) && blocks() < device.multiprocessors) plan.threads /= 2;
  plan.blocks =
      static_cast<int>(std::min<int64_t>(blocks(), device.multiprocessors * (kResidentThreads / plan.threads)));
  return plan;
}

template <class T>
struct RowsKernel {
  void (*kernel)(LossProblem<T>, LossPlan);
  int held;
};

template <class T, bool kWithPower>
RowsKernel<T> rows_kernel(bool aligned) {
  if (aligned) return {cosine_mse_rows_kernel<T, kWithPower, true>, kHeldElements<T, kWithPower, true>};
  return {cosine_mse_rows_kernel<T, kWithPower, false>, kHeldElements<T, kWithPower, false>};
}

// Enqueues the op in one to three launches, without host synchronisation. `scratch` holds loss_scratch(device)
// doubles, none for reduction kNone. N >= 0, H >= 1.
template <class T>
void cosine_mse(const LossProblem<T>& problem, double* scratch, const Device& device, Stream stream) {
  using A = acc_t<T>;
  LossPlan plan{};
  if (problem.count > 0) {
    const int64_t row_bytes = static_cast<int64_t>(problem.width) * sizeof(T);
    const bool all_aligned = aligned(problem.output, row_bytes) && aligned(problem.target, row_bytes) &&
                             aligned(problem.grad_output, row_bytes) && aligned(problem.grad_target, row_bytes);
    const RowsKernel<T> without_power = rows_kernel<T, false>(all_aligned);
    const RowsKernel<T> rows =
        problem.terms.power_weight == 0 ? without_power : rows_kernel<T, true>(all_aligned);
    plan = plan_rows(problem.count, problem.width, rows.held, device);
    plan.before = {scratch, 0};
    plan.after = {scratch + kBatchSums * most_blocks(device), plan.blocks};
    const bool totals = problem.reduction == kMean && (problem.grad_output || problem.grad_target);
    if (totals && problem.terms.rmse_weight != 0) {
      LossProblem<T> squares = problem;
      squares.terms.cosine_weight = squares.terms.power_weight = 0;
      squares.grad_output = squares.grad_target = nullptr;
      squares.loss = nullptr;
      LossPlan pass = plan_rows(problem.count, problem.width, without_power.held, device);
      plan.before.count = pass.blocks;
      pass.after = plan.before;
      launch(kOp, without_power.kernel, pass.blocks, pass.threads, kSumsBytes, stream, squares, pass);
    } else if (totals && problem.row_weight && problem.count > kWeightsPerThread * plan.threads) {
      const int64_t blocks = ceil_div(problem.count, kWeightsPerThread * kThreads);
      plan.before.count = static_cast<int>(std::min<int64_t>(blocks, device.multiprocessors));
      launch(kOp, cosine_mse_weights_kernel<A>, plan.before.count, kThreads, kSumsBytes, stream,
             problem.row_weight, problem.count, plan.before);
    }
    launch(kOp, rows.kernel, plan.blocks, plan.threads, kSumsBytes, stream, problem, plan);
  }
  if (problem.reduction != kNone && plan.blocks != 1)
    launch(kOp, cosine_mse_loss_kernel<A>, 1, kThreads, kSumsBytes, stream, plan.after, problem.reduction,
           problem.terms.rmse_weight, problem.loss);
}

}  // namespace embkern::cuda
