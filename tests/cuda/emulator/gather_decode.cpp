// Runs calls of gather_decode on the emulator; see arguments.h. A call's tensors are ids, records, directory,
// tiers, levels, scales and, if present, basis and offset; its output is (N, H).
#include "cuda/gather_decode.cuh"

#include "packed_arrays.h"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t wide_ids, count, num_embeddings, words, tiers, groups, terms, width, has_offset, misaligned;
  int64_t multiprocessors, shared_per_block, order;
  double scale;
};

template <class T>
void call(const Header& header) {
  DecodeProblem<T> problem{};
  Array<char> ids(header.count * (header.wide_ids ? 8 : 4));
  emulator::PackedArrays table(header);
  Array<T> scales(header.num_embeddings, header.misaligned);
  Array<T> basis(header.terms * header.width, header.misaligned);
  Array<T> offset(header.has_offset ? header.width : 0, header.misaligned);
  Array<T> out(header.count * header.width, header.misaligned);
  Array<T> coefficients(header.count * header.terms);
  Array<acc_t<T>> factors(header.terms ? header.count : 0);
  Array<int32_t> places(header.terms ? header.count : 0);
  problem.ids = ids.read().data();
  problem.wide_ids = header.wide_ids;
  problem.count = header.count;
  problem.table = table.read();
  problem.width = static_cast<int>(header.width);
  problem.terms = static_cast<int>(header.terms);
  problem.scales = scales.read().data();
  problem.basis = header.terms ? basis.read().data() : nullptr;
  problem.offset = header.has_offset ? offset.read().data() : nullptr;
  problem.out = out.data();
  problem.scale = static_cast<acc_t<T>>(header.scale);
  problem.coefficients = coefficients.data();
  problem.factors = factors.data();
  problem.places = places.data();
  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  const int shared = static_cast<int>(header.shared_per_block);
  emulator::Machine::instance().shared_limit = shared;
  gather_decode(problem, Device{static_cast<int>(header.multiprocessors), shared, shared + 1024}, Stream{});
  out.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv,
                                  [](const Header& header, auto element) { call<decltype(element)>(header); });
}
