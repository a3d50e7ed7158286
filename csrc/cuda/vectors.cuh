// Block size and 16-byte vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace embkern::cuda {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // threads of a warp
constexpr int kWarps = kThreads / kLanes;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements in one 16-byte access

template <class T>
struct alignas(16) Vector {
  T values[kVector<T>];
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int clamped(int a, int most) { return a < 0 ? 0 : smaller(a, most); }

// Whether the rows of a matrix can be accessed in 16-byte vectors.
inline bool aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

// Loads a vector of which the first `valid` elements exist; the others become zero.
template <class T>
EMBKERN_DEVICE Vector<T> load_vector(const T* from, int valid, bool aligned) {
  if (aligned && valid >= kVector<T>) return ptx::load_16<Vector<T>>(from);
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) vector.values[i] = i < valid ? from[i] : T(0);
  return vector;
}

// Copies a vector from global to shared memory in the same way, asynchronously if it is aligned.
template <class T>
EMBKERN_DEVICE void copy_vector(T* shared, const T* from, int valid, bool aligned) {
  if (aligned)
    ptx::copy_async_16(shared, from, clamped(valid, kVector<T>) * static_cast<int>(sizeof(T)));
  else
    ptx::store_16(shared, load_vector(from, valid, false));
}

// Stores the first `valid` elements. In an aligned row either all elements of a vector exist or none.
template <class T>
EMBKERN_DEVICE void store_vector(T* to, const Vector<T>& vector, int valid, bool aligned) {
  if (aligned) {
    if (valid > 0) ptx::store_16(to, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < valid) to[i] = vector.values[i];
}

}  // namespace embkern::cuda
