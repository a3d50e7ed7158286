// One inline function per machine instruction that the kernels use directly.
//
// All other kernel code is ordinary C++; tests/cuda/emulator provides the same functions on a CPU.
// Target: sm_80 and later. Fragment layouts are those of the PTX ISA, "Warp-level matrix instructions".
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cassert>
#include <cstdint>
#include <type_traits>

#define EMBKERN_DEVICE __device__ __forceinline__

namespace embkern::cuda::ptx {

// The block's dynamic shared memory, 16-byte aligned.
EMBKERN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

EMBKERN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Ends the kernel with a device-side assertion, even if NDEBUG is defined.
EMBKERN_DEVICE void fail(const char* what) { __assert_fail(what, "embkern", 0, ""); }

// Access to 16 aligned bytes.
template <class Vector>
EMBKERN_DEVICE Vector load_16(const void* from) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16, "");
  return *static_cast<const Vector*>(from);
}

template <class Vector>
EMBKERN_DEVICE void store_16(void* to, const Vector& vector) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16, "");
  *static_cast<Vector*>(to) = vector;
}

// Returns its argument, but hides from the compiler that it is unchanged. The compiler then recomputes values
// that it would otherwise keep in registers.
template <class Vector>
EMBKERN_DEVICE Vector forget(Vector vector) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16, "");
  uint4& bits = reinterpret_cast<uint4&>(vector);
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  return vector;
}

// Starts a copy to 16 aligned bytes of shared memory, from global memory and past L1. The first `bytes` of them
// are read, the others become zero.
EMBKERN_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

// Closes a group of all copies that this thread has started since the last group.
EMBKERN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread, the newest ones, are incomplete.
template <int kPending>
EMBKERN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane 8 i + j gives the address of row j of matrix
// i (16 bytes, aligned). Lane l receives elements (l / 4, 2 (l % 4) + {0, 1}) of each.
EMBKERN_DEVICE void load_matrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: lane l receives elements (2 (l % 4) + {0, 1}, l / 4).
EMBKERN_DEVICE void load_matrix_x4_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16, 8) += a (16, 16) @ b (16, 8) on tensor cores: 16-bit factors, fp32 sums.
template <class T>
EMBKERN_DEVICE void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>, "");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class A>
EMBKERN_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether a condition holds in any lane of the warp.
EMBKERN_DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition); }

// Approximations by the special function unit. Error bounds: log2 2^-22, absolute for values between 0.5 and 2
// and relative elsewhere; exp2 2^-22; reciprocal 2^-23. Subnormal numbers count as 0.
EMBKERN_DEVICE float log2_approximate(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

EMBKERN_DEVICE float exp2_approximate(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

EMBKERN_DEVICE float reciprocal_approximate(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

EMBKERN_DEVICE void sync_block() { __syncthreads(); }
EMBKERN_DEVICE void sync_warp() { __syncwarp(); }

}  // namespace embkern::cuda::ptx
