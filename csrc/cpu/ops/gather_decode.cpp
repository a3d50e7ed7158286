// gather_decode: out[n] = scale * (scales[id] * row + offset); row is the values of a record, or values @ basis
//
//   ids (*) int32|int64, records (W,) int32, directory (ceil(V / 32), 5) int32, tiers (T, 1 + G) uint8, levels
//   (4, 128) int16, scales (V,), basis (K, H) or none, offset (H,) or none -> out (*, H) of scales' dtype.
//   docs/packed-format.md describes the format.
//
// Each distinct id is decoded once and copied to its other positions. Rows of values need no product: H b / 8
// bytes read, H elements written. Rows of coefficients share a product with the basis, in the tiles of
// gather_project. The bits of a row depend neither on the other ids nor on the number of threads.
#include <cstring>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/compiler.h"
#include "cpu/common/distinct.h"
#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packed_table.h"

namespace embkern {
namespace {

constexpr int64_t kDirectRows = 16;   // rows of values in a task
constexpr int64_t kProductRows = 48;  // rows of coefficients in a task

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
