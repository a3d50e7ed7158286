// The parameters packed as right operands of the products of one step.
#pragma once

#include <vector>

#include "cpu/common/memory.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/autoencoder/problem.h"

namespace embkern::autoencoder {

// Names as in autoencoder.cpp: W and e of the encoder, D and b of the decoder, G = D D^T.
template <class T>
struct Operands {
  Buffer<T> encoder, decoder, decoder_transposed;  // for x W^T, c D and g D^T
  Buffer<T> both, gram, both_offset;               // for x [W; D; b]^T and c G, and the bias of the former
  std::vector<T> gram_rows;                        // (r, r + 1): D [D; b]^T
  std::vector<T> basis_offset;                     // (r,): D b
  std::vector<T> basis_squares;                    // (r,): the diagonal of G
  double offset_square = 0;

  // Packs what the direct form needs; run_tasks(count, body) runs body(task) for every task.
  template <class RunTasks>
  void pack(const TrainingKernels<T>& training, const Parameters<T>& p, bool gradient,
            const RunTasks& run_tasks) {
    const auto basis = rows_of(p.basis, p.rank, p.width);
    run_tasks(3, [&](int64_t task) {
      if (task == 0 && p.encoder_weight) {
        const auto weight = rows_of(p.encoder_weight, p.rank, p.width);
        training.pack_transposed(weight.data(), p.width, p.rank,
                                 encoder.resize(training.packed_size(p.width, p.rank)));
      } else if (task == 1) {
        training.pack(basis.data(), p.rank, p.width, decoder.resize(training.packed_size(p.rank, p.width)));
      } else if (task == 2 && gradient) {
        training.pack_transposed(basis.data(), p.width, p.rank,
                                 decoder_transposed.resize(training.packed_size(p.width, p.rank)));
      }
    });
  }

  // Packs what the Gram form needs.
  void pack_gram(const Kernels<T>& table, const TrainingKernels<T>& training, const Parameters<T>& p) {
    const int64_t r = p.rank, codes = p.encoder_weight ? r : 0;
    std::vector<const T*> rows;
    if (codes) rows = rows_of(p.encoder_weight, r, p.width);
    const auto basis = rows_of(p.basis, r, p.width);
    const std::vector<T> zeros(p.width, T(0));
    std::vector<const T*> decoder_rows = basis;
    decoder_rows.push_back(p.offset ? p.offset : zeros.data());
    rows.insert(rows.end(), decoder_rows.begin(), decoder_rows.end());
    const int64_t columns = rows.size();
    training.pack_transposed(rows.data(), p.width, columns,
                             both.resize(training.packed_size(p.width, columns)));
    T* bias = both_offset.resize(columns);
    for (int64_t j = 0; j < columns; ++j) bias[j] = j < codes && p.encoder_bias ? p.encoder_bias[j] : T(0);

    Buffer<T> transposed;
    training.pack_transposed(decoder_rows.data(), p.width, r + 1,
                             transposed.resize(training.packed_size(p.width, r + 1)));
    gram_rows.resize(r * (r + 1));
    basis_offset.resize(r);
    for (int64_t first = 0; first < r; first += kBlockRows) {
      const int64_t m = std::min(kBlockRows, r - first);
      const void* left[kBlockRows];
      T* out[kBlockRows];
      for (int64_t i = 0; i < m; ++i) {
        left[i] = basis[first + i];
        out[i] = gram_rows.data() + (first + i) * (r + 1);
      }
      training.project_packed({m, p.width, 0, r + 1, 0, left, nullptr, nullptr, T(1), out}, transposed.get());
    }
    basis_squares.resize(r);
    for (int64_t i = 0; i < r; ++i) {
      basis_offset[i] = gram_rows[i * (r + 1) + r];
      basis_squares[i] = gram_rows[i * (r + 1) + i];
    }
    const auto lines = rows_of(gram_rows.data(), r, r + 1);
    training.pack(lines.data(), r, r, gram.resize(training.packed_size(r, r)));
    offset_square = p.offset ? table.row_sums(p.offset, p.offset, p.width).target_square : 0;
  }
};

}  // namespace embkern::autoencoder
