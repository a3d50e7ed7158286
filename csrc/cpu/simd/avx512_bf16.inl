// Primitives of AVX-512 with BF16 (conversions, dot products of pairs), VBMI (byte permutations) and GFNI (bit
// matrices).

#include "cpu/simd/avx512_common.inl"

template <>
struct Elements<BFloat16> {
  static EMBKERN_INLINE Vector<float> widen(const BFloat16* from) { return widen_bf16(from); }
  static EMBKERN_INLINE void narrow(Vector<float> vector, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)vector));
  }
};

// The arithmetic of two bf16 terms per unit. The instruction takes bf16 subnormals (below 1.2e-38) for zero.
struct Pair {
  static constexpr int kTerms = 2;
  using A = float;
  using Scalar = uint32_t;
  using Line = __m512i;
  static EMBKERN_INLINE Vector<A> add(Vector<A> sum, Scalar x, Line y) {
    return (Vector<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)),
                                       (__m512bh)y);
  }
  static EMBKERN_INLINE uint32_t bits(const BFloat16* from) {
    uint16_t raw;
    std::memcpy(&raw, from, sizeof(raw));
    return raw;
  }
  static EMBKERN_INLINE void along(const BFloat16* row, int64_t k, Scalar* to) {
    if (k > 1) std::memcpy(to, row, k / 2 * sizeof(Scalar));  // a row of rank 0 may have no address
    if (k % 2) to[k / 2] = bits(row + k - 1);
  }
  template <int SIZE>
  static EMBKERN_INLINE void across(const BFloat16* const* rows, int64_t p, int64_t k, int64_t i, Scalar* to) {
    EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) to[r] =
        bits(rows[p] + i + r) | (p + 1 == k ? 0 : bits(rows[p + 1] + i + r) << 16);
  }
  static EMBKERN_INLINE __m512i columns(const BFloat16* from, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(count > 0 ? (__mmask32(1) << count) - 1 : 0, from);
  }
  template <int N>
  static EMBKERN_INLINE void lines(const BFloat16* const* rows, int64_t p, int64_t k, int64_t j, int64_t count,
                                   Line* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t exist = count < 0 ? N * 16 : std::min<int64_t>(count, N * 16);
    EMBKERN_UNROLL for (int v = 0; v < N; v += 2) {  // 32 columns make two lines of 16 pairs
      const int64_t at = v * 16;
      const __m512i even = columns(rows[p] + j + at, exist - at);
      const __m512i odd = p + 1 == k ? _mm512_setzero_si512() : columns(rows[p + 1] + j + at, exist - at);
      to[v] = _mm512_permutex2var_epi16(even, low, odd);
      if (N > 1) to[v + 1] = _mm512_permutex2var_epi16(even, high, odd);
    }
  }
};

template <>
struct Product<BFloat16> {
  using Arithmetic = Pair;
  using S = BFloat16;
};

// A word per plane; then the bytes of the same 8 values side by side, the highest plane first; then a product
// over GF(2) transposes 8 x 8 bits.
template <int BITS>
EMBKERN_INLINE GroupCodes group_codes(const int32_t* words) {
  // 8 bytes of lane i hold byte i / 2 of every plane, the other 8 hold byte 2 + i / 2; of the 8 values there
  // are, `values` selects the lower or the upper four and makes each a word.
  const __m512i bytes = _mm512_set_epi32(0x03070b0f, 0x13171b1f, 0x0105090d, 0x1115191d, 0x03070b0f, 0x13171b1f,
                                         0x0105090d, 0x1115191d, 0x02060a0e, 0x12161a1e, 0x0004080c, 0x1014181c,
                                         0x02060a0e, 0x12161a1e, 0x0004080c, 0x1014181c);
  constexpr int64_t kLower = 0x0008000400020001, kUpper = 0x0080004000200010;
  const __m512i values = _mm512_set_epi64(kUpper, kUpper, kLower, kLower, kUpper, kUpper, kLower, kLower);
  const __m256i planes = _mm256_maskz_loadu_epi32(static_cast<__mmask8>((1 << BITS) - 1), words);
  const __m512i planes_of_8 = _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(planes));
  return {_mm512_gf2p8affine_epi64_epi8(values, planes_of_8, 0)};
}
