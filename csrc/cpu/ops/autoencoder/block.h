// One block of rows: its terms and gradients, in the direct form or in the Gram form of autoencoder.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/ops/autoencoder/operands.h"
#include "cpu/ops/autoencoder/problem.h"
#include "cpu/ops/row_loss.h"

namespace embkern::autoencoder {

// The bound on cancellation in the Gram form: |x - y|^2 loses at most about four bits.
constexpr double kSafeError = 1.0 / 16;

// Up to kBlockRows rows of a batch.
template <class T>
struct Block {
  int64_t first, m;
  const T* rows[kBlockRows];
  const T* codes[kBlockRows];
  T* output[kBlockRows];  // y, then its gradient
  T* grad_codes[kBlockRows];
};

// What the blocks of a batch have in common.
template <class T>
struct BlockLoss {
  const Kernels<T>& table;
  const TrainingKernels<T>& training;
  const Operands<T>& operands;
  const Parameters<T>& p;
  const Layout& layout;
  const LossOptions& options;
  const Batch<T>& batch;
  int64_t stride;       // of rows of codes in scratch memory
  double factor, root;  // of a row's weight; the batch's RMSE where the gradient needs it, else -1
  Terms* terms;         // (N,)

  // Makes `block` rows first to last, with their outputs in scratch memory.
  void place(int64_t first, int64_t last, T* codes, T* output, T* grad_codes, Block<T>& block) const {
    block.first = first;
    block.m = last - first;
    for (int64_t i = 0; i < block.m; ++i) {
      block.rows[i] = batch.rows[first + i];
      block.codes[i] = batch.codes ? batch.codes + (first + i) * p.rank : codes + i * stride;
      block.output[i] = output + i * p.width;
      block.grad_codes[i] =
          batch.grad_codes ? batch.grad_codes + (first + i) * p.rank : grad_codes + i * stride;
    }
  }

  // Computes terms and, in the batch's scratch rows, the gradients by y and by the codes.
  void direct(Block<T>& block) const {
    const int64_t m = block.m, r = p.rank, width = p.width;
    const auto project = [&](const T* const* left, int64_t k, int64_t n, const T* offset, T* const* out,
                             const Buffer<T>& packed) {
      training.project_packed(
          {m, k, 0, n, 0, reinterpret_cast<const void* const*>(left), nullptr, offset, T(1), out},
          packed.get());
    };
    if (!batch.codes)
      project(block.rows, width, r, p.encoder_bias, const_cast<T* const*>(block.codes), operands.encoder);
    project(block.codes, r, width, p.offset, block.output, operands.decoder);
    thread_local std::vector<T> slopes;
    if (options.power != 0 && static_cast<int64_t>(slopes.size()) < width) slopes.resize(width);
    T* slope = batch.gradient ? slopes.data() : nullptr;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t n = block.first + i;
      T* y = block.output[i];
      const T* x = block.rows[i];
      RowLoss row = loss_of(n, table.row_sums(y, x, width));
      if (options.power != 0) row.power = table.row_power(y, x, width, options.alpha, slope) / width;
      const double weight = factor * batch.weight_of(n);
      const double rmse = root >= 0 ? root : std::sqrt(row.mse);
      record(n, row, weight);
      if (batch.gradient)
        table.row_gradient(
            y, x, width,
            output_gradient<T>(row, options, width, weight, root_slope(options, weight, rmse, width), slope),
            y);
    }
    if (batch.gradient) project(block.output, width, r, nullptr, block.grad_codes, operands.decoder_transposed);
  }

  // Computes terms and adds the gradients to `sum`. Returns false, having added nothing, if a row is not safe
  // in this form.
  bool gram(Block<T>& block, T* projected, int64_t projected_stride, T* scaled, T* sum) const {
    const int64_t m = block.m, r = p.rank, width = p.width, codes = batch.codes ? 0 : r;
    const void* left[kBlockRows];
    T* out[kBlockRows];
    T* from_gram[kBlockRows];  // D y
    const T *code_rows[kBlockRows], *from_output[kBlockRows], *from_target[kBlockRows];
    for (int64_t i = 0; i < m; ++i) {
      left[i] = block.rows[i];
      out[i] = projected + i * projected_stride;
    }
    training.project_packed(
        {m, width, 0, codes + r + 1, 0, left, nullptr, operands.both_offset.get(), T(1), out},
        operands.both.get());
    for (int64_t i = 0; i < m; ++i) {
      code_rows[i] = batch.codes ? block.codes[i] : out[i];
      left[i] = code_rows[i];
      from_gram[i] = block.grad_codes[i];
    }
    training.project_packed({m, r, 0, r, 0, left, nullptr, operands.basis_offset.data(), T(1), from_gram},
                            operands.gram.get());

    RowLoss rows[kBlockRows];
    T* ones = scaled + m * stride;
    T* weighted = ones;  // `ones` is written later
    for (int64_t i = 0; i < m; ++i) {
      const T *c = code_rows[i], *projection = out[i] + codes, *decoded = from_gram[i];
      RowSums sums;
      sums.wide = false;
      sums.dot = table.row_sums(c, projection, r).dot + projection[r];
      sums.output_square = table.row_sums(c, decoded, r).dot +
                           table.row_sums(c, operands.basis_offset.data(), r).dot + operands.offset_square;
      if (batch.target_norm) {
        const double norm = batch.target_norm[block.first + i];
        sums.target_square = norm * norm;
      } else {
        sums.target_square = table.row_sums(block.rows[i], block.rows[i], width).target_square;
      }
      sums.error_square = sums.target_square + sums.output_square - 2 * sums.dot;
      for (int64_t j = 0; j < r; ++j) weighted[j] = c[j] * operands.basis_squares[j];
      const double parts = table.row_sums(c, weighted, r).dot + operands.offset_square;
      const double squares = sums.target_square + std::max(sums.output_square, parts);
      // Infinity and NaN, from products that leave fp32's range, have to fail these comparisons.
      if (!(sums.error_square > kSafeError * squares && sums.output_square > kSafeError * parts &&
            sums.output_square > 1e-20 && sums.target_square > 1e-20 && squares < 1e20 &&
            std::isfinite(sums.dot)))
        return false;
      rows[i] = loss_of(block.first + i, sums);
    }
    for (int64_t i = 0; i < m; ++i) {
      const double weight = factor * batch.weight_of(block.first + i);
      const RowGradient<T> to = output_gradient<T>(rows[i], options, width, weight, 0, nullptr);
      const double s = to.from_output + to.from_error, t = to.from_target - to.from_error;
      record(block.first + i, rows[i], weight);
      T* grad = block.grad_codes[i];
      const RowGradient<T> combine{s, t, 0, 0, nullptr, false};
      table.row_gradient(grad, out[i] + codes, r, combine, grad);
      // s [c, 1] goes to its own row, t [c, 1] replaces the projection, and both products use [c, 1].
      T *by_s = scaled + i * stride, *by_t = out[i] + codes, *c = ones + i * stride;
      for (int64_t j = 0; j < r; ++j) {
        const T code = code_rows[i][j];
        c[j] = code;
        by_s[j] = static_cast<T>(s) * code;
        by_t[j] = static_cast<T>(t) * code;
      }
      c[r] = T(1);
      by_s[r] = static_cast<T>(s);
      by_t[r] = static_cast<T>(t);
      code_rows[i] = c;
      from_output[i] = by_s;
      from_target[i] = by_t;
    }
    const int64_t K = layout.size();
    training.outer_update({r + 1, m, r + 1, from_output, code_rows, false, sum + K, r + 1});
    training.outer_update({r + 1, m, width, from_target, block.rows, false, sum + layout.basis(), width});
    if (!batch.codes) {
      training.outer_update(
          {r, m, width, block.grad_codes, block.rows, false, sum + layout.encoder_weight(), width});
      add_rows(block.grad_codes, m, r, false, sum + layout.encoder_bias());
    }
    return true;
  }

  RowLoss loss_of(int64_t n, const RowSums& sums) const {
    const double norm = batch.target_norm ? static_cast<double>(batch.target_norm[n]) : 0;
    return row_loss(sums, batch.target_norm ? &norm : nullptr, p.width, options.eps);
  }

  void record(int64_t n, const RowLoss& row, double weight) const {
    double value = row.value(options);
    if (options.rmse != 0 && options.reduction == kSum) value += options.rmse * std::sqrt(row.mse);
    terms[n] = {weight * value, weight * (1 - row.cosine), weight * row.mse, weight * row.power};
  }

  // to (+)= the sum of rows.
  void add_rows(const T* const* rows, int64_t count, int64_t width, bool overwrite, T* to) const {
    thread_local std::vector<T> total;
    total.resize(width);
    table.total_rows(rows, count, 0, width, total.data());
    for (int64_t j = 0; j < width; ++j) to[j] = overwrite ? total[j] : to[j] + total[j];
  }

  // Adds the gradients of offset and encoder bias.
  void biases(const T* const* output, const T* const* grad_codes, int64_t count, bool overwrite,
              T* gradient) const {
    add_rows(output, count, p.width, overwrite, gradient + layout.offset());
    if (!batch.codes) add_rows(grad_codes, count, p.rank, overwrite, gradient + layout.encoder_bias());
  }
};

}  // namespace embkern::autoencoder
