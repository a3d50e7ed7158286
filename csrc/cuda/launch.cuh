// Kernel launches and device properties; every return code is checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace embkern::cuda {

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t code, const char* op) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(code));
}

// The properties that determine a launch.
struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes, the limit with opt-in
  int shared_per_multiprocessor;  // bytes
};

inline Device query_device(int index, const char* op) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), op);
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// The properties of a device, queried once.
inline Device device_properties(int index, const char* op) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, query_device(index, op)).first->second;
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            Stream stream, const Arguments&... arguments) {
  constexpr int kSharedWithoutOptIn = 48 * 1024;
  if (shared_bytes > kSharedWithoutOptIn)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError(), op);
}

}  // namespace embkern::cuda
