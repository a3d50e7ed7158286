// Primitives of AVX-512 F, BW, DQ and VL.

#include "cpu/simd/avx512_common.inl"

template <>
struct Elements<BFloat16> {
  static EMBKERN_INLINE Vector<float> widen(const BFloat16* from) { return widen_bf16(from); }
  // Rounds to nearest even; every NaN becomes 0x7fc0.
  static EMBKERN_INLINE void narrow(Vector<float> vector, BFloat16* to) {
    const __m512i bits = (__m512i)vector;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)vector, (__m512)vector, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
};

template <int BITS>
EMBKERN_INLINE GroupCodes group_codes(const int32_t* words) {
  __m256i parts[2] = {};  // two sums of half of the planes each shorten the chain of dependent additions
  EMBKERN_UNROLL for (int bit = 0; bit < BITS; ++bit) {
    __m256i& part = parts[bit % 2];
    part = _mm256_mask_add_epi8(part, static_cast<__mmask32>(words[bit]), part,
                                _mm256_set1_epi8(static_cast<char>(1 << bit)));
  }
  // Four bytes each in the order of GroupCodes, then widened.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_or_si256(parts[0], parts[1]), order);
  return {_mm512_cvtepu8_epi16(bytes)};
}
