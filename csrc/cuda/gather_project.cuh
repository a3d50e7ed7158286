// gather_project, forward: out[n] = scale * (codes[ids[n]] @ basis + offset)
//
//   ids (N,) int32|int64, codes (V, r), basis (r, H), offset (H,) or none -> out (N, H), row-major and of one
//   dtype: bf16, fp16 (sums in fp32), fp32 or fp64 (sums in themselves). One rounding, at the end.
//
// Two kernels; `gather_project` below chooses by the shapes.
//
//   decode, N <= 16: bound by latency, then by reading the basis once. The columns are cut into strips of 32
//     bytes, one per block, so that a hundred multiprocessors share the reading of a basis of a megabyte. In a
//     block 128 slices share the rows of the basis, and their partial sums are added in a fixed order. A thread
//     loads its part of the basis before it waits for ids and codes.
//     Launch: (H / strip) * (N / rows) blocks of 256. Bytes: r H + N r per strip (from L2) + N H.
//
//   tiles, larger N: a block gathers the codes of its rows into shared memory once and iterates over H, so that
//     the codes are read once and the basis N / kRows times, from L2. Tiles of the basis arrive through a
//     cp.async pipeline that continues from one column tile to the next.
//     bf16 and fp16 use tensor cores (mma.sync m16n8k16). fp32 and fp64 use FMA, because the error must not
//     exceed that of plain fp32 by much: 3xTF32 keeps 22 of 24 bits and truncates its sums, for several times
//     that error.
//     Launch: ceil(N / kRows) * splits of H blocks of 256. Bytes: N r + (N / kRows) r H (from L2) + N H.
//
// r, H, N and V are arbitrary. Where rows or pointers are not multiples of 16 bytes the same code copies single
// elements. These headers need no CUDA beyond ptx.cuh and launch.cuh, so that tests/cuda can run them on a CPU.
#pragma once

#include <cstdint>

#include "cuda/gather_project_decode.cuh"
#include "cuda/gather_project_tiles.cuh"
#include "cuda/launch.cuh"

namespace embkern::cuda {

// Enqueues the forward in one launch, without host synchronisation. N, H >= 1.
template <class T>
void gather_project(const Problem<T>& problem, const Device& device, Stream stream) {
  if (problem.count == 1) return launch_decode<T, 1>(problem, stream);
  if (problem.count <= 4) return launch_decode<T, 4>(problem, stream);
  if (problem.count <= kDecodeCount) return launch_decode<T, 8>(problem, stream);
  // The large tile has to occupy at least half of the device.
  using Large = TileProduct<T, true>;
  const int64_t large_tiles = ceil_div(problem.count, Large::kRows) * ceil_div(problem.width, Large::kColumns);
  if (2 * large_tiles >= device.multiprocessors) return launch_tiles<Large>(problem, device, stream);
  launch_tiles<TileProduct<T, false>>(problem, device, stream);
}

}  // namespace embkern::cuda
