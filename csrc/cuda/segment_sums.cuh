// Sums of the rows of equal ids, for the gradient of codes: sums[id] = sum over n with ids[n] = id of rows[n].
//
// The positions are sorted by their ids. A segment is the positions of one id. Its sum is made within blocks of
// kSegmentBlock positions, so that the time does not depend on how often an id occurs, and the order of every
// sum is that of the positions: no atomics, and the same bits in every run.
//
//   sum_segments: a warp per block of positions and strip of columns, 16 bytes per lane. A segment that lies
//     within the block is finished. One that crosses a border leaves its sum in tails[block] where it begins
//     and in heads[block] where it continues.
//   join_segments: for every block in which a segment begins and does not end, tails[block] plus the heads that
//     follow.
// Bytes: N r (rows) + 2 N r / kSegmentBlock at most + U r for U distinct ids.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace embkern::cuda {

constexpr int kSegmentBlock = 32;

// The arguments of one call. `rows`, `heads` and `tails` have rows of `stride` elements, a multiple of 16
// bytes.
template <class T>
struct Segments {
  const acc_t<T>* rows;    // (N, stride)
  const void* sorted_ids;  // (N,), ascending
  const int64_t* order;    // (N,), the position of each sorted id
  bool wide_ids;           // int64, else int32
  int64_t count;           // N
  int rank;                // r
  int stride;
  int64_t padding_idx;     // whose rows are zero
  T* sums;                 // (V, r); rows of ids that do not occur are left as they are
  acc_t<T>*heads, *tails;  // (ceil(N / kSegmentBlock), stride)
};

template <class T>
EMBKERN_DEVICE int64_t sorted_id(const Segments<T>& segments, int64_t i) {
  return segments.wide_ids ? static_cast<const int64_t*>(segments.sorted_ids)[i]
                           : static_cast<const int32_t*>(segments.sorted_ids)[i];
}

template <class T>
EMBKERN_DEVICE void finish_segment(const Segments<T>& segments, int64_t id, int column,
                                   const Vector<acc_t<T>>& sum) {
#pragma unroll
  for (int i = 0; i < kVector<acc_t<T>>; ++i)
    if (column + i < segments.rank)
      segments.sums[id * segments.rank + column + i] = static_cast<T>(sum.values[i]);
}

template <class A>
EMBKERN_DEVICE void add(Vector<A>& sum, const Vector<A>& vector) {
#pragma unroll
  for (int i = 0; i < kVector<A>; ++i) sum.values[i] += vector.values[i];
}

// Warp w of all: block w / strips, strip w % strips.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_segments_kernel(const Segments<T> segments, const int strips) {
  using A = acc_t<T>;
  constexpr int kInFlight = 8;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int64_t block = warp / strips, begin = block * kSegmentBlock;
  const int column = static_cast<int>(warp % strips * kLanes + threadIdx.x % kLanes) * kVector<A>;
  if (begin >= segments.count || column >= segments.stride) return;
  const int64_t left = segments.count - begin;
  const int size = left < kSegmentBlock ? static_cast<int>(left) : kSegmentBlock;
  int64_t id = sorted_id(segments, begin);
  bool begins = begin == 0 || sorted_id(segments, begin - 1) != id;
  Vector<A> sum{};
  for (int first = 0; first < size; first += kInFlight) {
    Vector<A> rows[kInFlight];
    int64_t following[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const bool exists = first + i < size;
      const int64_t position = exists ? segments.order[begin + first + i] : 0;
      rows[i] = load_vector(segments.rows + position * segments.stride + column, exists ? kVector<A> : 0, true);
      following[i] = first + i + 1 < left ? sorted_id(segments, begin + first + i + 1) : -1;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i >= size) break;
      add(sum, rows[i]);
      const bool ends = following[i] != id;
      if (!ends && first + i + 1 < size) continue;
      if (ends && begins)
        finish_segment(segments, id, column, sum);
      else
        ptx::store_16((begins ? segments.tails : segments.heads) + block * segments.stride + column, sum);
      sum = {}, id = following[i], begins = true;
    }
  }
}

// Block b: block b / strips of positions, strip b % strips. The warps take the heads in turn.
template <class T>
__global__ void __launch_bounds__(kThreads) join_segments_kernel(const Segments<T> segments, const int strips) {
  using A = acc_t<T>;
  constexpr int kInFlight = 4;
  const int64_t block = blockIdx.x / strips, begin = block * kSegmentBlock, end = begin + kSegmentBlock;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int column = static_cast<int>(blockIdx.x % strips * kLanes + lane) * kVector<A>;
  if (end >= segments.count) return;
  const int64_t id = sorted_id(segments, end - 1);
  if (sorted_id(segments, end) != id || (begin > 0 && sorted_id(segments, begin - 1) == id)) return;

  const auto continues = [&](int64_t later) {
    return later * kSegmentBlock < segments.count && sorted_id(segments, later * kSegmentBlock) == id;
  };
  Vector<A> sum{};
  const bool exists = column < segments.stride && id != segments.padding_idx;
  for (int64_t later = block + 1 + warp; exists && continues(later); later += kWarps * kInFlight) {
    Vector<A> heads[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = later + i * kWarps;
      heads[i] =
          load_vector(segments.heads + at * segments.stride + column, continues(at) ? kVector<A> : 0, true);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(sum, heads[i]);
  }
  Vector<A>* sums = reinterpret_cast<Vector<A>*>(ptx::shared_memory());  // (kWarps, kLanes)
  ptx::store_16(sums + threadIdx.x, sum);
  ptx::sync_block();
  if (warp > 0 || !exists) return;
  sum = ptx::load_16<Vector<A>>(segments.tails + block * segments.stride + column);
#pragma unroll
  for (int i = 0; i < kWarps; ++i) add(sum, ptx::load_16<Vector<A>>(sums + i * kLanes + lane));
  finish_segment(segments, id, column, sum);
}

// Enqueues both kernels. N, r >= 1.
template <class T>
void sum_segments(const char* op, const Segments<T>& segments, Stream stream) {
  const int64_t blocks = ceil_div(segments.count, kSegmentBlock);
  const int strips = static_cast<int>(ceil_div(segments.stride, kLanes * kVector<acc_t<T>>));
  launch(op, sum_segments_kernel<T>, ceil_div(blocks * strips, kWarps), kThreads, 0, stream, segments, strips);
  launch(op, join_segments_kernel<T>, blocks * strips, kThreads, kThreads * 16, stream, segments, strips);
}

}  // namespace embkern::cuda
