// Products of two matrices that both arrive term by term, for the gradients of gather_project:
// c[row][column] = sum over k of a[row][k] * b[column][k], one tile of c per block.
//
// Slabs of kDepth terms of a and b pass through a cp.async pipeline. A slab has the layout of its matrix in
// memory: one row of it per row or column of c, or (kTermMajor) one per term.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/vectors.cuh"

namespace embkern::cuda {

// kDepth terms of kOuter rows or columns, in shared memory.
template <class T, int kOuter, int kDepth, bool kTermMajor>
struct Slab {
  static constexpr int kRows = kTermMajor ? kDepth : kOuter;
  static constexpr int kVectors = (kTermMajor ? kOuter : kDepth) / kVector<T>;  // of a row
  static constexpr int kElements = kOuter * kDepth;

  // A permutation within each row puts the same vector of eight adjacent rows into eight different banks.
  static EMBKERN_DEVICE int at(int row, int vector) {
    return (row * kVectors + (vector ^ (row % 8 * smaller(kVectors, 8) / 8))) * kVector<T>;
  }

  // Starts the copy of a slab. `row_of(row)` is the address of a row in the matrix, of which elements up to
  // `valid_of(row)` exist; the others become zero.
  template <class RowOf, class ValidOf>
  static EMBKERN_DEVICE void copy(T* slab, const T* matrix, bool aligned, RowOf row_of, ValidOf valid_of) {
    static_assert(kRows * kVectors % kThreads == 0, "every thread copies the same number of vectors");
#pragma unroll
    for (int i = 0; i < kRows * kVectors / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads, row = index / kVectors, vector = index % kVectors;
      const int valid = valid_of(row) - vector * kVector<T>;
      copy_vector(slab + at(row, vector), valid > 0 ? row_of(row) + vector * kVector<T> : matrix, valid,
                  aligned);
    }
  }
};

// Where a tile of c goes: `rows` by `columns` elements. If `vectors`, the stride and the pointer are multiples
// of four elements, and the elements between the columns and the stride may be written.
template <class E>
struct Target {
  E* to;
  int64_t stride, rows;
  int columns;
  bool vectors;
};

// Stores adjacent elements of a row.
template <int kCount, class A, class E>
EMBKERN_DEVICE void put(const Target<E>& target, int64_t row, int column, const A (&values)[kCount]) {
  struct alignas(kCount * sizeof(E)) Pack {
    E values[kCount];
  };
  if (row >= target.rows) return;
  Pack pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = static_cast<E>(values[i]);
  E* to = target.to + row * target.stride + column;
  if (target.vectors) {
    if (column < target.stride) *reinterpret_cast<Pack*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (column + i < target.columns) to[i] = pack.values[i];
}

// Tensor cores. Of eight warps, kWarpRows lie along the rows; each owns kM x kN fragments of 16 x 8.
template <class T_, bool kTermMajor, int kWarpRows, int kM, int kN, int kDepth_, int kStages_>
struct StreamedTensorCores {
  using T = T_;
  static constexpr int kWarpColumns = kWarps / kWarpRows, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRows = kWarpRows * 16 * kM, kColumns = kWarpColumns * 8 * kN;
  using SlabA = Slab<T, kRows, kDepth, kTermMajor>;
  using SlabB = Slab<T, kColumns, kDepth, kTermMajor>;
  static_assert(kN % 2 == 0, "fragments of b are loaded in pairs");

  float sums[kM][kN][4] = {};

  static EMBKERN_DEVICE int warp_row() { return threadIdx.x / kLanes / kWarpColumns * 16 * kM; }
  static EMBKERN_DEVICE int warp_column() { return threadIdx.x / kLanes % kWarpColumns * 8 * kN; }

  EMBKERN_DEVICE void multiply(const T* a_slab, const T* b_slab) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll 1  // unrolled, the large tile of grad_basis spills registers on sm_100
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int row = warp_row() + 16 * m;
        if constexpr (kTermMajor)
          ptx::load_matrix_x4_transposed(
              a[m], a_slab + SlabA::at(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
        else
          ptx::load_matrix_x4(a[m], a_slab + SlabA::at(row + lane % 16, k / 8 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        const int column = warp_column() + 8 * n;
        if constexpr (kTermMajor)
          ptx::load_matrix_x4_transposed(b, b_slab + SlabB::at(k + lane % 16, column / 8 + lane / 16));
        else
          ptx::load_matrix_x4(b, b_slab + SlabB::at(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::multiply_16x8x16<T>(sums[m][n], a[m], b[0], b[1]);
          ptx::multiply_16x8x16<T>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  template <class E>
  EMBKERN_DEVICE void store(const Target<E>& target, int64_t first_row, int first_column, float scale) const {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* sum = sums[m][n] + 2 * half;
          put(target, first_row + warp_row() + 16 * m + 8 * half + lane / 4,
              first_column + warp_column() + 8 * n + lane % 4 * 2, {sum[0] * scale, sum[1] * scale});
        }
  }
};

// FMA. Each of 16 x 16 threads has a square of kOwn rows and columns, adjacent ones if a row of a slab is one
// term, else 16 apart. A warp is 4 x 8 threads. The products of a slab are added up before they are added to
// the sums: over thousands of terms, one fp32 sum after the other has several times the error of plain torch.
template <class T_, bool kTermMajor, int kStages_>
struct StreamedFma {
  using T = T_;
  static constexpr int kDepth = sizeof(T) == 8 ? 16 : 32, kStages = kStages_;
  static constexpr int kOwn = kVector<T>, kRows = 16 * kOwn, kColumns = kRows;
  using SlabA = Slab<T, kRows, kDepth, kTermMajor>;
  using SlabB = Slab<T, kColumns, kDepth, kTermMajor>;

  T sums[kOwn][kOwn] = {};

  static EMBKERN_DEVICE int thread_row() { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8; }
  static EMBKERN_DEVICE int thread_column() { return threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8; }

  EMBKERN_DEVICE void multiply(const T* a_slab, const T* b_slab) {
    T part[kOwn][kOwn] = {};
    if constexpr (kTermMajor) {
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        const auto a = ptx::load_16<Vector<T>>(a_slab + SlabA::at(k, thread_row()));
        const auto b = ptx::load_16<Vector<T>>(b_slab + SlabB::at(k, thread_column()));
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) part[i][j] += a.values[i] * b.values[j];
      }
    } else {
#pragma unroll 2
      for (int vector = 0; vector < SlabA::kVectors; ++vector) {
        Vector<T> b[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          b[j] = ptx::load_16<Vector<T>>(b_slab + SlabB::at(thread_column() + 16 * j, vector));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const auto a = ptx::load_16<Vector<T>>(a_slab + SlabA::at(thread_row() + 16 * i, vector));
#pragma unroll
          for (int j = 0; j < kOwn; ++j)
#pragma unroll
            for (int k = 0; k < kVector<T>; ++k) part[i][j] += a.values[k] * b[j].values[k];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sums[i][j] += part[i][j];
  }

  template <class E>
  EMBKERN_DEVICE void store(const Target<E>& target, int64_t first_row, int first_column, T scale) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      T values[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) values[j] = sums[i][j] * scale;
      if constexpr (kTermMajor) {
        put(target, first_row + thread_row() * kOwn + i, first_column + thread_column() * kOwn, values);
      } else {
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          put(target, first_row + thread_row() + 16 * i, first_column + thread_column() + 16 * j, {values[j]});
      }
    }
  }
};

template <class Product>
constexpr int kStageElements = Product::SlabA::kElements + Product::SlabB::kElements;

template <class Product>
constexpr int kStreamBytes =
    Product::kStages * kStageElements<Product> * static_cast<int>(sizeof(typename Product::T));

// Adds up `steps` slabs. `load(a, b, step)` starts the copies of step `step`; every thread calls it for one
// step after the other. `stages` has kStreamBytes<Product> bytes.
template <class Product, class Load>
EMBKERN_DEVICE void multiply_streamed(Product& product, typename Product::T* stages, int steps, Load load) {
  int loaded = 0, slot = 0, load_slot = 0;
  const auto load_stage = [&] {
    if (loaded < steps) {
      auto* stage = stages + load_slot * kStageElements<Product>;
      load(stage, stage + Product::SlabA::kElements, loaded++);
      load_slot = load_slot + 1 == Product::kStages ? 0 : load_slot + 1;
    }
    ptx::copy_async_commit();  // empty groups at the end keep the count of groups uniform
  };
  for (int i = 0; i < Product::kStages - 1; ++i) load_stage();
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<Product::kStages - 2>();
    ptx::sync_block();  // this stage has arrived, and nobody reads the one before any more
    load_stage();
    const auto* stage = stages + slot * kStageElements<Product>;
    product.multiply(stage, stage + Product::SlabA::kElements);
    slot = slot + 1 == Product::kStages ? 0 : slot + 1;
  }
}

// The large tile for a device full of blocks, the small one for fewer rows and columns; FMA has one tile.
template <class T, bool kTermMajor, bool kLarge>
using StreamedProduct =
    std::conditional_t<sizeof(T) == 2,
                       std::conditional_t<kLarge, StreamedTensorCores<T, kTermMajor, 2, 4, 4, 32, 4>,
                                          StreamedTensorCores<T, kTermMajor, 4, 1, 4, 64, 4>>,
                       StreamedFma<T, kTermMajor, 4>>;

}  // namespace embkern::cuda
