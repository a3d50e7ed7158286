// The CPU ops that registration.cpp binds to the schemas of embkern/ops/*.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace embkern {

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

std::tuple<Tensor, Tensor, Tensor> cosine_mse_forward(const Tensor& output, const Tensor& target,
                                                      const std::optional<Tensor>& row_weight,
                                                      const std::optional<Tensor>& target_norm,
                                                      const std::optional<Tensor>& grad_loss, int64_t reduction,
                                                      double cosine_weight, double mse_weight,
                                                      double rmse_weight, double power_weight, double alpha,
                                                      double eps, bool needs_output, bool needs_target);

Tensor packed_logits_forward(const Tensor& hidden, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset);

// The gradients are of fp32, or of float64 if hidden or scales are. One that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> packed_logits_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& records, const Tensor& directory,
    const Tensor& tiers, const Tensor& levels, const Tensor& scales, const std::optional<Tensor>& basis,
    const std::optional<Tensor>& offset, bool needs_hidden, bool needs_scales, bool needs_basis,
    bool needs_offset);

// Losses, statistics for the backward, and the gradient of the losses' sum by hidden, empty if not needed. The
// losses and statistics of ignored states are 0.
std::tuple<Tensor, Tensor, Tensor> packed_cross_entropy_forward(
    const Tensor& hidden, const Tensor& labels, const Tensor& records, const Tensor& directory,
    const Tensor& tiers, const Tensor& levels, const Tensor& scales, const std::optional<Tensor>& basis,
    const std::optional<Tensor>& offset, const std::optional<Tensor>& bias, int64_t ignore_index,
    double label_smoothing, double softcap, bool needs_hidden);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_cross_entropy_backward(
    const Tensor& grad, const Tensor& statistics, const Tensor& hidden, const Tensor& labels,
    const Tensor& records, const Tensor& directory, const Tensor& tiers, const Tensor& levels,
    const Tensor& scales, const std::optional<Tensor>& basis, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& bias, int64_t ignore_index, double label_smoothing, double softcap,
    bool needs_hidden, bool needs_scales, bool needs_basis, bool needs_offset, bool needs_bias);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> autoencoder_forward(
    const Tensor& target, const std::optional<Tensor>& codes, const std::optional<Tensor>& encoder_weight,
    const std::optional<Tensor>& encoder_bias, const Tensor& basis, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& row_weight, const std::optional<Tensor>& target_norm, int64_t reduction,
    double cosine_weight, double mse_weight, double rmse_weight, double power_weight, double alpha, double eps,
    bool needs_grad);

Tensor autoencoder_train(const Tensor& rows, const Tensor& order, int64_t batch_size, Tensor parameters,
                         Tensor first_moment, Tensor second_moment, int64_t rank, int64_t step, double lr,
                         double beta1, double beta2, double adam_eps, double cosine_weight, double mse_weight,
                         double rmse_weight, double power_weight, double alpha, double eps);

Tensor gather_decode_forward(const Tensor& ids, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset,
                             int64_t embedding_dim, double scale);

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& values, const std::optional<Tensor>& spread,
                                                 const Tensor& bits, const Tensor& levels, const Tensor& steps,
                                                 const Tensor& factors, bool needs_codes);

std::tuple<Tensor, Tensor, Tensor> quantize_trellis(const Tensor& values, const std::optional<Tensor>& spread,
                                                    const Tensor& bits, const Tensor& levels,
                                                    const Tensor& scales, bool needs_codes);

// exp and tanh of the kernels, for tests.
std::tuple<Tensor, Tensor> exp_and_tanh(const Tensor& values);

// Turns the filling of fresh tensors and scratch memory with NaN on or off, for tests.
void set_poison_memory(bool on);

}  // namespace embkern
