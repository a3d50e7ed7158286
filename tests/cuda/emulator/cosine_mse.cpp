// Runs calls of cosine_mse on the emulator; see arguments.h. A call's tensors are output and target (N, H),
// and, each if present, row_weight (N,), target_norm (N,) and grad_loss (1,) or (N,). Its outputs are the loss
// (1,) or (N,) and, each if wanted, grad_output and grad_target (N, H).
#include "cuda/cosine_mse.cuh"

#include "arguments.h"

namespace {

using namespace embkern::cuda;
using emulator::Array;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t count, width, reduction, has_row_weight, has_target_norm, grad_losses, needs_output, needs_target;
  int64_t misaligned, multiprocessors, order;
  double cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps;
};

template <class T>
void call(const Header& header) {
  using A = acc_t<T>;
  const int64_t count = header.count, elements = count * header.width;
  LossProblem<T> problem{};
  Array<T> output(elements, header.misaligned), target(elements, header.misaligned);
  Array<A> row_weight(header.has_row_weight ? count : 0), target_norm(header.has_target_norm ? count : 0);
  Array<A> grad_loss(header.grad_losses), loss(header.reduction == kNone ? count : 1);
  Array<T> grad_output(header.needs_output ? elements : 0, header.misaligned);
  Array<T> grad_target(header.needs_target ? elements : 0, header.misaligned);
  problem.output = output.read().data();
  problem.target = target.read().data();
  row_weight.read(), target_norm.read(), grad_loss.read();
  problem.row_weight = header.has_row_weight ? row_weight.data() : nullptr;
  problem.target_norm = header.has_target_norm ? target_norm.data() : nullptr;
  problem.grad_loss = header.grad_losses ? grad_loss.data() : nullptr;
  problem.grad_loss_stride = header.grad_losses > 1;
  problem.count = count;
  problem.width = static_cast<int>(header.width);
  problem.reduction = static_cast<Reduction>(header.reduction);
  problem.terms = make_terms<T>(header.cosine_weight, header.mse_weight, header.rmse_weight,
                                header.power_weight, header.alpha, header.eps, header.width);
  problem.loss = loss.data();
  problem.grad_output = header.needs_output ? grad_output.data() : nullptr;
  problem.grad_target = header.needs_target ? grad_target.data() : nullptr;

  constexpr int kShared = 48 * 1024;
  const Device device{static_cast<int>(header.multiprocessors), kShared, kShared + 1024};
  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  emulator::Machine::instance().shared_limit = kShared;
  Array<double> scratch(header.reduction == kNone ? 0 : loss_scratch(device));
  cosine_mse(problem, scratch.data(), device, Stream{});
  loss.write(), grad_output.write(), grad_target.write();
}

}  // namespace

int main(int argc, char** argv) {
  emulator::for_each_call<Header>(argc, argv,
                                  [](const Header& header, auto element) { call<decltype(element)>(header); });
}
