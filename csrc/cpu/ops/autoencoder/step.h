// One batch: its terms and its gradients by all parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/ops/autoencoder/block.h"

namespace embkern::autoencoder {

constexpr int64_t kSmallBatch = 256;  // the most rows that are not cut into chunks
constexpr int64_t kChunkRows = 512;   // the least rows of a chunk
// A chunk has a copy of the parameters for its sums. The largest number of chunks is halved while these copies
// take more than kSumBytes, down to eight chunks, which keep eight threads busy.
constexpr int64_t kMaxChunks = 32, kMinChunks = 8, kSumBytes = 20 << 20;
constexpr int64_t kTileRows = 12;           // of the widest tile; blocks are multiples of it
constexpr int64_t kMostBlockRows = 120;     // outer_update reads and writes its sums once per 128 terms
constexpr int64_t kBlockBytes = 384 << 10;  // of a block's rows of y
constexpr int64_t kParameterRows = 36;      // the least rows of a matrix whose gradient one task computes
// Divisors of a step's multiplications before useful_threads: a step has several phases, each of which has to
// be worth a thread. Phases cost less with the threads of a Team.
constexpr int64_t kForwardShare = 8, kTeamShare = 4;

template <class T>
class Step {
 public:
  // `team` is for a run of many steps; torch's threads are used if it is null.
  Step(const Parameters<T>& parameters, const LossOptions& options, Team* team)
      : p_(parameters), layout_{parameters.rank, parameters.width}, options_(options), team_(team) {
    const int64_t fit = kBlockBytes / (p_.width * static_cast<int64_t>(sizeof(T)));
    block_rows_ = std::clamp(fit / kTileRows * kTileRows, kTileRows, kMostBlockRows);
    stride_ = round_up(p_.rank + 1, 16);
  }

  // Computes the terms and, if the batch wants them, the gradients, in one vector in the order of Layout.
  // finish(first, count, gradient) is called for every range of that vector as soon as it is complete.
  template <class Finish>
  Terms run(const Batch<T>& batch, T* gradient, Finish finish) {
    threads_ = team_ ? team_->size() : useful_threads(batch.count * p_.rank * p_.width / kForwardShare);
    operands_.pack(training_, p_, batch.gradient, [&](int64_t tasks, auto body) { run_tasks(tasks, body); });
    factor_ = 1;
    if (options_.reduction == kMean) {
      double total = batch.count;
      if (batch.weight) {
        total = 0;
        for (int64_t n = 0; n < batch.count; ++n) total += batch.weight[n];
      }
      factor_ = 1 / total;
    }
    terms_.resize(batch.count);
    root_ = -1;
    const bool one_root = options_.reduction == kMean && options_.rmse != 0;
    if (one_root && batch.gradient) {
      Batch<T> forward = batch;
      forward.gradient = false;
      root_ = std::sqrt(pass(forward, nullptr, finish).mse);
    }
    Terms total = pass(batch, gradient, finish);
    if (one_root) total.loss += options_.rmse * std::sqrt(total.mse);
    return total;
  }

 private:
  template <class Body>
  void run_tasks(int64_t tasks, const Body& body) {
    if (team_)
      team_->run(tasks, body);
    else
      for_tasks(tasks, threads_, body);
  }

  BlockLoss<T> block_loss(const Batch<T>& batch) {
    return {table_, training_, operands_, p_, layout_, options_, batch, stride_, factor_, root_, terms_.data()};
  }

  // Computes the terms of every row and, if the batch wants them, the gradients. Returns the sum of the terms.
  template <class Finish>
  Terms pass(const Batch<T>& batch, T* gradient, Finish finish) {
    if (batch.count <= kSmallBatch)
      small(batch, gradient, finish);
    else
      chunked(batch, gradient, finish);
    Terms total;  // a sequential sum has the same bits for any number of threads
    for (const Terms& terms : terms_) total.add(terms);
    return total;
  }

  // ---- a small batch: first the rows are divided between threads, then the parameters ----------------------

  template <class Finish>
  void small(const Batch<T>& batch, T* gradient, Finish finish) {
    const int64_t count = batch.count;
    T* codes = codes_.resize(count * stride_);
    T* output = output_.resize(count * p_.width);
    T* grad_codes = grad_codes_.resize(count * stride_);
    const int64_t share = std::max<int64_t>(1, (count + threads_ - 1) / threads_);
    const int64_t size = std::min(block_rows_, round_up(share, kTileRows / 3));
    const BlockLoss<T> loss = block_loss(batch);
    run_tasks((count + size - 1) / size, [&](int64_t task) {
      Block<T> block;
      loss.place(task * size, std::min(count, (task + 1) * size), codes + task * size * stride_,
                 output + task * size * p_.width, grad_codes + task * size * stride_, block);
      loss.direct(block);
    });
    if (!batch.gradient) return;
    std::vector<const T*> code_rows(count), output_rows = rows_of<T>(output, count, p_.width);
    for (int64_t n = 0; n < count; ++n)
      code_rows[n] = batch.codes ? batch.codes + n * p_.rank : codes + n * stride_;
    const auto grad_code_rows = rows_of<T>(grad_codes, count, stride_);
    const int64_t ranges = std::max<int64_t>(1, p_.rank / kParameterRows);
    const int64_t tasks = (batch.codes ? 1 : 2) * ranges + 1;
    run_tasks(tasks, [&](int64_t task) {
      if (task == 0) {
        loss.biases(output_rows.data(), grad_code_rows.data(), count, true, gradient);
        if (!batch.codes) finish(layout_.encoder_bias(), p_.rank, gradient);
        finish(layout_.offset(), p_.width, gradient);
        return;
      }
      const bool decoder = task <= ranges;
      const int64_t first = (task - 1) % ranges * kParameterRows;
      const int64_t m = (task - 1) % ranges == ranges - 1 ? p_.rank - first : kParameterRows;
      const int64_t at = (decoder ? layout_.basis() : layout_.encoder_weight()) + first * p_.width;
      std::vector<const T*> left = decoder ? code_rows : grad_code_rows;
      for (const T*& row : left) row += first;
      training_.outer_update({m, count, p_.width, left.data(), decoder ? output_rows.data() : batch.rows, true,
                              gradient + at, p_.width});
      finish(at, m * p_.width, gradient);
    });
  }

  // ---- a large batch: chunks of rows, each with sums of its own --------------------------------------------

  template <class Finish>
  void chunked(const Batch<T>& batch, T* gradient, Finish finish) {
    const int64_t count = batch.count, parameters = layout_.size(), r = p_.rank;
    const bool gram = batch.gradient && options_.power == 0 && options_.rmse == 0;
    if (gram) operands_.pack_gram(table_, training_, p_);
    const int64_t size = parameters + (gram ? (r + 1) * (r + 1) : 0);
    const int64_t padded = round_up(size, 16);
    int64_t most = kMaxChunks;
    while (most > kMinChunks && most * padded * static_cast<int64_t>(sizeof(T)) > kSumBytes) most /= 2;
    const int64_t chunks = std::clamp<int64_t>(count / kChunkRows, 2, most);
    T* sums = batch.gradient ? sums_.resize(chunks * padded) : nullptr;
    const BlockLoss<T> loss = block_loss(batch);
    run_tasks(chunks, [&](int64_t chunk) {
      T* sum = sums + chunk * padded;
      if (sums) std::fill_n(sum, padded, T(0));
      const int64_t end = (chunk + 1) * count / chunks;
      for (int64_t first = chunk * count / chunks; first < end; first += block_rows_)
        block(loss, first, std::min(end, first + block_rows_), gram, sum);
    });
    if (!batch.gradient) return;
    constexpr int64_t range = 1 << 13;
    const auto add = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T total = sums[i];
        for (int64_t chunk = 1; chunk < chunks; ++chunk) total += sums[chunk * padded + i];
        sums[i] = total;
      }
    };
    if (gram) {
      add(parameters, size);
      decode_gram(sums + parameters);
    }
    run_tasks((parameters + range - 1) / range, [&](int64_t task) {
      const int64_t first = task * range, last = std::min(parameters, first + range);
      add(first, last);
      for (int64_t i = first; i < last; ++i)
        gradient[i] = sums[i] + (gram && i >= layout_.basis() ? from_gram_[i - layout_.basis()] : T(0));
      finish(first, last - first, gradient);
    });
  }

  // from_gram_ = K [D; b], where `sums` are K = sum s [c, 1]^T [c, 1].
  void decode_gram(const T* sums) {
    const int64_t r = p_.rank, width = p_.width;
    auto rows = rows_of(p_.basis, r, width);
    const std::vector<T> zeros(width, T(0));
    rows.push_back(p_.offset ? p_.offset : zeros.data());
    from_gram_.resize((r + 1) * width);
    run_tasks((r + 1 + kParameterRows - 1) / kParameterRows, [&](int64_t task) {
      const int64_t first = task * kParameterRows, m = std::min(kParameterRows, r + 1 - first);
      const void* left[kParameterRows];
      T* out[kParameterRows];
      for (int64_t i = 0; i < m; ++i) {
        left[i] = sums + (first + i) * (r + 1);
        out[i] = from_gram_.data() + (first + i) * width;
      }
      table_.project({m, r + 1, 0, width, 0, left, rows.data(), nullptr, T(1), out});
    });
  }

  // Computes rows first to last and adds their gradients to `sum`.
  void block(const BlockLoss<T>& loss, int64_t first, int64_t last, bool gram, T* sum) {
    thread_local Buffer<T> scratch;
    const int64_t m = last - first, r = p_.rank;
    const Batch<T>& batch = loss.batch;
    // The Gram form keeps [c, P, <x, b>] of a row in the place of the direct form's row of y.
    const int64_t wide = std::max(p_.width, 2 * stride_ + 16);
    T* output = scratch.resize(m * (wide + 4 * stride_));
    T* codes = output + m * wide;
    T* grad_codes = codes + m * stride_;
    Block<T> block;
    loss.place(first, last, codes, output, grad_codes, block);
    if (gram && loss.gram(block, output, wide, grad_codes + m * stride_, sum)) return;
    loss.direct(block);
    if (!batch.gradient) return;
    const auto left = [&](const T* const* rows, const T* const* right, T* out) {
      training_.outer_update({r, m, p_.width, rows, right, false, out, p_.width});
    };
    left(block.codes, block.output, sum + layout_.basis());
    if (!batch.codes) left(block.grad_codes, block.rows, sum + layout_.encoder_weight());
    loss.biases(block.output, block.grad_codes, m, false, sum);
  }

  const Kernels<T>& table_ = kernels<T>();  // read once, since another thread may change the level
  const TrainingKernels<T>& training_ = training_kernels<T>();
  const Parameters<T> p_;
  const Layout layout_;
  const LossOptions options_;
  Team* const team_;
  int64_t block_rows_, stride_, threads_ = 1;
  double factor_ = 1, root_ = -1;  // see BlockLoss
  Operands<T> operands_;
  Buffer<T> codes_, output_, grad_codes_, sums_;
  std::vector<T> from_gram_;
  std::vector<Terms> terms_;
};

}  // namespace embkern::autoencoder
