// The raw op gather_project for CUDA tensors; formula and kernels are in gather_project.cuh.
// Run: embkern.ops.gather_project(ids, codes, basis, offset, backend="native").
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/gather_project.cuh"
#include "cuda/gather_project_tensors.cuh"
#include "cuda/ops.h"
#include "cuda/tensors.h"

namespace embkern::cuda {

// For gather_decode.cu, too.
template void gather_project(const Problem<float>&, const Device&, Stream);
template void gather_project(const Problem<double>&, const Device&, Stream);
template void gather_project(const Problem<BFloat16>&, const Device&, Stream);
template void gather_project(const Problem<Half>&, const Device&, Stream);

namespace {

template <class T>
void run(const Tensor& ids, const Tensor& codes, const Tensor& basis, const std::optional<Tensor>& offset,
         double scale, const Tensor& out) {
  Problem<T> problem = lookup_of<T>(ids, codes, basis, scale);
  problem.offset = offset ? static_cast<const T*>(offset->const_data_ptr()) : nullptr;
  problem.out = static_cast<T*>(out.mutable_data_ptr());
  set_alignment(problem);

  const int device = codes.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  gather_project(problem, device_properties(device, kOp), current_stream(device, kOp));
}

}  // namespace

void gather_project_out(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                        const std::optional<Tensor>& offset, double scale, Tensor out) {
  check_lookup(kOp, ids, codes, basis);
  check(out.is_cuda() && out.is_contiguous() && out.numel() == ids.numel() * basis.size(1), kOp,
        ": expected out contiguous with one row of H for each id");
  if (out.numel() == 0) return;
  dispatch_floating(codes.scalar_type(), "codes",
                    [&](auto element) { run<decltype(element)>(ids, codes, basis, offset, scale, out); });
}

Tensor gather_project_forward(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                              const std::optional<Tensor>& offset, double scale) {
  check_lookup(kOp, ids, codes, basis);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < ids.dim(); ++i) shape.push_back(ids.size(i));
  shape.push_back(basis.size(1));
  Tensor out = torch::stable::new_empty(codes, shape);
  gather_project_out(ids, codes, basis, offset, scale, out);
  return out;
}

}  // namespace embkern::cuda
