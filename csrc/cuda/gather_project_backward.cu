// The raw op gather_project_backward for CUDA tensors; formulas and kernels are in
// gather_project_gradients.cuh. Run: the gradient of embkern.ops.gather_project(ids, codes, basis, offset,
// backend="native").
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <vector>

#include "cuda/gather_project_gradients.cuh"
#include "cuda/gather_project_tensors.cuh"
#include "cuda/ops.h"
#include "cuda/tensors.h"

namespace embkern::cuda {
namespace {

struct Sorted {
  Tensor values, order;
};

// torch.sort(ids, stable=True)
Sorted sort(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  // The headers of torch 2.10 and 2.11 lack STABLE_TORCH_ERROR_CODE_CHECK, which expands to the same for 2.10.
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// The wanted gradients; one that is not has no elements.
struct Wanted {
  const Tensor& codes;  // (V, r), zeros, or with `sparse` (N, r)
  const Tensor& basis;
  const Tensor& offset;
  bool sparse;
};

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <class T>
void sum_codes(const Gradients<T>& problem, const Tensor& ids, const Tensor& grad_codes, const Device& device,
               Stream stream) {
  using A = acc_t<T>;
  const int64_t count = problem.lookup.count, stride = ceil_div(problem.lookup.rank, 4) * 4;
  const auto scratch = [&](int64_t rows) {
    return torch::stable::new_empty(grad_codes, std::vector<int64_t>{rows, stride}, scalar_type_of<A>());
  };
  const Tensor rows = scratch(count), ends = scratch(2 * ceil_div(count, kSegmentBlock));
  grad_rows(problem, data<A>(rows), stride, device, stream);
  const Sorted sorted = sort(torch::stable::flatten(ids));
  Segments<T> segments{};
  segments.rows = data<A>(rows);
  segments.sorted_ids = sorted.values.const_data_ptr();
  segments.order = static_cast<const int64_t*>(sorted.order.const_data_ptr());
  segments.wide_ids = problem.lookup.wide_ids;
  segments.count = count;
  segments.rank = problem.lookup.rank;
  segments.stride = static_cast<int>(stride);
  segments.padding_idx = problem.padding_idx;
  segments.sums = data<T>(grad_codes);
  segments.heads = data<A>(ends);
  segments.tails = segments.heads + ends.numel() / 2;
  sum_segments(kBackwardOp, segments, stream);
}

template <class T>
void run(const Tensor& grad, const Tensor& ids, const Tensor& codes, const Tensor& basis, double scale,
         int64_t padding_idx, const Wanted& wanted) {
  using A = acc_t<T>;
  Gradients<T> problem{};
  problem.lookup = lookup_of<T>(ids, codes, basis, scale);
  const Problem<T>& lookup = problem.lookup;
  problem.grad = static_cast<const T*>(grad.const_data_ptr());
  problem.padding_idx = padding_idx;
  set_alignment(problem);

  const int index = codes.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device device = device_properties(index, kBackwardOp);
  const Stream stream = current_stream(index, kBackwardOp);
  if (wanted.codes.numel() && wanted.sparse)
    grad_rows(problem, data<T>(wanted.codes), lookup.rank, device, stream);
  else if (wanted.codes.numel())
    sum_codes(problem, ids, wanted.codes, device, stream);
  if (wanted.basis.numel() || wanted.offset.numel()) {
    auto plan = plan_grad_basis(lookup, wanted.basis.numel() > 0, wanted.offset.numel() > 0, device);
    const Tensor partial = torch::stable::new_empty(
        grad, std::vector<int64_t>{plan.splits, int64_t{lookup.rank} + 1, plan.stride}, scalar_type_of<A>());
    plan.partial = data<A>(partial);
    grad_basis(problem, plan, data<T>(wanted.basis), data<T>(wanted.offset), device, stream);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_project_backward(const Tensor& grad, const Tensor& ids,
                                                                   const Tensor& codes, const Tensor& basis,
                                                                   double scale, int64_t padding_idx,
                                                                   bool needs_codes, bool needs_basis,
                                                                   bool needs_offset, bool sparse) {
  check_lookup(kBackwardOp, ids, codes, basis);
  check(grad.is_cuda() && grad.is_contiguous() && grad.dim() == 2 && grad.size(0) == ids.numel() &&
            grad.size(1) == basis.size(1) && grad.scalar_type() == codes.scalar_type(),
        kBackwardOp, ": expected grad (N, H), contiguous, in the dtype of codes");
  const int64_t count = ids.numel(), rank = codes.size(1), width = basis.size(1);
  const auto zeros = [&](const std::vector<int64_t>& shape) { return torch::stable::new_zeros(grad, shape); };
  const auto allocate = [&](bool needed, const std::vector<int64_t>& shape) {
    if (grad.numel() == 0 && needed) return zeros(shape);
    return torch::stable::new_empty(grad, needed ? shape : std::vector<int64_t>{0});
  };
  Tensor code_ids =
      torch::stable::new_empty(ids, std::vector<int64_t>{sparse && needs_codes ? count : 0}, ScalarType::Long);
  if (sparse && needs_codes) torch::stable::copy_(code_ids, torch::stable::flatten(ids));
  Tensor grad_codes =
      needs_codes && !sparse ? zeros({codes.size(0), rank}) : allocate(needs_codes, {count, rank});
  Tensor grad_basis = allocate(needs_basis, {rank, width}), grad_offset = allocate(needs_offset, {width});
  const std::tuple<Tensor, Tensor, Tensor, Tensor> gradients{code_ids, grad_codes, grad_basis, grad_offset};
  if (grad.numel() == 0) return gradients;
  const Wanted wanted{grad_codes, grad_basis, grad_offset, sparse};
  dispatch_floating(codes.scalar_type(), "codes", [&](auto element) {
    run<decltype(element)>(grad, ids, codes, basis, scale, padding_idx, wanted);
  });
  return gradients;
}

}  // namespace embkern::cuda
