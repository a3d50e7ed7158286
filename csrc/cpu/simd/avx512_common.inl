// Primitives of AVX-512 F, BW, DQ and VL that all levels with AVX-512 share.

constexpr int kVectorBytes = 64, kRegisters = 32;
constexpr bool kHasVectorPower = true;

#include "cpu/simd/vector.inl"

template <>
struct Elements<Half> {
  static EMBKERN_INLINE Vector<float> widen(const Half* from) {
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static EMBKERN_INLINE void narrow(Vector<float> vector, Half* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT));
  }
};

EMBKERN_INLINE Vector<float> widen_bf16(const BFloat16* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}

EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
}

// 1 / (scale * sqrt(x) + eps). In fp32 two estimates of 14 bits, each with a
// Newton step, replace a square root and a division, which take 20 cycles of Zen 4 for 16 floats; the estimates
// take half of that. The result is within 3 ulp.
template <class T>
EMBKERN_INLINE Vector<T> inverse_of_root(Vector<T> x, T scale, T eps) {
  if constexpr (std::is_same_v<T, float>) {
    using V = Vector<float>;
    const V guess = (V)_mm512_rsqrt14_ps((__m512)x);
    const V root = x * guess;
    V exact = root + (0.5f * guess) * multiply_add(-1.0f * root, root, x);
    // The estimate is infinite at 0 and at subnormal numbers, whose root is taken as 0.
    exact = x < 1.17549435e-38f ? V{} : exact;
    const V divisor = scale * exact + eps;
    const V inverse = (V)_mm512_rcp14_ps((__m512)divisor);
    return inverse + inverse * multiply_add(-1.0f * divisor, inverse, constant(1.0f));
  } else {
    return constant(T(1)) / (scale * square_root(x) + eps);
  }
}

EMBKERN_INLINE void store_streamed(const char* from, char* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
}

// ---- minima -------------------------------------------------------------------------------------------------

EMBKERN_INLINE void store_bytes(__m512i values, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(values));
}

// Of each lane the least of four vectors, `stride` apart and aligned, the first one if several have it. Its
// number takes two bits: the lower ones of all lanes, then the higher ones.
EMBKERN_INLINE Vector<float> least_of_four(const float* from, int64_t stride, uint8_t* choice) {
  const __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + stride),
               c = _mm512_load_ps(from + 2 * stride), d = _mm512_load_ps(from + 3 * stride);

  const __mmask16 second = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ), fourth = _mm512_cmp_ps_mask(d, c, _CMP_LT_OQ);
  const __m512 low = _mm512_min_ps(b, a), high = _mm512_min_ps(d, c);
  const __mmask16 upper = _mm512_cmp_ps_mask(high, low, _CMP_LT_OQ);
  const uint16_t masks[2] = {static_cast<uint16_t>((upper & fourth) | (~upper & second)), upper};
  std::memcpy(choice, masks, sizeof(masks));
  return (Vector<float>)_mm512_min_ps(high, low);
}

// Lane i is lane QUARTER * kLanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Vector<float> spread_quarter(Vector<float> x) {
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (Vector<float>)_mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(4 * QUARTER)),
                                              (__m512)x);
}

// ---- quantization -------------------------------------------------------------------------------------------

struct Rounded {
  Vector<float> value;
  __m512i code;
};

// The nearest of 2^BITS ascending levels, by binary search among the edges between them; BITS <= 4.
template <int BITS>
EMBKERN_INLINE Rounded nearest_level(Vector<float> values, const float* edges, const float* levels) {
  const __m512 all_edges = _mm512_loadu_ps(edges);
  __m512i code = _mm512_setzero_si512();
  EMBKERN_UNROLL for (int step = 1 << (BITS - 1); step > 0; step /= 2) {
    const __m512i middle = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
    const __mmask16 above =
        _mm512_cmp_ps_mask((__m512)values, _mm512_permutexvar_ps(middle, all_edges), _CMP_GT_OQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  }
  return {(Vector<float>)_mm512_permutexvar_ps(code, _mm512_loadu_ps(levels)), code};
}

// The nearest of 2^BITS multiples of `step`, which lie around zero. The result is in units of the step.
template <int BITS>
EMBKERN_INLINE Rounded nearest_step(Vector<float> values, float step) {
  constexpr int kMost = (1 << BITS) - 1;
  constexpr float kMiddle = kMost / 2.0f;
  const __m512 steps = _mm512_fmadd_ps((__m512)values, _mm512_set1_ps(1 / step), _mm512_set1_ps(kMiddle));
  const __m512i above = _mm512_max_epi32(_mm512_cvtps_epi32(steps), _mm512_setzero_si512());
  const __m512i code = _mm512_min_epi32(above, _mm512_set1_epi32(kMost));
  return {(Vector<float>)_mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(kMiddle)), code};
}

EMBKERN_INLINE void store_codes(const Rounded& rounded, uint8_t* to) { store_bytes(rounded.code, to); }

#include "cpu/simd/planes.inl"
#include "cpu/simd/power.inl"

EMBKERN_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> whole) {
  return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)whole);
}

#include "cpu/simd/exponential.inl"

// ---- groups of a packed table -------------------------------------------------------------------------------

// The indices of the 32 values of a group, a word each, in the order that two unpacking instructions take: lane
// i of 128 bits has those of values 4 i to 4 i + 3 and 16 + 4 i to 16 + 4 i + 3. Bits above those of an index
// that selects one of 128 levels may be set.
struct GroupIndices {
  __m512i words;
};

EMBKERN_INLINE void to_floats(const GroupIndices& indices, Vector<float>* values) {
  const __m512i zero = _mm512_setzero_si512();
  values[0] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(indices.words, zero));
  values[1] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(indices.words, zero));
}

// A table of 128 integers in four registers. Two shuffles of 64 entries each look 32 indices up.
class Table128 {
 public:
  static constexpr float kUnit = 1.0f / 65536;  // of the results: an upper half of a word, with its sign

  EMBKERN_INLINE explicit Table128(const int16_t* entries) {
    EMBKERN_UNROLL for (int i = 0; i < 4; ++i) quarter_[i] = _mm512_loadu_si512(entries + 32 * i);
  }

  EMBKERN_INLINE void look_up(const GroupIndices& indices, Vector<float>* values) const {
    const __m512i index = indices.words, zero = _mm512_setzero_si512();
    const __m512i entries = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                                    _mm512_permutex2var_epi16(quarter_[0], index, quarter_[1]),
                                                    _mm512_permutex2var_epi16(quarter_[2], index, quarter_[3]));
    values[0] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(zero, entries));
    values[1] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(zero, entries));
  }

 private:
  __m512i quarter_[4];
};
