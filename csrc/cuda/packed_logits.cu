// The raw op packed_logits for CUDA tensors; formula and kernels are in packed_logits.cuh.
// Run: embkern.ops.packed_logits(hidden, records, ..., backend="native").
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>
#include <vector>

#include "cuda/ops.h"
#include "cuda/packed_logits.cuh"
#include "cuda/packed_tensors.h"

namespace embkern::cuda {
namespace {

Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      fail(name, ": expected dtype Float, Double, BFloat16 or Half, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

template <class T, class A>
void run(const Tensor& hidden, const PackedTable& table, const Tensor& scales,
         const std::optional<Tensor>& basis, const std::optional<Tensor>& offset, const Tensor& logits) {
  LogitsProblem<T, A> problem{};
  problem.hidden = hidden.const_data_ptr();
  problem.element = element_of("hidden", hidden);
  problem.count = hidden.size(0);
  problem.table = table;
  problem.width = to_int("hidden", hidden.size(1));
  problem.terms = basis ? to_int("basis", basis->size(0)) : 0;
  problem.scales = static_cast<const T*>(scales.const_data_ptr());
  problem.basis = basis ? static_cast<const T*>(basis->const_data_ptr()) : nullptr;
  problem.offset = offset ? static_cast<const T*>(offset->const_data_ptr()) : nullptr;
  problem.logits = logits.mutable_data_ptr();

  const int device = scales.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t size = problem.width + problem.terms;
  const Tensor states =
      torch::stable::new_empty(scales, std::vector<int64_t>{kMostStates, size}, scalar_type_of<A>());
  const Tensor shifts =
      torch::stable::new_empty(scales, std::vector<int64_t>{kMostStates}, scalar_type_of<A>());
  problem.states = static_cast<A*>(states.mutable_data_ptr());
  problem.shifts = static_cast<A*>(shifts.mutable_data_ptr());
  packed_logits(problem, device_properties(device, kLogitsOp), current_stream(device, kLogitsOp));
}

template <class T>
void run_in(const Tensor& hidden, const PackedTable& table, const Tensor& scales,
            const std::optional<Tensor>& basis, const std::optional<Tensor>& offset, const Tensor& logits) {
  if (hidden.scalar_type() == ScalarType::Double)
    return run<T, double>(hidden, table, scales, basis, offset, logits);
  run<T, acc_t<T>>(hidden, table, scales, basis, offset, logits);
}

}  // namespace

Tensor packed_logits_forward(const Tensor& hidden, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset) {
  check(hidden.is_cuda() && hidden.is_contiguous() && hidden.dim() == 2, kLogitsOp,
        ": expected hidden (N, H), a contiguous CUDA tensor");
  const PackedTable table = packed_table(kLogitsOp, records, directory, tiers, levels, scales);
  check_floats(kLogitsOp, basis, offset, hidden.size(1));
  const Tensor logits = torch::stable::new_empty(hidden, std::vector<int64_t>{hidden.size(0), scales.numel()});
  if (logits.numel() == 0) return logits;
  dispatch_floating(scales.scalar_type(), "scales", [&](auto element) {
    run_in<decltype(element)>(hidden, table, scales, basis, offset, logits);
  });
  return logits;
}

}  // namespace embkern::cuda
