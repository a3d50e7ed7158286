// packed_logits: logits[n][v] = hidden[n] . row[v] over all rows of a packed table, which is never decoded as a
// whole, and the gradients of hidden, scales, basis and offset.
//
//   hidden (N, H), records ... offset as gather_decode takes them -> (N, V) of hidden's dtype.
//
// A row of coefficients c is scales[v] * (c @ basis) + offset, so that its logit is scales[v] * (c . (basis @
// hidden)) + offset . hidden: the N small products basis @ hidden are computed once, and a row costs as many
// multiplications as it has coefficients. With up to 8 hidden states, the values of a row are multiplied while
// they are in registers. With more, blocks of rows are decoded to L2, sorted by tier, and multiplied as
// matrices, with as many terms as the tier has values. Sums run in fp32 (float64 if hidden or scales are); the
// bits of a logit depend on the number of hidden states, and neither on the threads nor on the other rows.
#include <algorithm>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/memory.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packed_head.h"

namespace embkern {
namespace {

constexpr int64_t kFewBlocks = 8;   // blocks of 32 rows in a task with few hidden states
constexpr int64_t kManyRows = 192;  // rows in a task with many hidden states
constexpr int64_t kLine = 16;       // ids or hidden states that are transposed together

template <class A, class T>
void few_states(Head<A>& head, T* logits) {
  const int64_t V = head.table.vocabulary, blocks = (V + kGroup - 1) / kGroup;
  const int64_t count = head.states <= 1 ? 1 : head.states <= 2 ? 2 : head.states <= 4 ? 4 : kFewStates;
  const A* factors[2][kFewStates];
  for (int64_t n = 0; n < kFewStates; ++n)
    for (const bool transform : {false, true})
      factors[transform][n] = head.factor(transform, std::min(n, head.states - 1));
  for_tasks((blocks + kFewBlocks - 1) / kFewBlocks, useful_threads(V * head.width * head.states),
            [&](int64_t task) {
              A sums[kFewStates];
              head.for_rows(task * kFewBlocks, std::min(blocks, (task + 1) * kFewBlocks), [&](const auto& row) {
                head.kernel.packed_products(head.packed(row, head.row_scales.get()[row.id]),
                                            factors[head.table.transform(row.tier)], count, sums);
                for (int64_t n = 0; n < head.states; ++n)
                  logits[n * V + row.id] = static_cast<T>(sums[n] + head.offsets[n]);
              });
            });
}

template <class A, class T>
void many_states(Head<A>& head, T* logits) {
  const int64_t V = head.table.vocabulary, stride = std::max(head.direct_width, head.basis_rows);
  for (int64_t first = 0; first < head.states; first += kStateTile) {
    const int64_t count = std::min(kStateTile, head.states - first);
    const auto factors = head.pack(first, first + count);
    for_tasks((V + kManyRows - 1) / kManyRows, useful_threads(V * head.width * count), [&](int64_t task) {
      thread_local Buffer<A> scratch;
      A *values = scratch.resize(kManyRows * (stride + kStateTile)), *sums = values + kManyRows * stride;
      const int64_t row = task * kManyRows, rows = std::min(kManyRows, V - row);
      auto block = head.sorted(row, row + rows);
      if (static_cast<int64_t>(block.rows.size()) < rows) return;
      head.decode(block, 0, rows, true, values, stride);
      head.multiply(block, 0, rows, factors, count, sums, kStateTile);
      for (int64_t n = 0; n < count; n += kLine) {
        const int64_t some = std::min(kLine, count - n);
        for (int64_t i = 0; i < rows; ++i) {
          const A* from = sums + block.place[i] * kStateTile + n;
          T* to = logits + (first + n) * V + row + i;
          for (int64_t s = 0; s < some; ++s) to[s * V] = static_cast<T>(from[s] + head.offsets[first + n + s]);
        }
      }
    });
  }
}

// g[place of the id][n] = grad[n][id]
template <class A, class T>
void transpose_gradient(const T* grad, int64_t vocabulary, int64_t states, const int32_t* place, int64_t first,
                        int64_t last, int64_t id, A* g) {
  for (int64_t i = first; i < last; i += kLine) {
    const int64_t some = std::min(kLine, last - i);
    for (int64_t n = 0; n < states; ++n)
      for (int64_t s = 0; s < some; ++s)
        g[place[i + s] * states + n] = static_cast<A>(grad[n * vocabulary + id + i + s]);
  }
}

}  // namespace

Tensor packed_logits_forward(const Tensor& hidden_, const Tensor& records_, const Tensor& directory_,
                             const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_,
                             const std::optional<Tensor>& basis_, const std::optional<Tensor>& offset_) {
  check(hidden_.is_cpu() && hidden_.dim() == 2, "hidden: expected a CPU tensor of shape (N, H)");
  const Tensor hidden = as_contiguous(hidden_), records = as_contiguous(records_),
               directory = as_contiguous(directory_);
  const Tensor tiers = as_contiguous(tiers_), levels = as_contiguous(levels_), scales = as_contiguous(scales_);
  const std::optional<Tensor> basis = as_contiguous(basis_), offset = as_contiguous(offset_);
  const PackedTable table =
      checked_table(records, directory, tiers, levels, scales, basis, offset, hidden.size(1));
  Tensor logits =
      empty_in_huge_pages({hidden.size(0), table.vocabulary}, hidden.scalar_type(), hidden.element_size());
  if (hidden.size(0) == 0) return logits;
  dispatch_sums(hidden, scales, [&](auto sum) {
    Head<decltype(sum)> head(table, hidden, scales, basis, offset);
    dispatch_floating(hidden.scalar_type(), "hidden", [&](auto element) {
      auto* to = static_cast<decltype(element)*>(logits.mutable_data_ptr());
      head.states <= kFewStates ? few_states(head, to) : many_states(head, to);
    });
    head.refuse_damage();
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_logits_backward(
    const Tensor& grad_, const Tensor& hidden_, const Tensor& records_, const Tensor& directory_,
    const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_, const std::optional<Tensor>& basis_,
    const std::optional<Tensor>& offset_, bool needs_hidden, bool needs_scales, bool needs_basis,
    bool needs_offset) {
  check(hidden_.is_cpu() && hidden_.dim() == 2, "hidden: expected a CPU tensor of shape (N, H)");
  const Tensor grad = as_contiguous(grad_), hidden = as_contiguous(hidden_), records = as_contiguous(records_),
               directory = as_contiguous(directory_);
  const Tensor tiers = as_contiguous(tiers_), levels = as_contiguous(levels_), scales = as_contiguous(scales_);
  const std::optional<Tensor> basis = as_contiguous(basis_), offset = as_contiguous(offset_);
  const PackedTable table =
      checked_table(records, directory, tiers, levels, scales, basis, offset, hidden.size(1));
  const int64_t states = hidden.size(0), V = table.vocabulary, H = table.width;
  check(grad.is_cpu() && grad.dim() == 2, "grad: expected a CPU tensor of shape (N, V)");
  check_size("grad", grad, 0, states);
  check_size("grad", grad, 1, V);
  const ScalarType type = sums_type(hidden, scales);
  Tensor of_hidden = empty({needs_hidden ? states : 0, H}, type),
         of_scales = empty({needs_scales ? V : 0}, type);
  Tensor of_basis = empty({needs_basis ? table.basis_rows : 0, H}, type),
         of_offset = empty({needs_offset ? H : 0}, type);
  dispatch_sums(hidden, scales, [&](auto sum) {
    using A = decltype(sum);
    const auto data = [](Tensor& tensor, bool needed) {
      return needed ? static_cast<A*>(tensor.mutable_data_ptr()) : nullptr;
    };
    A* scale_gradients = data(of_scales, needs_scales);
    Head<A> head(table, hidden, scales, basis, offset);
    dispatch_floating(grad.scalar_type(), "grad", [&](auto element) {
      const auto* from = static_cast<const decltype(element)*>(grad.const_data_ptr());
      const auto tiles = needs_scales ? head.pack_all() : std::vector<typename Head<A>::Packed>{};
      const auto sums = head.gradients(
          states,
          [&](const auto& block, int64_t id, int64_t threads, A* g) {
            head.for_chunks(block, threads, [&](int64_t first, int64_t last) {
              transpose_gradient(from, V, states, block.place.data(), first, last, id, g);
            });
          },
          [&](const auto& block, int64_t, int64_t begin, int64_t end, const A* g) {
            if (needs_scales) head.sum_scale_gradients(block, begin, end, tiles, g, scale_gradients);
          });
      head.refuse_damage();
      head.finish(sums, data(of_hidden, needs_hidden), data(of_basis, needs_basis),
                  data(of_offset, needs_offset));
    });
  });
  return {of_hidden, of_scales, of_basis, of_offset};
}

}  // namespace embkern
