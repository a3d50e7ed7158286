// The raw op cosine_mse for CUDA tensors; formula and kernels are in cosine_mse.cuh.
// Run: embkern.ops.cosine_mse_loss(output, target, backend="native").
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/cosine_mse.cuh"
#include "cuda/ops.h"
#include "cuda/tensors.h"

namespace embkern::cuda {
namespace {

ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_matrices(const Tensor& output, const Tensor& target) {
  for (const Tensor* each : {&output, &target})
    check(each->is_cuda() && each->is_contiguous(), kOp, ": expected contiguous CUDA tensors");
  check(output.dim() == 2 && target.dim() == 2 && output.size(0) == target.size(0) &&
            output.size(1) == target.size(1) && output.size(1) > 0,
        kOp, ": expected output and target (N, H) with H >= 1");
  check(target.scalar_type() == output.scalar_type(), "target: expected dtype ",
        torch::headeronly::toString(output.scalar_type()), " as in output, got ",
        torch::headeronly::toString(target.scalar_type()));
  check(target.get_device_index() == output.get_device_index(), "target: expected the device of output");
}

// An optional tensor in the accumulation dtype on the device of output.
void check_values(const char* name, const std::optional<Tensor>& values, const Tensor& output) {
  if (!values) return;
  check(values->is_cuda() && values->get_device_index() == output.get_device_index(), name,
        ": expected the device of output");
  check(values->scalar_type() == accumulation_type(output), name, ": expected dtype ",
        torch::headeronly::toString(accumulation_type(output)), ", got ",
        torch::headeronly::toString(values->scalar_type()));
}

void check_row_values(const char* name, const std::optional<Tensor>& values, const Tensor& output) {
  check_values(name, values, output);
  check(!values || (values->dim() == 1 && values->size(0) == output.size(0) && values->is_contiguous()), name,
        ": expected (N,), contiguous");
}

template <class A>
const A* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* data(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cosine_mse_forward(const Tensor& output, const Tensor& target,
                                                      const std::optional<Tensor>& row_weight,
                                                      const std::optional<Tensor>& target_norm,
                                                      const std::optional<Tensor>& grad_loss, int64_t reduction,
                                                      double cosine_weight, double mse_weight,
                                                      double rmse_weight, double power_weight, double alpha,
                                                      double eps, bool needs_output, bool needs_target) {
  check_matrices(output, target);
  check_row_values("row_weight", row_weight, output);
  check_row_values("target_norm", target_norm, output);
  check(reduction >= kNone && reduction <= kSum, "reduction: expected 0, 1 or 2, got ", reduction);
  const int64_t count = output.size(0), width = output.size(1);
  check_values("grad_loss", grad_loss, output);
  if (grad_loss)
    check(reduction == kNone ? grad_loss->dim() == 1 && grad_loss->size(0) == count : grad_loss->dim() == 0,
          "grad_loss: expected the shape of the loss");

  const int device_index = output.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const auto matrix = [&](bool wanted) {
    return torch::stable::new_empty(output,
                                    wanted ? std::vector<int64_t>{count, width} : std::vector<int64_t>{0});
  };
  Tensor loss = torch::stable::new_empty(
      output, reduction == kNone ? std::vector<int64_t>{count} : std::vector<int64_t>{},
      accumulation_type(output));
  Tensor grad_output = matrix(needs_output), grad_target = matrix(needs_target);
  if (count == 0 && reduction == kNone) return {loss, grad_output, grad_target};

  const Device device = device_properties(device_index, kOp);
  const int64_t scratch_size = reduction == kNone ? 0 : loss_scratch(device);
  Tensor scratch = torch::stable::new_empty(output, {scratch_size}, ScalarType::Double);
  const auto run = [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    LossProblem<T> problem;
    problem.output = static_cast<const T*>(output.const_data_ptr());
    problem.target = static_cast<const T*>(target.const_data_ptr());
    problem.row_weight = data<A>(row_weight);
    problem.target_norm = data<A>(target_norm);
    problem.grad_loss = data<A>(grad_loss);
    problem.grad_loss_stride = grad_loss && reduction == kNone ? grad_loss->stride(0) : 0;
    problem.count = count;
    problem.width = to_int("output", width);
    problem.reduction = static_cast<Reduction>(reduction);
    problem.terms = make_terms<T>(cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps, width);
    problem.loss = static_cast<A*>(loss.mutable_data_ptr());
    problem.grad_output = data<T>(grad_output, needs_output);
    problem.grad_target = data<T>(grad_target, needs_target);
    cosine_mse(problem, static_cast<double*>(scratch.mutable_data_ptr()), device,
               current_stream(device_index, kOp));
  };
  dispatch_floating(output.scalar_type(), "output", run);
  return {loss, grad_output, grad_target};
}

}  // namespace embkern::cuda
