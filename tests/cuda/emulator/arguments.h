// Input and output of the emulator's programs.
//
//   PROGRAM IN OUT
// IN has a header and the tensors of each call; OUT receives the outputs of all calls.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <fstream>

#include "emulator.h"

namespace emulator {

inline std::ifstream input;
inline std::ofstream output;

// An array of `count` elements, filled with NaN, that begins `misaligned` elements past a 16-byte boundary. The
// allocation ends with the last element, so that a sanitizer detects the first byte beyond it.
template <class T>
class Array {
 public:
  explicit Array(int64_t count, int64_t misaligned = 0) : count_(count), misaligned_(misaligned) {
    const size_t bytes = (count + misaligned) * sizeof(T);
    if (posix_memalign(&memory_, 16, bytes + (bytes == 0))) fail("out of memory");
    std::memset(memory_, 0xff, bytes);
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;

  T* data() { return static_cast<T*>(memory_) + misaligned_; }
  Array& read() {
    input.read(reinterpret_cast<char*>(data()), count_ * sizeof(T));
    return *this;
  }
  void write() { output.write(reinterpret_cast<const char*>(data()), count_ * sizeof(T)); }

 private:
  void* memory_ = nullptr;
  int64_t count_, misaligned_;
};

// The elements from the first to the last one of a matrix.
inline int64_t elements(int64_t rows, int64_t columns, int64_t stride) {
  return columns ? (rows - 1) * stride + columns : 0;
}

// Calls run(header, T{}) for every header of the input, where T is the type of its `dtype`.
template <class Header, class Run>
void for_each_call(int argc, char** argv, Run run) {
  if (argc != 3) fail("expected IN and OUT");
  input.open(argv[1], std::ios::binary);
  output.open(argv[2], std::ios::binary);
  for (Header header; input.read(reinterpret_cast<char*>(&header), sizeof(header));) {
    switch (header.dtype) {
      case 0:
        run(header, float{});
        break;
      case 1:
        run(header, double{});
        break;
      case 2:
        run(header, torch::headeronly::BFloat16{});
        break;
      case 3:
        run(header, torch::headeronly::Half{});
        break;
      default:
        fail("unknown dtype");
    }
  }
}

}  // namespace emulator
