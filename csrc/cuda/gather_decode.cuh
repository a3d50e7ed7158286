// gather_decode, forward: out[n] = scale * (scales[id] * row + offset), id = ids[n]; row is the values of the
// record of the id, or values @ basis.
//
//   ids (N,) int32|int64, records (W,) int32, directory (ceil(V / 32), 5) int32, tiers (T, 1 + G) uint8, levels
//   (17, 16) int8, scales (V,), basis (K, H) or none, offset (H,) or none -> out (N, H), row-major, of scales'
//   dtype: bf16, fp16 (sums in fp32), fp32 or fp64 (sums in themselves). docs/packed-format.md has the format.
//
// One launch, or two if there is a basis; neither depends on the ids, so that the host waits for nothing.
//
//   rows: a warp per position, a lane per value of a group of 32, so that words of a record are read by all
//     lanes at once and 32 results are adjacent. The levels are in shared memory: what a warp reads of a table
//     are 16 bytes, in four banks. A row of values is written to out. Of a row of coefficients the values, its
//     factor and its place are written to memory.
//     Launch: ceil(N / 8) blocks of 256. Bytes: the records (4 words per group and bit) + N (H or K).
//
//   product: gather_project with factors, which leaves rows of values as they are. Values have at most 8
//     significant bits and are exact in every dtype: only sums of products are rounded.
//
// The record of a row is located by counting: its entry of the directory says where the records of 32 rows
// begin, and every lane adds the words of one row that comes before.
#pragma once

#include <cstdint>

#include "cuda/gather_project.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed_record.cuh"

namespace embkern::cuda {

constexpr char kDecodeOp[] = "gather_decode";

// The arguments of one call.
template <class T>
struct DecodeProblem {
  const void* ids;
  bool wide_ids;  // int64, else int32
  int64_t count;  // N
  PackedTable table;
  int width;  // H
  int terms;  // K, 0 without a basis
  const T* scales;
  const T* basis;   // may be null
  const T* offset;  // may be null
  T* out;
  acc_t<T> scale;
  // With a basis, what the product reads: (N, K), (N,), (N,).
  T* coefficients;
  acc_t<T>* factors;
  int32_t* places;
};

// Warp w of block b: position 8 b + w.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_decode_rows_kernel(const DecodeProblem<T> problem) {
  using A = acc_t<T>;
  TierSizes* sizes = reinterpret_cast<TierSizes*>(ptx::shared_memory());  // (kMostTiers,)
  int8_t* levels = reinterpret_cast<int8_t*>(sizes + kMostTiers);         // (17, 16)
  const PackedTable& table = problem.table;
  const int lane = threadIdx.x % kLanes;
  load_tables(table, sizes, levels);
  ptx::sync_block();

  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (n >= problem.count) return;
  const int64_t id = problem.wide_ids ? static_cast<const int64_t*>(problem.ids)[n]
                                      : static_cast<const int32_t*>(problem.ids)[n];
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(table.num_embeddings))
    ptx::fail("gather_decode: ids: expected 0 <= id < V");
  const Record record = find_record(table, sizes, id, lane);
  const A factor = static_cast<A>(problem.scales[id]);
  const bool indirect = problem.terms > 0 && record.indirect;
  if (problem.terms > 0 && lane == 0) {
    problem.factors[n] = factor;
    problem.places[n] = indirect ? static_cast<int32_t>(n) : -1;
  }
  const int width = indirect ? problem.terms : problem.width;
  T* to = indirect ? problem.coefficients + n * width : problem.out + n * width;
  RecordReader reader(record, lane);
  for (int column = lane, group = 0; column - lane < width; column += kLanes, ++group) {
    const float value = reader.next(group < table.groups ? record.bits[group] : 0, levels);
    if (column >= width) continue;
    if (indirect) {
      to[column] = static_cast<T>(value);
    } else {
      const A shift = problem.offset ? static_cast<A>(problem.offset[column]) : A(0);
      to[column] = static_cast<T>((static_cast<A>(value) * factor + shift) * problem.scale);
    }
  }
}

// Enqueues the forward, without host synchronisation. N, H >= 1.
template <class T>
void gather_decode(const DecodeProblem<T>& problem, const Device& device, Stream stream) {
  launch(kDecodeOp, gather_decode_rows_kernel<T>, ceil_div(problem.count, kWarps), kThreads, kTablesBytes,
         stream, problem);
  if (problem.terms == 0) return;
  Problem<T> product{};
  product.ids = problem.places;
  product.count = product.num_embeddings = problem.count;
  product.rank = problem.terms;
  product.codes_stride = problem.terms;
  product.width = problem.width;
  product.codes = problem.coefficients;
  product.basis = problem.basis;
  product.offset = problem.offset;
  product.factors = problem.factors;
  product.out = problem.out;
  product.scale = problem.scale;
  set_alignment(product);
  gather_project(product, device, stream);
}

}  // namespace embkern::cuda
