// gather_decode: out[n] = scale * (scales[id] * row + offset); row is the values of a record, or values @ basis
//
//   ids (*) int32|int64, records (W,) int32, directory (ceil(V / 32), 5) int32, tiers (T, 1 + G) uint8, levels
//   (4, 128) int16, scales (V,), basis (K, H) or none, offset (H,) or none -> out (*, H) of scales' dtype.
//   docs/packed-format.md describes the format.
//
// Each distinct id is decoded once and copied to its other positions. Rows of values need no product: H b / 8
// bytes read, H elements written. Rows of coefficients share a product with the basis, in the tiles of
// gather_project. The bits of a row depend neither on the other ids nor on the number of threads.
#include <array>
#include <cstring>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/compiler.h"
#include "cpu/common/distinct.h"
#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"

namespace embkern {
namespace {

constexpr int64_t kGroup = 32, kMaxTiers = 16, kLevelBits = 4;
constexpr int64_t kDirectRows = 16;   // rows of values in a task
constexpr int64_t kProductRows = 48;  // rows of coefficients in a task

// A checked table. What bounds the reads is a copy: another thread may write to the tensors after the check.
struct PackedTable {
  const int32_t *records, *directory;
  std::vector<uint8_t> tiers;
  int64_t count, vocabulary, groups, words;  // numbers of tiers, rows, groups of a tier, words of the records
  int64_t basis_rows, width;
  std::array<int64_t, kMaxTiers> size{}, used{};  // words and groups of a tier's record
  std::array<int32_t, 256> pair;                  // words of two records, by the byte with their tiers
  std::array<int16_t, kLevelBits * kTrellisStates + 2> levels{};

  const uint8_t* bits(int64_t tier) const { return tiers.data() + tier * (1 + groups) + 1; }
  bool transform(int64_t tier) const { return tiers[tier * (1 + groups)] != 0; }

  // Finds the record of a row and returns its tier.
  int64_t locate(int64_t id, const int32_t** record) const {
    std::array<int32_t, 5> entry;
    std::memcpy(entry.data(), directory + id / kGroup * 5, sizeof(entry));
    int64_t start = entry[0];
    const int64_t lane = id % kGroup;
    const auto two = [&](int64_t i) { return static_cast<uint32_t>(entry[1 + i / 4]) >> 8 * (i % 4) & 255; };
    for (int64_t i = 0; i < lane / 2; ++i) start += pair[two(i)];
    if (lane % 2) start += size[two(lane / 2) & 15];
    const int64_t tier = two(lane / 2) >> 4 * (lane % 2) & 15;
    check(tier < count && start >= 0 && start + size[tier] <= words,
          "directory: expected records within their ", words, " words and tiers below ", count, ", got tier ",
          tier, " at ", start, " for id ", id);
    *record = records + start;
    return tier;
  }
};

PackedTable checked_table(const Tensor& records, const Tensor& directory, const Tensor& tiers,
                          const Tensor& levels, const Tensor& scales, const std::optional<Tensor>& basis,
                          const std::optional<Tensor>& offset, int64_t width) {
  const ScalarType type = scales.scalar_type();
  check_tensor("records", records, 1, ScalarType::Int);
  check_tensor("directory", directory, 2, ScalarType::Int);
  check_tensor("tiers", tiers, 2, ScalarType::Byte);
  check_tensor("levels", levels, 2, ScalarType::Short);
  check_tensor("scales", scales, 1, type);
  check_size("directory", directory, 0, (scales.size(0) + kGroup - 1) / kGroup);
  check_size("directory", directory, 1, 5);
  check_size("levels", levels, 0, kLevelBits);
  check_size("levels", levels, 1, kTrellisStates);
  check(scales.size(0) > 0, "scales: expected at least 1, got 0");
  check(records.size(0) > 0, "records: expected at least 1 word, got 0");
  check(tiers.size(0) >= 1 && tiers.size(0) <= kMaxTiers && tiers.size(1) >= 2,
        "tiers: expected shape (T, 1 + G) with T up to 16 and G >= 1");
  check(width > 0, "embedding_dim: expected at least 1, got ", width);
  PackedTable table;
  table.records = static_cast<const int32_t*>(records.const_data_ptr());
  table.directory = static_cast<const int32_t*>(directory.const_data_ptr());
  const auto* all_tiers = static_cast<const uint8_t*>(tiers.const_data_ptr());
  table.tiers.assign(all_tiers, all_tiers + tiers.numel());
  table.count = tiers.size(0), table.vocabulary = scales.size(0), table.groups = tiers.size(1) - 1;
  table.words = records.numel(), table.width = width, table.basis_rows = 0;
  if (basis) {
    check_tensor("basis", *basis, 2, type);
    check_size("basis", *basis, 1, width);
    check(basis->size(0) % kGroup == 0, "basis: expected a multiple of 32 rows, got ", basis->size(0));
    table.basis_rows = basis->size(0);
  }
  if (offset) {
    check_tensor("offset", *offset, 1, type);
    check_size("offset", *offset, 0, width);
  }
  for (int64_t tier = 0; tier < table.count; ++tier) {
    const int64_t most = table.transform(tier) ? table.basis_rows : width + kGroup - 1;
    for (int64_t group = 0; group < table.groups; ++group) {
      const int64_t bits = table.bits(tier)[group];
      check(bits <= 8 && (bits == 0 || (group + 1) * kGroup <= most / kGroup * kGroup),
            "tiers: expected up to 8 bits in a group of the row, got ", bits, " in group ", group, " of tier ",
            tier);
      table.size[tier] += bits;
      if (bits) table.used[tier] = group + 1;
    }
  }
  for (size_t i = 0; i < table.pair.size(); ++i)
    table.pair[i] = static_cast<int32_t>(table.size[i & 15] + table.size[i >> 4]);
  std::memcpy(table.levels.data(), levels.const_data_ptr(), kLevelBits * kTrellisStates * sizeof(int16_t));
  return table;
}

template <class T>
struct Decode {
  using A = acc_t<T>;
  const Kernels<T>& kernel;  // read once, since another thread may change the level
  const PackedTable& table;
  const T *scales, *offset;
  const std::vector<const T*>& terms;  // rows of the basis
  A scale;
  T* out;

  struct Row {
    const int32_t* record;
    int64_t tier, id, position;
  };

  Row find(int64_t id, int64_t position) const {
    Row row;
    row.tier = table.locate(id, &row.record);
    row.id = id, row.position = position;
    prefetch(row.record, 128);
    prefetch(scales + id, sizeof(T));
    return row;
  }

  PackedRow<T> packed(const Row& row, int64_t width, A factor) const {
    return {row.record, table.bits(row.tier), table.used[row.tier],
            width,      table.levels.data(),  static_cast<A>(scales[row.id]) * factor};
  }

  void direct(const Row& row) const {
    kernel.decode_row(packed(row, table.width, scale), offset, scale, out + row.position * table.width);
  }

  // Decodes up to kProductRows rows of coefficients. Each is padded with zeros to the rows of the basis, so
  // that rows of all tiers share one pass over it, and the bits of a row do not depend on the other rows.
  void product(const Row* rows, int64_t m) const {
    thread_local std::vector<double> scratch;  // aligned for every type
    const int64_t k = table.basis_rows;
    const int64_t bytes = k * static_cast<int64_t>(kernel.sums_in_element_type ? sizeof(T) : sizeof(A));
    scratch.resize(std::max<size_t>(scratch.size(), (m * bytes + 7) / 8));
    const void* left[kProductRows];
    T* to[kProductRows];
    for (int64_t i = 0; i < m; ++i) {
      char* values = reinterpret_cast<char*>(scratch.data()) + i * bytes;
      kernel.decode_coefficients(packed(rows[i], k, 1), values);
      left[i] = values;
      to[i] = out + rows[i].position * table.width;
    }
    kernel.project_sums({m, k, 0, table.width, 0, left, terms.data(), offset, scale, to});
  }

  template <class Copy>
  void decode(const Row* rows, int64_t m, Copy copy) const {
    if (table.transform(rows[0].tier))
      product(rows, m);
    else
      for (int64_t i = 0; i < m; ++i) direct(rows[i]);
    for (int64_t i = 0; i < m; ++i) copy(rows[i].position);
  }

  void operator()(const Distinct& distinct) const {
    const int64_t count = distinct.count(), width = table.width;
    // Rows of values come first, then those of coefficients, both in order of first occurrence.
    std::vector<Row> rows(count);
    int64_t direct_rows = 0, products = count;
    for (int64_t u = 0; u < count; ++u) {
      const Row row = find(distinct.id(u), distinct.first(u));
      rows[table.transform(row.tier) ? --products : direct_rows++] = row;
    }
    std::reverse(rows.begin() + products, rows.end());
    const int64_t work = width * (2 * count + (count - products) * table.basis_rows / 2);

    struct Task {
      int64_t first, last;
    };
    std::vector<Task> tasks;
    const auto add = [&](int64_t first, int64_t last, int64_t most) {
      for (; first < last; first += most) tasks.push_back({first, std::min(last, first + most)});
    };
    add(products, count, kProductRows);  // the long tasks first
    add(0, products, kDirectRows);
    for_tasks(tasks.size(), useful_threads(work), [&](int64_t task) {
      const auto [first, last] = tasks[task];
      decode(rows.data() + first, last - first, [&](int64_t position) {
        const T* row = out + position * width;
        for (int64_t n = distinct.next(position); n >= 0; n = distinct.next(n))
          std::memcpy(out + n * width, row, width * sizeof(T));
      });
    });
  }
};

}  // namespace

Tensor gather_decode_forward(const Tensor& ids_, const Tensor& records_, const Tensor& directory_,
                             const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_,
                             const std::optional<Tensor>& basis_, const std::optional<Tensor>& offset_,
                             int64_t embedding_dim, double scale) {
  check(ids_.is_cpu(), "ids: expected a CPU tensor");
  dispatch_index(ids_.scalar_type(), "ids", [](auto) {});
  const Tensor ids = as_contiguous(ids_), records = as_contiguous(records_),
               directory = as_contiguous(directory_);
  const Tensor tiers = as_contiguous(tiers_), levels = as_contiguous(levels_), scales = as_contiguous(scales_);
  const std::optional<Tensor> basis = as_contiguous(basis_), offset = as_contiguous(offset_);
  const PackedTable table =
      checked_table(records, directory, tiers, levels, scales, basis, offset, embedding_dim);
  Tensor out =
      empty_in_huge_pages(lookup_sizes(ids, embedding_dim), scales.scalar_type(), scales.element_size());
  if (ids.numel() == 0) return out;
  dispatch_floating(scales.scalar_type(), "scales", [&](auto element) {
    using T = decltype(element);
    const T* rows = optional_data<T>(basis);
    std::vector<const T*> terms(table.basis_rows);
    for (size_t p = 0; p < terms.size(); ++p) terms[p] = rows + p * embedding_dim;
    const Decode<T> run{kernels<T>(),
                        table,
                        static_cast<const T*>(scales.const_data_ptr()),
                        optional_data<T>(offset),
                        terms,
                        static_cast<acc_t<T>>(scale),
                        static_cast<T*>(out.mutable_data_ptr())};
    dispatch_index(ids.scalar_type(), "ids", [&](auto index) {
      const auto* all = static_cast<const decltype(index)*>(ids.const_data_ptr());
      if (ids.numel() == 1) {
        const auto row = run.find(checked(all, 0, table.vocabulary), 0);
        run.decode(&row, 1, [](int64_t) {});
      } else {
        run(Distinct(all, ids.numel(), table.vocabulary, -1));
      }
    });
  });
  return out;
}

}  // namespace embkern
