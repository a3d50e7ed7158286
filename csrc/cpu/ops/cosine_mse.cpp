// cosine_mse: for rows y of output and x of target, e = y - x,
//   row  = cosine (1 - <x, y> / max(|x||y|, eps)) + mse mean(e^2) + power mean((|e| + 1e-10)^alpha)
//   loss = sum_n w_n row_n / sum_n w_n + rmse sqrt(sum_n w_n mean(e_n^2) / sum_n w_n)
// and its gradients, times `grad_loss` if given. This is reduction mean. Reduction sum has no divisions, and
// one root per row; reduction none gives the terms of that sum.
//
//   output, target (N, H) of one dtype, row_weight and target_norm (N,) or none -> loss () or (N,), gradients
//   (N, H), or (0,) if not needed. Sums are in fp32, or in fp64 if a row's squares leave fp32's range.
//
// Bytes moved: 2 N H read, N H written per gradient. A row stays in L1 between its sums and its gradient. The
// gradient of the batch's root first needs a sum over the batch, which reads output and target once more.
#include <cmath>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/row_loss.h"

namespace embkern {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // elements of a task: 128 KB of each operand in fp32

template <class T>
struct CosineMSE {
  using A = acc_t<T>;
  const Kernels<T>& table = kernels<T>();  // read once, since another thread may change the level
  LossOptions options;
  int64_t count, width;
  const T *output, *target;
  const A *weight, *target_norm, *grad_loss;
  A* loss;
  T *grad_output, *grad_target;  // null if not needed

  double weight_of(int64_t n) const { return weight ? static_cast<double>(weight[n]) : 1; }

  template <class Body>
  void for_rows(int64_t operations, Body body) const {
    const int64_t rows = std::max<int64_t>(1, kTaskElements / width);
    for_tasks((count + rows - 1) / rows, useful_threads(count * width * operations), [&](int64_t task) {
      for (int64_t n = task * rows; n < std::min(count, (task + 1) * rows); ++n) body(n);
    });
  }

  void operator()() const {
    double total_weight = count;
    if (weight) {
      total_weight = 0;
      for (int64_t n = 0; n < count; ++n) total_weight += weight[n];
    }
    const bool mean = options.reduction == kMean, one_root = mean && options.rmse != 0;
    const double norm = mean ? 1 / total_weight : 1;  // the factor of a row's weight
    std::vector<double> rows(count);
    double root = 0;
    if (one_root) {
      for_rows(4, [&](int64_t n) {
        rows[n] = table.row_sums(output + n * width, target + n * width, width).error_square / width;
      });
      for (int64_t n = 0; n < count; ++n) root += norm * weight_of(n) * rows[n];
      root = std::sqrt(root);
    }
    for_rows(options.power != 0 ? 40 : 8,
             [&](int64_t n) { rows[n] = row(n, norm, one_root ? &root : nullptr); });
    if (options.reduction == kNone) return;
    double sum = 0;  // a sequential sum has the same bits for any number of threads
    for (const double value : rows) sum += value;
    if (one_root) sum += options.rmse * root;
    *loss = static_cast<A>(mean && count == 0 ? std::nan("") : sum);
  }

  // Returns a row's term of the loss and writes its gradients.
  double row(int64_t n, double norm, const double* batch_root) const {
    const T *y = output + n * width, *x = target + n * width;
    thread_local std::vector<A> slopes;
    const bool gradient = grad_output || grad_target;
    if (options.power != 0 && gradient && static_cast<int64_t>(slopes.size()) < width) slopes.resize(width);
    A* slope = gradient ? slopes.data() : nullptr;
    const double known_norm = target_norm ? static_cast<double>(target_norm[n]) : 0;
    RowLoss row =
        row_loss(table.row_sums(y, x, width), target_norm ? &known_norm : nullptr, width, options.eps);
    if (options.power != 0) row.power = table.row_power(y, x, width, options.alpha, slope) / width;

    const double factor = norm * weight_of(n);
    const double root = batch_root ? *batch_root : std::sqrt(row.mse);
    double value = factor * row.value(options);
    if (!batch_root && options.rmse != 0) value += factor * options.rmse * root;
    if (options.reduction == kNone) loss[n] = static_cast<A>(value);
    if (gradient) {
      const double incoming = !grad_loss ? 1 : grad_loss[options.reduction == kNone ? n : 0];
      const double scaled = incoming * factor, from_root = root_slope(options, scaled, root, width);
      if (grad_output)
        table.row_gradient(y, x, width, output_gradient<A>(row, options, width, scaled, from_root, slope),
                           grad_output + n * width);
      if (grad_target)
        table.row_gradient(y, x, width, target_gradient<A>(row, options, width, scaled, from_root, slope),
                           grad_target + n * width);
    }
    return value;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cosine_mse_forward(const Tensor& output, const Tensor& target,
                                                      const std::optional<Tensor>& row_weight,
                                                      const std::optional<Tensor>& target_norm,
                                                      const std::optional<Tensor>& grad_loss, int64_t reduction,
                                                      double cosine_weight, double mse_weight,
                                                      double rmse_weight, double power_weight, double alpha,
                                                      double eps, bool needs_output, bool needs_target) {
  const ScalarType type = output.scalar_type();
  check_tensor("output", output, 2, type);
  check_tensor("target", target, 2, type);
  const int64_t count = output.size(0), width = output.size(1);
  check_size("target", target, 0, count);
  check_size("target", target, 1, width);
  check(width > 0, "output: expected rows of at least 1 element, got 0");
  const LossOptions options{reduction, cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps};
  check_options(options);
  Tensor loss, grad_output, grad_target;
  dispatch_floating(type, "output", [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    check_shape("row_weight", row_weight, scalar_type_of<A>(), {count});
    check_shape("target_norm", target_norm, scalar_type_of<A>(), {count});
    const std::vector<int64_t> loss_shape(reduction == kNone ? 1 : 0, count);
    check_shape("grad_loss", grad_loss, scalar_type_of<A>(), loss_shape);
    const auto gradient = [&](bool needed) {
      return needed ? empty_in_huge_pages({count, width}, type, sizeof(T)) : empty({0}, type);
    };
    loss = empty(loss_shape, scalar_type_of<A>());
    grad_output = gradient(needs_output);
    grad_target = gradient(needs_target);
    CosineMSE<T> run;
    run.options = options;
    run.count = count, run.width = width;
    run.output = static_cast<const T*>(output.const_data_ptr());
    run.target = static_cast<const T*>(target.const_data_ptr());
    run.weight = optional_data<A>(row_weight);
    run.target_norm = optional_data<A>(target_norm);
    run.grad_loss = optional_data<A>(grad_loss);
    run.loss = static_cast<A*>(loss.mutable_data_ptr());
    run.grad_output = needs_output ? static_cast<T*>(grad_output.mutable_data_ptr()) : nullptr;
    run.grad_target = needs_target ? static_cast<T*>(grad_target.mutable_data_ptr()) : nullptr;
    run();
  });
  return {loss, grad_output, grad_target};
}

}  // namespace embkern
