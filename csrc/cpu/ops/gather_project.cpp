// gather_project: out[n] = scale * (codes[ids[n]] @ basis + offset)
//
//   ids (*) int32|int64, codes (V, r), basis (r, H), offset (H,) or none -> out (*, H), all of one dtype;
//   fp32 accumulation, one rounding at the end. codes and basis may have any row stride.
//
// Tokens of a text repeat, so each of the U <= N distinct ids is projected once, into the row of its first
// occurrence, and copied from cache to the others. Bytes moved: U r (codes) + r H (basis, from cache after the
// first block) + N H (output); 2 U r H operations. No (N, r) intermediate reaches memory.
//
// Backward: with s_u the sum, in order of position, of the rows g_n of `grad` that belong to distinct id u,
//   grad_codes[u] = scale s_u @ basis^T,  grad_basis = scale codes[u]^T @ s_u,  grad_offset = scale sum_n g_n
// The ids alone determine the order of every sum, so the bits do not depend on the number of threads. Where the
// kernels multiply bf16, the s_u of repeated ids are rounded to bf16 first; all other sums stay in fp32.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/common/arguments.h"
#include "cpu/common/distinct.h"
#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"

namespace embkern {
namespace {

constexpr int64_t kDealtRows = 4;     // rows are dealt to blocks in this number, that of AVX-512's smaller tile
constexpr int64_t kColumnGrain = 64;  // threads share columns in multiples of this, a cache line or more
constexpr int64_t kMinColumns = 256;  // the least columns of a thread, since each thread packs the rows again

void check_matrix(const char* name, const Tensor& tensor, ScalarType type) {
  check(tensor.is_cpu(), name, ": expected a CPU tensor");
  check(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  check(tensor.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

// The table itself if its rows are contiguous, at any stride, else a copy.
Tensor with_contiguous_rows(const Tensor& table) {
  return table.stride(1) == 1 || table.size(1) <= 1 ? table : torch::stable::contiguous(table);
}

struct Arguments {
  int64_t count, vocabulary, rank, width;
  Tensor ids, codes, basis;

  Arguments(const Tensor& ids_, const Tensor& codes_, const Tensor& basis_)
      : ids(as_contiguous(ids_)), codes(codes_), basis(basis_) {
    check(ids.is_cpu(), "ids: expected a CPU tensor");
    dispatch_index(ids.scalar_type(), "ids", [](auto) {});
    check_matrix("codes", codes, codes.scalar_type());
    check_matrix("basis", basis, codes.scalar_type());
    check_size("basis", basis, 0, codes.size(1));
    codes = with_contiguous_rows(codes);
    basis = with_contiguous_rows(basis);
    count = ids.numel();
    vocabulary = codes.size(0), rank = codes.size(1), width = basis.size(1);
  }
};

template <class T>
std::vector<const T*> row_pointers(const Tensor& table) {
  std::vector<const T*> rows(table.size(0));
  const T* data = static_cast<const T*>(table.const_data_ptr());
  const int64_t stride = table.stride(0);
  for (size_t p = 0; p < rows.size(); ++p) rows[p] = data + p * stride;
  return rows;
}

// ---- forward ------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Kernels<T>& table;  // read once, since another thread may change the level
  const Arguments& arguments;
  std::vector<const T*> basis;
  const T* codes;
  int64_t stride;
  const T* offset;
  acc_t<T> scale;
  T* out;

  // Writes columns first to last of the rows `positions` of out, which belong to `ids`.
  void project(int64_t m, const int64_t* ids, const int64_t* positions, int64_t first, int64_t last) const {
    const void* rows[kBlockRows];
    T* to[kBlockRows];
    for (int64_t i = 0; i < m; ++i) {
      rows[i] = codes + ids[i] * stride;
      to[i] = out + positions[i] * arguments.width;
    }
    const int64_t padding = arguments.width - last;
    table.project({m, arguments.rank, first, last, padding, rows, basis.data(), offset, scale, to});
  }

  // A single token, as when generating text. The time is that of reading the basis.
  void one(int64_t id) const {
    const int64_t width = arguments.width, threads = useful_threads(arguments.rank * width);
    const int64_t columns = column_share(threads);
    const int64_t position = 0;
    for_tasks((width + columns - 1) / columns, threads, [&](int64_t task) {
      project(1, &id, &position, task * columns, std::min(width, (task + 1) * columns));
    });
  }

  int64_t column_share(int64_t splits) const {
    return ((arguments.width + splits - 1) / splits + kColumnGrain - 1) / kColumnGrain * kColumnGrain;
  }

  void operator()(const Distinct& distinct) const {
    const int64_t count = distinct.count(), width = arguments.width;
    const int64_t threads = useful_threads(count * arguments.rank * width);
    // A block packs the basis once for all its rows. If there are few blocks they are split by columns rather
    // than into smaller blocks.
    const int64_t needed = (count + kBlockRows - 1) / kBlockRows;
    const int64_t splits = needed >= 4 * threads ? 1 : std::clamp<int64_t>(width / kMinColumns, 1, threads);
    const int64_t per_split = (threads + splits - 1) / splits;
    const int64_t blocks = std::min((needed + per_split - 1) / per_split * per_split, count);
    const int64_t columns = column_share(splits);
    const int64_t column_blocks = (width + columns - 1) / columns;
    for_tasks(blocks * column_blocks, threads, [&](int64_t task) {
      const int64_t block = task / column_blocks, first = task % column_blocks * columns;
      const int64_t last = std::min(width, first + columns);
      // Rows are dealt to the blocks in turn: early ids tend to be frequent and need more copies.
      int64_t ids[kBlockRows], positions[kBlockRows], m = 0;
      for (int64_t begin = block * kDealtRows; begin < count; begin += blocks * kDealtRows) {
        for (int64_t u = begin; u < std::min(count, begin + kDealtRows); ++u, ++m) {
          ids[m] = distinct.id(u);
          positions[m] = distinct.first(u);
        }
      }
      if (m == 0) return;
      project(m, ids, positions, first, last);
      for (int64_t i = 0; i < m; ++i) {
        const T* row = out + positions[i] * width;
        for (int64_t n = distinct.next(positions[i]); n >= 0; n = distinct.next(n))
          std::memcpy(out + n * width + first, row + first, (last - first) * sizeof(T));
      }
    });
  }
};

template <class T>
void forward(const Arguments& arguments, const std::optional<Tensor>& offset, double scale, Tensor& out) {
  const Forward<T> run{kernels<T>(),
                       arguments,
                       row_pointers<T>(arguments.basis),
                       static_cast<const T*>(arguments.codes.const_data_ptr()),
                       arguments.codes.stride(0),
                       offset ? static_cast<const T*>(offset->const_data_ptr()) : nullptr,
                       static_cast<acc_t<T>>(scale),
                       static_cast<T*>(out.mutable_data_ptr())};
  dispatch_index(arguments.ids.scalar_type(), "ids", [&](auto index) {
    const auto* ids = static_cast<const decltype(index)*>(arguments.ids.const_data_ptr());
    if (arguments.count == 1)
      run.one(checked(ids, 0, arguments.vocabulary));
    else
      run(Distinct(ids, arguments.count, arguments.vocabulary, -1));
  });
}

void forward_into(const Arguments& arguments, const std::optional<Tensor>& offset, double scale, Tensor& out) {
  if (arguments.width == 0) {  // an id may still be out of range
    dispatch_index(arguments.ids.scalar_type(), "ids", [&](auto index) {
      const auto* ids = static_cast<const decltype(index)*>(arguments.ids.const_data_ptr());
      for (int64_t n = 0; n < arguments.count; ++n) checked(ids, n, arguments.vocabulary);
    });
  }
  if (arguments.count == 0 || arguments.width == 0) return;
  dispatch_floating(arguments.codes.scalar_type(), "codes",
                    [&](auto element) { forward<decltype(element)>(arguments, offset, scale, out); });
}

std::optional<Tensor> checked_offset(const Arguments& arguments, const std::optional<Tensor>& offset) {
  if (!offset) return offset;
  const Tensor checked = as_contiguous(*offset);
  check_shape("offset", checked, arguments.codes.scalar_type(), {arguments.width});
  return checked;
}

// ---- backward -----------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  const Kernels<T>& table = kernels<T>();
  const Arguments& arguments;
  const Distinct& distinct;
  const T* grad;
  acc_t<T> scale;
  std::vector<acc_t<T>> sums;     // memory of the sums of ids that occur more than once, in the kernels' type
  std::vector<const void*> rows;  // (U,): the summed gradient of each distinct id

  Backward(const Arguments& arguments_, const Distinct& distinct_, const T* grad_, double scale_)
      : arguments(arguments_), distinct(distinct_), grad(grad_), scale(static_cast<acc_t<T>>(scale_)) {}

  // Fills `rows`, which codes() and basis() multiply.
  void sum_rows() {
    const int64_t count = distinct.count(), width = arguments.width;
    const bool narrow = table.sums_in_element_type;
    const int64_t bytes = width * static_cast<int64_t>(narrow ? sizeof(T) : sizeof(acc_t<T>));
    std::vector<int64_t> slot(count, -1);  // -1: the only row of an id is used in place
    int64_t summed = 0;
    for (int64_t u = 0; u < count; ++u)
      if (distinct.size(u) > 1 || !narrow) slot[u] = summed++;
    sums.resize((summed * bytes + sizeof(acc_t<T>) - 1) / sizeof(acc_t<T>));
    char* memory = reinterpret_cast<char*>(sums.data());
    rows.resize(count);
    constexpr int64_t chunk = 16;
    for_tasks((count + chunk - 1) / chunk, useful_threads(arguments.count * width), [&](int64_t task) {
      std::vector<const T*> positions;
      for (int64_t u = task * chunk; u < std::min(count, (task + 1) * chunk); ++u) {
        if (slot[u] < 0) {
          rows[u] = grad + distinct.first(u) * width;
          continue;
        }
        positions.clear();
        for (int64_t n = distinct.first(u); n >= 0; n = distinct.next(n)) positions.push_back(grad + n * width);
        void* sum = memory + slot[u] * bytes;
        table.sum_rows(positions.data(), positions.size(), width, sum);
        rows[u] = sum;
      }
    });
  }

  // to[u] (r,) = scale * s_u @ basis^T
  void codes(const std::vector<T*>& to) const {
    const int64_t count = distinct.count(), rank = arguments.rank, width = arguments.width;
    const auto basis = row_pointers<T>(arguments.basis);
    const int64_t stride = (rank + kColumnGrain - 1) / kColumnGrain * kColumnGrain;
    std::vector<T> transposed(stride * width);  // (H, r), rows padded
    std::vector<const T*> terms(width);
    const int64_t threads = useful_threads(count * rank * width);
    constexpr int64_t tile = 16;
    for_tasks((width + tile - 1) / tile, useful_threads(8 * rank * width), [&](int64_t task) {
      const int64_t end = std::min(width, (task + 1) * tile);
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = task * tile; j < end; ++j) transposed[j * stride + k] = basis[k][j];
    });
    for (int64_t j = 0; j < width; ++j) terms[j] = transposed.data() + j * stride;
    // A packed block takes at most half of a 1 MiB L2, up to a width of 10922 in fp32.
    const int64_t fits = std::max<int64_t>(12, (1 << 19) / (width * static_cast<int64_t>(sizeof(acc_t<T>))));
    const int64_t size = std::min({kBlockRows / 2, fits, (count + threads - 1) / threads});
    for_tasks((count + size - 1) / size, threads, [&](int64_t task) {
      const int64_t first = task * size, m = std::min(size, count - first);
      table.project_sums({m, width, 0, rank, stride - rank, rows.data() + first, terms.data(), nullptr, scale,
                          to.data() + first});
    });
  }

  void basis(T* to) const {
    const int64_t count = distinct.count(), rank = arguments.rank, width = arguments.width;
    const T* codes = static_cast<const T*>(arguments.codes.const_data_ptr());
    const int64_t stride = arguments.codes.stride(0);
    std::vector<const T*> terms(count);
    for (int64_t u = 0; u < count; ++u) terms[u] = codes + distinct.id(u) * stride;
    const int64_t threads = useful_threads(count * rank * width);
    // Every task packs all codes, so tasks are wide, but their running sums should stay in L2.
    const int64_t share = std::min<int64_t>((width + threads - 1) / threads, 512);
    const int64_t columns = (share + kColumnGrain - 1) / kColumnGrain * kColumnGrain;
    for_tasks((width + columns - 1) / columns, threads, [&](int64_t task) {
      const int64_t first = task * columns, last = std::min(width, first + columns);
      table.outer_sum({rank, count, first, last, terms.data(), rows.data(), scale, to, width});
    });
  }

  void offset(T* to) const {
    const int64_t width = arguments.width;
    std::vector<const T*> positions;
    for (int64_t u = 0; u < distinct.count(); ++u)
      for (int64_t n = distinct.first(u); n >= 0; n = distinct.next(n)) positions.push_back(grad + n * width);
    std::vector<acc_t<T>> sum(width);
    const int64_t columns = 4 * kColumnGrain;
    for_tasks((width + columns - 1) / columns, useful_threads(arguments.count * width), [&](int64_t task) {
      const int64_t first = task * columns, size = std::min(columns, width - first);
      table.total_rows(positions.data(), positions.size(), first, first + size, sum.data());
    });
    for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(scale * sum[j]);
  }
};

template <class T>
void zero(Tensor& tensor) {
  T* data = static_cast<T*>(tensor.mutable_data_ptr());
  const int64_t count = tensor.numel(), chunk = 1 << 18;
  for_tasks((count + chunk - 1) / chunk, useful_threads(count), [&](int64_t task) {
    const int64_t first = task * chunk;
    std::memset(static_cast<void*>(data + first), 0, std::min(chunk, count - first) * sizeof(T));
  });
}

}  // namespace

Tensor gather_project_forward(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                              const std::optional<Tensor>& offset, double scale) {
  const Arguments arguments(ids, codes, basis);
  const std::optional<Tensor> checked = checked_offset(arguments, offset);
  Tensor out =
      empty_in_huge_pages(lookup_sizes(ids, arguments.width), codes.scalar_type(), codes.element_size());
  forward_into(arguments, checked, scale, out);
  return out;
}

void gather_project_out(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                        const std::optional<Tensor>& offset, double scale, Tensor out) {
  const Arguments arguments(ids, codes, basis);
  const std::optional<Tensor> checked = checked_offset(arguments, offset);
  check_shape("out", out, codes.scalar_type(), lookup_sizes(ids, arguments.width));
  forward_into(arguments, checked, scale, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_project_backward(const Tensor& grad, const Tensor& ids,
                                                                   const Tensor& codes, const Tensor& basis,
                                                                   double scale, int64_t padding_idx,
                                                                   bool needs_codes, bool needs_basis,
                                                                   bool needs_offset, bool sparse) {
  const Arguments arguments(ids, codes, basis);
  const ScalarType type = codes.scalar_type();
  const int64_t rank = arguments.rank, width = arguments.width;
  check_tensor("grad", grad, 2, type);
  check_size("grad", grad, 0, arguments.count);
  check_size("grad", grad, 1, width);
  Tensor code_ids, grad_codes, grad_basis, grad_offset;
  dispatch_floating(type, "codes", [&](auto element) {
    using T = decltype(element);
    dispatch_index(arguments.ids.scalar_type(), "ids", [&](auto index) {
      Distinct distinct(static_cast<const decltype(index)*>(arguments.ids.const_data_ptr()), arguments.count,
                        arguments.vocabulary, padding_idx);
      const int64_t count = distinct.count();
      // A gradient that is not needed is an empty tensor, since the stable ABI has no undefined tensors.
      const int64_t code_rows = !needs_codes ? 0 : sparse ? count : arguments.vocabulary;
      code_ids = empty({needs_codes && sparse ? count : 0}, ScalarType::Long);
      grad_codes = empty_in_huge_pages(
          needs_codes ? std::vector<int64_t>{code_rows, rank} : std::vector<int64_t>{0}, type, sizeof(T));
      grad_basis = empty(needs_basis ? std::vector<int64_t>{rank, width} : std::vector<int64_t>{0}, type);
      grad_offset = empty({needs_offset ? width : 0}, type);
      if (!sparse) zero<T>(grad_codes);
      if (needs_codes && sparse) {
        distinct.sort();
        auto* to = static_cast<int64_t*>(code_ids.mutable_data_ptr());
        for (int64_t u = 0; u < count; ++u) to[u] = distinct.id(u);
      }
      if (count == 0 || width == 0) {
        zero<T>(grad_codes);
        zero<T>(grad_basis);
        zero<T>(grad_offset);
        return;
      }
      Backward<T> run(arguments, distinct, static_cast<const T*>(grad.const_data_ptr()), scale);
      if (needs_codes || needs_basis) run.sum_rows();
      if (needs_codes) {
        T* data = static_cast<T*>(grad_codes.mutable_data_ptr());
        std::vector<T*> rows(count);
        for (int64_t u = 0; u < count; ++u) rows[u] = data + (sparse ? u : distinct.id(u)) * rank;
        run.codes(rows);
      }
      if (needs_basis) run.basis(static_cast<T*>(grad_basis.mutable_data_ptr()));
      if (needs_offset) run.offset(static_cast<T*>(grad_offset.mutable_data_ptr()));
    });
  });
  return {code_ids, grad_codes, grad_basis, grad_offset};
}

}  // namespace embkern
