// Primitives of AVX2, FMA and F16C.

constexpr int kVectorBytes = 32, kRegisters = 16;
constexpr bool kHasVectorPower = true;

#include "cpu/simd/vector.inl"

template <>
struct Elements<Half> {
  static EMBKERN_INLINE Vector<float> widen(const Half* from) {
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static EMBKERN_INLINE void narrow(Vector<float> vector, Half* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Elements<BFloat16> {
  static EMBKERN_INLINE Vector<float> widen(const BFloat16* from) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
  }
  // Rounds to nearest even; every NaN becomes 0x7fc0.
  static EMBKERN_INLINE void narrow(Vector<float> vector, BFloat16* to) {
    const __m256i bits = (__m256i)vector;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
    const __m256 rounded = _mm256_blendv_ps((__m256)even, (__m256)_mm256_set1_epi32(0x7fc00000), nan);
    const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
};

EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
}

EMBKERN_INLINE void store_streamed(const char* from, char* to) {
  EMBKERN_UNROLL for (int at = 0; at < 64; at += 32) _mm256_stream_si256(
      reinterpret_cast<__m256i*>(to + at), _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at)));
}

// Of each lane the least of four vectors, `stride` apart and aligned, the first one if several have it. Its
// number takes two bits: the lower ones of all lanes, then the higher ones.
EMBKERN_INLINE Vector<float> least_of_four(const float* from, int64_t stride, uint8_t* choice) {
  const __m256 a = _mm256_load_ps(from), b = _mm256_load_ps(from + stride),
               c = _mm256_load_ps(from + 2 * stride), d = _mm256_load_ps(from + 3 * stride);
  const __m256 second = _mm256_cmp_ps(b, a, _CMP_LT_OQ), fourth = _mm256_cmp_ps(d, c, _CMP_LT_OQ);
  const __m256 low = _mm256_min_ps(b, a), high = _mm256_min_ps(d, c);
  const __m256 upper = _mm256_cmp_ps(high, low, _CMP_LT_OQ);
  choice[0] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_blendv_ps(second, fourth, upper)));
  choice[1] = static_cast<uint8_t>(_mm256_movemask_ps(upper));
  return (Vector<float>)_mm256_min_ps(high, low);
}

// Lane i is lane QUARTER * kLanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Vector<float> spread_quarter(Vector<float> x) {
  const __m256i lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return (Vector<float>)_mm256_permutevar8x32_ps((__m256)x,
                                                 _mm256_add_epi32(lane, _mm256_set1_epi32(2 * QUARTER)));
}

#include "cpu/simd/lanewise.inl"
#include "cpu/simd/planes.inl"
#include "cpu/simd/power.inl"

// x * 2^whole in two factors, so that the result may be subnormal or infinite; |whole| <= 250.
EMBKERN_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> whole) {
  const Integers n = __builtin_convertvector(whole, Integers), half = n >> 1;
  return x * (Vector<float>)((half + 127) << 23) * (Vector<float>)((n - half + 127) << 23);
}

#include "cpu/simd/exponential.inl"

// The indices of the 32 values of a group, a byte each.
using GroupIndices = __m256i;

// Bytes whose bits from the window of PLANE on are those of the indices; others are arbitrary. Value 8 k + j is
// byte k of word j, the plane rotated.
template <int BITS, int PLANE>
EMBKERN_INLINE __m256i windows(const int32_t* words) {
  constexpr int kFirst = Window<BITS, PLANE>::kFirst;
  const __m256i plane = _mm256_set1_epi32(words[PLANE]);
  const __m256i right =
      _mm256_setr_epi32(kFirst % 32, (kFirst + 1) % 32, (kFirst + 2) % 32, (kFirst + 3) % 32, (kFirst + 4) % 32,
                        (kFirst + 5) % 32, (kFirst + 6) % 32, (kFirst + 7) % 32);
  const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(32), right);
  const __m256i own = _mm256_or_si256(_mm256_srlv_epi32(plane, right), _mm256_sllv_epi32(plane, left));
  if constexpr (PLANE + 1 == BITS) {
    return own;
  } else {
    const __m256i below = _mm256_set1_epi8(Window<BITS, PLANE + 1>::kBelow);
    return _mm256_or_si256(_mm256_and_si256(below, own),
                           _mm256_andnot_si256(below, windows<BITS, PLANE + 1>(words)));
  }
}

template <int BITS, int COUNT>
EMBKERN_INLINE GroupIndices group_indices(const int32_t* words) {
  if constexpr (BITS <= 4) {
    const __m256i index = _mm256_and_si256(windows<BITS, 0>(words), _mm256_set1_epi8((1 << COUNT) - 1));
    const __m256i columns = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                             1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(index, columns), order);
  } else {
    // Byte i of a plane's word is spread over lanes 8 i to 8 i + 7, each of which tests its own bit.
    const __m256i own_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2,
                                              2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    __m256i index = _mm256_setzero_si256();
    for_planes<BITS, COUNT>(words, [&](int bit, uint32_t plane) {
      const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(plane)), own_byte);
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own_bit), own_bit);
      index = _mm256_or_si256(index, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << bit))));
    });
    return index;
  }
}

EMBKERN_INLINE void to_floats(const GroupIndices& indices, Vector<float>* values) {
  const __m128i low = _mm256_castsi256_si128(indices), high = _mm256_extracti128_si256(indices, 1);
  values[0] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
  values[1] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
  values[2] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
  values[3] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
}

// A table of 128 integers. The low and the high bytes of 16 entries are a table of one shuffle each, and bits 4
// to 6 of an index choose among eight of them: a gather of 32 entries takes twice as long.
class Table128 {
 public:
  static constexpr float kUnit = 1;  // of the results

  EMBKERN_INLINE explicit Table128(const int16_t* entries) {
    EMBKERN_UNROLL for (int i = 0; i < 8; ++i) {
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries + 16 * i));
      low_[i] = both_halves(_mm256_and_si256(some, _mm256_set1_epi16(0xff)));
      high_[i] = both_halves(_mm256_srli_epi16(some, 8));
    }
  }

  EMBKERN_INLINE void look_up(const GroupIndices& indices, Vector<float>* values) const {
    const __m256i low = bytes(low_, indices), high = bytes(high_, indices);
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    values[0] = to_float(_mm256_castsi256_si128(even));
    values[1] = to_float(_mm256_castsi256_si128(odd));
    values[2] = to_float(_mm256_extracti128_si256(even, 1));
    values[3] = to_float(_mm256_extracti128_si256(odd, 1));
  }

 private:
  // 16 numbers below 256 to bytes, in both halves.
  static EMBKERN_INLINE __m256i both_halves(__m256i numbers) {
    return _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1)));
  }

  static EMBKERN_INLINE __m256i bytes(const __m256i* tables, __m256i index) {
    __m256i found[8];
    EMBKERN_UNROLL for (int i = 0; i < 8; ++i) found[i] = _mm256_shuffle_epi8(tables[i], index);
    EMBKERN_UNROLL for (int bit = 4; bit < 7; ++bit) {
      const __m256i chosen = _mm256_slli_epi16(index, 7 - bit);  // the bit becomes the sign of its byte
      EMBKERN_UNROLL for (int i = 0; i < 1 << (6 - bit); ++i) found[i] =
          _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], chosen);
    }
    return found[0];
  }

  static EMBKERN_INLINE Vector<float> to_float(__m128i integers) {
    return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(integers));
  }

  __m256i low_[8], high_[8];
};
