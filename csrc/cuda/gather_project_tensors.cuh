// What gather_project and its gradients read, from the tensors of a call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cuda/gather_project_problem.cuh"
#include "cuda/tensors.h"

namespace embkern::cuda {

template <class T>
Problem<T> lookup_of(const torch::stable::Tensor& ids, const torch::stable::Tensor& codes,
                     const torch::stable::Tensor& basis, double scale) {
  Problem<T> problem{};
  problem.ids = ids.const_data_ptr();
  problem.wide_ids = ids.scalar_type() == ScalarType::Long;
  problem.count = ids.numel();
  problem.num_embeddings = codes.size(0);
  problem.rank = to_int("codes", codes.size(1));
  problem.width = to_int("basis", basis.size(1));
  problem.codes = static_cast<const T*>(codes.const_data_ptr());
  problem.codes_stride = codes.stride(0);
  problem.basis = static_cast<const T*>(basis.const_data_ptr());
  problem.scale = static_cast<acc_t<T>>(scale);
  return problem;
}

}  // namespace embkern::cuda
