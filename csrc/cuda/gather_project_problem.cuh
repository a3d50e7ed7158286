// The arguments of gather_project's kernels.
#pragma once

#include <cstdint>

#include "cuda/vectors.cuh"

namespace embkern::cuda {

constexpr char kOp[] = "gather_project";

// The arguments of one call. `aligned_*` means that the pointer and the distance of rows are multiples of 16
// bytes. Rows of codes may have elements between them, which are not read.
template <class T>
struct Problem {
  const void* ids;
  bool wide_ids;           // int64, else int32
  int64_t count;           // N
  int64_t num_embeddings;  // V
  int rank;                // r
  int width;               // H
  const T* codes;
  int64_t codes_stride;  // elements from one row to the next
  const T* basis;
  const T* offset;  // may be null
  // For gather_decode, else null: out[n] = scale * (factors[n] * (codes[ids[n]] @ basis) + offset), and where
  // ids[n] is negative, out[n] is left as it is.
  const acc_t<T>* factors;
  T* out;
  acc_t<T> scale;
  bool aligned_codes, aligned_basis, aligned_out;
};

template <class T>
void set_alignment(Problem<T>& problem) {
  problem.aligned_codes = aligned(problem.codes, problem.codes_stride * sizeof(T));
  problem.aligned_basis = aligned(problem.basis, problem.width * sizeof(T));
  problem.aligned_out = aligned(problem.out, problem.width * sizeof(T));
}

// The id at position n, negative where there is nothing to do. Any other id out of range ends the kernel before
// it is used.
template <class T>
EMBKERN_DEVICE int64_t checked_id(const Problem<T>& problem, int64_t n) {
  const int64_t id = problem.wide_ids ? static_cast<const int64_t*>(problem.ids)[n]
                                      : static_cast<const int32_t*>(problem.ids)[n];
  if (problem.factors && id < 0) return -1;
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(problem.num_embeddings))
    ptx::fail("gather_project: ids: expected 0 <= id < V");
  return id;
}

}  // namespace embkern::cuda
