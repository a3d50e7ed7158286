// Division of work between threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace embkern {

constexpr int64_t kThreadWork = 50000;  // multiplications that are worth another thread, about 2 us

// Runs body(task) for every task on torch's threads. Each thread takes the next task as soon as it is free, so
// tasks may run in any order. With no more tasks than threads each has a thread of its own, the same in every
// call: memory that is written again, as a freed output often is, stays in that thread's caches.
template <class Body>
void for_tasks(int64_t tasks, int64_t threads, Body body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  if (tasks <= threads) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    });
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

// Threads for a long sequence of short phases of about 20 us. torch's threads meet at a barrier, so one that is
// descheduled delays every phase by a time slice. Here the calling thread takes every task that is left, and
// waits only for tasks that are running. The other threads spin between phases.
class Team {
 public:
  explicit Team(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) others_.emplace_back([this] { serve(); });
  }
  Team(const Team&) = delete;
  ~Team() {
    stop_.store(true, std::memory_order_relaxed);
    for (std::thread& other : others_) other.join();
  }

  // Runs body(task) for every task, in any order.
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    if (others_.empty() || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    body_ = &body;
    call_ = [](const void* body, int64_t task) { (*static_cast<const Body*>(body))(task); };
    done_.store(0, std::memory_order_relaxed);
    ++phase_;
    left_.store(phase_ << kTaskBits | static_cast<uint64_t>(tasks), std::memory_order_release);
    while (take()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins) pause(spins);
    if (failure_) std::rethrow_exception(failure_);
  }
  int64_t size() const { return 1 + static_cast<int64_t>(others_.size()); }

 private:
  static constexpr int kTaskBits = 24;

  // Runs one task of the current phase; returns false if none is left. The counter includes the phase, so that
  // a thread cannot take a task of a phase that ended between its load and its exchange.
  bool take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    while (true) {
      const uint64_t tasks = left & ((uint64_t(1) << kTaskBits) - 1);
      if (tasks == 0) return false;
      if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
        try {
          call_(body_, static_cast<int64_t>(tasks - 1));
        } catch (...) {
          const std::lock_guard<std::mutex> lock(failure_mutex_);
          failure_ = std::current_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void serve() {
    for (int64_t spins = 0; !stop_.load(std::memory_order_relaxed); ++spins) {
      if (take())
        spins = 0;
      else
        pause(spins);
    }
  }

  static void pause(int64_t spins) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (spins < 1000) return __builtin_ia32_pause();
#endif
    (void)spins;
    std::this_thread::yield();
  }

  std::vector<std::thread> others_;
  std::atomic<uint64_t> left_{0};  // the phase in the upper bits, the number of its waiting tasks below
  std::atomic<int64_t> done_{0};
  std::atomic<bool> stop_{false};
  uint64_t phase_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

// The number of threads worth using for `work` multiplications.
inline int64_t useful_threads(int64_t work) {
  if (work < 2 * kThreadWork) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / kThreadWork);
}

}  // namespace embkern
