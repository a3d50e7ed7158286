// gather_project, forward: out[n] = scale * (codes[ids[n]] @ basis + offset)
//
//   ids (N,) int32|int64, codes (V, r), basis (r, H), offset (H,) or none -> out (N, H), row-major and of one
//   dtype: bf16, fp16 (sums in fp32), fp32 or fp64 (sums in themselves). One rounding, at the end.
//
// Two kernels; `gather_project` at the end of this file picks one by arithmetic.
//
//   decode, N <= 16: bound by latency, then by reading the basis once. The columns are cut into strips of 32
//     bytes, one block each, so that a basis of a megabyte is pulled by a hundred multiprocessors; in a block
//     the rows of the basis are dealt to 128 slices, and their partial sums added in a fixed order. A thread
//     asks for its part of the basis before it waits for ids -> codes.
//     Launch: (H / strip) * (N / rows) blocks of 256. Bytes: r H + N r per strip (from L2) + N H.
//
//   tiles, larger N: a block gathers the codes of its rows into shared memory once and walks along H, so
//     that the codes are read once and the basis N / kRows times, from L2. Tiles of the basis arrive through
//     a cp.async pipeline that does not stop between column tiles.
//     bf16, fp16: tensor cores (mma.sync m16n8k16). fp32, fp64: FMA, because the contract is the error of
//     plain fp32: 3xTF32 keeps 22 of 24 bits and sums with truncation, several times that error.
//     Launch: ceil(N / kRows) * splits of H blocks of 256. Bytes: N r + (N / kRows) r H (from L2) + N H.
//
// Any r, H, N and V: where rows or pointers are not multiples of 16 bytes the same code moves single elements.
// This header needs no CUDA beyond ptx.cuh and launch.cuh: tests/cuda runs it on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace embkern::cuda {

// The arguments of one call. `aligned_*`: pointer and row length are multiples of 16 bytes.
template <class T>
struct Problem {
  const void* ids;
  bool wide_ids;           // int64, else int32
  int64_t count;           // N
  int64_t num_embeddings;  // V
  int rank;                // r
  int width;               // H
  const T* codes;
  const T* basis;
  const T* offset;  // or null
  T* out;
  acc_t<T> scale;
  bool aligned_codes, aligned_basis, aligned_out;
};

// The id at position n. One out of range ends the kernel before anything is read with it.
template <class T>
EMBKERN_DEVICE int64_t checked_id(const Problem<T>& problem, int64_t n) {
  const int64_t id = problem.wide_ids ? static_cast<const int64_t*>(problem.ids)[n]
                                      : static_cast<const int32_t*>(problem.ids)[n];
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(problem.num_embeddings))
    ptx::fail("gather_project: ids: expected 0 <= id < V");
  return id;
}

// global -> shared: in the background where a 16-byte copy is possible, at once where not.
template <class T>
EMBKERN_DEVICE void copy_vector(T* shared, const T* from, int valid, bool aligned) {
  if (aligned)
    ptx::copy_async_16(shared, from, valid > 0);
  else
    ptx::store_16(shared, load_vector(from, valid, false));
}

// ---------------------------------------------------------------------------------------------- decode

// Largest N. A block reads the basis for 8 rows at most; beyond two such groups a tile of 64 rows costs less.
// By arithmetic, as are the sizes below: none is measured yet.
constexpr int kDecodeCount = 16;
constexpr int kStripLanes = 2;  // 16-byte vectors in a strip of columns: one 32-byte sector of each basis row
constexpr int kSlices = kThreads / kStripLanes;
constexpr int kDecodeCodesBytes = 32 * 1024;  // codes held at a time; with the sums this stays below 48 KiB

template <class T>
constexpr int kStrip = kStripLanes * kVector<T>;  // columns per block

template <class T, int kRows>
constexpr int kDecodeDepth = kDecodeCodesBytes / (kRows * static_cast<int>(sizeof(acc_t<T>)));

// Sums `values` over the lanes of a warp that differ in the bits of kMask and above (kMask a power of two).
// Each step trades half of the values for the other lane's half, which takes as many shuffles as there are
// values, where a sum of every value in every lane takes log2 times as many. Returns the index of the first
// value whose sum this lane then holds in values[0 ...].
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
  constexpr int kInFlight = kAlignedBasis ? 4 : 2;  // vectors of the basis a thread asks for at a time
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

  for (int first = 0; first < rank; first += kDepth) {  // one turn unless r is in the thousands
    const int size = smaller(kDepth, rank - first);
    Vector<T> basis[kInFlight];
    const auto load_basis = [&](int k) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i, k += kSlices) {
        const bool exists = k < size && column < width;
        const T* from = problem.basis + (exists ? static_cast<int64_t>(first + k) * width + column : 0);
        // Read unconditionally, and from the first element what does not exist and is not used: a branch
        // would make the thread wait for the values at its end, before it asks for the ids.
        basis[i] = kAlignedBasis ? ptx::load_16<Vector<T>>(from)
                                 : load_vector(from, exists ? width - column : 0, false);
      }
    };
    load_basis(slice);

    if (first > 0) ptx::sync_block();  // the codes of the turn before are no longer read
    const int vectors = static_cast<int>(ceil_div(size, kVector<T>));
    for (int i = thread; i < kRows * vectors; i += kThreads) {
      const int row = i / vectors, k = i % vectors * kVector<T>;
      Vector<T> vector{};
      if (first_row + row < problem.count) {
        const int64_t id = checked_id(problem, first_row + row);
        vector = load_vector(problem.codes + id * rank + first + k, size - k, problem.aligned_codes);
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

  // Over the slices: first those of a warp, then the warps in their order.
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
    A sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kRows * kStrip<T> + i];
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

// ---------------------------------------------------------------------------------------------- tiles
//
// A product says how one block multiplies: its tile (kRows, kColumns), the depth of a stage of the basis,
// where in a stage's row a 16-byte vector lies, and the epilogue. `codes` (kRows, stride) and `basis` (kDepth,
// kColumns) are in shared memory; stride is an odd number of vectors, so that vectors of neighbouring rows
// lie in different banks.

// Tensor cores: eight warps, kWarpRows of them along the rows; each owns kM x kN fragments of 16 x 8.
template <class T_, int kWarpRows, int kM, int kN, int kDepth_, int kStages_>
struct TensorCoreProduct {
  using T = T_;
  static constexpr int kWarpColumns = kWarps / kWarpRows, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRows = kWarpRows * 16 * kM, kColumns = kWarpColumns * 8 * kN;
  static constexpr int kStagingBytes = kWarps * 8 * 8 * kN * static_cast<int>(sizeof(T));
  static_assert(kN == 2 || kN == 4,
                "pairs of fragments are loaded together, and the staging is swizzled for these");

  float sums[kM][kN][4];

  // A permutation within each row: the same vector of eight neighbouring rows lies in eight different banks.
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

  // Eight rows of a warp at a time through shared memory, so that a lane stores 16 bytes; the staged vectors
  // are permuted so that neither side meets a bank twice.
  EMBKERN_DEVICE void store(const Problem<T>& problem, int64_t first_row, int first_column,
                            unsigned char* staging) const {
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
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* sum = sums[m][n] + 2 * half;
          *reinterpret_cast<Pair*>(staged_at(lane / 4, n) + lane % 4 * 2) = {
              static_cast<T>((sum[0] + offset[n][0]) * problem.scale),
              static_cast<T>((sum[1] + offset[n][1]) * problem.scale)};
        }
        ptx::sync_warp();
        if (const int row = lane / kN, vector = lane % kN; row < 8) {
          const int64_t n = first_row + warp_row() + 16 * m + 8 * half + row;
          const int at = column + vector * kVector<T>;
          if (n < problem.count)
            store_vector(problem.out + n * width + at, ptx::load_16<Vector<T>>(staged_at(row, vector)),
                         width - at, problem.aligned_out);
        }
        ptx::sync_warp();
      }
  }
};

// FMA: 16 x 16 threads, each with kM rows (16 apart) and kN vectors of columns. A warp is 4 x 8 threads, so
// that one load of it touches 4 different vectors of codes or 8 neighbouring ones of the basis.
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
                            unsigned char*) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int at = first_column + column(n), valid = problem.width - at;
      const Vector<T> offset =
          load_vector(problem.offset ? problem.offset + at : nullptr, problem.offset ? valid : 0, false);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Vector<T> vector;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i)
          vector.values[i] = (sums[m][n][i] + offset.values[i]) * problem.scale;
        if (const int64_t i = first_row + row(m); i < problem.count)
          store_vector(problem.out + i * problem.width + at, vector, valid, problem.aligned_out);
      }
    }
  }
};

// Two tiles per dtype. The large one reads the least and multiplies at the highest rate. The narrow one makes
// many small blocks of a small call, and has most of the basis it needs under way at once.
template <class T, bool kLarge>
using TileProduct = std::conditional_t<
    sizeof(T) == 2,
    std::conditional_t<kLarge, TensorCoreProduct<T, 2, 4, 4, 32, 3>, TensorCoreProduct<T, 4, 1, 2, 64, 5>>,
    std::conditional_t<kLarge, FmaProduct<T, 4, 2, 3>, FmaProduct<T, 2, 1, 5>>>;

// How a call is cut into blocks.
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
// At most 128 registers: two blocks per multiprocessor, one stores its tile while the other multiplies.
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
  int64_t* row_ids = reinterpret_cast<int64_t*>(staging + Product::kStagingBytes);  // (kRows,), -1 past the end

  const int64_t first_row = static_cast<int64_t>(blockIdx.x / plan.splits) * kRows;
  const int64_t part = blockIdx.x % plan.splits, tiles = ceil_div(width, kColumns);
  const int end_tile = static_cast<int>((part + 1) * tiles / plan.splits);

  // Position in the sequence of stages: along the depth of one column tile, then on to the next.
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
      static_assert(kDepth * kVectors % kThreads == 0, "every thread copies as much");
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
    ptx::copy_async_commit();  // an empty group at the end, so that the count of groups goes on
  };

  const auto gather = [&](int first) {  // columns [first, first + panel) of the codes of the block's rows
    const int vectors = plan.panel / kVector<T>;
    for (int i = thread; i < kRows * vectors; i += kThreads) {
      const int row = i / vectors, k = i % vectors * kVector<T>;
      const int64_t id = row_ids[row];
      const int valid = id < 0 ? 0 : rank - first - k;
      copy_vector(codes + row * stride + k, problem.codes + (valid > 0 ? id * rank + first + k : 0), valid,
                  problem.aligned_codes);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    ptx::sync_block();
  };

  for (int i = 0; i < kStages - 1; ++i) load_stage();  // needs no ids: under way while they are read
  for (int row = thread; row < kRows; row += kThreads)
    row_ids[row] = first_row + row < problem.count ? checked_id(problem, first_row + row) : -1;

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
      product.store(problem, first_row, tile * kColumns, staging);
      product.clear();
    }
  }
}

// ---------------------------------------------------------------------------------------------- host

constexpr char kOp[] = "gather_project";

template <class T, int kRows>
void launch_decode(const Problem<T>& problem, Stream stream) {
  const int64_t blocks = ceil_div(problem.width, kStrip<T>) * ceil_div(problem.count, kRows);
  launch(kOp, gather_project_decode_kernel<T, kRows>, blocks, kThreads, decode_shared_bytes<T, kRows>(), stream,
         problem);
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

// Enqueues the forward. N, H >= 1; no host synchronisation, one launch.
template <class T>
void gather_project(const Problem<T>& problem, const Device& device, Stream stream) {
  if (problem.count == 1) return launch_decode<T, 1>(problem, stream);
  if (problem.count <= 4) return launch_decode<T, 4>(problem, stream);
  if (problem.count <= kDecodeCount) return launch_decode<T, 8>(problem, stream);
  // The large tile where it occupies at least half of the device.
  using Large = TileProduct<T, true>;
  const int64_t large_tiles = ceil_div(problem.count, Large::kRows) * ceil_div(problem.width, Large::kColumns);
  if (2 * large_tiles >= device.multiprocessors) return launch_tiles<Large>(problem, device, stream);
  launch_tiles<TileProduct<T, false>>(problem, device, stream);
}

}  // namespace embkern::cuda
