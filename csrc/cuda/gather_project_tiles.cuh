// gather_project for many rows, see gather_project.cuh: every block multiplies gathered codes by tiles of the
// basis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/gather_project_problem.cuh"
#include "cuda/launch.cuh"

namespace embkern::cuda {

// A product defines how one block multiplies: its tile (kRows, kColumns), the depth of a stage of the basis,
// the position of a 16-byte vector in a row of a stage, and the epilogue. `codes` (kRows, stride) and `basis`
// (kDepth, kColumns) are in shared memory. The stride is an odd number of vectors, so that vectors of adjacent
// rows lie in different banks.

// Tensor cores. Of eight warps, kWarpRows lie along the rows; each owns kM x kN fragments of 16 x 8.
template <class T_, int kWarpRows, int kM, int kN, int kDepth_, int kStages_>
struct TensorCoreProduct {
  using T = T_;
  static constexpr int kWarpColumns = kWarps / kWarpRows, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRows = kWarpRows * 16 * kM, kColumns = kWarpColumns * 8 * kN;
  static constexpr int kStagingBytes = kWarps * 8 * 8 * kN * static_cast<int>(sizeof(T));
  static_assert(kN == 2 || kN == 4,
                "fragments are loaded in pairs, and the staging buffer is swizzled for two or four");

  float sums[kM][kN][4];

  // A permutation within each row puts the same vector of eight adjacent rows into eight different banks.
  static EMBKERN_DEVICE int vector_at(int row, int vector) {
    return vector ^ (row % 8 * smaller(kColumns / kVector<T>, 8) / 8);
  }

  EMBKERN_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  }

  static EMBKERN_DEVICE int warp_row() { return threadIdx.x / kLanes / kWarpColumns * 16 * kM; }
  static EMBKERN_DEVICE int warp_column() { return threadIdx.x / kLanes % kWarpColumns * 8 * kN; }

  EMBKERN_DEVICE void multiply(const T* codes, int stride, const T* basis, int depth) {
    const int lane = threadIdx.x % kLanes;
    const T* code_row = codes + (warp_row() + lane % 16) * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k >= depth) break;
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::load_matrix_x4(a[m], code_row + 16 * m * stride + k);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        const int row = k + lane % 16, vector = warp_column() / 8 + n + lane / 16;
        ptx::load_matrix_x4_transposed(b, basis + row * kColumns + vector_at(row, vector) * kVector<T>);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::multiply_16x8x16<T>(sums[m][n], a[m], b[0], b[1]);
          ptx::multiply_16x8x16<T>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Eight rows of a warp at a time go through shared memory, so that a lane stores 16 bytes. The staged vectors
  // are permuted, so that neither writes nor reads have bank conflicts.
  EMBKERN_DEVICE void store(const Problem<T>& problem, int64_t first_row, int first_column,
                            const int64_t* row_ids, unsigned char* staging) const {
    struct alignas(4) Pair {
      T values[2];
    };
    const int lane = threadIdx.x % kLanes, width = problem.width;
    const int column = first_column + warp_column();
    T* staged = reinterpret_cast<T*>(staging) + threadIdx.x / kLanes * 8 * 8 * kN;
    const auto staged_at = [&](int row, int vector) {
      return staged + (row * kN + (vector ^ (row * kN / 8))) * kVector<T>;
    };
    float offset[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = column + 8 * n + lane % 4 * 2 + i;
        offset[n][i] = problem.offset && at < width ? static_cast<float>(problem.offset[at]) : 0.f;
      }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int eight = warp_row() + 16 * m + 8 * half;
        float factor = 1;
        if (problem.factors && row_ids[eight + lane / 4] >= 0)
          factor = problem.factors[first_row + eight + lane / 4];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* sum = sums[m][n] + 2 * half;
          *reinterpret_cast<Pair*>(staged_at(lane / 4, n) + lane % 4 * 2) = {
              static_cast<T>((factor * sum[0] + offset[n][0]) * problem.scale),
              static_cast<T>((factor * sum[1] + offset[n][1]) * problem.scale)};
        }
        ptx::sync_warp();
        if (const int row = lane / kN, vector = lane % kN; row < 8) {
          const int at = column + vector * kVector<T>;
          if (row_ids[eight + row] >= 0)
            store_vector(problem.out + (first_row + eight + row) * width + at,
                         ptx::load_16<Vector<T>>(staged_at(row, vector)), width - at, problem.aligned_out);
        }
        ptx::sync_warp();
      }
  }
};

// FMA. 16 x 16 threads have kM rows, 16 apart, and kN vectors of columns each. A warp is 4 x 8 threads, so that
// one load of a warp reads 4 vectors of codes or 8 adjacent vectors of the basis.
template <class T_, int kM, int kN, int kStages_>
struct FmaProduct {
  using T = T_;
  static constexpr int kDepth = sizeof(T) == 8 ? 16 : 32, kStages = kStages_;
  static constexpr int kRows = 16 * kM, kColumns = 16 * kN * kVector<T>;
  static constexpr int kStagingBytes = 0;

  T sums[kM][kN][kVector<T>];

  static EMBKERN_DEVICE int vector_at(int, int vector) { return vector; }

  EMBKERN_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) sums[m][n][i] = 0;
  }

  static EMBKERN_DEVICE int row(int m) { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8 + 16 * m; }
  static EMBKERN_DEVICE int column(int n) {
    return (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8 + 16 * n) * kVector<T>;
  }

  EMBKERN_DEVICE void multiply(const T* codes, int stride, const T* basis, int depth) {
#pragma unroll 2
    for (int k = 0; k < depth; k += kVector<T>) {  // codes and basis are zero beyond r
      Vector<T> a[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) a[m] = ptx::load_16<Vector<T>>(codes + row(m) * stride + k);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const auto b = ptx::load_16<Vector<T>>(basis + (k + j) * kColumns + column(n));
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) sums[m][n][i] += a[m].values[j] * b.values[i];
        }
    }
  }

  EMBKERN_DEVICE void store(const Problem<T>& problem, int64_t first_row, int first_column,
                            const int64_t* row_ids, unsigned char*) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int at = first_column + column(n), valid = problem.width - at;
      const Vector<T> offset =
          load_vector(problem.offset ? problem.offset + at : nullptr, problem.offset ? valid : 0, false);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (row_ids[row(m)] < 0) continue;
        const T factor = problem.factors ? problem.factors[first_row + row(m)] : T(1);
        Vector<T> vector;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i)
          vector.values[i] = (factor * sums[m][n][i] + offset.values[i]) * problem.scale;
        store_vector(problem.out + (first_row + row(m)) * problem.width + at, vector, valid,
                     problem.aligned_out);
      }
    }
  }
};

// Two tiles per dtype. The large one reads the fewest bytes and multiplies at the highest rate. The narrow one
// cuts a small call into many blocks, each of which has most loads of its basis in flight at once.
template <class T, bool kLarge>
using TileProduct = std::conditional_t<
    sizeof(T) == 2,
    std::conditional_t<kLarge, TensorCoreProduct<T, 2, 4, 4, 32, 3>, TensorCoreProduct<T, 4, 1, 2, 64, 5>>,
    std::conditional_t<kLarge, FmaProduct<T, 4, 2, 3>, FmaProduct<T, 2, 1, 5>>>;

// The division of a call into blocks.
struct TilePlan {
  int panel;   // columns of the codes held in shared memory: r if it fits, else a multiple of kDepth
  int splits;  // blocks that share the columns of one block of rows
  int shared_bytes;
};

template <class T>
__host__ __device__ constexpr int code_stride(int panel) {
  return panel + kVector<T>;
}

// bf16 at r = 75, 256, 512: 51, 95, 159 KiB (large), 34, 56, 88 KiB (narrow).
template <class Product>
constexpr int64_t tile_shared_bytes(int panel) {
  using T = typename Product::T;
  constexpr int64_t kStageElements = Product::kStages * Product::kDepth * Product::kColumns;
  return Product::kRows * sizeof(int64_t) + Product::kStagingBytes +
         (int64_t{Product::kRows} * code_stride<T>(panel) + kStageElements) * sizeof(T);
}

// Block b: rows [kRows i, kRows (i + 1)) with i = b / splits, and part b % splits of the column tiles.
// With at most 128 registers two blocks share a multiprocessor: one stores its tile while the other multiplies.
template <class Product>
__global__ void __launch_bounds__(kThreads, 2)
    gather_project_tile_kernel(const Problem<typename Product::T> problem, const TilePlan plan) {
  using T = typename Product::T;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns;
  constexpr int kDepth = Product::kDepth, kStages = Product::kStages;
  constexpr int kVectors = kColumns / kVector<T>;  // of a row of a stage
  const int rank = problem.rank, width = problem.width, thread = threadIdx.x;
  const int stride = code_stride<T>(plan.panel);
  unsigned char* memory = ptx::shared_memory();
  T* codes = reinterpret_cast<T*>(memory);  // (kRows, stride)
  T* stages = codes + kRows * stride;       // (kStages, kDepth, kColumns)
  unsigned char* staging = reinterpret_cast<unsigned char*>(stages + kStages * kDepth * kColumns);
  int64_t* row_ids = reinterpret_cast<int64_t*>(staging + Product::kStagingBytes);  // (kRows,), -1 for no row

  const int64_t first_row = static_cast<int64_t>(blockIdx.x / plan.splits) * kRows;
  const int64_t part = blockIdx.x % plan.splits, tiles = ceil_div(width, kColumns);
  const int end_tile = static_cast<int>((part + 1) * tiles / plan.splits);

  // A position in the sequence of stages, which runs along the depth of one column tile and then to the next
  // tile.
  struct Position {
    int tile, k;
    EMBKERN_DEVICE void advance(int rank) {
      k += kDepth;
      if (k >= rank) k = 0, ++tile;
    }
  };
  Position multiplied{static_cast<int>(part * tiles / plan.splits), 0}, loaded = multiplied;
  int slot = 0, load_slot = 0;

  const auto load_stage = [&] {
    if (loaded.tile < end_tile) {
      T* stage = stages + load_slot * kDepth * kColumns;
      static_assert(kDepth * kVectors % kThreads == 0, "every thread copies the same number of vectors");
#pragma unroll
      for (int i = 0; i < kDepth * kVectors / kThreads; ++i) {
        const int row = (thread + i * kThreads) / kVectors, vector = (thread + i * kThreads) % kVectors;
        const int k = loaded.k + row, column = loaded.tile * kColumns + vector * kVector<T>;
        const int valid = k < rank ? width - column : 0;
        copy_vector(stage + row * kColumns + Product::vector_at(row, vector) * kVector<T>,
                    problem.basis + (valid > 0 ? static_cast<int64_t>(k) * width + column : 0), valid,
                    problem.aligned_basis);
      }
      loaded.advance(rank);
      load_slot = load_slot + 1 == kStages ? 0 : load_slot + 1;
    }
    ptx::copy_async_commit();  // empty groups at the end keep the count of groups uniform
  };

  const auto gather = [&](int first) {  // columns [first, first + panel) of the codes of the block's rows
    const int vectors = plan.panel / kVector<T>;
    for (int i = thread; i < kRows * vectors; i += kThreads) {
      const int row = i / vectors, k = i % vectors * kVector<T>;
      const int64_t id = row_ids[row];
      const int valid = id < 0 ? 0 : rank - first - k;
      copy_vector(codes + row * stride + k,
                  problem.codes + (valid > 0 ? id * problem.codes_stride + first + k : 0), valid,
                  problem.aligned_codes);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    ptx::sync_block();
  };

  for (int i = 0; i < kStages - 1; ++i) load_stage();  // these loads need no ids and overlap with reading them
  for (int row = thread; row < kRows; row += kThreads)
    row_ids[row] = first_row + row < problem.count ? checked_id(problem, first_row + row) : -1;
  if (problem.factors) {
    ptx::sync_block();
    bool any = false;
    for (int row = 0; row < kRows; ++row) any |= row_ids[row] >= 0;
    if (!any) return ptx::copy_async_wait<0>();
  }

  Product product;
  product.clear();
  const bool one_panel = plan.panel >= rank;
  for (bool first = true; multiplied.tile < end_tile; first = false) {
    ptx::copy_async_wait<kStages - 2>();
    ptx::sync_block();  // this stage has arrived, and nobody reads the one before any more
    load_stage();
    if (one_panel ? first : multiplied.k % plan.panel == 0) gather(multiplied.k);
    product.multiply(codes + (one_panel ? multiplied.k : multiplied.k % plan.panel), stride,
                     stages + slot * kDepth * kColumns, smaller(kDepth, rank - multiplied.k));
    slot = slot + 1 == kStages ? 0 : slot + 1;
    const int tile = multiplied.tile;
    multiplied.advance(rank);
    if (multiplied.tile != tile) {
      product.store(problem, first_row, tile * kColumns, row_ids, staging);
      product.clear();
    }
  }
}

template <class Product>
TilePlan plan_tiles(int64_t count, int rank, int width, const Device& device) {
  using T = typename Product::T;
  TilePlan plan;
  plan.panel = static_cast<int>(ceil_div(rank, 16) * 16);
  if (tile_shared_bytes<Product>(plan.panel) > device.shared_per_block) {
    const int left = device.shared_per_block - static_cast<int>(tile_shared_bytes<Product>(0));
    const int fitting = left / (Product::kRows * static_cast<int>(sizeof(T)));
    plan.panel = fitting / Product::kDepth * Product::kDepth;
  }
  plan.shared_bytes = static_cast<int>(tile_shared_bytes<Product>(plan.panel));

  // Blocks run in waves of as many as the device holds; one costs its column tiles plus about one for the
  // gather. Take the fewest tiles in sequence, and the fewest blocks among equals.
  constexpr int kReservedPerBlock = 1024;
  const int resident =
      std::clamp(device.shared_per_multiprocessor / (plan.shared_bytes + kReservedPerBlock), 1, 2);
  const int64_t row_blocks = ceil_div(count, Product::kRows), tiles = ceil_div(width, Product::kColumns);
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= std::min<int64_t>(tiles, 64); ++splits) {
    const int64_t waves =
        ceil_div(row_blocks * splits, static_cast<int64_t>(device.multiprocessors) * resident);
    const int64_t cost = waves * (ceil_div(tiles, splits) + 1);
    if (cost < least) least = cost, plan.splits = splits;
  }
  return plan;
}

template <class Product>
void launch_tiles(const Problem<typename Product::T>& problem, const Device& device, Stream stream) {
  const TilePlan plan = plan_tiles<Product>(problem.count, problem.rank, problem.width, device);
  launch(kOp, gather_project_tile_kernel<Product>, ceil_div(problem.count, Product::kRows) * plan.splits,
         kThreads, plan.shared_bytes, stream, problem, plan);
}

}  // namespace embkern::cuda
