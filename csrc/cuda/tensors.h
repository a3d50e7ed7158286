// Conversion of tensors to kernel arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "checks.h"
#include "cuda/launch.cuh"

namespace embkern::cuda {

// Kernels count columns in int, rows and elements in int64.
inline int to_int(const char* name, int64_t size) {
  constexpr int64_t kMost = int64_t{1} << 30;
  check(size <= kMost, name, ": expected rows of at most ", kMost, " elements, got ", size);
  return static_cast<int>(size);
}

// Torch's current stream on a device.
inline Stream current_stream(int device, const char* op) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(message(op, ": no current stream on CUDA device ", device));
  return static_cast<Stream>(stream);
}

}  // namespace embkern::cuda
