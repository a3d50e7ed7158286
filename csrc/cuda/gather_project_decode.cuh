// gather_project for few rows, see gather_project.cuh: every block reads a strip of the basis.
#pragma once

#include <cstdint>

#include "cuda/gather_project_problem.cuh"
#include "cuda/launch.cuh"

namespace embkern::cuda {

// The largest N. A block reads the basis for up to 8 rows; beyond two such groups a tile of 64 rows costs less.
// This bound and the sizes below are calculated, not measured.
constexpr int kDecodeCount = 16;
constexpr int kStripLanes = 2;  // 16-byte vectors in a strip of columns: one 32-byte sector of each basis row
constexpr int kSlices = kThreads / kStripLanes;
constexpr int kDecodeCodesBytes = 32 * 1024;  // codes in shared memory; with the sums less than 48 KiB

template <class T>
constexpr int kStrip = kStripLanes * kVector<T>;  // columns per block

template <class T, int kRows>
constexpr int kDecodeDepth = kDecodeCodesBytes / (kRows * static_cast<int>(sizeof(acc_t<T>)));

// Sums `values` over the lanes of a warp that differ in the bits from kMask on, a power of two. In each step
// two lanes exchange halves of their values, so that all steps together take one shuffle per value; a sum of
// every value in every lane would take log2(lanes) shuffles per value. Returns the index of the first value
// whose sum this lane holds, in values[0], values[1], ...
template <int kCount, int kBit, int kMask, class A, int kSize>
EMBKERN_DEVICE int reduce_scatter(A (&values)[kSize], int lane) {
  if constexpr (kBit < kMask) {
    return 0;
  } else if constexpr (kCount == 1) {
    values[0] += ptx::shuffle_xor(values[0], kBit);
    return reduce_scatter<1, kBit / 2, kMask>(values, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A kept = upper ? values[i + kHalf] : values[i], given = upper ? values[i] : values[i + kHalf];
      values[i] = kept + ptx::shuffle_xor(given, kBit);
    }
    return (upper ? kHalf : 0) + reduce_scatter<kHalf, kBit / 2, kMask>(values, lane);
  }
}

template <class T, int kRows>
constexpr int decode_shared_bytes() {
  return kDecodeCodesBytes + kWarps * kRows * kStrip<T> * static_cast<int>(sizeof(acc_t<T>));
}

// Block b: strip b / groups of the columns, rows [kRows g, kRows (g + 1)) with g = b % groups.
// Thread t: vector t % kStripLanes of the strip, rows k = t / kStripLanes + i kSlices of the basis.
template <class T, int kRows, bool kAlignedBasis>
EMBKERN_DEVICE void decode(const Problem<T>& problem) {
  using A = acc_t<T>;
  constexpr int kValues = kRows * kVector<T>, kDepth = kDecodeDepth<T, kRows>;
  constexpr int kInFlight = kAlignedBasis ? 4 : 2;  // vectors of the basis that a thread loads at a time
  const int rank = problem.rank, width = problem.width, thread = threadIdx.x;
  const int groups = static_cast<int>(ceil_div(problem.count, kRows));
  const int column = static_cast<int>(blockIdx.x / groups) * kStrip<T> + thread % kStripLanes * kVector<T>;
  const int first_row = static_cast<int>(blockIdx.x % groups) * kRows;
  const int slice = thread / kStripLanes;
  A* codes = reinterpret_cast<A*>(ptx::shared_memory());  // (kRows, kDepth)
  A* sums = codes + kRows * kDepth;                       // (kWarps, kRows, kStrip)

  A partial[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) partial[i] = 0;

  for (int first = 0; first < rank; first += kDepth) {  // once unless r is in the thousands
    const int size = smaller(kDepth, rank - first);
    Vector<T> basis[kInFlight];
    const auto load_basis = [&](int k) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i, k += kSlices) {
        const bool exists = k < size && column < width;
        const T* from = problem.basis + (exists ? static_cast<int64_t>(first + k) * width + column : 0);
        // The load is unconditional, from the first element where a vector does not exist: a thread would wait
        // for the values at the end of a branch, before it loads the ids.
        basis[i] = kAlignedBasis ? ptx::load_16<Vector<T>>(from)
                                 : load_vector(from, exists ? width - column : 0, false);
      }
    };
    load_basis(slice);

    if (first > 0) ptx::sync_block();  // the codes of the previous iteration are no longer read
    const int vectors = static_cast<int>(ceil_div(size, kVector<T>));
    for (int i = thread; i < kRows * vectors; i += kThreads) {
      const int row = i / vectors, k = i % vectors * kVector<T>;
      Vector<T> vector{};
      if (first_row + row < problem.count) {
        const int64_t id = checked_id(problem, first_row + row);
        if (id >= 0)
          vector = load_vector(problem.codes + id * problem.codes_stride + first + k, size - k,
                               problem.aligned_codes);
      }
#pragma unroll
      for (int j = 0; j < kVector<T>; j += kVector<A>) {
        Vector<A> widened;
#pragma unroll
        for (int l = 0; l < kVector<A>; ++l) widened.values[l] = static_cast<A>(vector.values[j + l]);
        ptx::store_16(codes + row * kDepth + k + j, widened);
      }
    }
    ptx::sync_block();

    for (int k = slice; k < size;) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i, k += kSlices) {
        if (k >= size) continue;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const A code = codes[row * kDepth + k];
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j)
            partial[row * kVector<T> + j] += code * static_cast<A>(basis[i].values[j]);
        }
      }
      if (k < size) load_basis(k);
    }
  }

  // The sum over the slices: first within warps, then over the warps in their order.
  constexpr int kPeers = kLanes / kStripLanes, kHeld = kValues > kPeers ? kValues / kPeers : 1;
  const int held = reduce_scatter<kValues, kLanes / 2, kStripLanes>(partial, thread % kLanes);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = (held + i) / kVector<T>, j = (held + i) % kVector<T>;
    sums[(thread / kLanes * kRows + row) * kStrip<T> + thread % kStripLanes * kVector<T> + j] = partial[i];
  }
  ptx::sync_block();
  const int strip = column - thread % kStripLanes * kVector<T>;
  for (int i = thread; i < kRows * kStrip<T>; i += kThreads) {
    const int row = first_row + i / kStrip<T>, at = strip + i % kStrip<T>;
    if (row >= problem.count || at >= width) continue;
    if (problem.factors && checked_id(problem, row) < 0) continue;
    A sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kRows * kStrip<T> + i];
    if (problem.factors) sum *= problem.factors[row];
    if (problem.offset) sum += static_cast<A>(problem.offset[at]);
    problem.out[static_cast<int64_t>(row) * width + at] = static_cast<T>(sum * problem.scale);
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2) gather_project_decode_kernel(const Problem<T> problem) {
  if (problem.aligned_basis)
    decode<T, kRows, true>(problem);
  else
    decode<T, kRows, false>(problem);
}

template <class T, int kRows>
void launch_decode(const Problem<T>& problem, Stream stream) {
  const int64_t blocks = ceil_div(problem.width, kStrip<T>) * ceil_div(problem.count, kRows);
  launch(kOp, gather_project_decode_kernel<T, kRows>, blocks, kThreads, decode_shared_bytes<T, kRows>(), stream,
         problem);
}

}  // namespace embkern::cuda
