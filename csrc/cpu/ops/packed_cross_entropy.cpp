// packed_cross_entropy: the cross-entropy of a head over a packed table, without its (N, V) logits, and the
// gradients of hidden, scales, basis, offset and bias.
//
//   hidden (N, H), labels (N,), records ... offset as gather_decode takes them, bias (V,) -> losses (N,)
//
// Blocks of rows are decoded and multiplied as in packed_logits.cpp, and the logits of a block are folded into
// the running maximum and sum of exponentials of each hidden state before the next block is computed. The
// exponential of the label is left out of that sum: where a prediction is nearly certain, loss and gradient
// then follow from what remains without cancellation. If only hidden needs a gradient, the rows of the table
// are summed with their exponentials in the same pass, as in flash attention, and scaled at the end. Otherwise
// the backward computes the same bits of the logits again. Ignored states are dropped at once. The order of all
// sums is fixed, so that bits do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/memory.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packed_head.h"

namespace embkern {
namespace {

constexpr int64_t kLine = 16;      // elements that rows of logits are padded to, a vector of every level
constexpr int64_t kSumRows = 192;  // exponentials that are summed in the sums' type
// Of a state, for the backward: its largest logit, the log of the sum of exp(logit - largest), -log p(label).
constexpr int64_t kStatistics = 3;

// The states that are not ignored, and those in the order of their labels.
struct Labels {
  std::vector<int64_t> positions, labels, order;

  // Calls use(state, row of the block) for the labels among rows begin to end of a block.
  template <class Block, class Use>
  void for_labels(const Block& block, int64_t first, int64_t begin, int64_t end, Use use) const {
    const auto before = [&](int64_t state, int64_t id) { return labels[state] < id; };
    const int64_t last = first + static_cast<int64_t>(block.rows.size());
    for (auto at = std::lower_bound(order.begin(), order.end(), first, before);
         at != order.end() && labels[*at] < last; ++at) {
      const int64_t row = block.place[labels[*at] - first];
      if (row >= begin && row < end) use(*at, row);
    }
  }
};

Labels kept_labels(const Tensor& labels, int64_t vocabulary, int64_t ignore_index) {
  Labels kept;
  dispatch_index(labels.scalar_type(), "labels", [&](auto index) {
    const auto* from = static_cast<const decltype(index)*>(labels.const_data_ptr());
    for (int64_t n = 0; n < labels.numel(); ++n) {
      const int64_t label = from[n];
      if (label == ignore_index) continue;
      if (label < 0 || label >= vocabulary)
        throw std::out_of_range(message("labels: expected 0 <= label < ", vocabulary, " or ", ignore_index,
                                        ", got ", label, " at flat position ", n));
      kept.positions.push_back(n);
      kept.labels.push_back(label);
    }
  });
  kept.order.resize(kept.labels.size());
  for (size_t i = 0; i < kept.order.size(); ++i) kept.order[i] = static_cast<int64_t>(i);
  std::sort(kept.order.begin(), kept.order.end(), [&](int64_t left, int64_t right) {
    return std::pair(kept.labels[left], left) < std::pair(kept.labels[right], right);
  });
  return kept;
}

Tensor rows_at(const Tensor& tensor, const std::vector<int64_t>& positions) {
  if (static_cast<int64_t>(positions.size()) == tensor.size(0)) return tensor;
  Tensor rows = empty({static_cast<int64_t>(positions.size()), tensor.size(1)}, tensor.scalar_type());
  const int64_t bytes = tensor.size(1) * tensor.element_size();
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  const auto* from = static_cast<const char*>(tensor.const_data_ptr());
  for (const int64_t n : positions) std::memcpy(to, from + n * bytes, bytes), to += bytes;
  return rows;
}

// Moves rows to their positions among `count` rows; the others are 0.
template <class A>
void spread_rows(const std::vector<int64_t>& positions, int64_t count, int64_t width, A* rows) {
  int64_t kept = static_cast<int64_t>(positions.size());
  if (kept == count) return;
  for (int64_t n = count; n-- > 0;) {
    if (kept > 0 && positions[kept - 1] == n)
      --kept, std::memmove(rows + n * width, rows + kept * width, width * sizeof(A));
    else
      std::fill_n(rows + n * width, width, A(0));
  }
}

// What is known of a hidden state after all rows.
struct State {
  double shift = 0;        // the largest logit
  double rest = 0;         // sum of exp(logit - shift) without the label
  double label_logit = 0;  // finite or not
  double total = 0;        // sum of the logits, for label smoothing

  double label() const { return std::exp(label_logit - shift); }
  double loss() const {  // -log p(label)
    const double below = shift - label_logit;
    return below < 30 ? std::log1p(rest / label()) : below + std::log(rest + label());
  }
  double log_sum() const { return std::log(rest + label()); }  // of exp(logit - shift)
};

template <class A>
class CrossEntropy {
 public:
  CrossEntropy(Head<A>& head, const Labels& labels, const std::optional<Tensor>& bias, double smoothing,
               double cap)
      : head_(head),
        labels_(labels),
        cap_(static_cast<A>(cap)),
        smoothing_(smoothing),
        stride_((head.states + kLine - 1) / kLine * kLine + kLine),  // rows 4 KiB apart would share sets of L1
        tiles_(head.pack_all()) {
    if (bias) widen(*bias, 0, head.table.vocabulary, biases_.resize(head.table.vocabulary));
    has_bias_ = bias.has_value();
  }

  // Unless null, `sums` receives the sums of exp(logit - shift) times the rows, those of the labels left out.
  std::vector<State> forward(typename Head<A>::Sums* sums);

  // Sums the gradients of the logits for upstream gradients of the losses, from the statistics of the forward.
  // Gradients of scales and bias are written unless null.
  typename Head<A>::Sums backward(const double* upstream, const A* statistics, A* of_scales, A* of_bias);

  // Turns sums of exp(logit - shift) times the rows into the gradient: those over all probabilities, less the
  // label's row times the sum of the others' probabilities.
  void add_labels(const std::vector<State>& states, typename Head<A>::Sums& sums) const;

 private:
  using Block = typename Head<A>::Block;

  LogitBlock<A> logits(int64_t rows, int64_t n, int64_t count, A* sums, int64_t stride, const A* scales,
                       const A* biases) const {
    return {rows, count, stride, sums, scales, biases, head_.offsets.data() + n, cap_};
  }

  // The biases of some rows in the order of a block; null if there are none.
  const A* biases_of(const Block& block, int64_t begin, int64_t end, A* to) const {
    if (!has_bias_) return nullptr;
    for (int64_t i = begin; i < end; ++i) to[i - begin] = biases_.get()[block.rows[i].id];
    return to;
  }

  void fold(const Block& block, int64_t first, int64_t count, int64_t chunks, const A* maxima, const A* totals,
            A* g, std::vector<State>& states, typename Head<A>::Sums* sums) const;

  Head<A>& head_;
  const Labels& labels_;
  const A cap_;
  const double smoothing_;
  const int64_t stride_;
  const std::vector<typename Head<A>::Packed> tiles_;
  Buffer<A> biases_;
  bool has_bias_;
};

template <class A>
std::vector<State> CrossEntropy<A>::forward(typename Head<A>::Sums* sums) {
  const int64_t states = head_.states, value_stride = std::max(head_.direct_width, head_.basis_rows);
  const int64_t chunks_of_block = head_.block_rows / kGradientChunk;
  // Its exponential is 0, also times the slope of the cap.
  const A excluded = cap_ != 0 ? -2 * cap_ - 2000 : -std::numeric_limits<A>::infinity();
  std::vector<State> found(states);
  for (State& state : found) state.shift = -std::numeric_limits<double>::infinity();
  Buffer<A> value_memory, logit_memory, maxima_memory, total_memory;
  A* values = value_memory.resize(head_.block_rows * value_stride);
  A* g = logit_memory.resize(head_.block_rows * stride_);
  A* maxima = maxima_memory.resize(chunks_of_block * states);
  A* totals = smoothing_ != 0 ? total_memory.resize(chunks_of_block * states) : nullptr;
  head_.for_blocks([&](Block& block, int64_t first, int64_t threads) {
    head_.for_chunks(block, threads, [&](int64_t begin, int64_t end) {
      const int64_t chunk = begin / kGradientChunk * states;
      A bias_line[kGradientChunk], scales[kGradientChunk];
      const A* biases = biases_of(block, begin, end, bias_line);
      head_.scales_of(block, begin, end, scales);
      head_.decode(block, begin, end, false, values, value_stride);
      for (int64_t n = 0, tile = 0; n < states; n += kStateTile, ++tile) {
        const int64_t count = std::min(kStateTile, states - n);
        A* to = g + begin * stride_ + n;
        head_.multiply(block, begin, end, tiles_[tile], count, to, stride_);
        head_.products.finish_logits(logits(end - begin, n, count, to, stride_, scales, biases),
                                     maxima + chunk + n, totals ? totals + chunk + n : nullptr);
      }
      labels_.for_labels(block, first, begin, end, [&](int64_t n, int64_t i) {
        found[n].label_logit = g[i * stride_ + n];
        g[i * stride_ + n] = excluded;
      });
      if (sums) head_.scale(block, begin, end, values, value_stride);
    });
    const int64_t chunks = (static_cast<int64_t>(block.rows.size()) + kGradientChunk - 1) / kGradientChunk;
    for_tasks((states + kGradientStates - 1) / kGradientStates, threads, [&](int64_t task) {
      const int64_t n = task * kGradientStates;
      fold(block, n, std::min(kGradientStates, states - n), chunks, maxima, totals, g, found, sums);
    });
  });
  for (State& state : found)  // All logits are -inf; the loss is NaN, as in torch.
    if (state.shift == -std::numeric_limits<double>::infinity()) state.rest = std::nan("");
  return found;
}

// Folds the logits of a block into `count` states from `first` on.
template <class A>
void CrossEntropy<A>::fold(const Block& block, int64_t first, int64_t count, int64_t chunks, const A* maxima,
                           const A* totals, A* g, std::vector<State>& found,
                           typename Head<A>::Sums* sums) const {
  const int64_t rows = static_cast<int64_t>(block.rows.size());
  A shifts[kGradientStates], exponentials[kGradientStates];
  for (int64_t s = 0; s < count; ++s) {
    State& state = found[first + s];
    double most = state.shift;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      most = std::max<double>(most, maxima[chunk * head_.states + first + s]);
      if (totals) state.total += totals[chunk * head_.states + first + s];
    }
    const bool nothing = most == -std::numeric_limits<double>::infinity();
    shifts[s] = nothing ? A(0) : static_cast<A>(most);
    if (most == state.shift) continue;
    const double factor = std::exp(state.shift - most);
    state.shift = most, state.rest *= factor;
    if (!sums) continue;
    sums->totals[first + s] *= factor;
    for (const bool transform : {false, true}) {
      const int64_t terms = head_.factor_width(transform);
      A* line = sums->factors[transform].get() + (first + s) * terms;
      for (int64_t j = 0; j < terms; ++j) line[j] *= static_cast<A>(factor);
    }
  }
  for (int64_t i = 0; i < rows; i += kSumRows) {
    head_.products.sum_exponentials(
        logits(std::min(kSumRows, rows - i), first, count, g + i * stride_ + first, stride_, nullptr, nullptr),
        shifts, sums != nullptr, exponentials);
    for (int64_t s = 0; s < count; ++s) found[first + s].rest += exponentials[s];
  }
  if (sums) head_.add_rows(block, first, count, g, stride_, *sums);
}

template <class A>
void CrossEntropy<A>::add_labels(const std::vector<State>& states, typename Head<A>::Sums& sums) const {
  std::vector<Row> rows(head_.states);
  for (int64_t n = 0; n < head_.states; ++n) {
    const int64_t id = labels_.labels[n];
    head_.table.check_place(id);
    const auto [start, tier] = head_.table.find(id);
    rows[n].id = id, rows[n].tier = tier;
    rows[n].record = head_.table.records + start;
  }
  for_tasks((head_.states + kGradientStates - 1) / kGradientStates,
            useful_threads(head_.states * head_.width * kGroup), [&](int64_t task) {
              thread_local Buffer<A> scratch;
              A* values = scratch.resize(std::max(head_.direct_width, head_.basis_rows));
              const int64_t begin = task * kGradientStates;
              for (int64_t n = begin; n < std::min(head_.states, begin + kGradientStates); ++n) {
                const State& state = states[n];
                const double inverse = 1 / (state.rest + state.label());
                const double tangent = cap_ != 0 ? state.label_logit / cap_ : 0;
                const double of_label = -state.rest * inverse * (1 - tangent) * (1 + tangent);
                sums.totals[n] = sums.totals[n] * inverse + of_label;
                for (const bool transform : {false, true}) {
                  const int64_t terms = head_.factor_width(transform);
                  A* line = sums.factors[transform].get() + n * terms;
                  for (int64_t j = 0; j < terms; ++j) line[j] *= static_cast<A>(inverse);
                }
                const bool transform = head_.table.transform(rows[n].tier);
                A* line = sums.factors[transform].get() + n * head_.factor_width(transform);
                const A scale = static_cast<A>(of_label) * head_.row_scales.get()[rows[n].id];
                head_.kernel.decode_coefficients(head_.packed(rows[n], scale), values);
                for (int64_t j = 0; j < head_.table.used[rows[n].tier] * kGroup; ++j) line[j] += values[j];
              }
            });
}

template <class A>
typename Head<A>::Sums CrossEntropy<A>::backward(const double* upstream, const A* statistics, A* of_scales,
                                                 A* of_bias) {
  const int64_t states = head_.states;
  const double each = smoothing_ / static_cast<double>(head_.table.vocabulary);
  std::vector<A> shifts(states), factors(states), uniform(states);
  for (int64_t n = 0; n < states; ++n) {
    shifts[n] = statistics[kStatistics * n];
    factors[n] = static_cast<A>(upstream[n] * std::exp(-static_cast<double>(statistics[kStatistics * n + 1])));
    uniform[n] = static_cast<A>(-upstream[n] * each);
  }
  constexpr int64_t kStride = kStateTile + kLine;
  const std::vector<A> ones(kStateTile, A(1));
  return head_.gradients(
      stride_, [](const Block&, int64_t, int64_t, A*) {},
      [&](const Block& block, int64_t first, int64_t begin, int64_t end, A* g) {
        thread_local Buffer<A> scratch;
        A* products = scratch.resize(kGradientChunk * kStride);
        A bias_line[kGradientChunk], scales[kGradientChunk];
        const A* biases = biases_of(block, begin, end, bias_line);
        head_.scales_of(block, begin, end, scales);
        double scale_sums[kGradientChunk] = {}, bias_sums[kGradientChunk] = {};
        for (int64_t n = 0, tile = 0; n < states; n += kStateTile, ++tile) {
          const int64_t count = std::min(kStateTile, states - n);
          head_.multiply(block, begin, end, tiles_[tile], count, products, kStride);
          const auto some = logits(end - begin, n, count, products, kStride, scales, biases);
          head_.products.logit_gradients(some, {shifts.data() + n, factors.data() + n, uniform.data() + n},
                                         g + begin * stride_ + n, stride_);
          labels_.for_labels(block, first, begin, end, [&](int64_t state, int64_t i) {
            if (state < n || state >= n + count) return;
            const double loss = statistics[kStatistics * state + 2];
            double gradient = upstream[state] * (std::expm1(-loss) + smoothing_ - each);
            if (cap_ != 0) {
              const double logit =
                  scales[i - begin] * products[(i - begin) * kStride + state - n] + head_.offsets[state];
              const double tangent = std::tanh((logit + (biases ? biases[i - begin] : A(0))) / cap_);
              gradient *= (1 - tangent) * (1 + tangent);
            }
            g[i * stride_ + state] = static_cast<A>(gradient);
          });
          if (!of_scales && !of_bias) continue;
          for (int64_t i = begin; i < end; ++i) {
            const A *line = g + i * stride_ + n, *factors[2] = {products + (i - begin) * kStride, ones.data()};
            std::fill(products + (i - begin) * kStride + count,
                      products + (i - begin) * kStride + padded(count), A(0));
            A found[2];
            head_.kernel.row_products(line, count, factors, 2, found);
            scale_sums[i - begin] += found[0], bias_sums[i - begin] += found[1];
          }
        }
        for (int64_t i = begin; i < end; ++i) {
          const int64_t id = block.rows[i].id;
          if (of_scales) of_scales[id] = static_cast<A>(scale_sums[i - begin]);
          if (of_bias) of_bias[id] = static_cast<A>(bias_sums[i - begin]);
        }
      });
}

// The arguments of both ops, checked.
struct Arguments {
  Tensor hidden, labels, records, directory, tiers, levels, scales;
  std::optional<Tensor> basis, offset, bias;
  PackedTable table;
  Labels kept;

  Arguments(const Tensor& hidden_, const Tensor& labels_, const Tensor& records_, const Tensor& directory_,
            const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_,
            const std::optional<Tensor>& basis_, const std::optional<Tensor>& offset_,
            const std::optional<Tensor>& bias_, int64_t ignore_index, double smoothing, double cap)
      : hidden(as_contiguous(hidden_)),
        labels(as_contiguous(labels_)),
        records(as_contiguous(records_)),
        directory(as_contiguous(directory_)),
        tiers(as_contiguous(tiers_)),
        levels(as_contiguous(levels_)),
        scales(as_contiguous(scales_)),
        basis(as_contiguous(basis_)),
        offset(as_contiguous(offset_)),
        bias(as_contiguous(bias_)) {
    check(hidden.is_cpu() && hidden.dim() == 2, "hidden: expected a CPU tensor of shape (N, H)");
    dispatch_floating(hidden.scalar_type(), "hidden", [](auto) {});
    if (bias) dispatch_floating(bias->scalar_type(), "bias", [](auto) {});
    table = checked_table(records, directory, tiers, levels, scales, basis, offset, hidden.size(1));
    check_tensor("labels", labels, 1, labels.scalar_type());
    check_size("labels", labels, 0, hidden.size(0));
    if (bias) {
      check_tensor("bias", *bias, 1, bias->scalar_type());
      check_size("bias", *bias, 0, table.vocabulary);
    }
    check(smoothing >= 0 && smoothing <= 1, "label_smoothing: expected 0 to 1, got ", smoothing);
    check(cap == 0 || (cap >= 1e-30 && cap <= 1e30), "softcap: expected 0 or a positive number, got ", cap);
    kept = kept_labels(labels, table.vocabulary, ignore_index);
    hidden = rows_at(hidden, kept.positions);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> packed_cross_entropy_forward(
    const Tensor& hidden_, const Tensor& labels_, const Tensor& records_, const Tensor& directory_,
    const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_, const std::optional<Tensor>& basis_,
    const std::optional<Tensor>& offset_, const std::optional<Tensor>& bias_, int64_t ignore_index,
    double label_smoothing, double softcap, bool needs_hidden) {
  const Arguments given(hidden_, labels_, records_, directory_, tiers_, levels_, scales_, basis_, offset_,
                        bias_, ignore_index, label_smoothing, softcap);
  check(!needs_hidden || label_smoothing == 0, "needs_hidden: expected false with label smoothing");
  const int64_t states = given.labels.numel(), H = given.table.width;
  const ScalarType type = sums_type(given.hidden, given.scales);
  Tensor losses = empty({states}, type), statistics = empty({states, kStatistics}, type),
         of_hidden = empty({needs_hidden ? states : 0, H}, type);
  dispatch_sums(given.hidden, given.scales, [&](auto sum) {
    using A = decltype(sum);
    A* loss = static_cast<A*>(losses.mutable_data_ptr());
    A* known = static_cast<A*>(statistics.mutable_data_ptr());
    std::fill_n(loss, states, A(0));
    std::fill_n(known, kStatistics * states, A(0));
    A* gradient = static_cast<A*>(of_hidden.mutable_data_ptr());
    if (!given.kept.labels.empty()) {
      Head<A> head(given.table, given.hidden, given.scales, given.basis, given.offset);
      CrossEntropy<A> run(head, given.kept, given.bias, label_smoothing, softcap);
      typename Head<A>::Sums sums;
      if (needs_hidden) sums = head.no_sums();
      std::vector<State> found = run.forward(needs_hidden ? &sums : nullptr);
      head.refuse_damage();
      for (int64_t n = 0; n < head.states; ++n) {
        const int64_t to = given.kept.positions[n];
        double value = found[n].loss();
        known[kStatistics * to] = static_cast<A>(found[n].shift);
        known[kStatistics * to + 1] = static_cast<A>(found[n].log_sum());
        known[kStatistics * to + 2] = static_cast<A>(value);
        if (label_smoothing != 0)
          value = (1 - label_smoothing) * value +
                  label_smoothing * (found[n].shift + found[n].log_sum() -
                                     found[n].total / static_cast<double>(given.table.vocabulary));
        loss[to] = static_cast<A>(value);
      }
      if (needs_hidden) {
        run.add_labels(found, sums);
        head.finish(sums, gradient, nullptr, nullptr);
      }
    }
    if (needs_hidden) spread_rows(given.kept.positions, states, H, gradient);
  });
  return {losses, statistics, of_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_cross_entropy_backward(
    const Tensor& grad_, const Tensor& statistics_, const Tensor& hidden_, const Tensor& labels_,
    const Tensor& records_, const Tensor& directory_, const Tensor& tiers_, const Tensor& levels_,
    const Tensor& scales_, const std::optional<Tensor>& basis_, const std::optional<Tensor>& offset_,
    const std::optional<Tensor>& bias_, int64_t ignore_index, double label_smoothing, double softcap,
    bool needs_hidden, bool needs_scales, bool needs_basis, bool needs_offset, bool needs_bias) {
  const Arguments given(hidden_, labels_, records_, directory_, tiers_, levels_, scales_, basis_, offset_,
                        bias_, ignore_index, label_smoothing, softcap);
  const Tensor grad = as_contiguous(grad_), statistics = as_contiguous(statistics_);
  const int64_t states = given.labels.numel(), V = given.table.vocabulary, H = given.table.width;
  check(!needs_bias || given.bias, "needs_bias: expected false without a bias");
  check_tensor("grad", grad, 1, grad.scalar_type());
  check_size("grad", grad, 0, states);
  const ScalarType type = sums_type(given.hidden, given.scales);
  check_shape("statistics", statistics, type, {states, kStatistics});
  Tensor of_hidden = empty({needs_hidden ? states : 0, H}, type),
         of_scales = empty({needs_scales ? V : 0}, type);
  Tensor of_basis = empty({needs_basis ? given.table.basis_rows : 0, H}, type),
         of_offset = empty({needs_offset ? H : 0}, type), of_bias = empty({needs_bias ? V : 0}, type);
  dispatch_sums(given.hidden, given.scales, [&](auto sum) {
    using A = decltype(sum);
    const auto data = [](Tensor& tensor, bool needed) {
      return needed ? static_cast<A*>(tensor.mutable_data_ptr()) : nullptr;
    };
    if (given.kept.labels.empty()) {
      for (Tensor* each : {&of_hidden, &of_scales, &of_basis, &of_offset, &of_bias})
        std::fill_n(static_cast<A*>(each->mutable_data_ptr()), each->numel(), A(0));
      return;
    }
    Head<A> head(given.table, given.hidden, given.scales, given.basis, given.offset);
    CrossEntropy<A> run(head, given.kept, given.bias, label_smoothing, softcap);
    std::vector<double> all(states), upstream;
    widen(grad, 0, states, all.data());
    for (const int64_t n : given.kept.positions) upstream.push_back(all[n]);
    const Tensor known = rows_at(statistics, given.kept.positions);
    const auto sums = run.backward(upstream.data(), static_cast<const A*>(known.const_data_ptr()),
                                   data(of_scales, needs_scales), data(of_bias, needs_bias));
    head.refuse_damage();
    head.finish(sums, data(of_hidden, needs_hidden), data(of_basis, needs_basis),
                data(of_offset, needs_offset));
    if (needs_hidden) spread_rows(given.kept.positions, states, H, data(of_hidden, true));
  });
  return {of_hidden, of_scales, of_basis, of_offset, of_bias};
}

std::tuple<Tensor, Tensor> exp_and_tanh(const Tensor& values_) {
  const Tensor values = as_contiguous(values_);
  check_tensor("values", values, 1, values.scalar_type());
  Tensor exponentials = empty({values.numel()}, values.scalar_type()),
         tangents = empty({values.numel()}, values.scalar_type());
  const auto run = [&](auto element) {
    using A = decltype(element);
    training_kernels<A>().exp_and_tanh(static_cast<const A*>(values.const_data_ptr()), values.numel(),
                                       static_cast<A*>(exponentials.mutable_data_ptr()),
                                       static_cast<A*>(tangents.mutable_data_ptr()));
  };
  if (values.scalar_type() == ScalarType::Double)
    run(double{});
  else
    check_tensor("values", values, 1, ScalarType::Float), run(float{});
  return {exponentials, tangents};
}

}  // namespace embkern
