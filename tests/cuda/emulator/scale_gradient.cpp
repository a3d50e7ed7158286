// Runs calls of scale_gradient_ on the emulator; see arguments.h. A call's tensors are grad and the factors;
// its output is grad.
#include "cuda/scale_gradient.cuh"

#include "arguments.h"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t count, width, by_row, misaligned, multiprocessors;
};

template <class T>
void call(const Header& header) {
  Array<T> grad(header.count * header.width, header.misaligned);
  Array<acc_t<T>> factors(header.by_row ? header.count : 1);
  grad.read();
  factors.read();
  const Device device{static_cast<int>(header.multiprocessors), 0, 0};
  scale_gradient(grad.data(), factors.data(), header.count, header.width, header.by_row != 0, device, Stream{});
  grad.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv,
                                  [](const Header& header, auto element) { call<decltype(element)>(header); });
}
