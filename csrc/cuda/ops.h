// The CUDA ops that registration.cpp binds to the schemas of embkern/ops/*.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace embkern::cuda {

using torch::stable::Tensor;

Tensor gather_project_forward(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                              const std::optional<Tensor>& offset, double scale);

void gather_project_out(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                        const std::optional<Tensor>& offset, double scale, Tensor out);

}  // namespace embkern::cuda
