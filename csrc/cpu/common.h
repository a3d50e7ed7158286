// Element types, conversions and the one matrix product that the CPU kernels share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "checks.h"

// One binary for every x86-64: the compiler emits the function once per level and the loader picks.
// The kernels below are always_inline templates, so they are compiled anew inside each clone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EMBKERN_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EMBKERN_CPU_CLONES
#endif

#if defined(__GNUC__)
#define EMBKERN_INLINE inline __attribute__((always_inline))
#else
#define EMBKERN_INLINE inline
#endif

namespace embkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// float64 accumulates in float64, everything narrower in float32.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>)
    return ScalarType::Double;
  else
    return ScalarType::Float;
}

template <class Body>
void dispatch_floating(ScalarType type, const char* name, Body body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      check(false, name, ": expected dtype Float, Double, BFloat16 or Half, got ",
            torch::headeronly::toString(type));
  }
}

template <class Body>
void dispatch_index(ScalarType type, const char* name, Body body) {
  switch (type) {
    case ScalarType::Int:
      return body(int32_t{});
    case ScalarType::Long:
      return body(int64_t{});
    default:
      check(false, name, ": expected dtype Int or Long, got ", torch::headeronly::toString(type));
  }
}

template <class From, class To>
EMBKERN_INLINE void convert(const From* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// A table in the accumulation type: the tensor's own memory when it already is, a converted copy otherwise.
template <class T>
class Widened {
 public:
  Widened(const T* data, int64_t count) {
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      data_ = data;
    } else {
      copy_.resize(count);
      convert(data, count, copy_.data());
      data_ = copy_.data();
    }
  }
  const acc_t<T>* data() const { return data_; }

 private:
  std::vector<acc_t<T>> copy_;
  const acc_t<T>* data_;
};

// c (m, n) = a (m, k) @ b (k, n), plus init (n,) on every row if given; row-major, leading dimensions ld*.
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          const float* init, float* c, int64_t ldc);
void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
          const double* init, double* c, int64_t ldc);

}  // namespace embkern
