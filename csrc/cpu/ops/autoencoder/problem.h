// The arguments of one batch of the autoencoder's loss.
#pragma once

#include <cstdint>
#include <vector>

namespace embkern::autoencoder {

// The parameters in one vector: encoder weight (r, H), encoder bias (r,), basis (r, H), offset (H,).
struct Layout {
  int64_t rank, width;
  int64_t encoder_weight() const { return 0; }
  int64_t encoder_bias() const { return rank * width; }
  int64_t basis() const { return encoder_bias() + rank; }
  int64_t offset() const { return basis() + rank * width; }
  int64_t size() const { return offset() + width; }
};

template <class T>
struct Parameters {
  int64_t rank, width;
  const T *encoder_weight, *encoder_bias, *basis, *offset;  // null where absent
};

// The rows of one batch, and whether gradients are wanted.
template <class T>
struct Batch {
  int64_t count;
  const T* const* rows;  // of the target
  const T* codes;        // (N, r), null if the encoder computes them
  const T *weight, *target_norm;
  T* grad_codes;  // (N, r) if codes are given and gradients are wanted, else null
  bool gradient;
  double weight_of(int64_t n) const { return weight ? static_cast<double>(weight[n]) : 1; }
};

// The loss, and the means or sums of its terms.
struct Terms {
  double loss = 0, distance = 0, mse = 0, power = 0;
  void add(const Terms& other) {
    loss += other.loss;
    distance += other.distance;
    mse += other.mse;
    power += other.power;
  }
};

// Pointers to the rows of a matrix.
template <class T>
std::vector<const T*> rows_of(const T* matrix, int64_t count, int64_t width) {
  std::vector<const T*> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = matrix + i * width;
  return rows;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace embkern::autoencoder
