// The kernels of kernels.h for one instruction set, in namespace EMBKERN_LEVEL. They are written in terms of
// the primitives that the level defines in the file EMBKERN_PRIMITIVES.

#if defined(__GNUC__) && !defined(__clang__)
// False warnings of GCC 12: _mm512_undefined_epi32 in its own header, sums that one branch fills, and the
// bounds of a copy of a partial vector.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

namespace embkern {
namespace EMBKERN_LEVEL {
namespace {

// clang-format off: later files use earlier ones
#include EMBKERN_PRIMITIVES
#include "cpu/kernels/tiles.inl"
#include "cpu/kernels/project.inl"
#include "cpu/kernels/outer_sum.inl"
#include "cpu/kernels/sum_rows.inl"
#include "cpu/kernels/row_loss.inl"
#include "cpu/kernels/packed_product.inl"
#include "cpu/kernels/adam.inl"
#include "cpu/kernels/logits.inl"
#include "cpu/kernels/bits.inl"
#include "cpu/kernels/decode.inl"
#include "cpu/kernels/packed_row_product.inl"
#include "cpu/kernels/quantize.inl"
#include "cpu/kernels/trellis.inl"
// clang-format on

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  using S = typename Product<T>::S;
  using M = typename Product<T>::Arithmetic;
  static constexpr Kernels<T> table = {std::is_same_v<S, T>,
                                       project<T, T, M>,
                                       project<T, S, M>,
                                       outer_sum<T, S, M>,
                                       sum_rows<T, S>,
                                       total_rows<T>,
                                       row_sums<T>,
                                       row_power<T>,
                                       row_gradient<T>,
                                       decode_row<T>,
                                       decode_coefficients<T, S>,
                                       copy_streamed,
                                       packed_products<T>,
                                       row_products<T>};
  return table;
}

template <class T>
const TrainingKernels<T>& training_kernels() {
  static constexpr TrainingKernels<T> table = {
      packed_size<T>, pack<T>,          pack_transposed<T>,  project_packed<T>,  outer_update<T>,
      adam<T>,        finish_logits<T>, sum_exponentials<T>, logit_gradients<T>, exp_and_tanh<T>};
  return table;
}

template <class T>
const PackingKernels& packing_kernels() {
  static constexpr PackingKernels table = {quantize_row, search_trellis};
  return table;
}

template const PackingKernels& packing_kernels<float>();
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();
template const TrainingKernels<float>& training_kernels<float>();
template const TrainingKernels<double>& training_kernels<double>();

}  // namespace EMBKERN_LEVEL
}  // namespace embkern

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
