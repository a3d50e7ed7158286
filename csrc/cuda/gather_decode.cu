// The raw op gather_decode for CUDA tensors; formula and kernels are in gather_decode.cuh.
// Run: embkern.ops.gather_decode(ids, records, ..., embedding_dim=H, backend="native").
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/gather_decode.cuh"
#include "cuda/ops.h"
#include "cuda/packed_tensors.h"

namespace embkern::cuda {

// Instantiated in gather_project.cu.
extern template void gather_project(const Problem<float>&, const Device&, Stream);
extern template void gather_project(const Problem<double>&, const Device&, Stream);
extern template void gather_project(const Problem<BFloat16>&, const Device&, Stream);
extern template void gather_project(const Problem<Half>&, const Device&, Stream);

namespace {

template <class T>
void run(const Tensor& ids, const PackedTable& table, const Tensor& scales, const std::optional<Tensor>& basis,
         const std::optional<Tensor>& offset, double scale, const Tensor& out) {
  DecodeProblem<T> problem{};
  problem.ids = ids.const_data_ptr();
  problem.wide_ids = ids.scalar_type() == ScalarType::Long;
  problem.count = ids.numel();
  problem.table = table;
  problem.width = to_int("embedding_dim", out.size(-1));
  problem.terms = basis ? to_int("basis", basis->size(0)) : 0;
  problem.scales = static_cast<const T*>(scales.const_data_ptr());
  problem.basis = basis ? static_cast<const T*>(basis->const_data_ptr()) : nullptr;
  problem.offset = offset ? static_cast<const T*>(offset->const_data_ptr()) : nullptr;
  problem.out = static_cast<T*>(out.mutable_data_ptr());
  problem.scale = static_cast<acc_t<T>>(scale);

  const int device = scales.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::optional<Tensor> coefficients, factors, places;
  if (problem.terms > 0) {
    coefficients = torch::stable::new_empty(scales, std::vector<int64_t>{problem.count, problem.terms});
    factors = torch::stable::new_empty(scales, std::vector<int64_t>{problem.count}, scalar_type_of<acc_t<T>>());
    places = torch::stable::new_empty(scales, std::vector<int64_t>{problem.count}, ScalarType::Int);
    problem.coefficients = static_cast<T*>(coefficients->mutable_data_ptr());
    problem.factors = static_cast<acc_t<T>*>(factors->mutable_data_ptr());
    problem.places = static_cast<int32_t*>(places->mutable_data_ptr());
  }
  gather_decode(problem, device_properties(device, kDecodeOp), current_stream(device, kDecodeOp));
}

}  // namespace

Tensor gather_decode_forward(const Tensor& ids, const Tensor& records, const Tensor& directory,
                             const Tensor& tiers, const Tensor& levels, const Tensor& scales,
                             const std::optional<Tensor>& basis, const std::optional<Tensor>& offset,
                             int64_t embedding_dim, double scale) {
  check(ids.is_cuda() && ids.is_contiguous(), kDecodeOp, ": expected ids, a contiguous CUDA tensor");
  const PackedTable table = packed_table(kDecodeOp, records, directory, tiers, levels, scales);
  check_floats(kDecodeOp, basis, offset, embedding_dim);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < ids.dim(); ++i) shape.push_back(ids.size(i));
  shape.push_back(embedding_dim);
  const Tensor out = torch::stable::new_empty(scales, shape);
  if (out.numel() == 0) return out;
  check(ids.numel() <= INT32_MAX, kDecodeOp, ": expected fewer than 2^31 ids, got ", ids.numel());
  dispatch_floating(scales.scalar_type(), "scales", [&](auto element) {
    run<decltype(element)>(ids, table, scales, basis, offset, scale, out);
  });
  return out;
}

}  // namespace embkern::cuda
