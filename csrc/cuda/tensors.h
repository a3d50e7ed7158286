// Conversion of tensors to kernel arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "element_types.h"

namespace embkern::cuda {

// Kernels count columns in int, rows and elements in int64.
inline int to_int(const char* name, int64_t size) {
  constexpr int64_t kMost = int64_t{1} << 30;
  check(size <= kMost, name, ": expected rows of at most ", kMost, " elements, got ", size);
  return static_cast<int>(size);
}

// Checks the arguments of a lookup. The rows of codes may be any number of elements apart.
inline void check_lookup(const char* op, const torch::stable::Tensor& ids, const torch::stable::Tensor& codes,
                         const torch::stable::Tensor& basis) {
  check(ids.is_cuda() && ids.is_contiguous() && basis.is_cuda() && basis.is_contiguous() && codes.is_cuda(), op,
        ": expected CUDA tensors, ids and basis contiguous");
  check(codes.dim() == 2 && basis.dim() == 2 && basis.size(0) == codes.size(1), op,
        ": expected codes (V, r) and basis (r, H)");
  check(codes.size(1) <= 1 || codes.stride(1) == 1, op, ": expected codes with rows of adjacent elements");
}

// Torch's current stream on a device.
inline Stream current_stream(int device, const char* op) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(message(op, ": no current stream on CUDA device ", device));
  return static_cast<Stream>(stream);
}

}  // namespace embkern::cuda
