// Runs calls of gather_project on the emulator; see arguments.h. A call's tensors are ids, codes, basis and, if
// present, offset; its output is (N, H).
#include "cuda/gather_project.cuh"

#include "arguments.h"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t wide_ids, count, num_embeddings, rank, width, codes_stride, has_offset, misaligned;
  int64_t multiprocessors, shared_per_block, order;
  double scale;
};

template <class T>
void call(const Header& header) {
  Problem<T> problem{};
  Array<char> ids(header.count * (header.wide_ids ? 8 : 4));
  Array<T> codes(emulator::elements(header.num_embeddings, header.rank, header.codes_stride),
                 header.misaligned);
  Array<T> basis(header.rank * header.width, header.misaligned);
  Array<T> offset(header.has_offset ? header.width : 0, header.misaligned);
  Array<T> out(header.count * header.width, header.misaligned);
  problem.ids = ids.read().data();
  problem.wide_ids = header.wide_ids;
  problem.count = header.count;
  problem.num_embeddings = header.num_embeddings;
  problem.rank = static_cast<int>(header.rank);
  problem.width = static_cast<int>(header.width);
  problem.codes = codes.read().data();
  problem.codes_stride = header.codes_stride;
  problem.basis = basis.read().data();
  problem.offset = header.has_offset ? offset.read().data() : nullptr;
  problem.out = out.data();
  problem.scale = static_cast<acc_t<T>>(header.scale);
  set_alignment(problem);
  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  const int shared = static_cast<int>(header.shared_per_block);
  emulator::Machine::instance().shared_limit = shared;
  gather_project(problem, Device{static_cast<int>(header.multiprocessors), shared, shared + 1024}, Stream{});
  out.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv,
                                  [](const Header& header, auto element) { call<decltype(element)>(header); });
}
