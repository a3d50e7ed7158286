// Runs calls of gather_project_backward on the emulator; see arguments.h. A call's tensors are grad, ids,
// codes, basis, the ids in ascending order and the position of each of them; its outputs are the gradients of
// codes (V, r), or for `sparse` (N, r), of basis (r, H) and of offset (H,).
#include "arguments.h"
#include "cuda/gather_project_gradients.cuh"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t wide_ids, count, num_embeddings, rank, width, codes_stride, misaligned;
  int64_t padding_idx, sparse, needs_basis, needs_offset;
  int64_t multiprocessors, shared_per_block, order;
  double scale;
};

template <class T>
void call(const Header& header) {
  using A = acc_t<T>;
  Gradients<T> problem{};
  Problem<T>& lookup = problem.lookup;
  const int64_t V = header.num_embeddings, r = header.rank, H = header.width, N = header.count;
  const int64_t id_bytes = header.wide_ids ? 8 : 4;
  Array<T> grad(N * H, header.misaligned);
  Array<char> ids(N * id_bytes), sorted_ids(N * id_bytes);
  Array<T> codes(emulator::elements(V, r, header.codes_stride), header.misaligned);
  Array<T> basis(r * H, header.misaligned);
  Array<int64_t> order(N);
  problem.grad = grad.read().data();
  lookup.ids = ids.read().data();
  lookup.wide_ids = header.wide_ids;
  lookup.count = N;
  lookup.num_embeddings = V;
  lookup.rank = static_cast<int>(r);
  lookup.width = static_cast<int>(H);
  lookup.codes = codes.read().data();
  lookup.codes_stride = header.codes_stride;
  lookup.basis = basis.read().data();
  lookup.scale = static_cast<A>(header.scale);
  problem.padding_idx = header.padding_idx;
  set_alignment(problem);
  sorted_ids.read();
  order.read();

  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  const int shared = static_cast<int>(header.shared_per_block);
  emulator::Machine::instance().shared_limit = shared;
  const Device device{static_cast<int>(header.multiprocessors), shared, shared + 1024};
  Array<T> grad_codes((header.sparse ? N : V) * r, header.misaligned);
  Array<T> basis_gradient(header.needs_basis ? r * H : 0), offset_gradient(header.needs_offset ? H : 0);
  if (header.sparse) {
    grad_rows(problem, grad_codes.data(), r, device, Stream{});
  } else {
    const int64_t stride = ceil_div(r, 4) * 4, ends = ceil_div(N, kSegmentBlock) * stride;
    Array<A> rows(N * stride), heads(ends), tails(ends);
    std::memset(static_cast<void*>(grad_codes.data()), 0, V * r * sizeof(T));
    grad_rows(problem, rows.data(), stride, device, Stream{});
    Segments<T> segments{};
    segments.rows = rows.data();
    segments.sorted_ids = sorted_ids.data();
    segments.order = order.data();
    segments.wide_ids = lookup.wide_ids;
    segments.count = N;
    segments.rank = lookup.rank;
    segments.stride = static_cast<int>(stride);
    segments.padding_idx = problem.padding_idx;
    segments.sums = grad_codes.data();
    segments.heads = heads.data();
    segments.tails = tails.data();
    sum_segments(kBackwardOp, segments, Stream{});
  }
  if (header.needs_basis || header.needs_offset) {
    auto plan = plan_grad_basis(lookup, header.needs_basis, header.needs_offset, device);
    Array<A> partial(int64_t{plan.splits} * (r + 1) * plan.stride);
    plan.partial = partial.data();
    grad_basis(problem, plan, header.needs_basis ? basis_gradient.data() : nullptr,
               header.needs_offset ? offset_gradient.data() : nullptr, device, Stream{});
  }
  grad_codes.write();
  basis_gradient.write();
  offset_gradient.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv,
                                  [](const Header& header, auto element) { call<decltype(element)>(header); });
}
