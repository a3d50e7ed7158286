// The CUDA ops that registration.cpp binds to the schemas of embkern/ops/*.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace embkern::cuda {

using torch::stable::Tensor;

Tensor gather_project_forward(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                              const std::optional<Tensor>& offset, double scale);

void gather_project_out(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                        const std::optional<Tensor>& offset, double scale, Tensor out);

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_project_backward(const Tensor& grad, const Tensor& ids,
                                                                   const Tensor& codes, const Tensor& basis,
                                                                   double scale, int64_t padding_idx,
                                                                   bool needs_codes, bool needs_basis,
                                                                   bool needs_offset, bool sparse);

Tensor gather_decode_forward(const Tensor& ids, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset,
                             int64_t embedding_dim, double scale);

Tensor packed_logits_forward(const Tensor& hidden, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset);

std::tuple<Tensor, Tensor, Tensor> cosine_mse_forward(const Tensor& output, const Tensor& target,
                                                      const std::optional<Tensor>& row_weight,
                                                      const std::optional<Tensor>& target_norm,
                                                      const std::optional<Tensor>& grad_loss, int64_t reduction,
                                                      double cosine_weight, double mse_weight,
                                                      double rmse_weight, double power_weight, double alpha,
                                                      double eps, bool needs_output, bool needs_target);

void scale_gradient(Tensor grad, const Tensor& grad_loss);

}  // namespace embkern::cuda
