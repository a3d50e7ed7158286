// Runs CUDA kernels on a CPU: one fiber per CUDA thread, one block at a time, in one OS thread.
//
// A fiber runs until it reaches a barrier or a warp instruction, so that a run is deterministic for a given
// order of the fibers. A warp runs ahead of the others until a barrier (in the shuffled order, for a random
// time). A kernel that lacks a barrier gives different bits in different orders. The emulator also checks the
// following, and ends the process with a message on a violation:
//   - every thread of a block (warp) reaches the same barrier (warp instruction), from the same line
//   - 16-byte accesses and rows of ldmatrix are aligned, and asynchronous copies write to shared memory
//   - the rows of ldmatrix lie in different banks
// Shared memory is filled with NaN at first, and so is the target of an asynchronous copy until its end.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __host__
#define __device__
#define __launch_bounds__(...)
#define EMBKERN_DEVICE inline

namespace emulator {

struct Index {
  unsigned x;
};
inline Index thread_index{}, block_index{};

enum class Order { kAscending, kDescending, kShuffled };

[[noreturn]] inline void fail(const char* what, int line = 0) {
  std::fprintf(stderr, "emulator: block %u, thread %u, line %d: %s\n", block_index.x, thread_index.x, line,
               what);
  std::fflush(stderr);
  std::_Exit(3);
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

// An asynchronous copy: its target, and its bytes as of the start.
struct Copy {
  void* to;
  unsigned char bytes[16];
};

using WarpInstruction = void (*)(void* const (&lanes)[kWarp]);

enum class State { kReady, kAtBlockBarrier, kAtWarpInstruction, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  State state;
  int line;
  WarpInstruction instruction;
  void* arguments;
  std::deque<std::vector<Copy>> copies;  // one entry per group; the last group is open
};

class Machine {
 public:
  Order order = Order::kAscending;
  int shared_limit = 0;  // bytes per block

  unsigned char* shared_memory() { return shared_; }
  Fiber& current() { return fibers_[thread_index.x]; }

  bool in_shared(const void* pointer, size_t bytes) const {
    const auto* at = static_cast<const unsigned char*>(pointer);
    return at >= shared_ && at + bytes <= shared_ + shared_bytes_;
  }

  void run(int64_t blocks, int threads, int shared_bytes, std::function<void()> kernel) {
    if (threads % kWarp) fail("the number of threads is not a multiple of the warp size");
    if (shared_bytes > shared_limit) fail("a launch requests more shared memory than the limit per block");
    kernel_ = std::move(kernel);
    fibers_.resize(threads);
    void* memory = std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16);
    shared_ = static_cast<unsigned char*>(memory);
    shared_bytes_ = shared_bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      block_index.x = static_cast<unsigned>(block);
      std::memset(shared_, 0xff, shared_bytes);  // NaN in every format
      run_block();
    }
    std::free(memory);
  }

  // Suspends the fiber until the scheduler has seen the other participants arrive.
  void wait(State state, int line, WarpInstruction instruction = nullptr, void* arguments = nullptr) {
    Fiber& fiber = current();
    fiber.state = state, fiber.line = line, fiber.instruction = instruction, fiber.arguments = arguments;
    switch_to_scheduler(fiber, false);
  }

 private:
  static void entry() {
    Machine& machine = instance();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_size_);
#endif
    machine.kernel_();
    Fiber& fiber = machine.current();
    fiber.state = State::kDone;
    machine.switch_to_scheduler(fiber, true);
  }

  void switch_to_scheduler(Fiber& fiber, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
#else
    swapcontext(&fiber.context, &scheduler_);
#endif
  }

  void resume(int thread) {
    thread_index.x = thread;
    Fiber& fiber = fibers_[thread];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber.context);
#endif
  }

  void run_block() {
    std::vector<int> warps = sequence(static_cast<int>(fibers_.size()) / kWarp), lanes = sequence(kWarp);
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      fiber.copies.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
    for (;;) {
      bool progress = false;
      shuffle(warps);
      for (const int warp : warps)
        while (advance(warp, lanes)) {
          progress = true;
          if (order == Order::kShuffled && random() % 4 == 0) break;
        }
      progress |= release_block_barrier();
      if (all_done()) return;
      if (!progress) fail("some threads of the block or warp do not reach the barrier at which others wait");
    }
  }

  std::vector<int> sequence(int count) const {
    std::vector<int> result(count);
    for (int i = 0; i < count; ++i) result[i] = order == Order::kDescending ? count - 1 - i : i;
    return result;
  }

  void shuffle(std::vector<int>& order_of) {
    if (order != Order::kShuffled) return;
    for (int i = static_cast<int>(order_of.size()) - 1; i > 0; --i)
      std::swap(order_of[i], order_of[random() % (i + 1)]);
  }

  // Runs the threads of a warp until each waits; returns false if all wait for other warps.
  bool advance(int warp, std::vector<int>& lanes) {
    bool progress = false;
    shuffle(lanes);
    for (const int lane : lanes)
      if (fibers_[warp * kWarp + lane].state == State::kReady) resume(warp * kWarp + lane), progress = true;
    return finish_warp_instruction(warp) || progress;
  }

  bool all_done() const {
    for (const Fiber& fiber : fibers_)
      if (fiber.state != State::kDone) return false;
    return true;
  }

  bool finish_warp_instruction(int warp) {
    Fiber* lanes = &fibers_[warp * kWarp];
    void* arguments[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane].state != State::kAtWarpInstruction) return false;
      if (lanes[lane].line != lanes[0].line || lanes[lane].instruction != lanes[0].instruction)
        fail("the lanes of a warp reach different warp instructions", lanes[lane].line);
      arguments[lane] = lanes[lane].arguments;
    }
    thread_index.x = warp * kWarp;
    if (lanes[0].instruction) lanes[0].instruction(arguments);
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane].state = State::kReady;
    return true;
  }

  bool release_block_barrier() {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kAtBlockBarrier) return false;
      if (fiber.line != fibers_[0].line) fail("the threads of a block reach different barriers", fiber.line);
    }
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    return true;
  }

  unsigned random() { return (random_ = random_ * 1664525u + 1013904223u) >> 8; }

  std::vector<Fiber> fibers_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  unsigned char* shared_ = nullptr;
  int shared_bytes_ = 0;
  unsigned random_ = 1;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
#endif

 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }
};

inline void check_alignment(const void* pointer, int line) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("a 16-byte access is not aligned", line);
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
