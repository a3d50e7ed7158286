// How the CPU ops divide work between threads, and where large outputs come from.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/common.h"

namespace embkern {

constexpr int64_t kThreadWork = 50000;  // multiplications that are worth another thread: some 2 us
constexpr int64_t kHugePageBytes = 2 << 20;
// Smaller outputs stay in the heap. From 32 MB on glibc maps every one afresh and returns it at once, and below
// it may trim the heap after each: 3000 faults of 2 us for 12 MB where 4 KiB pages come back.
constexpr int64_t kLargeOutputBytes = 4 << 20;

// Runs body(task) for every task; threads take the next one as they become free. Results do not depend on it.
template <class Body>
void for_tasks(int64_t tasks, int64_t threads, Body body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

// Threads of a long run of short phases, some 20 us each. torch's own threads meet at a barrier, so that one
// which the system keeps from running costs a time slice in every phase; here the caller takes whatever task
// nobody has taken, and waits only for tasks under way. Between phases the others spin.
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

  // Runs one task of the current phase, if there is one. The phase is part of the counter: a thread that comes
  // late cannot take a task of a phase it has not seen.
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
  std::atomic<uint64_t> left_{0};  // the phase, then the number of its tasks that nobody has taken
  std::atomic<int64_t> done_{0};
  std::atomic<bool> stop_{false};
  uint64_t phase_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

inline int64_t useful_threads(int64_t work) {
  if (work < 2 * kThreadWork) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / kThreadWork);
}

// A fresh mapping is paged in 2 MiB at a time: 4 KiB faults cost more than the projection.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePageBytes - 1) & ~uintptr_t(kHugePageBytes - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(kHugePageBytes - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline torch::stable::Tensor empty_in_huge_pages(const std::vector<int64_t>& sizes, ScalarType type,
                                                 int64_t element_bytes) {
  torch::stable::Tensor tensor = empty(sizes, type);
  const int64_t bytes = tensor.numel() * element_bytes;
  if (bytes >= kLargeOutputBytes) prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace embkern
