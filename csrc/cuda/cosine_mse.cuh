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
// One pass: 8 to 256 lanes own a row and keep it in registers, with 5 to 8 vectors of 16 bytes under way per
// thread and tensor; sums go over shuffles (and shared memory beyond a warp) in a fixed order, then the
// gradient is written. Of a row that is wider than that the last chunk stays, the others are read again,
// newest first, from L2. Launch: as many blocks as are resident at once; each strides over the rows.
// Bytes: 2 N H read, N H written per gradient.
//
// The loss: every block writes its sums, in double, and a kernel of one block adds them in order. No atomics:
// the same bits every time on the same device. What a gradient of the mean needs beforehand (sum(w), and with
// rmse_weight sum(w mse), which takes a pass over output and target) is added up in the same way.
//
// Rows whose sums leave [1e-20, 1e20] in fp32 (or are zero) are summed again in double, from L1 or L2.
// This header needs no CUDA beyond ptx.cuh and launch.cuh: tests/cuda runs it on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace embkern::cuda {

enum Reduction : int64_t { kNone, kMean, kSum };  // as in embkern/ops/reference.py

// What the loss is made of; a term of weight 0 is not computed.
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
  const A* row_weight;   // or null: ones
  const A* target_norm;  // or null: to be summed
  const A* grad_loss;    // or null: ones
  int64_t grad_loss_stride;
  int64_t count;  // N
  int width;      // H
  Reduction reduction;
  LossTerms<A> terms;
  A* loss;
  T* grad_output;  // or null
  T* grad_target;  // or null
};

// Sums over rows of the batch: in double, because the squares of an fp32 row may be as large as 1e40.
constexpr int kBatchSums = 3;
enum BatchSum { kRowSum, kWeightSum, kSquareSum };  // of w row, w and w mse

struct Partials {
  double* sums;  // (count, kBatchSums)
  int count;
};

// How a call is cut into blocks.
struct LossPlan {
  int lanes;        // threads that share a row: a power of two
  int chunks;       // parts of a row that they take one after another; 1 if it fits in their registers
  int threads;      // of a block
  int blocks;       // block b has the rows b groups + i, i < groups = threads / lanes, of every wave of blocks
  Partials before;  // what a gradient of the mean needs; none: nothing, or sum(w) is taken by every block
  Partials after;   // one for each block
};

// ---------------------------------------------------------------------------------------------- sums

constexpr int kMostSums = 5;
constexpr int kSumsBytes = 2 * kWarps * kMostSums * static_cast<int>(sizeof(double));

// Adds up `values` over `lanes` neighbouring threads, in every one of them and in a fixed order. Beyond a warp
// the lanes are the whole block; two buffers in shared memory, used by turns, save a barrier.
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

// The batch's sums from the blocks' partial ones, by one block.
EMBKERN_DEVICE void add_partials(double (&batch)[kBatchSums], const Partials& partials, int threads,
                                 int& turn) {
#pragma unroll 1
  for (int i = threadIdx.x; i < partials.count; i += threads) {
#pragma unroll
    for (int j = 0; j < kBatchSums; ++j) batch[j] += partials.sums[int64_t{i} * kBatchSums + j];
  }
  sum_over(batch, threads, turn);
}

// The loss of mean and sum.
template <class A>
EMBKERN_DEVICE A loss_of(const double (&batch)[kBatchSums], Reduction reduction, A rmse_weight) {
  if (reduction == kSum) return static_cast<A>(batch[kRowSum]);
  const double loss = batch[kRowSum] / batch[kWeightSum];
  if (rmse_weight == 0) return static_cast<A>(loss);
  return static_cast<A>(loss + rmse_weight * std::sqrt(batch[kSquareSum] / batch[kWeightSum]));
}

// ---------------------------------------------------------------------------------------------- a row

enum RowSum { kDot, kOutputSquare, kTargetSquare, kErrorSquare, kRowSums, kPower = kRowSums };

// What is known of a row before it is read.
template <class A>
struct RowFactors {
  A weight;       // w
  A slope;        // d (loss, times the incoming gradient) / d row
  A target_norm;  // if given
};

// What the sums of a row come to: its term of the loss without w, and the numbers of the gradients.
template <class S>
struct RowResult {
  S loss, square;
  S own_output, own_target, other, error, power;  // a, b, c, p, q of the formula above
};

// `root`: the batch's, for the mean.
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

// fp16 and fp64 rows are what they are: the squares of the one fit in fp32, nothing wider is there for the
// other.
template <class T>
constexpr bool kMayLeaveRange = std::is_same_v<acc_t<T>, float> && !std::is_same_v<T, torch::headeronly::Half>;

// Whether sums of squares in fp32 have lost, or may have lost, what the result needs of them. NaN has.
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

// magnitude^alpha; `slope` becomes magnitude^(alpha - 1). magnitude >= 1e-10.
// The library's powf costs 80 instructions; these leave the kernel to the memory.
template <class T>
EMBKERN_DEVICE acc_t<T> power(acc_t<T> magnitude, acc_t<T> alpha, acc_t<T>& slope) {
  slope = 1;
  if (alpha == 1) return magnitude;
  if constexpr (std::is_same_v<T, double>) {
    const double result = std::pow(magnitude, alpha);
    slope = result / magnitude;
    return result;
  } else if constexpr (sizeof(T) == 2) {  // good to 1e-6, a thousandth of the last bit
    const float log2 = ptx::log2_approximate(magnitude);
    slope = ptx::exp2_approximate((alpha - 1) * log2);
    return ptx::exp2_approximate(alpha * log2);
  } else {  // good to 2 or 3 of the last bits: integers and fractions apart, in the logarithm and in the result
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
    if (!(magnitude < INFINITY)) result = magnitude;  // which has no fraction
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

// A vector as it is kept: as elements, 16-bit ones would take a register each.
struct alignas(16) Words {
  uint32_t words[4];
};

template <class T>
EMBKERN_DEVICE Words pack(const Vector<T>& vector) {
  Words words;
  memcpy(&words, &vector, sizeof(words));
  return words;
}

template <class T>
EMBKERN_DEVICE Vector<T> unpack(const Words& words) {
  Vector<T> vector;
  memcpy(&vector, &words, sizeof(words));
  return vector;
}

// The share that one of `lanes` threads has of a row: vectors of neighbouring elements where the row can be
// moved so, else single elements; neighbouring lanes have neighbouring ones.
template <class T, bool kAligned>
struct Share {
  static constexpr int kAtOnce = kAligned ? kVector<T> : 1;  // elements

  int lane, lanes;
  int width;  // 0 for a row beyond the last

  // Of the chunk that starts at column `chunk`: the thread's first element, and how far the next ones are.
  EMBKERN_DEVICE int first(int chunk) const { return chunk + lane * kAtOnce; }
  EMBKERN_DEVICE int step() const { return lanes * kAtOnce; }

  // Whether element j of vector i exists, of those that begin `left` columns before the row's end.
  EMBKERN_DEVICE bool exists(int left, int i, int j) const {
    return (kAligned ? i : i * kVector<T> + j) * step() < left;
  }

  // Whether any lane has an element of its vector i.
  EMBKERN_DEVICE bool any(int chunk, int i) const { return chunk + i * lanes * kVector<T> < width; }

  EMBKERN_DEVICE Words load(const T* from, int left, int i) const {
    if constexpr (kAligned) {
      Words words{};
      if (exists(left, i, 0)) words = ptx::load_16<Words>(from + i * step());
      return words;
    } else {
      Vector<T> vector{};
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (exists(left, i, j)) vector.values[j] = from[(i * kVector<T> + j) * step()];
      return pack(vector);
    }
  }

  EMBKERN_DEVICE void store(T* to, int left, int i, const Vector<T>& vector) const {
    if constexpr (kAligned) {
      if (exists(left, i, 0)) ptx::store_16(to + i * step(), vector);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (exists(left, i, j)) to[(i * kVector<T> + j) * step()] = vector.values[j];
    }
  }
};

// Vectors of each tensor that a thread holds: as many as 128 registers allow. The power term keeps a slope per
// element beside them, and single elements have an address each.
template <class T, bool kWithPower, bool kAligned>
constexpr int kHeldVectors = !kWithPower      ? 8
                             : sizeof(T) == 4 ? 6
                                              : 4;
template <class T, bool kWithPower>
constexpr int kHeldVectors<T, kWithPower, false> = kWithPower && sizeof(T) == 2 ? 1 : 3;

template <class T, bool kWithPower, bool kAligned>
constexpr int kHeldElements = kHeldVectors<T, kWithPower, kAligned> * kVector<T>;

// A thread's share of one chunk of a row, in registers. Elements beyond the row are zeros.
template <class T, bool kWithPower, bool kAligned>
struct Chunk {
  using A = acc_t<T>;
  static constexpr int kVectors = kHeldVectors<T, kWithPower, kAligned>;

  Words output[kVectors], target[kVectors];
  A slopes[kWithPower ? kVectors : 1][kVector<T>];

  EMBKERN_DEVICE void load(const Share<T, kAligned>& share, const T* output_row, const T* target_row,
                           int chunk) {
    const int first = share.first(chunk), left = share.width - first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      output[i] = share.load(output_row + first, left, i);
      target[i] = share.load(target_row + first, left, i);
    }
  }

  EMBKERN_DEVICE void add_to(A (&sums)[kRowSums + kWithPower], const Share<T, kAligned>& share,
                             int chunk) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      const Vector<T> ys = unpack<T>(output[i]), xs = unpack<T>(target[i]);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A y = static_cast<A>(ys.values[j]), x = static_cast<A>(xs.values[j]), e = y - x;
        sums[kDot] += x * y;
        sums[kOutputSquare] += y * y;
        sums[kTargetSquare] += x * x;
        sums[kErrorSquare] += e * e;
      }
    }
  }

  // Fills `slopes` and returns the sum of the powers.
  EMBKERN_DEVICE A take_powers(const Share<T, kAligned>& share, int chunk, A alpha) {
    const int left = share.width - share.first(chunk);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      const Vector<T> ys = unpack<T>(output[i]), xs = unpack<T>(target[i]);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A e = static_cast<A>(ys.values[j]) - static_cast<A>(xs.values[j]);
        const A power = power_of_error<T>(e, alpha, slopes[i][j]);
        sum += share.exists(left, i, j) ? power : 0;
      }
    }
    return sum;
  }

  EMBKERN_DEVICE void store_gradients(const Share<T, kAligned>& share, const LossProblem<T>& problem,
                                      int64_t offset, int chunk, const RowResult<A>& row) const {
    if (problem.grad_output) store<true>(share, problem.grad_output + offset, chunk, row);
    if (problem.grad_target) store<false>(share, problem.grad_target + offset, chunk, row);
  }

 private:
  template <bool kOfOutput>
  EMBKERN_DEVICE void store(const Share<T, kAligned>& share, T* to, int chunk, const RowResult<A>& row) const {
    const int first = share.first(chunk), left = share.width - first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      // The compiler would keep x, y and e in fp32 since the sums, and spill.
      const Vector<T> ys = unpack<T>(ptx::forget(output[i])), xs = unpack<T>(ptx::forget(target[i]));
      Vector<T> gradient;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A y = static_cast<A>(ys.values[j]), x = static_cast<A>(xs.values[j]);
        A error = row.error * (y - x);
        if constexpr (kWithPower) error += row.power * slopes[i][j];
        gradient.values[j] = static_cast<T>(kOfOutput ? row.own_output * y + row.other * x + error
                                                      : row.own_target * x + row.other * y - error);
      }
      share.store(to + first, left, i, gradient);
    }
  }
};

// A row that left the range of fp32: its sums once more, in double, and its gradients. All lanes of a warp come
// here together; those whose row is in range pass with `width` 0.
template <class T, bool kWithPower>
EMBKERN_DEVICE RowResult<double> wide_row(const LossProblem<T>& problem, int64_t offset, int lane, int lanes,
                                          int width, float power_sum, const RowFactors<float>& factors,
                                          float root, int& turn) {
  const T *output = problem.output + offset, *target = problem.target + offset;
  double sums[kRowSums] = {};
#pragma unroll 2
  for (int i = lane; i < width; i += lanes) {
    const double y = static_cast<float>(output[i]), x = static_cast<float>(target[i]), e = y - x;
    sums[kDot] += x * y;
    sums[kOutputSquare] += y * y;
    sums[kTargetSquare] += x * x;
    sums[kErrorSquare] += e * e;
  }
  sum_over(sums, lanes, turn);
  const auto row = row_result<double, T>(problem, sums, power_sum, factors, root);
  if (!problem.grad_output && !problem.grad_target) return row;
#pragma unroll 2
  for (int i = lane; i < width; i += lanes) {
    const double y = static_cast<float>(output[i]), x = static_cast<float>(target[i]);
    double error = row.error * (y - x);
    if constexpr (kWithPower) {
      float slope;
      power_of_error<T>(static_cast<float>(y) - static_cast<float>(x), problem.terms.alpha, slope);
      error += row.power * slope;
    }
    if (problem.grad_output)
      problem.grad_output[offset + i] =
          static_cast<T>(static_cast<float>(row.own_output * y + row.other * x + error));
    if (problem.grad_target)
      problem.grad_target[offset + i] =
          static_cast<T>(static_cast<float>(row.own_target * x + row.other * y - error));
  }
  return row;
}

// ---------------------------------------------------------------------------------------------- kernels

// At most 128 registers: 512 threads per multiprocessor, with 64 to 128 KiB under way at first.
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

// One block: the loss from the partial sums of the blocks.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cosine_mse_loss_kernel(const Partials partials, Reduction reduction, A rmse_weight, A* loss) {
  double batch[kBatchSums] = {};
  int turn = 0;
  add_partials(batch, partials, kThreads, turn);
  if (threadIdx.x == 0) *loss = loss_of(batch, reduction, rmse_weight);
}

// sum(w) alone: block b adds the weights of every `partials.count`-th run of kThreads.
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

// ---------------------------------------------------------------------------------------------- host

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

constexpr char kOp[] = "cosine_mse";
constexpr int kResidentThreads = 2 * kThreads;  // per multiprocessor, by the launch bounds
constexpr int kLeastLanes = 8;                  // with 16 bytes each: a whole line of the cache
// Up to so many weights every block adds up all of them, 16 for each of its threads, rather than wait for
// another kernel.
constexpr int kWeightsPerThread = 16;

inline int most_blocks(const Device& device) { return device.multiprocessors * (kResidentThreads / kLanes); }

// Doubles that a call needs, for the partial sums before and after.
inline int64_t loss_scratch(const Device& device) { return int64_t{2} * kBatchSums * most_blocks(device); }

// `held`: elements of a row that a thread keeps.
inline LossPlan plan_rows(int64_t count, int width, int held, const Device& device) {
  LossPlan plan{};
  plan.lanes = kLeastLanes;
  while (plan.lanes < kThreads && plan.lanes * held < width) plan.lanes *= 2;
  plan.chunks = static_cast<int>(ceil_div(width, plan.lanes * held));
  // A row of more than a warp has a block to itself. Others share one, of fewer threads if few rows would
  // leave multiprocessors without any.
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

// Enqueues the op, in one to three launches and without host synchronisation. `scratch`: loss_scratch(device)
// doubles, none for reduction kNone. Any N; H >= 1.
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
