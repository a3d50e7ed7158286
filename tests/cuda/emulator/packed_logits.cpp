// Runs calls of packed_logits on the emulator; see arguments.h. A call's tensors are hidden, records,
// directory, tiers, levels, scales and, if present, basis and offset; its output is (N, V). Sums are those of
// fp32 unless hidden or scales are of fp64.
#include "cuda/packed_logits.cuh"

#include "packed_arrays.h"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype, hidden_dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t count, num_embeddings, words, tiers, groups, terms, width, has_offset, multiprocessors, order;
};

template <class T, class A>
void call(const Header& header) {
  constexpr int64_t kSizes[] = {4, 8, 2, 2};
  LogitsProblem<T, A> problem{};
  Array<char> hidden(header.count * header.width * kSizes[header.hidden_dtype]);
  emulator::PackedArrays table(header);
  Array<T> scales(header.num_embeddings), basis(header.terms * header.width);
  Array<T> offset(header.has_offset ? header.width : 0);
  Array<char> logits(header.count * header.num_embeddings * kSizes[header.hidden_dtype]);
  Array<A> states(kMostStates * (header.width + header.terms)), shifts(kMostStates);
  problem.hidden = hidden.read().data();
  problem.element = static_cast<Element>(header.hidden_dtype);
  problem.count = header.count;
  problem.table = table.read();
  problem.width = static_cast<int>(header.width);
  problem.terms = static_cast<int>(header.terms);
  problem.scales = scales.read().data();
  problem.basis = header.terms ? basis.read().data() : nullptr;
  problem.offset = header.has_offset ? offset.read().data() : nullptr;
  problem.logits = logits.data();
  problem.states = states.data();
  problem.shifts = shifts.data();
  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  emulator::Machine::instance().shared_limit = 48 * 1024;
  const int multiprocessors = static_cast<int>(header.multiprocessors);
  packed_logits(problem, Device{multiprocessors, 48 * 1024, 100 * 1024}, Stream{});
  logits.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv, [](const Header& header, auto element) {
    using T = decltype(element);
    if (header.hidden_dtype == 1)
      call<T, double>(header);
    else
      call<T, acc_t<T>>(header);
  });
}
