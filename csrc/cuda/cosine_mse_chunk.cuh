// Access to the rows of cosine_mse: the share of a row that a thread keeps in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/cosine_mse_row.cuh"

namespace embkern::cuda {

// A vector in registers. As separate elements, 16-bit values would take a register each.
struct alignas(16) Words {
  uint32_t words[4];
};

template <class T>
EMBKERN_DEVICE Words pack(const Vector<T>& vector) {
  Words words;
  memcpy(&words, &vector, sizeof(words));
  return words;
}

template <class T>
EMBKERN_DEVICE Vector<T> unpack(const Words& words) {
  Vector<T> vector;
  memcpy(&vector, &words, sizeof(words));
  return vector;
}

// The share of a row that belongs to one of `lanes` threads: 16-byte vectors if the row is aligned, else single
// elements. Adjacent lanes have adjacent vectors or elements.
template <class T, bool kAligned>
struct Share {
  static constexpr int kAtOnce = kAligned ? kVector<T> : 1;  // elements

  int lane, lanes;
  int width;  // 0 for a row beyond the last

  // The thread's first element of the chunk that starts at column `chunk`, and the distance to the next one.
  EMBKERN_DEVICE int first(int chunk) const { return chunk + lane * kAtOnce; }
  EMBKERN_DEVICE int step() const { return lanes * kAtOnce; }

  // Whether element j of vector i exists if the first one is `left` columns before the row's end.
  EMBKERN_DEVICE bool exists(int left, int i, int j) const {
    return (kAligned ? i : i * kVector<T> + j) * step() < left;
  }

  // Whether vector i exists in any lane.
  EMBKERN_DEVICE bool any(int chunk, int i) const { return chunk + i * lanes * kVector<T> < width; }

  EMBKERN_DEVICE Words load(const T* from, int left, int i) const {
    if constexpr (kAligned) {
      Words words{};
      if (exists(left, i, 0)) words = ptx::load_16<Words>(from + i * step());
      return words;
    } else {
      Vector<T> vector{};
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (exists(left, i, j)) vector.values[j] = from[(i * kVector<T> + j) * step()];
      return pack(vector);
    }
  }

  EMBKERN_DEVICE void store(T* to, int left, int i, const Vector<T>& vector) const {
    if constexpr (kAligned) {
      if (exists(left, i, 0)) ptx::store_16(to + i * step(), vector);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (exists(left, i, j)) to[(i * kVector<T> + j) * step()] = vector.values[j];
    }
  }
};

// The number of vectors of each tensor that a thread holds in 128 registers. The power term also keeps a slope
// per element, and single elements need an address each.
template <class T, bool kWithPower, bool kAligned>
constexpr int kHeldVectors = !kWithPower      ? 8
                             : sizeof(T) == 4 ? 6
                                              : 4;
template <class T, bool kWithPower>
constexpr int kHeldVectors<T, kWithPower, false> = kWithPower && sizeof(T) == 2 ? 1 : 3;

template <class T, bool kWithPower, bool kAligned>
constexpr int kHeldElements = kHeldVectors<T, kWithPower, kAligned> * kVector<T>;

// A thread's share of one chunk of a row, in registers. Elements beyond the row are zeros.
template <class T, bool kWithPower, bool kAligned>
struct Chunk {
  using A = acc_t<T>;
  static constexpr int kVectors = kHeldVectors<T, kWithPower, kAligned>;

  Words output[kVectors], target[kVectors];
  A slopes[kWithPower ? kVectors : 1][kVector<T>];

  EMBKERN_DEVICE void load(const Share<T, kAligned>& share, const T* output_row, const T* target_row,
                           int chunk) {
    const int first = share.first(chunk), left = share.width - first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      output[i] = share.load(output_row + first, left, i);
      target[i] = share.load(target_row + first, left, i);
    }
  }

  EMBKERN_DEVICE void add_to(A (&sums)[kRowSums + kWithPower], const Share<T, kAligned>& share,
                             int chunk) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      const Vector<T> ys = unpack<T>(output[i]), xs = unpack<T>(target[i]);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A y = static_cast<A>(ys.values[j]), x = static_cast<A>(xs.values[j]), e = y - x;
        sums[kDot] += x * y;
        sums[kOutputSquare] += y * y;
        sums[kTargetSquare] += x * x;
        sums[kErrorSquare] += e * e;
      }
    }
  }

  // Fills `slopes` and returns the sum of the powers.
  EMBKERN_DEVICE A take_powers(const Share<T, kAligned>& share, int chunk, A alpha) {
    const int left = share.width - share.first(chunk);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      const Vector<T> ys = unpack<T>(output[i]), xs = unpack<T>(target[i]);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A e = static_cast<A>(ys.values[j]) - static_cast<A>(xs.values[j]);
        const A power = power_of_error<T>(e, alpha, slopes[i][j]);
        sum += share.exists(left, i, j) ? power : 0;
      }
    }
    return sum;
  }

  EMBKERN_DEVICE void store_gradients(const Share<T, kAligned>& share, const LossProblem<T>& problem,
                                      int64_t offset, int chunk, const RowResult<A>& row) const {
    if (problem.grad_output) store<true>(share, problem.grad_output + offset, chunk, row);
    if (problem.grad_target) store<false>(share, problem.grad_target + offset, chunk, row);
  }

 private:
  template <bool kOfOutput>
  EMBKERN_DEVICE void store(const Share<T, kAligned>& share, T* to, int chunk, const RowResult<A>& row) const {
    const int first = share.first(chunk), left = share.width - first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!share.any(chunk, i)) break;
      // Without `forget` the compiler keeps x, y and e of the sums in fp32, and spills.
      const Vector<T> ys = unpack<T>(ptx::forget(output[i])), xs = unpack<T>(ptx::forget(target[i]));
      Vector<T> gradient;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        const A y = static_cast<A>(ys.values[j]), x = static_cast<A>(xs.values[j]);
        A error = row.error * (y - x);
        if constexpr (kWithPower) error += row.power * slopes[i][j];
        gradient.values[j] = static_cast<T>(kOfOutput ? row.own_output * y + row.other * x + error
                                                      : row.own_target * x + row.other * y - error);
      }
      share.store(to + first, left, i, gradient);
    }
  }
};

// Sums and gradients in double, for a row that left the range of fp32. All lanes of a warp call this together;
// those whose row is in range have `width` 0.
template <class T, bool kWithPower>
EMBKERN_DEVICE RowResult<double> wide_row(const LossProblem<T>& problem, int64_t offset, int lane, int lanes,
                                          int width, float power_sum, const RowFactors<float>& factors,
                                          float root, int& turn) {
  const T *output = problem.output + offset, *target = problem.target + offset;
  double sums[kRowSums] = {};
#pragma unroll 2
  for (int i = lane; i < width; i += lanes) {
    const double y = static_cast<float>(output[i]), x = static_cast<float>(target[i]), e = y - x;
    sums[kDot] += x * y;
    sums[kOutputSquare] += y * y;
    sums[kTargetSquare] += x * x;
    sums[kErrorSquare] += e * e;
  }
  sum_over(sums, lanes, turn);
  const auto row = row_result<double, T>(problem, sums, power_sum, factors, root);
  if (!problem.grad_output && !problem.grad_target) return row;
#pragma unroll 2
  for (int i = lane; i < width; i += lanes) {
    const double y = static_cast<float>(output[i]), x = static_cast<float>(target[i]);
    double error = row.error * (y - x);
    if constexpr (kWithPower) {
      float slope;
      power_of_error<T>(static_cast<float>(y) - static_cast<float>(x), problem.terms.alpha, slope);
      error += row.power * slope;
    }
    if (problem.grad_output)
      problem.grad_output[offset + i] =
          static_cast<T>(static_cast<float>(row.own_output * y + row.other * x + error));
    if (problem.grad_target)
      problem.grad_target[offset + i] =
          static_cast<T>(static_cast<float>(row.own_target * x + row.other * y - error));
  }
  return row;
}

}  // namespace embkern::cuda
