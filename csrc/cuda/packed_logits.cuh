// packed_logits, forward, for few hidden states: logits[n, v] = hidden[n] . row(v) over all rows of a packed
// table.
//
//   row(v) = scales[v] * values + offset              logits[n, v] = scales[v] * (values . hidden[n]) +
//   shifts[n] row(v) = scales[v] * (values @ basis) + offset    logits[n, v] = scales[v] * (values . states[n])
//   + shifts[n]
//
//   with states = hidden @ basis^T and shifts = hidden @ offset. hidden (N, H) of any dtype, the table as in
//   gather_decode.cuh -> logits (N, V) in the dtype of hidden. Sums run in fp32, in fp64 if hidden or scales
//   are.
//
// Two launches for 16 states at a time; no row is written to memory.
//
//   states: a warp per row of the basis, and one for the offset: products with all states, and the hidden
//   states
//     themselves in the type of the sums. Launch: ceil((K + 1) / 8) blocks of 256.
//
//   logits: a warp per row of the table, a lane per value of a group of 32: it decodes a value in registers and
//     multiplies it with that of each state, which L1 has. Groups without bits are skipped. The lanes' sums are
//     added by exchange of halves. A block runs through many rows, since it has to load the levels first.
//     Bytes: the records, once per 16 states, + N V.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/gather_project_decode.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed_record.cuh"

namespace embkern::cuda {

constexpr char kLogitsOp[] = "packed_logits";
constexpr int kMostStates = 16;
constexpr int kBlocksPerMultiprocessor = 8;  // calculated, not measured

// Tensors whose dtype is known at run time only.
enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// Calls use(array) with the array in its type.
template <class Use>
EMBKERN_DEVICE void with_type(const void* array, Element element, Use use) {
  switch (element) {
    case Element::kFloat:
      return use(static_cast<const float*>(array));
    case Element::kDouble:
      return use(static_cast<const double*>(array));
    case Element::kBFloat16:
      return use(static_cast<const torch::headeronly::BFloat16*>(array));
    default:
      return use(static_cast<const torch::headeronly::Half*>(array));
  }
}

template <class A>
EMBKERN_DEVICE void store_element(void* to, Element element, int64_t i, A value) {
  switch (element) {
    case Element::kFloat:
      static_cast<float*>(to)[i] = static_cast<float>(value);
      break;
    case Element::kDouble:
      static_cast<double*>(to)[i] = static_cast<double>(value);
      break;
    case Element::kBFloat16:
      static_cast<torch::headeronly::BFloat16*>(to)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<torch::headeronly::Half*>(to)[i] = static_cast<float>(value);
  }
}

// The arguments of one call; A is the type of the sums.
template <class T, class A>
struct LogitsProblem {
  const void* hidden;
  Element element;  // of hidden and logits
  int64_t count;    // N
  PackedTable table;
  int width;  // H
  int terms;  // K, 0 without a basis
  const T* scales;
  const T* basis;   // may be null
  const T* offset;  // may be null
  void* logits;
  // Of the states that are multiplied at a time: (16, H + K), the hidden state and its products with the basis,
  // and (16,).
  A* states;
  A* shifts;
};

// The sum of each of kStates values over the lanes; lane i gets that of state i / (32 / kStates).
template <int kStates, class A>
EMBKERN_DEVICE A sums_of_states(A (&values)[kStates], int lane) {
  reduce_scatter<kStates, kLanes / 2, 1>(values, lane);
  return values[0];
}

// Warp w of block b: row 8 b + w of the basis, or the offset after the last. States [first, first + count).
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    packed_logits_states_kernel(const LogitsProblem<T, A> problem, int64_t first, int count) {
  const int lane = threadIdx.x % kLanes, stride = problem.width + problem.terms;
  const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row > problem.terms) return;
  const bool last = row == problem.terms;
  const T* from = last ? problem.offset : problem.basis + static_cast<int64_t>(row) * problem.width;
  A sums[kMostStates];
#pragma unroll
  for (int n = 0; n < kMostStates; ++n) sums[n] = 0;
  with_type(problem.hidden, problem.element, [&](const auto* hidden) {
    hidden += first * problem.width;
    for (int column = lane; column < problem.width; column += kLanes) {
      const A factor = from ? static_cast<A>(from[column]) : A(0);
#pragma unroll
      for (int n = 0; n < kMostStates; ++n) {
        if (n >= count) continue;
        const A value = static_cast<A>(hidden[static_cast<int64_t>(n) * problem.width + column]);
        if (last) problem.states[n * stride + column] = value;
        sums[n] += factor * value;
      }
    }
  });
  const A sum = sums_of_states<kMostStates>(sums, lane);
  const int n = lane / (kLanes / kMostStates);
  if (lane % (kLanes / kMostStates) == 0 && n < count)
    (last ? problem.shifts[n] : problem.states[n * stride + problem.width + row]) = sum;
}

// Warp w of block b: rows 8 b + w + 8 i blocks.
template <class T, class A, int kStates>
__global__ void __launch_bounds__(kThreads)
    packed_logits_kernel(const LogitsProblem<T, A> problem, int64_t first, int count, int64_t blocks) {
  TierSizes* sizes = reinterpret_cast<TierSizes*>(ptx::shared_memory());  // (kMostTiers,)
  int8_t* levels = reinterpret_cast<int8_t*>(sizes + kMostTiers);         // (17, 16)
  const PackedTable& table = problem.table;
  const int lane = threadIdx.x % kLanes, stride = problem.width + problem.terms;
  load_tables(table, sizes, levels);
  ptx::sync_block();

  const int64_t step = blocks * kWarps;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; v < table.num_embeddings;
       v += step) {
    const Record record = find_record(table, sizes, v, lane);
    const bool indirect = problem.terms > 0 && record.indirect;
    const int width = indirect ? problem.terms : problem.width;
    const A* states = problem.states + (indirect ? problem.width : 0);
    A sums[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) sums[n] = 0;
    RecordReader reader(record, lane);
    for (int group = 0; group < table.groups && group * kGroup < width; ++group) {
      const int bits = record.bits[group], column = group * kGroup + lane;
      if (bits == 0) continue;
      const A value = static_cast<A>(reader.next(bits, levels));
      if (column >= width) continue;
#pragma unroll
      for (int n = 0; n < kStates; ++n)
        if (n < count) sums[n] += value * states[n * stride + column];
    }
    const A sum = sums_of_states<kStates>(sums, lane);
    const int n = lane / (kLanes / kStates);
    if (lane % (kLanes / kStates) == 0 && n < count)
      store_element(problem.logits, problem.element, (first + n) * table.num_embeddings + v,
                    static_cast<A>(problem.scales[v]) * sum + problem.shifts[n]);
  }
}

// Enqueues the forward, without host synchronisation. N, V, H >= 1.
template <class T, class A>
void packed_logits(const LogitsProblem<T, A>& problem, const Device& device, Stream stream) {
  const int64_t blocks =
      std::min<int64_t>(ceil_div(problem.table.num_embeddings, kWarps),
                        static_cast<int64_t>(device.multiprocessors) * kBlocksPerMultiprocessor);
  for (int64_t first = 0; first < problem.count; first += kMostStates) {
    const int count = static_cast<int>(std::min<int64_t>(kMostStates, problem.count - first));
    launch(kLogitsOp, packed_logits_states_kernel<T, A>, ceil_div(problem.terms + 1, kWarps), kThreads, 0,
           stream, problem, first, count);
    auto* kernel = count == 1   ? packed_logits_kernel<T, A, 1>
                   : count <= 4 ? packed_logits_kernel<T, A, 4>
                                : packed_logits_kernel<T, A, kMostStates>;
    launch(kLogitsOp, kernel, blocks, kThreads, kTablesBytes, stream, problem, first, count, blocks);
  }
}

}  // namespace embkern::cuda
