// gather_decode: out[n] = scale * (scales[id] * row + offset); row is the values of a record, or values @ basis
//
//   ids (*) int32|int64, records (W,) int32, directory (ceil(V / 32), 5) int32, tiers (T, 1 + G) uint8, levels
//   (17, 16) int8, scales (V,), basis (K, H) or none, offset (H,) or none -> out (*, H) of scales'
//   dtype. docs/packed-format.md describes the format.
//
// Two passes. The first one runs over the positions in order. It writes rows of values: H b / 8 bytes read, H
// elements written; a row that occurred a short while before is copied. Outputs that no cache holds are written
// past the caches, which saves reading their memory first. The second pass, seldom needed, has the rows of
// coefficients: each distinct one is decoded once, rows of a tier share a product with those rows of the basis
// that the tier has bits for, in the tiles of gather_project, and repeated rows are copied. The bits of a row
// depend neither on the other ids nor on the number of threads.
#include <algorithm>
#include <array>
#include <atomic>
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

constexpr int64_t kFewRows = 16;  // rows whose records are on their way before the first one is decoded
constexpr int64_t kFewestRows = 32, kMostRows = 4096;  // positions in a task of the first pass
constexpr int64_t kProductRows = 48;                   // rows of coefficients in a task
constexpr int64_t kStreamedBytes = 16 << 20;           // the least output that is written past the caches
constexpr int64_t kHeldBytes = 192 << 10;              // of decoded rows that are kept for that, in L2
constexpr int64_t kLineBytes = 64;
constexpr int64_t kValueWork = 4;  // of decoding a value, in multiplications

uint64_t hashed(int64_t id) { return static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> 32; }

template <class T>
struct Lookup {
  using A = acc_t<T>;
  const Kernels<T>& kernel;  // read once, since another thread may change the level
  const PackedTable& table;
  const T *scales, *basis, *offset;
  A scale;
  T* out;

  struct Row {
    int64_t id, position, tier;
    const int32_t* record;
  };

  PackedRow<T> packed(const Row& row, const RecordLayout& layout, int64_t width, A factor) const {
    return {row.record, &layout, width, table.levels, static_cast<A>(scales[row.id]) * factor};
  }

  // ---- rows of values ----

  void decode(const Row& row, T* to) const {
    kernel.decode_row(packed(row, table.tiers->layout(row.tier), table.width, scale), offset, scale, to);
  }

  T* place(int64_t position) const { return out + position * table.width; }

  // Writes the rows of values at positions first to last, at most kFewRows, and calls use(row) for the rows of
  // coefficients. Returns false at an id or a record out of range.
  template <class Index, class Write, class Use>
  bool some_values(const Index* ids, int64_t first, int64_t last, Write write, Use use) const {
    Row rows[kFewRows];
    for (int64_t n = first; n < last; ++n) {
      Row& row = rows[n - first];
      row.id = ids[n], row.position = n;
      if (row.id < 0 || row.id >= table.vocabulary) return false;
      const auto place = table.find(row.id);
      if (!table.valid(place)) return false;
      row.tier = place.tier, row.record = table.records + place.start;
      prefetch(row.record, 128);
      prefetch(scales + row.id, sizeof(T));
    }
    for (int64_t i = 0; i < last - first; ++i) table.transform(rows[i].tier) ? use(rows[i]) : write(rows[i]);
    return true;
  }

  // The same for all positions of a task, with copies of rows that it has decoded before.
  template <class Index, class Use>
  bool values(const Index* ids, int64_t first, int64_t last, Use use) const {
    int32_t known[1024];  // by a hash of the id: its last position, from the first one on
    std::memset(known, -1, sizeof(known));
    const auto write = [&](const Row& row) {
      int32_t& before = known[hashed(row.id) % 1024];
      if (before >= 0 && ids[first + before] == row.id)
        std::memcpy(place(row.position), place(first + before), table.width * sizeof(T));
      else
        decode(row, place(row.position));
      before = static_cast<int32_t>(row.position - first);
    };
    for (int64_t n = first; n < last; n += kFewRows)
      if (!some_values(ids, n, std::min(last, n + kFewRows), write, use)) return false;
    return true;
  }

  bool can_stream(int64_t count) const {
    const int64_t bytes = table.width * sizeof(T);
    return count * bytes >= kStreamedBytes && bytes <= kHeldBytes && bytes % kLineBytes == 0 &&
           reinterpret_cast<uintptr_t>(out) % kLineBytes == 0;
  }

  // The same with copies past the caches, of rows that are decoded to memory of the thread.
  template <class Index, class Use>
  bool streamed_values(const Index* ids, int64_t first, int64_t last, Use use) const {
    const int64_t bytes = table.width * sizeof(T), slots = kHeldBytes / bytes;
    thread_local Buffer<T> memory;
    T* rows = memory.resize(slots * table.width);
    std::vector<int64_t> held(slots, -1);  // the id in each slot
    const auto write = [&](const Row& row) {
      const int64_t slot = hashed(row.id) * slots >> 32;
      T* decoded = rows + slot * table.width;
      if (held[slot] != row.id) decode(row, decoded);
      held[slot] = row.id;
      kernel.copy_streamed(decoded, place(row.position), bytes);
    };
    bool valid = true;
    for (int64_t n = first; valid && n < last; n += kFewRows)
      valid = some_values(ids, n, std::min(last, n + kFewRows), write, use);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores are not ordered with later ones
    return valid;
  }

  // ---- rows of coefficients ----

  // The rows of the basis that belong to groups of a tier that have bits.
  using Terms = std::vector<const T*>;

  void find_terms(int64_t tier, Terms& terms) const {
    terms.clear();
    for (int64_t group = 0; group < table.used[tier]; ++group) {
      if (table.bits(tier)[group] == 0) continue;
      for (int64_t p = group * kGroup; p < (group + 1) * kGroup; ++p) terms.push_back(basis + p * table.width);
    }
  }

  // Multiplies up to kProductRows rows of a tier with the basis.
  void product(const Row* rows, int64_t m, const Terms& terms) const {
    thread_local Buffer<double> scratch;
    const RecordLayout& layout = table.tiers->stored_layout(rows->tier);
    const int64_t k = terms.size();
    const int64_t bytes = k * static_cast<int64_t>(kernel.sums_in_element_type ? sizeof(T) : sizeof(A));
    char* values = reinterpret_cast<char*>(scratch.resize((m * bytes + 7) / 8));
    const void* left[kProductRows];
    T* to[kProductRows];
    for (int64_t i = 0; i < m; ++i, values += bytes) {
      kernel.decode_coefficients(packed(rows[i], layout, k, 1), values);
      left[i] = values;
      to[i] = place(rows[i].position);
    }
    kernel.project_sums({m, k, 0, table.width, 0, left, terms.data(), offset, scale, to});
  }

  // The products of at most kFewRows rows, which change their order.
  void few_products(Row* rows, int64_t count) const {
    thread_local Terms terms;
    for (Row *end = rows + count, *next; rows < end; rows = next) {
      next = std::partition(rows, end, [tier = rows->tier](const Row& row) { return row.tier == tier; });
      find_terms(rows->tier, terms);
      product(rows, next - rows, terms);
    }
  }

  void products(const std::vector<Row>& found) const {
    const int64_t width = table.width;
    std::vector<int64_t> ids(found.size());
    for (size_t i = 0; i < found.size(); ++i) ids[i] = found[i].id;
    const Distinct distinct(ids.data(), ids.size(), table.vocabulary, -1);
    // The distinct rows in the order of their tiers, and the place of each in `found`.
    std::array<int64_t, kMaxTiers + 1> begin{};
    for (int64_t u = 0; u < distinct.count(); ++u) ++begin[found[distinct.first(u)].tier + 1];
    for (int64_t tier = 0; tier < kMaxTiers; ++tier) begin[tier + 1] += begin[tier];
    struct Task {
      int64_t first, last, tier;
    };
    std::vector<Task> tasks;
    const int64_t share =
        std::clamp(distinct.count() / torch::stable::get_num_threads(), kFewRows, kProductRows);
    std::vector<Terms> all(table.count);
    int64_t work = 0;
    for (int64_t tier = 0; tier < table.count; ++tier) {
      const int64_t last = begin[tier + 1];
      if (begin[tier] == last) continue;
      find_terms(tier, all[tier]);
      work += (last - begin[tier]) * width * (2 + all[tier].size() / 2);
      for (int64_t i = begin[tier]; i < last; i += share) tasks.push_back({i, std::min(last, i + share), tier});
    }
    std::vector<Row> rows(distinct.count());
    std::vector<int32_t> places(distinct.count());
    for (int64_t u = 0; u < distinct.count(); ++u) {
      const int64_t at = distinct.first(u), to = begin[found[at].tier]++;
      rows[to] = found[at];
      places[to] = static_cast<int32_t>(at);
    }
    for_tasks(tasks.size(), useful_threads(work), [&](int64_t task) {
      const auto [first, last, tier] = tasks[task];
      product(rows.data() + first, last - first, all[tier]);
      for (int64_t i = first; i < last; ++i) {
        const T* row = place(rows[i].position);
        for (int64_t at = distinct.next(places[i]); at >= 0; at = distinct.next(at))
          std::memcpy(place(found[at].position), row, width * sizeof(T));
      }
    });
  }

  // ---- both ----

  template <class Index>
  void operator()(const Index* ids, int64_t count) const {
    if (count <= kFewRows) {
      Row products[kFewRows];
      int64_t found = 0;
      const auto write = [&](const Row& row) { decode(row, place(row.position)); };
      if (!some_values(ids, 0, count, write, [&](const Row& row) { products[found++] = row; }))
        refuse(ids, count);
      return few_products(products, found);
    }
    // Few tasks, since a row is copied only from its own task. Rows of values take about the same time each.
    const int64_t threads = useful_threads(kValueWork * count * table.width);
    const int64_t share = (count + threads - 1) / threads;
    const int64_t size = std::clamp(share, kFewestRows, kMostRows), tasks = (count + size - 1) / size;
    std::vector<std::vector<Row>> found(tasks);
    std::atomic<bool> valid{true};
    const bool streamed = can_stream(count);
    for_tasks(tasks, threads, [&](int64_t task) {
      const int64_t first = task * size, last = std::min(count, first + size);
      const auto use = [&](const Row& row) { found[task].push_back(row); };
      if (!(streamed ? streamed_values(ids, first, last, use) : values(ids, first, last, use)))
        valid.store(false, std::memory_order_relaxed);
    });
    if (!valid.load(std::memory_order_relaxed)) refuse(ids, count);
    for (int64_t task = 1; task < tasks; ++task)
      found[0].insert(found[0].end(), found[task].begin(), found[task].end());
    if (!found[0].empty()) products(found[0]);
  }

  template <class Index>
  void refuse(const Index* ids, int64_t count) const {
    for (int64_t n = 0; n < count; ++n) checked(ids, n, table.vocabulary);
    for (int64_t n = 0; n < count; ++n) table.check_place(checked(ids, n, table.vocabulary));
    check(false, "ids: expected no other thread to write to them or to the table during the call");
  }
};

}  // namespace

Tensor gather_decode_forward(const Tensor& ids_, const Tensor& records_, const Tensor& directory_,
                             const Tensor& tiers_, const Tensor& levels_, const Tensor& scales_,
                             const std::optional<Tensor>& basis_, const std::optional<Tensor>& offset_,
                             int64_t embedding_dim, double scale) {
  check(ids_.is_cpu(), "ids: expected a CPU tensor");
  const ScalarType index_type = ids_.scalar_type();
  dispatch_index(index_type, "ids", [](auto) {});
  const Contiguous ids(ids_), records(records_), directory(directory_), tiers(tiers_), levels(levels_),
      scales(scales_);
  const std::optional<Tensor> basis = as_contiguous(basis_), offset = as_contiguous(offset_);
  const PackedTable table =
      checked_table(*records, *directory, *tiers, *levels, *scales, basis, offset, embedding_dim);
  Tensor out = empty_in_huge_pages(lookup_sizes(*ids, embedding_dim), table.type, scales->element_size());
  const int64_t count = ids->numel();
  if (count == 0) return out;
  dispatch_floating(table.type, "scales", [&](auto element) {
    using T = decltype(element);
    const Lookup<T> look_up{kernels<T>(),
                            table,
                            static_cast<const T*>(scales->const_data_ptr()),
                            optional_data<T>(basis),
                            optional_data<T>(offset),
                            static_cast<acc_t<T>>(scale),
                            static_cast<T*>(out.mutable_data_ptr())};
    dispatch_index(index_type, "ids", [&](auto index) {
      look_up(static_cast<const decltype(index)*>(ids->const_data_ptr()), count);
    });
  });
  return out;
}

}  // namespace embkern
