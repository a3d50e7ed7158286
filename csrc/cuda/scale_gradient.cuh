// scale_gradient_: grad *= factor in place, a scalar or one per row. What has the factor 1 is neither read nor
// written: in the usual backward the factor is 1, which the host cannot know without waiting.
//
//   grad (N, H) of bf16, fp16, fp32 or fp64, factors fp32 (fp64 for fp64), one or (N,)
//
//   scale_all: a few blocks that end at once if the factor is 1. Bytes: 2 N H, or none.
//   scale_rows: a warp per row. Bytes: twice those of the rows whose factor is not 1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace embkern::cuda {

constexpr char kScaleOp[] = "scale_gradient_";

// Multiplies elements [first, first + kVector) of `size`.
template <class T>
EMBKERN_DEVICE void scale_vector(T* grad, int64_t first, int64_t size, acc_t<T> factor, bool aligned) {
  const int valid = size - first < kVector<T> ? static_cast<int>(size - first) : kVector<T>;
  auto vector = load_vector(grad + first, valid, aligned);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    vector.values[i] = static_cast<T>(static_cast<acc_t<T>>(vector.values[i]) * factor);
  store_vector(grad + first, vector, valid, aligned && valid == kVector<T>);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_all_kernel(T* grad, const acc_t<T>* factors, const int64_t size, const int64_t blocks,
                     const bool aligned) {
  const acc_t<T> factor = *factors;
  if (factor == 1) return;
  const int64_t step = blocks * kThreads * kVector<T>;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector<T>;
#pragma unroll 4
  for (; first < size; first += step) scale_vector(grad, first, size, factor, aligned);
}

// Warp w of block b: row 8 b + w.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(T* grad, const acc_t<T>* factors, const int64_t count, const int64_t width,
                      const bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= count) return;
  const acc_t<T> factor = factors[row];
  if (factor == 1) return;
  T* from = grad + row * width;
#pragma unroll 4
  for (int64_t first = threadIdx.x % kLanes * kVector<T>; first < width; first += kLanes * kVector<T>)
    scale_vector(from, first, width, factor, aligned);
}

// Enqueues the op in one launch. N, H >= 1.
template <class T>
void scale_gradient(T* grad, const acc_t<T>* factors, int64_t count, int64_t width, bool by_row,
                    const Device& device, Stream stream) {
  if (by_row) {
    launch(kScaleOp, scale_rows_kernel<T>, ceil_div(count, kWarps), kThreads, 0, stream, grad, factors, count,
           width, aligned(grad, width * sizeof(T)));
    return;
  }
  const int64_t size = count * width;
  const int64_t blocks = std::min<int64_t>(ceil_div(size, kThreads * kVector<T>), 8 * device.multiprocessors);
  launch(kScaleOp, scale_all_kernel<T>, blocks, kThreads, 0, stream, grad, factors, size, blocks,
         aligned(grad, 0));
}

}  // namespace embkern::cuda
