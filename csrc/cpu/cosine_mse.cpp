// cosine_mse: with rows y_n of output, x_n of target and weights w_n (1 if none), W = sum_n w_n,
//
//   loss = sum_n w_n (cosine_weight (1 - cos_n) + mse_weight |x_n - y_n|^2 / H) / W
//   cos_n = <x_n, y_n> / max(|x_n| |y_n|, eps)
//
// Bytes moved: forward 2 N H read and (N, 3) statistics written; backward 2 N H read, N H written.
// stats[n] = (<x, y>, |y|, |x|): with them the gradient of a row is a combination of y, x and y - x.
// |x - y|^2 is summed directly, not from the statistics, where it would cancel for a good fit; for the same
// reason the gradient of the squared error is taken from y - x.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace embkern {
namespace {

constexpr int64_t kGrainRows = 16;
template <class A>
double total_weight(const A* row_weight, int64_t count) {
  if (!row_weight) return static_cast<double>(count);
  double sum = 0;
  for (int64_t n = 0; n < count; ++n) sum += row_weight[n];
  return sum;
}

// output and target (N, H) of one dtype; row_weight (N,) in the accumulation dtype.
template <class T>
void check_arguments(const Tensor& output, const Tensor& target, const std::optional<Tensor>& row_weight) {
  check_tensor("output", output, 2, output.scalar_type());
  check_tensor("target", target, 2, output.scalar_type());
  check_size("target", target, 0, output.size(0));
  check_size("target", target, 1, output.size(1));
  if (row_weight) {
    check_tensor("row_weight", *row_weight, 1, scalar_type_of<acc_t<T>>());
    check_size("row_weight", *row_weight, 0, output.size(0));
  }
}

template <class A>
const A* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor> cosine_mse_forward(const Tensor& output, const Tensor& target,
                                              const std::optional<Tensor>& row_weight, double cosine_weight,
                                              double mse_weight, double eps) {
  check_tensor("output", output, 2, output.scalar_type());
  const bool wide = output.scalar_type() == ScalarType::Double;
  const auto scalar = wide ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(output, {}, scalar);
  Tensor stats = torch::stable::new_empty(output, {output.size(0), 3}, scalar);
  dispatch_floating(output.scalar_type(), "output", [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    check_arguments<T>(output, target, row_weight);
    const Kernels<T>& table = kernels<T>();
    const int64_t count = output.size(0), width = output.size(1);
    const T* y = static_cast<const T*>(output.const_data_ptr());
    const T* x = static_cast<const T*>(target.const_data_ptr());
    const A* weight = optional_data<A>(row_weight);
    A* stat = static_cast<A*>(stats.mutable_data_ptr());
    std::vector<double> row_loss(count);
    torch::stable::parallel_for(0, count, kGrainRows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const RowSums<A> row = table.row_sums(y + n * width, x + n * width, width);
        const A output_norm = std::sqrt(row.output_square), target_norm = std::sqrt(row.target_square);
        stat[3 * n] = row.dot;
        stat[3 * n + 1] = output_norm;
        stat[3 * n + 2] = target_norm;
        // std::max(eps, NaN) would hide a NaN; the comparison below lets it through to the loss.
        const A product = output_norm * target_norm;
        const A cosine = row.dot / (product < A(eps) ? A(eps) : product);
        row_loss[n] = (weight ? weight[n] : 1.0) *
                      (cosine_weight * (1.0 - cosine) + mse_weight * row.error_square / width);
      }
    });
    double sum = 0;  // sequential: the same bits for any number of threads
    for (const double value : row_loss) sum += value;
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(sum / total_weight(weight, count));
  });
  return {loss, stats};
}

Tensor cosine_mse_backward(const Tensor& grad_loss, const Tensor& output, const Tensor& target,
                           const std::optional<Tensor>& row_weight, const Tensor& stats, double cosine_weight,
                           double mse_weight, double eps) {
  Tensor grad_output = torch::stable::empty_like(output);
  dispatch_floating(output.scalar_type(), "output", [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    check_arguments<T>(output, target, row_weight);
    const Kernels<T>& table = kernels<T>();
    const int64_t count = output.size(0), width = output.size(1);
    check_tensor("grad_loss", grad_loss, 0, scalar_type_of<A>());
    check_tensor("stats", stats, 2, scalar_type_of<A>());
    check_size("stats", stats, 0, count);
    check_size("stats", stats, 1, 3);
    const T* y = static_cast<const T*>(output.const_data_ptr());
    const T* x = static_cast<const T*>(target.const_data_ptr());
    const A* weight = optional_data<A>(row_weight);
    const A* stat = static_cast<const A*>(stats.const_data_ptr());
    T* grad = static_cast<T*>(grad_output.mutable_data_ptr());
    const double incoming = *static_cast<const A*>(grad_loss.const_data_ptr()) / total_weight(weight, count);
    torch::stable::parallel_for(0, count, kGrainRows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const A dot = stat[3 * n], output_norm = stat[3 * n + 1], product = output_norm * stat[3 * n + 2];
        const A row = static_cast<A>(incoming * (weight ? weight[n] : 1.0));
        const A cosine = row * A(cosine_weight);
        const bool clamped = product < A(eps);
        const A from_target = -cosine / (clamped ? A(eps) : product);
        const A from_output = clamped ? A(0) : cosine * (dot / product) / (output_norm * output_norm);
        const A from_error = row * static_cast<A>(2.0 * mse_weight / width);
        table.row_gradient(y + n * width, x + n * width, width, from_output, from_target, from_error,
                           grad + n * width);
      }
    });
  });
  return grad_output;
}

}  // namespace embkern
