// gather_project, backward, for grad (N, H):
//
//   rows[n]      = scale * grad[n] @ basis^T, zero where ids[n] = padding_idx; (N, r)
//   grad_codes   = sums of the rows of equal ids (segment_sums.cuh); for a sparse gradient the rows themselves
//   grad_basis   = scale * sum over n of codes[ids[n]]^T grad[n], without the positions of padding_idx
//   grad_offset  = scale * sum over n of grad[n], without them, too
//
// Sums are made in fp32 (fp64 for fp64) and rounded once. There are no atomics and the order of every sum is
// fixed: the same call gives the same bits.
//
//   rows: a block per tile of positions and ranks. Blocks of the same positions are adjacent, so that grad is
//     read from DRAM once. Bytes: N H + (N / kRows) r H (from L2) + N r.
//   basis: the positions are the inner dimension. They are divided into as many splits as fill the device.
//     A block multiplies one split for a tile of ranks and columns, or adds up columns of grad for the offset.
//     Bytes: N H + N r, (r / kRows) times from L2 + (r + 1) H per split.
//   splits: adds the splits in their order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/gather_project_problem.cuh"
#include "cuda/launch.cuh"
#include "cuda/segment_sums.cuh"
#include "cuda/streamed_product.cuh"

namespace embkern::cuda {

constexpr char kBackwardOp[] = "gather_project_backward";

// The arguments of one call.
template <class T>
struct Gradients {
  Problem<T> lookup;    // the forward's; offset, factors and out are null
  const T* grad;        // (N, H)
  int64_t padding_idx;  // negative for none
  bool aligned_grad;
};

template <class T>
void set_alignment(Gradients<T>& problem) {
  set_alignment(problem.lookup);
  problem.aligned_grad = aligned(problem.grad, problem.lookup.width * sizeof(T));
}

// The id at position n, -1 if it is padding_idx or n is not below `end`.
template <class T>
EMBKERN_DEVICE int64_t counted_id(const Gradients<T>& problem, int64_t n, int64_t end) {
  if (n >= end) return -1;
  const int64_t id = checked_id(problem.lookup, n);
  return id == problem.padding_idx ? -1 : id;
}

// ---- rows ---------------------------------------------------------------------------------------------------

// Block b: positions [kRows i, kRows (i + 1)) with i = b / column_tiles, tile b % column_tiles of the ranks.
template <class Product, class E>
__global__ void __launch_bounds__(kThreads, 2)
    grad_rows_kernel(const Gradients<typename Product::T> problem, const Target<E> target) {
  using T = typename Product::T;
  constexpr int kRows = Product::kRows;
  const Problem<T>& lookup = problem.lookup;
  const int width = lookup.width, rank = lookup.rank;
  const int column_tiles = static_cast<int>(ceil_div(rank, Product::kColumns));
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / column_tiles) * kRows;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Product::kColumns;
  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  bool* counted = reinterpret_cast<bool*>(ptx::shared_memory() + kStreamBytes<Product>);  // (kRows,)
  for (int row = threadIdx.x; row < kRows; row += kThreads)
    counted[row] = counted_id(problem, first_row + row, lookup.count) >= 0;
  ptx::sync_block();

  Product product;
  const int steps = static_cast<int>(ceil_div(width, Product::kDepth));
  multiply_streamed(product, stages, steps, [&](T* a, T* b, int step) {
    const int first = step * Product::kDepth, left = width - first;
    Product::SlabA::copy(
        a, problem.grad, problem.aligned_grad,
        [&](int row) { return problem.grad + (first_row + row) * width + first; },
        [&](int row) { return counted[row] ? left : 0; });
    Product::SlabB::copy(
        b, lookup.basis, lookup.aligned_basis,
        [&](int row) { return lookup.basis + static_cast<int64_t>(first_column + row) * width + first; },
        [&](int row) { return first_column + row < rank ? left : 0; });
  });
  product.store(target, first_row, first_column, lookup.scale);
}

template <class Product, class E>
void launch_grad_rows(const Gradients<typename Product::T>& problem, const Target<E>& target, Stream stream) {
  const int64_t blocks =
      ceil_div(problem.lookup.count, Product::kRows) * ceil_div(problem.lookup.rank, Product::kColumns);
  launch(kBackwardOp, grad_rows_kernel<Product, E>, blocks, kThreads, kStreamBytes<Product> + Product::kRows,
         stream, problem, target);
}

// Enqueues `rows`, rounded to E. N, H, r >= 1.
template <class E, class T>
void grad_rows(const Gradients<T>& problem, E* to, int64_t stride, const Device& device, Stream stream) {
  const int64_t count = problem.lookup.count;
  const int rank = problem.lookup.rank;
  const bool vectors = aligned(to, stride * sizeof(E)) && stride % 4 == 0;
  const Target<E> target{to, stride, count, rank, vectors};
  using Large = StreamedProduct<T, false, true>;
  const int64_t large_tiles = ceil_div(count, Large::kRows) * ceil_div(rank, Large::kColumns);
  if (2 * large_tiles >= device.multiprocessors) return launch_grad_rows<Large>(problem, target, stream);
  launch_grad_rows<StreamedProduct<T, false, false>>(problem, target, stream);
}

// ---- basis and offset ---------------------------------------------------------------------------------------

// The division of a call into blocks, and its result before the last sum.
template <class A>
struct SplitPlan {
  int64_t split_size;  // positions of one split, a multiple of kDepth
  int splits;
  int first_tile, tiles;  // of the ranks; the one after the last is grad_offset
  int stride;             // of a row of `partial`, a multiple of four elements
  A* partial;             // (splits, r + 1, stride)
};

// Adds up columns [first_column, first_column + kColumns) of grad over positions [begin, end).
template <class Product>
EMBKERN_DEVICE void sum_columns(const Gradients<typename Product::T>& problem, int64_t begin, int64_t end,
                                int first_column, const Target<acc_t<typename Product::T>>& target) {
  using T = typename Product::T;
  using A = acc_t<T>;
  constexpr int kVectors = Product::kColumns / kVector<T>, kLines = kThreads / kVectors;
  const int width = problem.lookup.width, thread = threadIdx.x;
  const int column = first_column + thread % kVectors * kVector<T>, valid = width - column;
  A sums[kVector<T>] = {};
  constexpr int kInFlight = 4;  // whose sum is added as one, which also makes the error smaller
  for (int64_t first = begin + thread / kVectors; first < end; first += kLines * kInFlight) {
    A part[kVector<T>] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t n = first + j * kLines;
      const int exist = counted_id(problem, n, end) >= 0 ? valid : 0;
      const auto vector =
          load_vector(problem.grad + (exist > 0 ? n * width + column : 0), exist, problem.aligned_grad);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) part[i] += static_cast<A>(vector.values[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sums[i] += part[i];
  }
  A* lines = reinterpret_cast<A*>(ptx::shared_memory());  // (kLines, kColumns)
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    lines[thread / kVectors * Product::kColumns + thread % kVectors * kVector<T> + i] = sums[i];
  ptx::sync_block();
  for (int i = thread; i < Product::kColumns; i += kThreads) {
    A sum = 0;
    for (int line = 0; line < kLines; ++line) sum += lines[line * Product::kColumns + i];
    if (first_column + i < width) target.to[first_column + i] = sum;
  }
}

constexpr int kIdChunk = 1024;  // ids of a split in shared memory at a time

// Block b: split b / (tiles * column_tiles), of it column tile b / tiles % column_tiles and tile b % tiles.
template <class Product>
__global__ void __launch_bounds__(kThreads, 2)
    grad_basis_kernel(const Gradients<typename Product::T> problem,
                      const SplitPlan<acc_t<typename Product::T>> plan) {
  using T = typename Product::T;
  using A = acc_t<T>;
  const Problem<T>& lookup = problem.lookup;
  const int width = lookup.width, rank = lookup.rank;
  const int column_tiles = static_cast<int>(ceil_div(width, Product::kColumns));
  const int first_row = (plan.first_tile + static_cast<int>(blockIdx.x % plan.tiles)) * Product::kRows;
  const int first_column = static_cast<int>(blockIdx.x / plan.tiles % column_tiles) * Product::kColumns;
  const int split = static_cast<int>(blockIdx.x / plan.tiles / column_tiles);
  const int64_t begin = split * plan.split_size;
  const int64_t end = begin + plan.split_size < lookup.count ? begin + plan.split_size : lookup.count;
  Target<A> target{plan.partial + static_cast<int64_t>(split) * (rank + 1) * plan.stride, plan.stride, rank,
                   width, true};
  if (first_row >= rank) {
    target.to += static_cast<int64_t>(rank) * plan.stride;
    return sum_columns<Product>(problem, begin, end, first_column, target);
  }

  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  int64_t* ids = reinterpret_cast<int64_t*>(ptx::shared_memory() + kStreamBytes<Product>);  // (kIdChunk,)
  static_assert(kIdChunk % Product::kDepth == 0 && kIdChunk >= Product::kStages * Product::kDepth, "");
  Product product;
  const int steps = static_cast<int>(ceil_div(end - begin, Product::kDepth));
  multiply_streamed(product, stages, steps, [&](T* a, T* b, int step) {
    const int64_t first = begin + static_cast<int64_t>(step) * Product::kDepth;
    const int at = step * Product::kDepth % kIdChunk;
    if (at == 0) {  // the barrier before this step follows the last use of the ids
      for (int i = threadIdx.x; i < kIdChunk; i += kThreads) ids[i] = counted_id(problem, first + i, end);
      ptx::sync_block();
    }
    Product::SlabA::copy(
        a, lookup.codes, lookup.aligned_codes,
        [&](int row) { return lookup.codes + ids[at + row] * lookup.codes_stride + first_row; },
        [&](int row) { return ids[at + row] < 0 ? 0 : rank - first_row; });
    Product::SlabB::copy(
        b, problem.grad, problem.aligned_grad,
        [&](int row) { return problem.grad + (first + row) * width + first_column; },
        [&](int row) { return ids[at + row] < 0 ? 0 : width - first_column; });
  });
  product.store(target, first_row, first_column, A(1));
}

// Adds the splits: thread i has element first + i of (r + 1, H).
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const SplitPlan<acc_t<T>> plan, const int64_t first, const int64_t last, const int rank,
                      const int width, const acc_t<T> scale, T* grad_basis, T* grad_offset) {
  const int64_t i = first + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= last) return;
  const int64_t row = i / width, column = i % width;
  const acc_t<T>* from = plan.partial + row * plan.stride + column;
  acc_t<T> sum = 0;
#pragma unroll 8
  for (int split = 0; split < plan.splits; ++split)
    sum += from[static_cast<int64_t>(split) * (rank + 1) * plan.stride];
  (row < rank ? grad_basis + i : grad_offset + column)[0] = static_cast<T>(sum * scale);
}

template <class Product>
SplitPlan<acc_t<typename Product::T>> plan_splits(const Problem<typename Product::T>& lookup, bool basis,
                                                  bool offset, const Device& device) {
  SplitPlan<acc_t<typename Product::T>> plan{};
  const int64_t row_tiles = ceil_div(lookup.rank, Product::kRows);
  plan.first_tile = static_cast<int>(basis ? 0 : row_tiles);
  plan.tiles = static_cast<int>(row_tiles - plan.first_tile + offset);
  plan.stride = static_cast<int>(ceil_div(lookup.width, 4) * 4);
  // As many splits as give two blocks for every multiprocessor, but none shorter than four steps.
  const int64_t blocks = plan.tiles * ceil_div(lookup.width, Product::kColumns);
  const int64_t splits =
      std::max<int64_t>(1, std::min(2 * device.multiprocessors / blocks, lookup.count / (4 * Product::kDepth)));
  plan.split_size = ceil_div(ceil_div(lookup.count, splits), Product::kDepth) * Product::kDepth;
  plan.splits = static_cast<int>(ceil_div(lookup.count, plan.split_size));
  return plan;
}

template <class T>
bool large_basis_tiles(const Problem<T>& lookup, const Device& device) {
  using Large = StreamedProduct<T, true, true>;
  const auto plan = plan_splits<Large>(lookup, true, true, device);
  return 2 * plan.splits * plan.tiles * ceil_div(lookup.width, Large::kColumns) >= device.multiprocessors;
}

// The plan of a call, for which `partial` has to hold splits * (r + 1) * stride elements. N, H >= 1.
template <class T>
SplitPlan<acc_t<T>> plan_grad_basis(const Problem<T>& lookup, bool basis, bool offset, const Device& device) {
  return large_basis_tiles(lookup, device)
             ? plan_splits<StreamedProduct<T, true, true>>(lookup, basis, offset, device)
             : plan_splits<StreamedProduct<T, true, false>>(lookup, basis, offset, device);
}

template <class Product>
void launch_grad_basis(const Gradients<typename Product::T>& problem,
                       const SplitPlan<acc_t<typename Product::T>>& plan, Stream stream) {
  const int64_t blocks = int64_t{plan.splits} * plan.tiles * ceil_div(problem.lookup.width, Product::kColumns);
  launch(kBackwardOp, grad_basis_kernel<Product>, blocks, kThreads,
         kStreamBytes<Product> + kIdChunk * static_cast<int>(sizeof(int64_t)), stream, problem, plan);
}

// Enqueues grad_basis (r, H) and grad_offset (H,); one that is null is not computed.
template <class T>
void grad_basis(const Gradients<T>& problem, const SplitPlan<acc_t<T>>& plan, T* grad_basis, T* grad_offset,
                const Device& device, Stream stream) {
  const Problem<T>& lookup = problem.lookup;
  if (large_basis_tiles(lookup, device))
    launch_grad_basis<StreamedProduct<T, true, true>>(problem, plan, stream);
  else
    launch_grad_basis<StreamedProduct<T, true, false>>(problem, plan, stream);
  const int64_t width = lookup.width, rows = lookup.rank;
  const int64_t first = grad_basis ? 0 : rows * width, last = (rows + (grad_offset ? 1 : 0)) * width;
  launch(kBackwardOp, sum_splits_kernel<T>, ceil_div(last - first, kThreads), kThreads, 0, stream, plan, first,
         last, lookup.rank, lookup.width, lookup.scale, grad_basis, grad_offset);
}

}  // namespace embkern::cuda
