// gather_project: out[n] = codes[ids[n]] @ basis + offset
//
//   ids (N,) int32|int64, codes (V, r), basis (r, H), offset (H,) or none -> out (N, H), all of one dtype;
//   fp32 accumulation, one rounding at the end.
//
// Bytes moved, forward: N r (gathered codes) + r H (basis, from cache after the first block) + N H (output).
// No (N, r) intermediate reaches memory: each block of rows is gathered into a buffer that stays in L1/L2.
//
// Backward, deterministic for any number of threads: the rows of `grad` that belong to one id are summed
// first, in order of position, in fp32 ("distinct" below, U <= N of them); then
//   grad_codes[u] = distinct[u] @ basis^T,  grad_basis = codes[u]^T @ distinct,  grad_offset = sum_u
//   distinct[u]
// and every element of those is one sequential sum. Bytes: N H read, U H written and read twice.
#include <numeric>

#include "cpu/common.h"
#include "cpu/ops.h"

namespace embkern {
namespace {

constexpr int64_t kBlockRows = 48;  // rows per task: a multiple of the tile's 6, codes and output stay in L2

template <class Index>
void check_ids(const Index* ids, int64_t count, int64_t num_embeddings) {
  for (int64_t n = 0; n < count; ++n) {
    if (ids[n] < 0 || ids[n] >= num_embeddings) {
      throw std::out_of_range(message("ids: expected 0 <= id < ", num_embeddings, ", got ",
                                      static_cast<int64_t>(ids[n]), " at flat position ", n));
    }
  }
}

void check_arguments(const Tensor& ids, const Tensor& codes, const Tensor& basis) {
  check_tensor("ids", ids, 1, ids.scalar_type());
  check_tensor("codes", codes, 2, codes.scalar_type());
  check_tensor("basis", basis, 2, codes.scalar_type());
  check_size("basis", basis, 0, codes.size(1));
}

template <class T, class Index>
void forward(const Index* ids, int64_t count, const T* codes, int64_t rank, const T* basis, int64_t width,
             const T* offset, T* out) {
  using A = acc_t<T>;
  const Widened<T> wide_basis(basis, rank * width);
  const Widened<T> wide_offset(offset, offset ? width : 0);
  const A* init = offset ? wide_offset.data() : nullptr;
  const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> rows(kBlockRows * rank);
    std::vector<A> projected(std::is_same_v<T, A> ? 0 : kBlockRows * width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows, size = std::min(kBlockRows, count - first);
      for (int64_t i = 0; i < size; ++i)
        convert(codes + static_cast<int64_t>(ids[first + i]) * rank, rank, rows.data() + i * rank);
      if constexpr (std::is_same_v<T, A>) {
        gemm(size, width, rank, rows.data(), rank, wide_basis.data(), width, init, out + first * width, width);
      } else {
        gemm(size, width, rank, rows.data(), rank, wide_basis.data(), width, init, projected.data(), width);
        convert(projected.data(), size * width, out + first * width);
      }
    }
  });
}

// out (width,) = sum of `count` rows. Up to 64 rows add up in the accumulation type; the partial sums of a
// longer column add up in fp64, as an id like that of "the" has thousands of rows.
template <class A, class RowAt>
void sum_rows(int64_t count, int64_t width, RowAt row_at, A* out) {
  constexpr int64_t partial_rows = 64;
  std::vector<double> total(count > partial_rows ? width : 0, 0.0);
  for (int64_t begin = 0; begin == 0 || begin < count; begin += partial_rows) {
    std::fill(out, out + width, A(0));
    for (int64_t i = begin; i < std::min(begin + partial_rows, count); ++i) {
      const auto* row = row_at(i);
      for (int64_t j = 0; j < width; ++j) out[j] += static_cast<A>(row[j]);
    }
    for (size_t j = 0; j < total.size(); ++j) total[j] += out[j];
  }
  convert(total.data(), total.size(), out);
}

// The rows of a gradient summed per distinct id, ids ascending.
template <class A>
struct DistinctRows {
  std::vector<int64_t> ids;  // (U,)
  std::vector<A> sums;       // (U, width)

  template <class T, class Index>
  DistinctRows(const T* grad, const Index* positions_ids, int64_t count, int64_t width, int64_t padding_idx) {
    std::vector<int64_t> order;
    order.reserve(count);
    for (int64_t n = 0; n < count; ++n)
      if (positions_ids[n] != padding_idx) order.push_back(n);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t left, int64_t right) { return positions_ids[left] < positions_ids[right]; });
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
      if (i == 0 || positions_ids[order[i]] != positions_ids[order[i - 1]]) {
        starts.push_back(i);
        ids.push_back(positions_ids[order[i]]);
      }
    }
    starts.push_back(order.size());
    sums.resize(ids.size() * width);
    torch::stable::parallel_for(0, ids.size(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        sum_rows(
            starts[u + 1] - starts[u], width, [&](int64_t i) { return grad + order[starts[u] + i] * width; },
            sums.data() + u * width);
    });
  }
  int64_t count() const { return ids.size(); }
};

template <class T, class A>
void backward_codes(const DistinctRows<A>& distinct, const T* basis, int64_t rank, int64_t width,
                    T* grad_codes) {
  std::vector<A> transposed(rank * width);  // (H, r)
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t j = 0; j < width; ++j) transposed[j * rank + k] = static_cast<A>(basis[k * width + j]);
  const int64_t blocks = (distinct.count() + kBlockRows - 1) / kBlockRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> rows(kBlockRows * rank);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows, size = std::min(kBlockRows, distinct.count() - first);
      gemm(size, rank, width, distinct.sums.data() + first * width, width, transposed.data(), rank,
           static_cast<const A*>(nullptr), rows.data(), rank);
      for (int64_t i = 0; i < size; ++i)
        convert(rows.data() + i * rank, rank, grad_codes + distinct.ids[first + i] * rank);
    }
  });
}

template <class T, class A>
void backward_basis(const DistinctRows<A>& distinct, const T* codes, int64_t rank, int64_t width,
                    T* grad_basis) {
  const int64_t count = distinct.count();
  std::vector<A> gathered(rank * count);  // (r, U): codes of the distinct ids, transposed
  for (int64_t u = 0; u < count; ++u)
    for (int64_t k = 0; k < rank; ++k)
      gathered[k * count + u] = static_cast<A>(codes[distinct.ids[u] * rank + k]);
  constexpr int64_t columns = 64;
  torch::stable::parallel_for(0, (width + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> part(rank * columns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * columns, size = std::min(columns, width - first);
      gemm(rank, size, count, gathered.data(), count, distinct.sums.data() + first, width,
           static_cast<const A*>(nullptr), part.data(), columns);
      for (int64_t k = 0; k < rank; ++k)
        convert(part.data() + k * columns, size, grad_basis + k * width + first);
    }
  });
}

template <class T, class A>
void backward_offset(const DistinctRows<A>& distinct, int64_t width, T* grad_offset) {
  std::vector<A> sum(width);
  sum_rows(distinct.count(), width, [&](int64_t u) { return distinct.sums.data() + u * width; }, sum.data());
  convert(sum.data(), width, grad_offset);
}

}  // namespace

Tensor gather_project_forward(const Tensor& ids, const Tensor& codes, const Tensor& basis,
                              const std::optional<Tensor>& offset) {
  check_arguments(ids, codes, basis);
  const int64_t count = ids.size(0), rank = codes.size(1), width = basis.size(1);
  if (offset) {
    check_tensor("offset", *offset, 1, codes.scalar_type());
    check_size("offset", *offset, 0, width);
  }
  Tensor out = torch::stable::new_empty(codes, {count, width});
  dispatch_floating(codes.scalar_type(), "codes", [&](auto element) {
    using T = decltype(element);
    dispatch_index(ids.scalar_type(), "ids", [&](auto index) {
      using Index = decltype(index);
      const auto* id = static_cast<const Index*>(ids.const_data_ptr());
      check_ids(id, count, codes.size(0));
      forward<T, Index>(id, count, static_cast<const T*>(codes.const_data_ptr()), rank,
                        static_cast<const T*>(basis.const_data_ptr()), width,
                        offset ? static_cast<const T*>(offset->const_data_ptr()) : nullptr,
                        static_cast<T*>(out.mutable_data_ptr()));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_project_backward(const Tensor& grad, const Tensor& ids,
                                                           const Tensor& codes, const Tensor& basis,
                                                           int64_t padding_idx, bool needs_codes,
                                                           bool needs_basis, bool needs_offset) {
  check_arguments(ids, codes, basis);
  const int64_t count = ids.size(0), vocabulary = codes.size(0), rank = codes.size(1), width = basis.size(1);
  check_tensor("grad", grad, 2, codes.scalar_type());
  check_size("grad", grad, 0, count);
  check_size("grad", grad, 1, width);
  // A gradient that is not needed is an empty tensor: the stable ABI has no undefined one.
  Tensor grad_codes =
      needs_codes ? torch::stable::new_zeros(codes, {vocabulary, rank}) : torch::stable::new_empty(codes, {0});
  Tensor grad_basis =
      needs_basis ? torch::stable::new_empty(basis, {rank, width}) : torch::stable::new_empty(basis, {0});
  Tensor grad_offset =
      needs_offset ? torch::stable::new_empty(basis, {width}) : torch::stable::new_empty(basis, {0});
  dispatch_floating(codes.scalar_type(), "codes", [&](auto element) {
    using T = decltype(element);
    dispatch_index(ids.scalar_type(), "ids", [&](auto index) {
      using Index = decltype(index);
      const auto* id = static_cast<const Index*>(ids.const_data_ptr());
      check_ids(id, count, vocabulary);
      const DistinctRows<acc_t<T>> distinct(static_cast<const T*>(grad.const_data_ptr()), id, count, width,
                                            padding_idx);
      if (needs_codes)
        backward_codes(distinct, static_cast<const T*>(basis.const_data_ptr()), rank, width,
                       static_cast<T*>(grad_codes.mutable_data_ptr()));
      if (needs_basis)
        backward_basis(distinct, static_cast<const T*>(codes.const_data_ptr()), rank, width,
                       static_cast<T*>(grad_basis.mutable_data_ptr()));
      if (needs_offset) backward_offset(distinct, width, static_cast<T*>(grad_offset.mutable_data_ptr()));
    });
  });
  return {grad_codes, grad_basis, grad_offset};
}

}  // namespace embkern
