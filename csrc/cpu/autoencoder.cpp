// autoencoder: the loss of y = c D + b against rows x, with codes c given or c = x W^T + e, and all its
// gradients.
//
//   target x (N, H); codes (N, r), or encoder weight W (r, H) and bias e (r,); basis D (r, H), offset b (H,)
//   -> terms (4,): loss, cosine distance, squared error, power term; gradients in the parameters' shapes
//
// Rows are taken in blocks that stay in L2, so that neither y nor its gradient (N, H) reaches memory. A block
// is computed in one of two forms:
//   direct  y and its gradient g of the block, row by row as cosine_mse does; then grad_c = g D^T,
//           grad_D += c^T g, grad_b += sum g, and with an encoder grad_W += grad_c^T x, grad_e += sum grad_c.
//           Five products of N H r with an encoder, three without.
//   Gram    g = s y + t x with two numbers per row, which follow from <x, y> = c P + <x, b>,
//           |y|^2 = c G c + 2 c D b + |b|^2 and |x|^2, where P = D x and G = D D^T. Hence grad_c = s D y + t P
//           and grad_[D; b] = (sum s [c, 1]^T [c, 1]) [D; b] + sum t [c, 1]^T x: four products, or two, and N
//           r^2. For cosine and squared error only. |x - y|^2 = |x|^2 - 2 <x, y> + |y|^2 cancels where the fit
//           is good, and |y|^2 where codes undo each other or the offset, for its rounding errors are those of
//           p = sum_j c_j^2 G_jj + |b|^2. A block with a row whose |x - y|^2 is below kSafeError of |x|^2 +
//           |y|^2 or |x|^2 + p, whose |y|^2 is below kSafeError of p, or with norms near the ends of fp32 is
//           computed in the direct form.
//
// Large batches are cut into chunks by the shapes alone. Each sums its gradients by itself, and the sums are
// added in order: the bits do not depend on the number of threads. Memory: chunks x parameters.
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_loss.h"

namespace embkern {
namespace {

constexpr int64_t kSmallBatch = 256;        // rows that are not cut into chunks
constexpr int64_t kChunkRows = 512;         // at least, in a larger batch
constexpr int64_t kMaxChunks = 32;          // at most, halved while their sums, a copy of the parameters each,
constexpr int64_t kMinChunks = 8;           // take more than kSumBytes; never below this,
constexpr int64_t kSumBytes = 20 << 20;     // so that eight threads have work
constexpr int64_t kTileRows = 12;           // of the widest tile: blocks and ranges are multiples
constexpr int64_t kMostBlockRows = 120;     // outer_update reads and writes its sums once per 128 terms
constexpr int64_t kBlockBytes = 384 << 10;  // of a block's rows of y
constexpr int64_t kParameterRows = 36;      // of a matrix whose gradient one task computes, at least
constexpr int64_t kForwardShare = 8;     // a step has several phases: more work for a thread than in a lookup,
constexpr int64_t kTeamShare = 4;        // and less where the threads of a Team take the phases
constexpr double kSafeError = 1.0 / 16;  // see above: the error loses at most some four bits

// Memory of one thread or step, aligned for whole vectors.
template <class T>
class Buffer {
 public:
  T* resize(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
      capacity_ = bytes;
    }
    poison(memory_.get(), bytes);
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t capacity_ = 0;
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

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
  const T *encoder_weight, *encoder_bias, *basis, *offset;  // null where there is none
};

// What is computed of which rows.
template <class T>
struct Batch {
  int64_t count;
  const T* const* rows;  // of the target
  const T* codes;        // (N, r), or null: the encoder makes them
  const T *weight, *target_norm;
  T* grad_codes;  // (N, r), where codes are given and gradients are wanted
  bool gradient;
  double weight_of(int64_t n) const { return weight ? static_cast<double>(weight[n]) : 1; }
};

struct Terms {
  double loss = 0, distance = 0, mse = 0, power = 0;
  void add(const Terms& other) {
    loss += other.loss;
    distance += other.distance;
    mse += other.mse;
    power += other.power;
  }
};

template <class T>
std::vector<const T*> rows_of(const T* matrix, int64_t count, int64_t width) {
  std::vector<const T*> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = matrix + i * width;
  return rows;
}

// The parameters packed as right operands, anew in every step.
template <class T>
struct Operands {
  Buffer<T> encoder, decoder, decoder_transposed;  // of x W^T, c D and g D^T
  Buffer<T> both, gram, both_offset;               // of x [W; D; b]^T and c G; bias of the former
  std::vector<T> gram_rows;                        // (r, r + 1): D [D; b]^T
  std::vector<T> basis_offset;                     // (r,): D b
  std::vector<T> basis_squares;                    // (r,): the diagonal of G
  double offset_square = 0;

  template <class Tasks>
  void pack(const TrainingKernels<T>& training, const Parameters<T>& p, bool gradient, const Tasks& for_tasks) {
    const auto basis = rows_of(p.basis, p.rank, p.width);
    for_tasks(3, [&](int64_t task) {
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

template <class T>
class Step {
 public:
  // `team`: the threads of a run of steps; torch's if null.
  Step(const Parameters<T>& parameters, const LossOptions& options, Team* team)
      : p_(parameters), layout_{parameters.rank, parameters.width}, options_(options), team_(team) {
    const int64_t fit = kBlockBytes / (p_.width * static_cast<int64_t>(sizeof(T)));
    block_rows_ = std::clamp(fit / kTileRows * kTileRows, kTileRows, kMostBlockRows);
    stride_ = round_up(p_.rank + 1, 16);
  }

  // Computes the terms and, unless `gradient` is null, the gradients in one vector, in the order of Layout.
  // `finish(first, count, gradient)` is called for every range of it as soon as that is known.
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
  struct Block {
    int64_t first, m;
    const T* rows[kBlockRows];
    const T* codes[kBlockRows];
    T* output[kBlockRows];  // y, then its gradient
    T* grad_codes[kBlockRows];
  };

  template <class Body>
  void run_tasks(int64_t tasks, const Body& body) {
    if (team_)
      team_->run(tasks, body);
    else
      for_tasks(tasks, threads_, body);
  }

  template <class Finish>
  Terms pass(const Batch<T>& batch, T* gradient, Finish finish) {
    if (batch.count <= kSmallBatch)
      small(batch, gradient, finish);
    else
      chunked(batch, gradient, finish);
    Terms total;  // sequential: the same bits for any number of threads
    for (const Terms& terms : terms_) total.add(terms);
    return total;
  }

  // ---- a small batch: rows are dealt to threads, then ranges of the parameters are -------------------------

  template <class Finish>
  void small(const Batch<T>& batch, T* gradient, Finish finish) {
    const int64_t count = batch.count;
    T* codes = codes_.resize(count * stride_);
    T* output = output_.resize(count * p_.width);
    T* grad_codes = grad_codes_.resize(count * stride_);
    const int64_t share = std::max<int64_t>(1, (count + threads_ - 1) / threads_);
    const int64_t size = std::min(block_rows_, round_up(share, kTileRows / 3));
    run_tasks((count + size - 1) / size, [&](int64_t task) {
      Block block;
      place(batch, task * size, std::min(count, (task + 1) * size), codes + task * size * stride_,
            output + task * size * p_.width, grad_codes + task * size * stride_, block);
      direct(batch, block);
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
        biases(batch, output_rows.data(), grad_code_rows.data(), count, true, gradient);
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

  // ---- a large batch: chunks of rows, each with its own sums -----------------------------------------------

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
    run_tasks(chunks, [&](int64_t chunk) {
      T* sum = sums + chunk * padded;
      if (sums) std::fill_n(sum, padded, T(0));
      const int64_t end = (chunk + 1) * count / chunks;
      for (int64_t first = chunk * count / chunks; first < end; first += block_rows_)
        block(batch, first, std::min(end, first + block_rows_), gram, sum);
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
      decode_gram(batch, sums + parameters);
    }
    run_tasks((parameters + range - 1) / range, [&](int64_t task) {
      const int64_t first = task * range, last = std::min(parameters, first + range);
      add(first, last);
      for (int64_t i = first; i < last; ++i)
        gradient[i] = sums[i] + (gram && i >= layout_.basis() ? from_gram_[i - layout_.basis()] : T(0));
      finish(first, last - first, gradient);
    });
  }

  // from_gram_ = K [D; b], for K = sum s [c, 1]^T [c, 1].
  void decode_gram(const Batch<T>&, const T* sums) {
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
  void block(const Batch<T>& batch, int64_t first, int64_t last, bool gram, T* sum) {
    thread_local Buffer<T> scratch;
    const int64_t m = last - first, r = p_.rank;
    // The Gram form has [c, P, <x, b>] of a row where the direct form has the row of y.
    const int64_t wide = std::max(p_.width, 2 * stride_ + 16);
    T* output = scratch.resize(m * (wide + 4 * stride_));
    T* codes = output + m * wide;
    T* grad_codes = codes + m * stride_;
    Block block;
    place(batch, first, last, codes, output, grad_codes, block);
    if (gram && gram_form(batch, block, output, wide, grad_codes + m * stride_, sum)) return;
    direct(batch, block);
    if (!batch.gradient) return;
    const auto left = [&](const T* const* rows, const T* const* right, T* out) {
      training_.outer_update({r, m, p_.width, rows, right, false, out, p_.width});
    };
    left(block.codes, block.output, sum + layout_.basis());
    if (!batch.codes) left(block.grad_codes, block.rows, sum + layout_.encoder_weight());
    biases(batch, block.output, block.grad_codes, m, false, sum);
  }

  void place(const Batch<T>& batch, int64_t first, int64_t last, T* codes, T* output, T* grad_codes,
             Block& block) const {
    block.first = first;
    block.m = last - first;
    for (int64_t i = 0; i < block.m; ++i) {
      block.rows[i] = batch.rows[first + i];
      block.codes[i] = batch.codes ? batch.codes + (first + i) * p_.rank : codes + i * stride_;
      block.output[i] = output + i * p_.width;
      block.grad_codes[i] =
          batch.grad_codes ? batch.grad_codes + (first + i) * p_.rank : grad_codes + i * stride_;
    }
  }

  // ---- the two forms of a block -----------------------------------------------------------------------------

  void direct(const Batch<T>& batch, Block& block) {
    const int64_t m = block.m, r = p_.rank, width = p_.width;
    const auto project = [&](const T* const* left, int64_t k, int64_t n, const T* offset, T* const* out,
                             const Buffer<T>& packed) {
      training_.project_packed(
          {m, k, 0, n, 0, reinterpret_cast<const void* const*>(left), nullptr, offset, T(1), out},
          packed.get());
    };
    if (!batch.codes)
      project(block.rows, width, r, p_.encoder_bias, const_cast<T* const*>(block.codes), operands_.encoder);
    project(block.codes, r, width, p_.offset, block.output, operands_.decoder);
    thread_local std::vector<T> slopes;
    if (options_.power != 0 && static_cast<int64_t>(slopes.size()) < width) slopes.resize(width);
    T* slope = batch.gradient ? slopes.data() : nullptr;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t n = block.first + i;
      T* y = block.output[i];
      const T* x = block.rows[i];
      RowLoss row = loss_of(batch, n, table_.row_sums(y, x, width));
      if (options_.power != 0) row.power = table_.row_power(y, x, width, options_.alpha, slope) / width;
      const double factor = factor_ * batch.weight_of(n), root = root_ >= 0 ? root_ : std::sqrt(row.mse);
      record(n, row, factor);
      if (batch.gradient)
        table_.row_gradient(
            y, x, width,
            output_gradient<T>(row, options_, width, factor, root_slope(options_, factor, root, width), slope),
            y);
    }
    if (batch.gradient)
      project(block.output, width, r, nullptr, block.grad_codes, operands_.decoder_transposed);
  }

  // Returns false, having added nothing, where a row is not safe in this form.
  bool gram_form(const Batch<T>& batch, Block& block, T* projected, int64_t projected_stride, T* scaled,
                 T* sum) {
    const int64_t m = block.m, r = p_.rank, width = p_.width, codes = batch.codes ? 0 : r;
    const void* left[kBlockRows];
    T* out[kBlockRows];
    T* from_gram[kBlockRows];  // D y
    const T *code_rows[kBlockRows], *from_output[kBlockRows], *from_target[kBlockRows];
    for (int64_t i = 0; i < m; ++i) {
      left[i] = block.rows[i];
      out[i] = projected + i * projected_stride;
    }
    training_.project_packed(
        {m, width, 0, codes + r + 1, 0, left, nullptr, operands_.both_offset.get(), T(1), out},
        operands_.both.get());
    for (int64_t i = 0; i < m; ++i) {
      code_rows[i] = batch.codes ? block.codes[i] : out[i];
      left[i] = code_rows[i];
      from_gram[i] = block.grad_codes[i];
    }
    training_.project_packed({m, r, 0, r, 0, left, nullptr, operands_.basis_offset.data(), T(1), from_gram},
                             operands_.gram.get());

    RowLoss rows[kBlockRows];
    T* ones = scaled + m * stride_;
    T* weighted = ones;  // not in use yet
    for (int64_t i = 0; i < m; ++i) {
      const T *c = code_rows[i], *projection = out[i] + codes, *decoded = from_gram[i];
      RowSums sums;
      sums.wide = false;
      sums.dot = table_.row_sums(c, projection, r).dot + projection[r];
      sums.output_square = table_.row_sums(c, decoded, r).dot +
                           table_.row_sums(c, operands_.basis_offset.data(), r).dot + operands_.offset_square;
      if (batch.target_norm) {
        const double norm = batch.target_norm[block.first + i];
        sums.target_square = norm * norm;
      } else {
        sums.target_square = table_.row_sums(block.rows[i], block.rows[i], width).target_square;
      }
      sums.error_square = sums.target_square + sums.output_square - 2 * sums.dot;
      for (int64_t j = 0; j < r; ++j) weighted[j] = c[j] * operands_.basis_squares[j];
      const double parts = table_.row_sums(c, weighted, r).dot + operands_.offset_square;
      const double squares = sums.target_square + std::max(sums.output_square, parts);
      // Where a product left fp32's range, the comparisons with infinity and NaN have to fail.
      if (!(sums.error_square > kSafeError * squares && sums.output_square > kSafeError * parts &&
            sums.output_square > 1e-20 && sums.target_square > 1e-20 && squares < 1e20 &&
            std::isfinite(sums.dot)))
        return false;
      rows[i] = loss_of(batch, block.first + i, sums);
    }
    for (int64_t i = 0; i < m; ++i) {
      const double factor = factor_ * batch.weight_of(block.first + i);
      const RowGradient<T> to = output_gradient<T>(rows[i], options_, width, factor, 0, nullptr);
      const double s = to.from_output + to.from_error, t = to.from_target - to.from_error;
      record(block.first + i, rows[i], factor);
      T* grad = block.grad_codes[i];
      const RowGradient<T> combine{s, t, 0, 0, nullptr, false};
      table_.row_gradient(grad, out[i] + codes, r, combine, grad);
      // s [c, 1] over grad's neighbours, t [c, 1] over the projection, [c, 1] for both products.
      T *by_s = scaled + i * stride_, *by_t = out[i] + codes, *c = ones + i * stride_;
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
    const int64_t K = layout_.size();
    training_.outer_update({r + 1, m, r + 1, from_output, code_rows, false, sum + K, r + 1});
    training_.outer_update({r + 1, m, width, from_target, block.rows, false, sum + layout_.basis(), width});
    if (!batch.codes) {
      training_.outer_update(
          {r, m, width, block.grad_codes, block.rows, false, sum + layout_.encoder_weight(), width});
      add_rows(block.grad_codes, m, r, false, sum + layout_.encoder_bias());
    }
    return true;
  }

  RowLoss loss_of(const Batch<T>& batch, int64_t n, const RowSums& sums) const {
    const double norm = batch.target_norm ? static_cast<double>(batch.target_norm[n]) : 0;
    return row_loss(sums, batch.target_norm ? &norm : nullptr, p_.width, options_.eps);
  }

  void record(int64_t n, const RowLoss& row, double factor) {
    double value = row.value(options_);
    if (options_.rmse != 0 && options_.reduction == kSum) value += options_.rmse * std::sqrt(row.mse);
    terms_[n] = {factor * value, factor * (1 - row.cosine), factor * row.mse, factor * row.power};
  }

  void add_rows(const T* const* rows, int64_t count, int64_t width, bool overwrite, T* to) const {
    thread_local std::vector<T> total;
    total.resize(width);
    table_.total_rows(rows, count, 0, width, total.data());
    for (int64_t j = 0; j < width; ++j) to[j] = overwrite ? total[j] : to[j] + total[j];
  }

  void biases(const Batch<T>& batch, const T* const* output, const T* const* grad_codes, int64_t count,
              bool overwrite, T* gradient) const {
    add_rows(output, count, p_.width, overwrite, gradient + layout_.offset());
    if (!batch.codes) add_rows(grad_codes, count, p_.rank, overwrite, gradient + layout_.encoder_bias());
  }

  const Kernels<T>& table_ = kernels<T>();  // taken once: another thread may set another level meanwhile
  const TrainingKernels<T>& training_ = training_kernels<T>();
  const Parameters<T> p_;
  const Layout layout_;
  const LossOptions options_;
  Team* const team_;
  int64_t block_rows_, stride_, threads_ = 1;
  double factor_ = 1, root_ = -1;  // of a row's weight; the batch's RMSE where the gradient needs it
  Operands<T> operands_;
  Buffer<T> codes_, output_, grad_codes_, sums_;
  std::vector<T> from_gram_;
  std::vector<Terms> terms_;
};

template <class T>
const T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void check_shape(const char* name, const std::optional<Tensor>& tensor, ScalarType type,
                 const std::vector<int64_t>& sizes) {
  if (!tensor) return;
  check_tensor(name, *tensor, sizes.size(), type);
  for (size_t dim = 0; dim < sizes.size(); ++dim) check_size(name, *tensor, dim, sizes[dim]);
}

template <class Body>
void dispatch_training(ScalarType type, Body body) {
  if (type == ScalarType::Double) return body(double{});
  check(type == ScalarType::Float, "target: expected dtype Float or Double, got ",
        torch::headeronly::toString(type));
  body(float{});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> autoencoder_forward(
    const Tensor& target, const std::optional<Tensor>& codes, const std::optional<Tensor>& encoder_weight,
    const std::optional<Tensor>& encoder_bias, const Tensor& basis, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& row_weight, const std::optional<Tensor>& target_norm, int64_t reduction,
    double cosine_weight, double mse_weight, double rmse_weight, double power_weight, double alpha, double eps,
    bool needs_grad) {
  const ScalarType type = target.scalar_type();
  check_tensor("target", target, 2, type);
  check_tensor("basis", basis, 2, type);
  const int64_t count = target.size(0), width = target.size(1), rank = basis.size(0);
  check(width > 0, "target: expected rows of at least 1 element, got 0");
  check_size("basis", basis, 1, width);
  check(codes.has_value() != encoder_weight.has_value(), "codes: expected either these or encoder_weight");
  check(encoder_weight || !encoder_bias, "encoder_bias: expected none without encoder_weight");
  check_shape("codes", codes, type, {count, rank});
  check_shape("encoder_weight", encoder_weight, type, {rank, width});
  check_shape("encoder_bias", encoder_bias, type, {rank});
  check_shape("offset", offset, type, {width});
  check_shape("row_weight", row_weight, type, {count});
  check_shape("target_norm", target_norm, type, {count});
  const LossOptions options{reduction, cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps};
  check_options(options);
  check(reduction != kNone, "reduction: expected mean or sum");

  Tensor terms = empty({4}, type);
  const auto gradient_of = [&](const std::optional<Tensor>& tensor, std::vector<int64_t> sizes) {
    return empty(needs_grad && tensor ? sizes : std::vector<int64_t>{0}, type);
  };
  Tensor grad_codes = gradient_of(codes, {count, rank});
  Tensor grad_weight = gradient_of(encoder_weight, {rank, width});
  Tensor grad_bias = gradient_of(encoder_bias, {rank});
  Tensor grad_basis = gradient_of(basis, {rank, width});
  Tensor grad_offset = gradient_of(offset, {width});
  dispatch_training(type, [&](auto element) {
    using T = decltype(element);
    const auto rows = rows_of(static_cast<const T*>(target.const_data_ptr()), count, width);
    Batch<T> batch{};
    batch.count = count;
    batch.rows = rows.data();
    batch.codes = optional_data<T>(codes);
    batch.weight = optional_data<T>(row_weight);
    batch.target_norm = optional_data<T>(target_norm);
    batch.gradient = needs_grad;
    batch.grad_codes = needs_grad && codes ? static_cast<T*>(grad_codes.mutable_data_ptr()) : nullptr;
    const Parameters<T> parameters{rank,
                                   width,
                                   optional_data<T>(encoder_weight),
                                   optional_data<T>(encoder_bias),
                                   static_cast<const T*>(basis.const_data_ptr()),
                                   optional_data<T>(offset)};
    const Layout layout{rank, width};
    std::vector<T> gradient(needs_grad ? layout.size() : 0);
    Step<T> step(parameters, options, nullptr);
    const Terms sums = step.run(batch, gradient.data(), [](int64_t, int64_t, T*) {});
    T* out = static_cast<T*>(terms.mutable_data_ptr());
    const double empty_mean = count == 0 && reduction == kMean ? std::nan("") : 0;
    const double values[4] = {sums.loss, sums.distance, sums.mse, sums.power};
    for (int i = 0; i < 4; ++i) out[i] = static_cast<T>(values[i] + empty_mean);
    if (!needs_grad) return;
    const auto copy = [&](Tensor& to, int64_t at) {
      if (to.numel() > 0) std::copy_n(gradient.data() + at, to.numel(), static_cast<T*>(to.mutable_data_ptr()));
    };
    copy(grad_weight, layout.encoder_weight());
    copy(grad_bias, layout.encoder_bias());
    copy(grad_basis, layout.basis());
    copy(grad_offset, layout.offset());
  });
  return {terms, grad_codes, grad_weight, grad_bias, grad_basis, grad_offset};
}

Tensor autoencoder_train(const Tensor& rows, const Tensor& order, int64_t batch_size, Tensor parameters,
                         Tensor first_moment, Tensor second_moment, int64_t rank, int64_t step, double lr,
                         double beta1, double beta2, double adam_eps, double cosine_weight, double mse_weight,
                         double rmse_weight, double power_weight, double alpha, double eps) {
  const ScalarType type = rows.scalar_type();
  check_tensor("rows", rows, 2, type);
  check_tensor("order", order, 1, ScalarType::Long);
  check(batch_size > 0, "batch_size: expected at least 1, got ", batch_size);
  check(rank > 0 && rows.size(1) > 0, "rank: expected at least 1, and rows of at least 1 element");
  const Layout layout{rank, rows.size(1)};
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"parameters", &parameters},
                                     {"first_moment", &first_moment},
                                     {"second_moment", &second_moment}})
    check_shape(name, *tensor, type, {layout.size()});
  const LossOptions options{kMean, cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps};
  const int64_t count = order.numel(), steps = (count + batch_size - 1) / batch_size;
  // A copy: another thread may write to the tensor after the check.
  const auto* all = static_cast<const int64_t*>(order.const_data_ptr());
  const std::vector<int64_t> ids(all, all + count);
  for (int64_t n = 0; n < count; ++n)
    if (ids[n] < 0 || ids[n] >= rows.size(0))
      throw std::out_of_range(
          message("order: expected 0 <= id < ", rows.size(0), ", got ", ids[n], " at position ", n));
  Tensor losses = empty({steps}, type);
  dispatch_training(type, [&](auto element) {
    using T = decltype(element);
    const T* table = static_cast<const T*>(rows.const_data_ptr());
    T* p = static_cast<T*>(parameters.mutable_data_ptr());
    T* m = static_cast<T*>(first_moment.mutable_data_ptr());
    T* v = static_cast<T*>(second_moment.mutable_data_ptr());
    T* loss = static_cast<T*>(losses.mutable_data_ptr());
    const Parameters<T> views{rank,
                              layout.width,
                              p + layout.encoder_weight(),
                              p + layout.encoder_bias(),
                              p + layout.basis(),
                              p + layout.offset()};
    const auto& training = training_kernels<T>();
    Team team(useful_threads(std::min(batch_size, count) * rank * layout.width / kTeamShare));
    Step<T> run(views, options, &team);
    std::vector<const T*> pointers;
    Buffer<T> gradient;
    gradient.resize(layout.size());
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t first = s * batch_size, last = std::min(count, first + batch_size);
      pointers.resize(last - first);
      for (int64_t n = first; n < last; ++n) pointers[n - first] = table + ids[n] * layout.width;
#if defined(__GNUC__)
      // A row of the next batch lies anywhere in the table: it comes from memory while this step computes.
      for (int64_t n = last; n < std::min(count, last + std::min<int64_t>(batch_size, kSmallBatch)); ++n)
        for (int64_t j = 0; j < layout.width; j += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(table + ids[n] * layout.width + j, 0, 2);
#endif
      Batch<T> batch{};
      batch.count = last - first;
      batch.rows = pointers.data();
      batch.gradient = true;
      const double taken = static_cast<double>(step + s + 1);
      const double correction = 1 - std::pow(beta1, taken),
                   root_correction = std::sqrt(1 - std::pow(beta2, taken));
      const AdamStep<T> adam{static_cast<T>(beta1),           static_cast<T>(1 - beta1),
                             static_cast<T>(beta2),           static_cast<T>(1 - beta2),
                             static_cast<T>(lr / correction), static_cast<T>(1 / root_correction),
                             static_cast<T>(adam_eps)};
      const Terms terms = run.run(batch, gradient.get(), [&](int64_t at, int64_t size, const T* grad) {
        training.adam(adam, size, grad + at, p + at, m + at, v + at);
      });
      loss[s] = static_cast<T>(terms.loss);
    }
  });
  return losses;
}

}  // namespace embkern
