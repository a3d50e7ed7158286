// The raw op scale_gradient_ for CUDA tensors; formula and kernels are in scale_gradient.cuh.
// Run: the backward of embkern.ops.cosine_mse_loss on CUDA.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/ops.h"
#include "cuda/scale_gradient.cuh"
#include "cuda/tensors.h"

namespace embkern::cuda {
namespace {

template <class T>
void run(const Tensor& grad, const Tensor& grad_loss) {
  const int index = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const int64_t count = grad.dim() ? grad.size(0) : 1;
  scale_gradient(static_cast<T*>(grad.mutable_data_ptr()),
                 static_cast<const acc_t<T>*>(grad_loss.const_data_ptr()), count, grad.numel() / count,
                 grad_loss.dim() > 0, device_properties(index, kScaleOp), current_stream(index, kScaleOp));
}

}  // namespace

void scale_gradient(Tensor grad, const Tensor& grad_loss) {
  check(grad.is_cuda() && grad.is_contiguous() && grad_loss.is_cuda() && grad_loss.is_contiguous() &&
            grad_loss.get_device_index() == grad.get_device_index(),
        kScaleOp, ": expected contiguous CUDA tensors on one device");
  const auto factor = grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(grad_loss.scalar_type() == factor, "grad_loss: expected dtype ", torch::headeronly::toString(factor),
        ", got ", torch::headeronly::toString(grad_loss.scalar_type()));
  check(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad.dim() > 0 && grad_loss.size(0) == grad.size(0)),
        "grad_loss: expected a scalar or one value per row");
  if (grad.numel() == 0) return;
  dispatch_floating(grad.scalar_type(), "grad", [&](auto element) { run<decltype(element)>(grad, grad_loss); });
}

}  // namespace embkern::cuda
