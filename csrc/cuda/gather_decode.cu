// The raw op gather_decode for CUDA tensors; formula and kernels are in gather_decode.cuh.
// Run: embkern.ops.gather_decode(ids, records, ..., embedding_dim=H, backend="native").
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "cuda/gather_decode.cuh"
#include "cuda/ops.h"
#include "cuda/tensors.h"

namespace embkern::cuda {

// Instantiated in gather_project.cu.
extern template void gather_project(const Problem<float>&, const Device&, Stream);
extern template void gather_project(const Problem<double>&, const Device&, Stream);
extern template void gather_project(const Problem<torch::headeronly::BFloat16>&, const Device&, Stream);
extern template void gather_project(const Problem<torch::headeronly::Half>&, const Device&, Stream);

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

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
    constexpr auto kSums = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    coefficients = torch::stable::new_empty(scales, std::vector<int64_t>{problem.count, problem.terms});
    factors = torch::stable::new_empty(scales, std::vector<int64_t>{problem.count}, kSums);
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
  for (const Tensor* each : {&ids, &records, &directory, &tiers, &levels, &scales})
    check(each->is_cuda() && each->is_contiguous(), kDecodeOp, ": expected contiguous CUDA tensors");
  for (const std::optional<Tensor>* each : {&basis, &offset})
    check(!*each || ((*each)->is_cuda() && (*each)->is_contiguous()), kDecodeOp,
          ": expected contiguous CUDA tensors");
  const int64_t V = scales.numel();
  check(directory.dim() == 2 && directory.size(0) == ceil_div(V, kGroup) && directory.size(1) == kEntry,
        kDecodeOp, ": expected directory (ceil(V / 32), 5)");
  check(tiers.dim() == 2 && tiers.size(0) <= kMostTiers && tiers.size(1) >= 1, kDecodeOp,
        ": expected tiers (T, 1 + G) with T up to 16");
  check(levels.numel() == kLevels && levels.scalar_type() == ScalarType::Char, kDecodeOp,
        ": expected levels (17, 16) int8");
  check(embedding_dim >= 1 && (!basis || (basis->dim() == 2 && basis->size(1) == embedding_dim)), kDecodeOp,
        ": expected basis (K, H)");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < ids.dim(); ++i) shape.push_back(ids.size(i));
  shape.push_back(embedding_dim);
  const Tensor out = torch::stable::new_empty(scales, shape);
  if (out.numel() == 0) return out;
  check(ids.numel() <= INT32_MAX, kDecodeOp, ": expected fewer than 2^31 ids, got ", ids.numel());
  const PackedTable table{static_cast<const int32_t*>(records.const_data_ptr()),
                          static_cast<const int32_t*>(directory.const_data_ptr()),
                          static_cast<const uint8_t*>(tiers.const_data_ptr()),
                          static_cast<const int8_t*>(levels.const_data_ptr()),
                          records.numel(),
                          V,
                          static_cast<int>(tiers.size(0)),
                          to_int("tiers", tiers.size(1) - 1)};
  switch (scales.scalar_type()) {
    case ScalarType::Float:
      run<float>(ids, table, scales, basis, offset, scale, out);
      break;
    case ScalarType::Double:
      run<double>(ids, table, scales, basis, offset, scale, out);
      break;
    case ScalarType::BFloat16:
      run<BFloat16>(ids, table, scales, basis, offset, scale, out);
      break;
    case ScalarType::Half:
      run<Half>(ids, table, scales, basis, offset, scale, out);
      break;
    default:
      check(false, "scales: expected dtype Float, Double, BFloat16 or Half, got ",
            torch::headeronly::toString(scales.scalar_type()));
  }
  return out;
}

}  // namespace embkern::cuda
