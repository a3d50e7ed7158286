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

// The two bytes of a plane that have the window of a value, a word each in the order of GroupIndices, and the
// shift that takes the window from them.
template <int BITS, int PLANE>
struct WindowBytes {
  alignas(64) uint8_t bytes[64] = {};
  alignas(64) uint16_t shifts[32] = {};
  constexpr WindowBytes() {
    for (int i = 0; i < 32; ++i) {
      const int value = i % 8 / 4 * 16 + i / 8 * 4 + i % 4;
      const int first = (value + Window<BITS, PLANE>::kFirst) % 32;
      bytes[2 * i] = static_cast<uint8_t>(first / 8);
      bytes[2 * i + 1] = static_cast<uint8_t>((first / 8 + 1) % 4);
      shifts[i] = static_cast<uint16_t>(first % 8);
    }
  }
};
template <int BITS, int PLANE>
constexpr WindowBytes<BITS, PLANE> kWindowBytes{};

// Words whose bits from the window of PLANE on are those of the indices; others are arbitrary.
template <int BITS, int PLANE>
EMBKERN_INLINE __m512i windows(const int32_t* words) {
  const WindowBytes<BITS, PLANE>& from = kWindowBytes<BITS, PLANE>;
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_set1_epi32(words[PLANE]), _mm512_load_si512(from.bytes));
  const __m512i own = _mm512_srlv_epi16(bytes, _mm512_load_si512(from.shifts));
  if constexpr (PLANE + 1 == BITS) {
    return own;
  } else {
    const __m512i below = _mm512_set1_epi16(Window<BITS, PLANE + 1>::kBelow);
    return _mm512_ternarylogic_epi32(below, own, windows<BITS, PLANE + 1>(words),
                                     0xca);  // below ? own : others
  }
}

template <int BITS, int COUNT>
EMBKERN_INLINE GroupIndices group_indices(const int32_t* words) {
  if constexpr (BITS <= 4) {
    return {windows<BITS, 0>(words)};
  } else {
    __m256i parts[2] = {};  // two sums of half of the planes each shorten the chain of dependent additions
    for_planes<BITS, COUNT>(words, [&](int bit, uint32_t plane) {
      __m256i& part = parts[bit % 2];
      part = _mm256_mask_add_epi8(part, plane, part, _mm256_set1_epi8(static_cast<char>(1 << bit)));
    });
    // Four bytes each in the order of GroupIndices, then widened.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_or_si256(parts[0], parts[1]), order);
    return {_mm512_cvtepu8_epi16(bytes)};
  }
}
