// What the ops over a whole packed table share: the two vectors of a hidden state that rows are multiplied
// with, and blocks of rows that are decoded and multiplied. packed_logits.cpp explains the computation.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/packed_table.h"

namespace embkern {
namespace {  // torch's Tensor is hidden, and what holds one must be, too

constexpr int64_t kStateTile = 256;  // hidden states in one product with a block of rows
// Rows in a block of the backward, which all threads decode: many, as threads wait for each other three times
// per block, but no more than there is room for their gradients.
constexpr int64_t kMostRows = 4096, kFewestRows = 1024, kBlockGradients = 1 << 22;
constexpr int64_t kGradientChunk = 128;  // rows of a block in a task
constexpr int64_t kGradientStates = 48;  // hidden states in a task that sums their gradients

inline int64_t padded(int64_t width) { return (width + kGroup - 1) / kGroup * kGroup; }

// Converts `count` elements from `first` on to A.
template <class A>
void widen(const Tensor& tensor, int64_t first, int64_t count, A* to) {
  dispatch_floating(tensor.scalar_type(), "scales", [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(tensor.const_data_ptr()) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i]);
  });
}

struct Row {
  int64_t id, tier;
  const int32_t* record;
};

// A table with its floating-point tensors, and the hidden states. A row of values is multiplied with a hidden
// state, a row of coefficients with basis @ hidden state; both are called its factors.
template <class A>
struct Head {
  const PackedTable& table;
  const Tensor& hidden;
  const Tensor& scales;
  const std::optional<Tensor>&basis, &offset;
  const Kernels<A>& kernel;
  const TrainingKernels<A>& products;

  int64_t states, width, direct_width, basis_rows;
  int64_t block_rows;      // of the backward
  Buffer<A> factors[2];    // (states, direct_width): hidden; (states, basis_rows): hidden @ basis^T
  Buffer<A> row_scales;    // (V,)
  std::vector<A> offsets;  // offset . hidden, per state
  std::atomic<bool> damaged{false};

  Head(const PackedTable& table, const Tensor& hidden, const Tensor& scales, const std::optional<Tensor>& basis,
       const std::optional<Tensor>& offset)
      : table(table),
        hidden(hidden),
        scales(scales),
        basis(basis),
        offset(offset),
        kernel(kernels<A>()),
        products(training_kernels<A>()),
        states(hidden.size(0)),
        width(table.width),
        direct_width(padded(table.width)),
        basis_rows(table.basis_rows),
        block_rows(std::clamp(kBlockGradients / std::max<int64_t>(states, 1) / kFewestRows * kFewestRows,
                              kFewestRows, kMostRows)) {
    factors[0].resize(states * direct_width);
    factors[1].resize(states * basis_rows);
    widen(scales, 0, table.vocabulary, row_scales.resize(table.vocabulary));
    for (int64_t n = 0; n < states; ++n) {
      A* to = factors[0].get() + n * direct_width;
      widen(hidden, n * width, width, to);
      std::fill(to + width, to + direct_width, A(0));
    }
    offsets.assign(states, A(0));
    if (basis) project(*basis, basis_rows, factors[1].get(), basis_rows);
    if (offset) project(*offset, 1, offsets.data(), 1);
  }

  int64_t factor_width(bool transform) const { return transform ? basis_rows : direct_width; }
  const A* factor(bool transform, int64_t n) const {
    return factors[transform].get() + n * factor_width(transform);
  }

  // to[n][k] = hidden[n] . matrix[k]
  void project(const Tensor& matrix, int64_t rows, A* to, int64_t stride) const {
    std::vector<const A*> all(states);
    for (int64_t n = 0; n < states; ++n) all[n] = factor(false, n);
    dispatch_floating(matrix.scalar_type(), "basis", [&](auto element) {
      using T = decltype(element);
      const T* from = static_cast<const T*>(matrix.const_data_ptr());
      if constexpr (std::is_same_v<acc_t<T>, A>) {
        const auto& dots = kernels<T>();
        for_tasks(rows, useful_threads(rows * width * states), [&](int64_t k) {
          std::vector<A> line(states);
          dots.row_products(from + k * width, width, all.data(), states, line.data());
          for (int64_t n = 0; n < states; ++n) to[n * stride + k] = line[n];
        });
      } else {  // hidden and the table differ in width: rare, and converted row by row
        std::vector<A> wide(direct_width, A(0));
        for (int64_t k = 0; k < rows; ++k) {
          for (int64_t j = 0; j < width; ++j) wide[j] = static_cast<A>(from[k * width + j]);
          std::vector<A> line(states);
          kernel.row_products(wide.data(), width, all.data(), states, line.data());
          for (int64_t n = 0; n < states; ++n) to[n * stride + k] = line[n];
        }
      }
    });
  }

  // Calls use(row) for the rows of blocks of 32 of the directory.
  template <class Use>
  void for_rows(int64_t first_block, int64_t last_block, Use use) {
    for (int64_t block = first_block; block < last_block; ++block) {
      std::array<int32_t, 5> entry;
      std::memcpy(entry.data(), table.directory + block * 5, sizeof(entry));
      int64_t start = first_word(entry.data());
      const int64_t rows = std::min(kGroup, table.vocabulary - block * kGroup);
      for (int64_t lane = 0; lane < rows; ++lane) {
        const int64_t tier = static_cast<uint32_t>(entry[1 + lane / 8]) >> 4 * (lane % 8) & 15;
        if (tier >= table.count || start < 0 || start + table.size[tier] > table.words) {
          damaged.store(true, std::memory_order_relaxed);
          return;
        }
        use(Row{block * kGroup + lane, tier, table.records + start});
        start += table.size[tier];
      }
    }
  }

  void refuse_damage() const {
    check(!damaged.load(), "directory: expected records within their ", table.words, " words and tiers below ",
          table.count);
  }

  PackedRow<A> packed(const Row& row, A factor) const {
    return {row.record, &table.tiers->layout(row.tier), table.used[row.tier] * kGroup, table.levels, factor};
  }

  // ---- many hidden states ----

  // Rows in the order of their tiers; `values` are where those of each row lie.
  struct Block {
    std::vector<Row> rows;
    std::vector<const void*> values;
    std::array<int64_t, kMaxTiers> ends;  // of the tiers' rows
    std::vector<int32_t> place;           // of each id among the rows, from the first id on
  };

  // Rows first (a multiple of 32) to last, not decoded yet; fewer if the table is damaged.
  Block sorted(int64_t first, int64_t last) {
    Block block;
    std::vector<Row> found;
    found.reserve(last - first);
    std::array<int64_t, kMaxTiers + 1> begin{};
    for_rows(first / kGroup, (last + kGroup - 1) / kGroup, [&](const Row& row) {
      found.push_back(row);
      ++begin[row.tier + 1];
    });
    for (int64_t tier = 0; tier < kMaxTiers; ++tier) block.ends[tier] = begin[tier + 1] += begin[tier];
    block.rows.resize(found.size());
    block.place.resize(found.size());
    for (const Row& row : found) {
      const int64_t to = begin[row.tier]++;
      block.rows[to] = row;
      block.place[row.id - first] = static_cast<int32_t>(to);
    }
    block.values.resize(found.size());
    return block;
  }

  // Decodes rows begin to end of a block to places `stride` apart, each times its scale if `scaled`.
  void decode(Block& block, int64_t begin, int64_t end, bool scaled, A* values, int64_t stride) const {
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = block.rows[i];
      A* to = values + i * stride;
      kernel.decode_coefficients(packed(row, scaled ? row_scales.get()[row.id] : A(1)), to);
      block.values[i] = to;
    }
  }

  void scales_of(const Block& block, int64_t begin, int64_t end, A* to) const {
    for (int64_t i = begin; i < end; ++i) to[i - begin] = row_scales.get()[block.rows[i].id];
  }

  // Multiplies decoded rows by their scales.
  void scale(const Block& block, int64_t begin, int64_t end, A* values, int64_t stride) const {
    for (int64_t i = begin; i < end; ++i) {
      const A factor = row_scales.get()[block.rows[i].id];
      for (int64_t j = 0; j < table.used[block.rows[i].tier] * kGroup; ++j) values[i * stride + j] *= factor;
    }
  }

  // Calls use(tier, its first row, the one after its last) for the tiers of rows begin to end of a block.
  template <class Use>
  void for_tiers(const Block& block, int64_t begin, int64_t end, Use use) const {
    for (int64_t tier = 0; tier < table.count && begin < end; ++tier) {
      const int64_t last = std::min(end, block.ends[tier]);
      if (last > begin) use(tier, begin, last);
      begin = std::max(begin, last);
    }
  }

  // The transposed factors of hidden states first to last in both forms, packed for project_packed.
  using Packed = std::array<Buffer<A>, 2>;
  std::vector<Packed> pack_all() const {
    std::vector<Packed> tiles;
    for (int64_t n = 0; n < states; n += kStateTile) tiles.push_back(pack(n, std::min(states, n + kStateTile)));
    return tiles;
  }
  Packed pack(int64_t first, int64_t last) const {
    Packed packed;
    std::vector<const A*> rows(last - first);
    for (const bool transform : {false, true}) {
      const int64_t terms = factor_width(transform);
      packed[transform].resize(products.packed_size(terms, last - first));
      for (int64_t n = first; n < last; ++n) rows[n - first] = factor(transform, n);
      if (terms > 0) products.pack_transposed(rows.data(), terms, last - first, packed[transform].get());
    }
    return packed;
  }

  // sums[i][n] = values of row begin + i of the block . factors of hidden state n, for `count` states.
  void multiply(const Block& block, int64_t begin, int64_t end, const Packed& packed_factors, int64_t count,
                A* sums, int64_t stride) const {
    std::vector<A*> out(end - begin);
    for (size_t i = 0; i < out.size(); ++i) out[i] = sums + static_cast<int64_t>(i) * stride;
    for_tiers(block, begin, end, [&](int64_t tier, int64_t first, int64_t last) {
      const bool transform = table.transform(tier);
      const int64_t terms = table.used[tier] * kGroup;
      for (; first < last; first += kBlockRows)
        products.project_packed(
            {std::min(kBlockRows, last - first), terms, 0, count, 0, block.values.data() + first, nullptr,
             nullptr, A(1), out.data() + first - begin, factor_width(transform)},
            packed_factors[transform].get());
    });
  }

  // ---- gradients ----

  // What a gradient of the logits, g (states, V), sums up to.
  struct Sums {
    Buffer<A> factors[2];        // (states, factor_width): sum over v of g[n][v] * scales[v] * values[v]
    std::vector<double> totals;  // (states,): sum over v of g[n][v]
  };

  Sums no_sums() const {
    Sums sums;
    for (const bool transform : {false, true}) {
      const int64_t count = states * factor_width(transform);
      std::fill_n(sums.factors[transform].resize(count), count, A(0));
    }
    sums.totals.assign(states, 0);
    return sums;
  }

  // Calls use(block, its first id, threads) for blocks of block_rows rows, up to the first damaged one.
  template <class Use>
  void for_blocks(Use use) {
    for (int64_t first = 0; first < table.vocabulary; first += block_rows) {
      const int64_t rows = std::min(block_rows, table.vocabulary - first);
      Block block = sorted(first, first + rows);
      if (static_cast<int64_t>(block.rows.size()) < rows) return;
      use(block, first, useful_threads(rows * width * states));
    }
  }

  // Calls use(begin, end) for the chunks of a block.
  template <class Use>
  static void for_chunks(const Block& block, int64_t threads, Use use) {
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    for_tasks((rows + kGradientChunk - 1) / kGradientChunk, threads,
              [&](int64_t task) { use(task * kGradientChunk, std::min(rows, (task + 1) * kGradientChunk)); });
  }

  // Sums g over all rows. For every block, prepare(block, first id, threads, g) is called, and then, for chunks
  // of its rows, fill(block, first id, begin, end, g), with the values of these rows decoded and not scaled.
  // Together they write g, a row of `stride` elements for each row of the block.
  template <class Prepare, class Fill>
  Sums gradients(int64_t stride, Prepare prepare, Fill fill) {
    const int64_t value_stride = std::max(direct_width, basis_rows);
    Sums sums = no_sums();
    Buffer<A> value_memory, gradient_memory;
    A* values = value_memory.resize(block_rows * value_stride);
    A* g = gradient_memory.resize(block_rows * stride);
    for_blocks([&](Block& block, int64_t first, int64_t threads) {
      prepare(block, first, threads, g);
      for_chunks(block, threads, [&](int64_t begin, int64_t end) {
        decode(block, begin, end, false, values, value_stride);
        fill(block, first, begin, end, g);
        scale(block, begin, end, values, value_stride);
      });
      for_tasks((states + kGradientStates - 1) / kGradientStates, threads, [&](int64_t task) {
        const int64_t begin = task * kGradientStates;
        add_rows(block, begin, std::min(kGradientStates, states - begin), g, stride, sums);
      });
    });
    return sums;
  }

  // The scale gradients of rows begin to end of a block, whose values are not scaled.
  void sum_scale_gradients(const Block& block, int64_t begin, int64_t end, const std::vector<Packed>& tiles,
                           const A* g, A* scale_gradients) const {
    thread_local Buffer<A> scratch;
    A* found = scratch.resize(kGradientChunk * kStateTile);
    double sums[kGradientChunk] = {};
    for (int64_t n = 0, tile = 0; n < states; n += kStateTile, ++tile) {
      const int64_t count = std::min(kStateTile, states - n);
      multiply(block, begin, end, tiles[tile], count, found, kStateTile);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t s = 0; s < count; ++s)
          sums[i - begin] += found[(i - begin) * kStateTile + s] * g[i * states + n + s];
    }
    for (int64_t i = begin; i < end; ++i) scale_gradients[block.rows[i].id] = static_cast<A>(sums[i - begin]);
  }

  // Adds the scaled rows of a block, times g, to the sums of `count` states from `begin` on.
  void add_rows(const Block& block, int64_t begin, int64_t count, const A* g, int64_t stride,
                Sums& sums) const {
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    std::vector<const A*> left(rows), right(rows);
    for (int64_t i = 0; i < rows; ++i) {
      left[i] = g + i * stride + begin;
      right[i] = static_cast<const A*>(block.values[i]);
      for (int64_t n = 0; n < count; ++n) sums.totals[begin + n] += left[i][n];
    }
    for_tiers(block, 0, rows, [&](int64_t tier, int64_t first, int64_t last) {
      const int64_t terms = table.used[tier] * kGroup, ld = factor_width(table.transform(tier));
      if (terms > 0)
        products.outer_update({count, last - first, terms, left.data() + first, right.data() + first, false,
                               sums.factors[table.transform(tier)].get() + begin * ld, ld});
    });
  }

  // The gradients of hidden (states, H), basis (K, H) and offset (H,), where the pointers are not null.
  void finish(const Sums& sums, A* of_hidden, A* of_basis, A* of_offset) const {
    std::vector<A*> out(states);
    std::vector<const void*> left(states);
    std::vector<const A*> rows(basis_rows);
    if (of_hidden) {
      std::vector<A> wide(std::max(basis_rows, int64_t(1)) * width);
      if (basis) widen(*basis, 0, basis_rows * width, wide.data());
      for (int64_t p = 0; p < basis_rows; ++p) rows[p] = wide.data() + p * width;
      for (int64_t n = 0; n < states; ++n)
        left[n] = sums.factors[1].get() + n * basis_rows, out[n] = of_hidden + n * width;
      for (int64_t n = 0; n < states; n += kBlockRows)
        kernel.project_sums({std::min(kBlockRows, states - n), basis_rows, 0, width, 0, left.data() + n,
                             rows.data(), nullptr, A(1), out.data() + n});
      std::vector<A> line(width, A(0));
      if (offset) widen(*offset, 0, width, line.data());
      for (int64_t n = 0; n < states; ++n)
        for (int64_t j = 0; j < width; ++j)
          out[n][j] += sums.factors[0].get()[n * direct_width + j] + static_cast<A>(sums.totals[n]) * line[j];
    }
    if (of_basis) {
      std::vector<const A*> a(states);
      std::vector<const void*> b(states);
      for (int64_t n = 0; n < states; ++n)
        a[n] = sums.factors[1].get() + n * basis_rows, b[n] = factor(false, n);
      kernel.outer_sum({basis_rows, states, 0, width, a.data(), b.data(), A(1), of_basis, width});
    }
    if (of_offset) {
      std::vector<double> total(width, 0);
      for (int64_t n = 0; n < states; ++n)
        for (int64_t j = 0; j < width; ++j) total[j] += sums.totals[n] * factor(false, n)[j];
      for (int64_t j = 0; j < width; ++j) of_offset[j] = static_cast<A>(total[j]);
    }
  }
};

inline ScalarType sums_type(const Tensor& hidden, const Tensor& scales) {
  const bool wide = hidden.scalar_type() == ScalarType::Double || scales.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

template <class Body>
void dispatch_sums(const Tensor& hidden, const Tensor& scales, Body body) {
  if (sums_type(hidden, scales) == ScalarType::Double)
    body(double{});
  else
    body(float{});
}

}  // namespace
}  // namespace embkern
