// The emulator's version of csrc/cuda/ptx.cuh: the same functions, as the PTX ISA describes each instruction.
// The caller's line identifies a barrier or warp instruction.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <type_traits>

#include "emulator.h"

namespace embkern::cuda::ptx {

using emulator::Machine;
using emulator::State;

inline unsigned char* shared_memory() { return Machine::instance().shared_memory(); }

inline void fail(const char* what) { emulator::fail(what); }

template <class Vector>
Vector load_16(const void* from, int line = __builtin_LINE()) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16, "");
  emulator::check_alignment(from, line);
  return *static_cast<const Vector*>(from);
}

template <class Vector>
void store_16(void* to, const Vector& vector, int line = __builtin_LINE()) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16, "");
  emulator::check_alignment(to, line);
  *static_cast<Vector*>(to) = vector;
}

template <class Vector>
Vector forget(Vector vector) {
  return vector;
}

// The source is read now, and the target written when the group is waited for, the latest moment that the ISA
// permits. Until then the target is NaN, since its old content may be lost from now on.
inline void copy_async_16(void* shared, const void* global, int bytes, int line = __builtin_LINE()) {
  emulator::check_alignment(shared, line);
  emulator::check_alignment(global, line);
  if (!Machine::instance().in_shared(shared, 16))
    emulator::fail("an asynchronous copy writes outside shared memory", line);
  emulator::Copy copy{shared, {}};
  std::memcpy(copy.bytes, global, bytes);
  std::memset(shared, 0xff, 16);
  Machine::instance().current().copies.back().push_back(copy);
}

inline void copy_async_commit() { Machine::instance().current().copies.emplace_back(); }

template <int kPending>
void copy_async_wait() {
  auto& groups = Machine::instance().current().copies;  // the last one is open
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.pop_front();
  }
}

struct LoadMatrix {
  uint32_t* to;
  const unsigned char* row;
};

template <bool kTransposed>
void load_matrices(void* const (&lanes)[emulator::kWarp]) {
  const auto lane_at = [&](int lane) { return static_cast<LoadMatrix*>(lanes[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    uint16_t elements[8][8];
    for (int i = 0; i < 8; ++i) {
      const unsigned char* row = lane_at(8 * matrix + i)->row;
      if (!Machine::instance().in_shared(row, 16)) emulator::fail("a row of ldmatrix is outside shared memory");
      banks |= 1u << (row - Machine::instance().shared_memory()) / 16 % 8;
      std::memcpy(elements[i], row, 16);
    }
    if (banks != 0xff) emulator::fail("the rows of ldmatrix share a bank");
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = kTransposed ? elements[j][i] : elements[i][j];
      const uint16_t high = kTransposed ? elements[j + 1][i] : elements[i][j + 1];
      lane_at(lane)->to[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

inline void load_matrix_x4(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
  emulator::check_alignment(row, line);
  LoadMatrix arguments{to, static_cast<const unsigned char*>(row)};
  Machine::instance().wait(State::kAtWarpInstruction, line, load_matrices<false>, &arguments);
}

inline void load_matrix_x4_transposed(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
  emulator::check_alignment(row, line);
  LoadMatrix arguments{to, static_cast<const unsigned char*>(row)};
  Machine::instance().wait(State::kAtWarpInstruction, line, load_matrices<true>, &arguments);
}

struct Multiply {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int which) {
  return static_cast<float>(T(static_cast<unsigned short>(pair >> 16 * which), T::from_bits()));
}

// Tensor cores add in fp32 and truncate, which gives larger errors than rounding.
inline float truncated(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}

template <class T>
void multiply_fragments(void* const (&lanes)[emulator::kWarp]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    const auto* from = static_cast<const Multiply*>(lanes[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[group + (i / 2 % 2 ? 8 : 0)][in_group * 2 + i % 2 + (i >= 4 ? 8 : 0)] =
          half_of<T>(from->a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i)
      b[in_group * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = half_of<T>(from->b[i / 2], i % 2);
  }
  for (int lane = 0; lane < emulator::kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      float& c = static_cast<Multiply*>(lanes[lane])->c[i];
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      double sum = c;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      c = truncated(sum);
    }
}

template <class T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      int line = __builtin_LINE()) {
  Multiply arguments{c, a, {b0, b1}};
  Machine::instance().wait(State::kAtWarpInstruction, line, multiply_fragments<T>, &arguments);
}

template <class A>
struct Shuffle {
  A value, received;
  int mask;
};

template <class A>
void shuffle_lanes(void* const (&lanes)[emulator::kWarp]) {
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    auto* own = static_cast<Shuffle<A>*>(lanes[lane]);
    own->received = static_cast<Shuffle<A>*>(lanes[lane ^ own->mask])->value;
  }
}

template <class A>
A shuffle_xor(A value, int mask, int line = __builtin_LINE()) {
  Shuffle<A> arguments{value, value, mask};
  Machine::instance().wait(State::kAtWarpInstruction, line, shuffle_lanes<A>, &arguments);
  return arguments.received;
}

inline void any_lane(void* const (&lanes)[emulator::kWarp]) {
  bool any = false;
  for (void* lane : lanes) any |= *static_cast<bool*>(lane);
  for (void* lane : lanes) *static_cast<bool*>(lane) = any;
}

inline bool any(bool condition, int line = __builtin_LINE()) {
  Machine::instance().wait(State::kAtWarpInstruction, line, any_lane, &condition);
  return condition;
}

// A result of the special function unit with a large error: the nearest multiple of twice the error bound.
inline float approximated(double exact, double bound) {
  return static_cast<float>(std::nearbyint(exact / (2 * bound)) * (2 * bound));
}

inline float relatively_approximated(double exact, double bound) {
  if (exact == 0 || !std::isfinite(exact)) return static_cast<float>(exact);
  const float value = approximated(exact, std::ldexp(bound, std::ilogb(exact)));
  return std::fabs(value) < 0x1p-126f ? 0.f : value;
}

inline float log2_approximate(float value) {
  const double exact = std::log2(static_cast<double>(value));
  return value > 0.5f && value < 2 ? approximated(exact, 0x1p-22) : relatively_approximated(exact, 0x1p-22);
}

inline float exp2_approximate(float value) {
  return relatively_approximated(std::exp2(double{value}), 0x1p-22);
}
inline float reciprocal_approximate(float value) { return relatively_approximated(1.0 / value, 0x1p-23); }

inline void sync_block(int line = __builtin_LINE()) { Machine::instance().wait(State::kAtBlockBarrier, line); }
inline void sync_warp(int line = __builtin_LINE()) {
  Machine::instance().wait(State::kAtWarpInstruction, line);
}

}  // namespace embkern::cuda::ptx
