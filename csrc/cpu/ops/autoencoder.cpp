// autoencoder: the loss of y = c D + b against rows x, with codes c given or c = x W^T + e, and all gradients.
//
//   target x (N, H); codes (N, r), or encoder weight W (r, H) and bias e (r,); basis D (r, H), offset b (H,)
//   -> terms (4,): loss, cosine distance, squared error, power term; gradients in the parameters' shapes
//
// Rows are processed in blocks that stay in L2, so that neither y nor its gradient (N, H) reaches memory. A
// block is computed in one of two forms:
//   direct  y and its gradient g, row by row as in cosine_mse; then grad_c = g D^T, grad_D += c^T g, grad_b +=
//           sum g, and with an encoder grad_W += grad_c^T x, grad_e += sum grad_c. Five products of N H r
//           multiplications with an encoder, three without.
//   Gram    for cosine and squared error only. The gradient is g = s y + t x with two numbers per row, which
//           follow from <x, y> = c P + <x, b>, |y|^2 = c G c + 2 c D b + |b|^2 and |x|^2, where P = D x and G =
//           D D^T. Hence grad_c = s D y + t P and grad_[D; b] = (sum s [c, 1]^T [c, 1]) [D; b] + sum t [c, 1]^T
//           x. Four products with an encoder, two without, and N r^2.
//           Cancellation bounds this form. |x - y|^2 = |x|^2 - 2 <x, y> + |y|^2 cancels where the fit is good,
//           and |y|^2 where codes cancel each other or the offset: its rounding errors are those of
//           p = sum_j c_j^2 G_jj + |b|^2. A block takes the direct form if a row of it has |x - y|^2 below
//           kSafeError of |x|^2 + |y|^2 or of |x|^2 + p, or |y|^2 below kSafeError of p, or norms near the ends
//           of fp32's range.
//
// Large batches are cut into chunks by the shapes alone. Each chunk sums its own gradients, and these sums are
// added in order, so the bits do not depend on the number of threads. Memory: chunks x parameters.
#include <cmath>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/compiler.h"
#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/ops/autoencoder/step.h"
#include "cpu/ops/ops.h"

namespace embkern {
namespace {

using namespace autoencoder;

template <class Body>
void dispatch_training(ScalarType type, Body body) {
  if (type == ScalarType::Double) return body(double{});
  check(type == ScalarType::Float, "target: expected dtype Float or Double, got ",
        torch::headeronly::toString(type));
  body(float{});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> autoencoder_forward(
    const Tensor& target, const std::optional<Tensor>& codes, const std::optional<Tensor>& encoder_weight,
    const std::optional<Tensor>& encoder_bias, const Tensor& basis, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& row_weight, const std::optional<Tensor>& target_norm, int64_t reduction,
    double cosine_weight, double mse_weight, double rmse_weight, double power_weight, double alpha, double eps,
    bool needs_grad) {
  const ScalarType type = target.scalar_type();
  check_tensor("target", target, 2, type);
  check_tensor("basis", basis, 2, type);
  const int64_t count = target.size(0), width = target.size(1), rank = basis.size(0);
  check(width > 0, "target: expected rows of at least 1 element, got 0");
  check_size("basis", basis, 1, width);
  check(codes.has_value() != encoder_weight.has_value(), "codes: expected either these or encoder_weight");
  check(encoder_weight || !encoder_bias, "encoder_bias: expected none without encoder_weight");
  check_shape("codes", codes, type, {count, rank});
  check_shape("encoder_weight", encoder_weight, type, {rank, width});
  check_shape("encoder_bias", encoder_bias, type, {rank});
  check_shape("offset", offset, type, {width});
  check_shape("row_weight", row_weight, type, {count});
  check_shape("target_norm", target_norm, type, {count});
  const LossOptions options{reduction, cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps};
  check_options(options);
  check(reduction != kNone, "reduction: expected mean or sum");

  Tensor terms = empty({4}, type);
  const auto gradient_of = [&](const std::optional<Tensor>& tensor, std::vector<int64_t> sizes) {
    return empty(needs_grad && tensor ? sizes : std::vector<int64_t>{0}, type);
  };
  Tensor grad_codes = gradient_of(codes, {count, rank});
  Tensor grad_weight = gradient_of(encoder_weight, {rank, width});
  Tensor grad_bias = gradient_of(encoder_bias, {rank});
  Tensor grad_basis = gradient_of(basis, {rank, width});
  Tensor grad_offset = gradient_of(offset, {width});
  dispatch_training(type, [&](auto element) {
    using T = decltype(element);
    const auto rows = rows_of(static_cast<const T*>(target.const_data_ptr()), count, width);
    Batch<T> batch{};
    batch.count = count;
    batch.rows = rows.data();
    batch.codes = optional_data<T>(codes);
    batch.weight = optional_data<T>(row_weight);
    batch.target_norm = optional_data<T>(target_norm);
    batch.gradient = needs_grad;
    batch.grad_codes = needs_grad && codes ? static_cast<T*>(grad_codes.mutable_data_ptr()) : nullptr;
    const Parameters<T> parameters{rank,
                                   width,
                                   optional_data<T>(encoder_weight),
                                   optional_data<T>(encoder_bias),
                                   static_cast<const T*>(basis.const_data_ptr()),
                                   optional_data<T>(offset)};
    const Layout layout{rank, width};
    std::vector<T> gradient(needs_grad ? layout.size() : 0);
    Step<T> step(parameters, options, nullptr);
    const Terms sums = step.run(batch, gradient.data(), [](int64_t, int64_t, T*) {});
    T* out = static_cast<T*>(terms.mutable_data_ptr());
    const double empty_mean = count == 0 && reduction == kMean ? std::nan("") : 0;
    const double values[4] = {sums.loss, sums.distance, sums.mse, sums.power};
    for (int i = 0; i < 4; ++i) out[i] = static_cast<T>(values[i] + empty_mean);
    if (!needs_grad) return;
    const auto copy = [&](Tensor& to, int64_t at) {
      if (to.numel() > 0) std::copy_n(gradient.data() + at, to.numel(), static_cast<T*>(to.mutable_data_ptr()));
    };
    copy(grad_weight, layout.encoder_weight());
    copy(grad_bias, layout.encoder_bias());
    copy(grad_basis, layout.basis());
    copy(grad_offset, layout.offset());
  });
  return {terms, grad_codes, grad_weight, grad_bias, grad_basis, grad_offset};
}

Tensor autoencoder_train(const Tensor& rows, const Tensor& order, int64_t batch_size, Tensor parameters,
                         Tensor first_moment, Tensor second_moment, int64_t rank, int64_t step, double lr,
                         double beta1, double beta2, double adam_eps, double cosine_weight, double mse_weight,
                         double rmse_weight, double power_weight, double alpha, double eps) {
  const ScalarType type = rows.scalar_type();
  check_tensor("rows", rows, 2, type);
  check_tensor("order", order, 1, ScalarType::Long);
  check(batch_size > 0, "batch_size: expected at least 1, got ", batch_size);
  check(rank > 0 && rows.size(1) > 0, "rank: expected at least 1, and rows of at least 1 element");
  const Layout layout{rank, rows.size(1)};
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"parameters", &parameters},
                                     {"first_moment", &first_moment},
                                     {"second_moment", &second_moment}})
    check_shape(name, *tensor, type, {layout.size()});
  const LossOptions options{kMean, cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps};
  const int64_t count = order.numel(), steps = (count + batch_size - 1) / batch_size;
  // The ids are copied because another thread may write to the tensor after the check.
  const auto* all = static_cast<const int64_t*>(order.const_data_ptr());
  const std::vector<int64_t> ids(all, all + count);
  for (int64_t n = 0; n < count; ++n)
    if (ids[n] < 0 || ids[n] >= rows.size(0))
      throw std::out_of_range(
          message("order: expected 0 <= id < ", rows.size(0), ", got ", ids[n], " at position ", n));
  Tensor losses = empty({steps}, type);
  dispatch_training(type, [&](auto element) {
    using T = decltype(element);
    const T* table = static_cast<const T*>(rows.const_data_ptr());
    T* p = static_cast<T*>(parameters.mutable_data_ptr());
    T* m = static_cast<T*>(first_moment.mutable_data_ptr());
    T* v = static_cast<T*>(second_moment.mutable_data_ptr());
    T* loss = static_cast<T*>(losses.mutable_data_ptr());
    const Parameters<T> views{rank,
                              layout.width,
                              p + layout.encoder_weight(),
                              p + layout.encoder_bias(),
                              p + layout.basis(),
                              p + layout.offset()};
    const auto& training = training_kernels<T>();
    Team team(useful_threads(std::min(batch_size, count) * rank * layout.width / kTeamShare));
    Step<T> run(views, options, &team);
    std::vector<const T*> pointers;
    Buffer<T> gradient;
    gradient.resize(layout.size());
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t first = s * batch_size, last = std::min(count, first + batch_size);
      pointers.resize(last - first);
      for (int64_t n = first; n < last; ++n) pointers[n - first] = table + ids[n] * layout.width;
      // The rows of the next batch are scattered over the table; they are read from memory during this step.
      for (int64_t n = last; n < std::min(count, last + std::min<int64_t>(batch_size, kSmallBatch)); ++n)
        prefetch<0, 2>(table + ids[n] * layout.width, layout.width * sizeof(T));
      Batch<T> batch{};
      batch.count = last - first;
      batch.rows = pointers.data();
      batch.gradient = true;
      const double taken = static_cast<double>(step + s + 1);
      const double correction = 1 - std::pow(beta1, taken),
                   root_correction = std::sqrt(1 - std::pow(beta2, taken));
      const AdamStep<T> adam{static_cast<T>(beta1),           static_cast<T>(1 - beta1),
                             static_cast<T>(beta2),           static_cast<T>(1 - beta2),
                             static_cast<T>(lr / correction), static_cast<T>(1 / root_correction),
                             static_cast<T>(adam_eps)};
      const Terms terms = run.run(batch, gradient.get(), [&](int64_t at, int64_t size, const T* grad) {
        training.adam(adam, size, grad + at, p + at, m + at, v + at);
      });
      loss[s] = static_cast<T>(terms.loss);
    }
  });
  return losses;
}

}  // namespace embkern
