// Element types and their dispatch.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "checks.h"

namespace embkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The accumulation type: float64 for float64, float32 for everything narrower.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// That of an accumulation type, float or double.
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
      fail(name, ": expected dtype Float, Double, BFloat16 or Half, got ", torch::headeronly::toString(type));
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
      fail(name, ": expected dtype Int or Long, got ", torch::headeronly::toString(type));
  }
}

}  // namespace embkern
