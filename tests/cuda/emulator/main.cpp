// Reads calls of gather_project from a file, runs the CUDA kernels on the emulator and writes the outputs.
//
//   main IN OUT
// IN: per call the header below, then ids, codes, basis, offset (if any), each in its own buffer of exactly its
// size, at `misaligned` elements past a 16-byte boundary. OUT: the (N, H) outputs one after another.
#include <fstream>
#include <memory>
#include <vector>

#include "cuda/gather_project.cuh"

namespace {

using namespace embkern::cuda;

struct Header {
  int64_t dtype;  // 0 fp32, 1 fp64, 2 bf16, 3 fp16
  int64_t wide_ids, count, num_embeddings, rank, width, has_offset, misaligned;
  int64_t multiprocessors, shared_per_block, order;
  double scale;
};

std::ifstream input;
std::ofstream output;

// An array of exactly `count` elements: a sanitizer sees the first byte past its end.
template <class T>
class Array {
 public:
  Array(int64_t count, int64_t misaligned) : count_(count), misaligned_(misaligned) {
    const size_t bytes = (count + misaligned) * sizeof(T);
    if (posix_memalign(&memory_, 16, bytes + (bytes == 0))) emulator::fail("out of memory");
    std::memset(memory_, 0xff, bytes);
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  T* data() { return static_cast<T*>(memory_) + misaligned_; }
  Array& read() {
    input.read(reinterpret_cast<char*>(data()), count_ * sizeof(T));
    return *this;
  }

 private:
  void* memory_ = nullptr;
  int64_t count_, misaligned_;
};

bool aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

template <class T>
void call(const Header& header) {
  Problem<T> problem{};
  Array<char> ids(header.count * (header.wide_ids ? 8 : 4), 0);
  Array<T> codes(header.num_embeddings * header.rank, header.misaligned);
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
  problem.basis = basis.read().data();
  problem.offset = header.has_offset ? offset.read().data() : nullptr;
  problem.out = out.data();
  problem.scale = static_cast<acc_t<T>>(header.scale);
  problem.aligned_codes = aligned(problem.codes, header.rank * sizeof(T));
  problem.aligned_basis = aligned(problem.basis, header.width * sizeof(T));
  problem.aligned_out = aligned(problem.out, header.width * sizeof(T));
  emulator::Machine::instance().order = static_cast<emulator::Order>(header.order);
  const int shared = static_cast<int>(header.shared_per_block);
  emulator::Machine::instance().shared_limit = shared;
  gather_project(problem, Device{static_cast<int>(header.multiprocessors), shared, shared + 1024}, Stream{});
  output.write(reinterpret_cast<const char*>(out.data()), header.count * header.width * sizeof(T));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) emulator::fail("expected IN and OUT");
  input.open(argv[1], std::ios::binary);
  output.open(argv[2], std::ios::binary);
  for (Header header; input.read(reinterpret_cast<char*>(&header), sizeof(header));) {
    switch (header.dtype) {
      case 0:
        call<float>(header);
        break;
      case 1:
        call<double>(header);
        break;
      case 2:
        call<torch::headeronly::BFloat16>(header);
        break;
      case 3:
        call<torch::headeronly::Half>(header);
        break;
      default:
        emulator::fail("unknown dtype");
    }
  }
}
