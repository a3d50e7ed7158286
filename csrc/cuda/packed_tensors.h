// The tensors of a packed table, checked and converted for kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "cuda/packed_record.cuh"
#include "cuda/tensors.h"

namespace embkern::cuda {

using torch::stable::Tensor;

inline PackedTable packed_table(const char* op, const Tensor& records, const Tensor& directory,
                                const Tensor& tiers, const Tensor& levels, const Tensor& scales) {
  using torch::headeronly::ScalarType;
  for (const Tensor* each : {&records, &directory, &tiers, &levels, &scales})
    check(each->is_cuda() && each->is_contiguous(), op, ": expected contiguous CUDA tensors");
  const int64_t V = scales.numel();
  check(directory.dim() == 2 && directory.size(0) == ceil_div(V, kGroup) && directory.size(1) == kEntry, op,
        ": expected directory (ceil(V / 32), 5)");
  check(tiers.dim() == 2 && tiers.size(0) <= kMostTiers && tiers.size(1) >= 1, op,
        ": expected tiers (T, 1 + G) with T up to 16");
  check(levels.numel() == kLevels && levels.scalar_type() == ScalarType::Char, op,
        ": expected levels (17, 16) int8");
  check(records.scalar_type() == ScalarType::Int && directory.scalar_type() == ScalarType::Int &&
            tiers.scalar_type() == ScalarType::Byte,
        op, ": expected records and directory of int32, tiers of uint8");
  return {static_cast<const int32_t*>(records.const_data_ptr()),
          static_cast<const int32_t*>(directory.const_data_ptr()),
          static_cast<const uint8_t*>(tiers.const_data_ptr()),
          static_cast<const int8_t*>(levels.const_data_ptr()),
          records.numel(),
          V,
          static_cast<int>(tiers.size(0)),
          to_int("tiers", tiers.size(1) - 1)};
}

inline void check_floats(const char* op, const std::optional<Tensor>& basis,
                         const std::optional<Tensor>& offset, int64_t width) {
  for (const std::optional<Tensor>* each : {&basis, &offset})
    check(!*each || ((*each)->is_cuda() && (*each)->is_contiguous()), op, ": expected contiguous CUDA tensors");
  check(width >= 1 && (!basis || (basis->dim() == 2 && basis->size(1) == width)), op,
        ": expected basis (K, H)");
  check(!offset || offset->numel() == width, op, ": expected offset (H,)");
}

}  // namespace embkern::cuda
