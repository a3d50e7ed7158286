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

// Lane i is from[first + (i >> BITS)]; `from` is aligned and all of these are in one vector of it.
template <int BITS>
EMBKERN_INLINE Vector<float> repeat_lanes(const float* from, int first) {
  const int begin = first / kLanes<float> * kLanes<float>;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i index = _mm256_add_epi32(_mm256_srli_epi32(lane, BITS), _mm256_set1_epi32(first - begin));
  return (Vector<float>)_mm256_permutevar8x32_ps(_mm256_load_ps(from + begin), index);
}

#include "cpu/simd/lanewise.inl"
#include "cpu/simd/planes.inl"
#include "cpu/simd/power.inl"

// The indices of the 32 values of a group.
struct GroupIndices {
  __m256i quarter[4];
};

template <int BITS, int COUNT>
EMBKERN_INLINE GroupIndices group_indices(const int32_t* words) {
  GroupIndices indices;
  EMBKERN_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
    const __m256i lane_bit =
        _mm256_sllv_epi32(_mm256_set1_epi32(1 << (8 * quarter)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i index = _mm256_setzero_si256();
    for_planes<BITS, COUNT>(words, [&](int bit, uint32_t plane) {
      const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(plane)), lane_bit);
      const __m256i set = _mm256_cmpeq_epi32(own, lane_bit);
      index = _mm256_or_si256(index, _mm256_and_si256(set, _mm256_set1_epi32(1 << bit)));
    });
    indices.quarter[quarter] = index;
  }
  return indices;
}

EMBKERN_INLINE void to_floats(const GroupIndices& indices, Vector<float>* values) {
  EMBKERN_UNROLL for (int i = 0; i < 4; ++i) values[i] = (Vector<float>)_mm256_cvtepi32_ps(indices.quarter[i]);
}

// A table of 128 integers. The gather reads 32 bits for each, so one more entry has to be readable.
class Table128 {
 public:
  EMBKERN_INLINE explicit Table128(const int16_t* entries) : entries_(entries) {}

  EMBKERN_INLINE void look_up(const GroupIndices& indices, Vector<float>* values) const {
    EMBKERN_UNROLL for (int i = 0; i < 4; ++i) {
      const int* pairs = reinterpret_cast<const int*>(entries_);
      const __m256i pair = _mm256_i32gather_epi32(pairs, indices.quarter[i], 2);
      const __m256i entry = _mm256_srai_epi32(_mm256_slli_epi32(pair, 16), 16);
      values[i] = (Vector<float>)_mm256_cvtepi32_ps(entry);
    }
  }

 private:
  const int16_t* entries_;
};
