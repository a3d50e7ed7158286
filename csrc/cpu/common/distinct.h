// Range check and deduplication of a batch's ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "checks.h"

namespace embkern {

// The id at position n; throws std::out_of_range unless 0 <= id < vocabulary.
template <class Index>
int64_t checked(const Index* ids, int64_t n, int64_t vocabulary) {
  const int64_t id = ids[n];
  if (id < 0 || id >= vocabulary)
    throw std::out_of_range(
        message("ids: expected 0 <= id < ", vocabulary, ", got ", id, " at flat position ", n));
  return id;
}

// The distinct ids of a batch in order of first occurrence, and the positions of each in ascending order. One
// allocation holds everything: about 40 bytes per position.
class Distinct {
 public:
  template <class Index>
  Distinct(const Index* all, int64_t count, int64_t vocabulary, int64_t padding_idx) {
    check(count < (int64_t(1) << 31), "ids: expected fewer than 2^31, got ", count);
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * count) ++bits;
    const int64_t slots = int64_t(1) << bits;
    memory_.reset(new int32_t[6 * count + slots]);
    ids_ = reinterpret_cast<int64_t*>(memory_.get());
    first_ = memory_.get() + 2 * count;
    size_ = first_ + count;
    next_ = size_ + count;
    int32_t* last = next_ + count;
    int32_t* slot_of = last + count;
    std::memset(slot_of, -1, slots * sizeof(int32_t));
    for (int64_t n = 0; n < count; ++n) {
      const int64_t id = checked(all, n, vocabulary);
      if (id == padding_idx) continue;
      uint64_t slot = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits);
      while (slot_of[slot] >= 0 && ids_[slot_of[slot]] != id) slot = (slot + 1) & (slots - 1);
      const int32_t known = slot_of[slot], position = static_cast<int32_t>(n);
      next_[n] = -1;
      if (known >= 0) {
        next_[last[known]] = position;
        last[known] = position;
        ++size_[known];
      } else {
        slot_of[slot] = static_cast<int32_t>(count_);
        ids_[count_] = id;
        first_[count_] = last[count_] = position;
        size_[count_++] = 1;
      }
    }
  }

  // Ids u = 0 ... count() - 1.
  int64_t count() const { return count_; }
  int64_t id(int64_t u) const { return ids_[u]; }
  int64_t first(int64_t u) const { return first_[u]; }
  int64_t size(int64_t u) const { return size_[u]; }
  // The next position of the same id; negative after the last.
  int64_t next(int64_t n) const { return next_[n]; }

  // Sorts the ids, as a coalesced sparse tensor requires.
  void sort() {
    std::vector<int64_t> order(count_);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t left, int64_t right) { return ids_[left] < ids_[right]; });
    const auto apply = [&](auto* values) {
      const std::vector<std::decay_t<decltype(*values)>> before(values, values + count_);
      for (int64_t u = 0; u < count_; ++u) values[u] = before[order[u]];
    };
    apply(ids_);
    apply(first_);
    apply(size_);
  }

 private:
  std::unique_ptr<int32_t[]> memory_;
  int64_t* ids_;
  int32_t *first_, *size_, *next_;
  int64_t count_ = 0;
};

}  // namespace embkern
