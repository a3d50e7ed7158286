// The codes of a row at some bits a value, each by itself, and the search for its scale.

struct Rounded {
  Vector<float> value;
#if defined(EMBKERN_AVX512)
  __m512i code;
#else
  int32_t code[kLanes<float>];
#endif
};

// The nearest level of each value, by binary search among the edges; beyond four bits the nearest step.
template <int BITS>
EMBKERN_INLINE Rounded rounded(Vector<float> values, const RowToPack& row) {
  Rounded result;
  constexpr int kMost = (1 << BITS) - 1;
  constexpr float kMiddle = kMost / 2.0f;
  const int at = BITS <= 4 ? 16 * (BITS - 1) : 0;
#if defined(EMBKERN_AVX512)
  if constexpr (BITS <= 4) {
    const __m512 edges = _mm512_loadu_ps(row.edges + at);
    __m512i code = _mm512_setzero_si512();
    EMBKERN_UNROLL for (int step = 1 << (BITS - 1); step > 0; step /= 2) {
      const __m512i middle = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
      const __mmask16 above =
          _mm512_cmp_ps_mask((__m512)values, _mm512_permutexvar_ps(middle, edges), _CMP_GT_OQ);
      code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
    }
    result.code = code;
    result.value = (Vector<float>)_mm512_permutexvar_ps(code, _mm512_loadu_ps(row.levels + at));
  } else {
    const __m512 steps =
        _mm512_fmadd_ps((__m512)values, _mm512_set1_ps(1 / row.steps[BITS]), _mm512_set1_ps(kMiddle));
    const __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32(steps), _mm512_setzero_si512());
    result.code = _mm512_min_epi32(code, _mm512_set1_epi32(kMost));
    result.value = (Vector<float>)_mm512_sub_ps(_mm512_cvtepi32_ps(result.code), _mm512_set1_ps(kMiddle));
  }
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    int code = 0;
    if constexpr (BITS <= 4) {
      for (int step = 1 << (BITS - 1); step > 0; step /= 2)
        code += values[i] > row.edges[at + code + step - 1] ? step : 0;
      result.value[i] = row.levels[at + code];
    } else {
      const float steps = std::nearbyint(values[i] / row.steps[BITS] + kMiddle);
      code = static_cast<int>(std::min(std::max(steps, 0.0f), static_cast<float>(kMost)));
      result.value[i] = static_cast<float>(code) - kMiddle;
    }
    result.code[i] = code;
  }
#endif
  return result;
}

struct PackingSums {
  Vector<float> dot, square;
};

template <int BITS, bool CODES>
EMBKERN_INLINE void quantize_group(const RowToPack& row, int64_t first, float inverse, PackingSums& sums,
                                   uint8_t* codes) {
  EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) {
    const int64_t at = first + v * kLanes<float>;
    const Vector<float> values = load(row.values + at);
    const Rounded nearest = rounded<BITS>(inverse * values, row);
    if constexpr (CODES) {
#if defined(EMBKERN_AVX512)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + at), _mm512_cvtepi32_epi8(nearest.code));
#else
      for (int i = 0; i < kLanes<float>; ++i) codes[at + i] = static_cast<uint8_t>(nearest.code[i]);
#endif
    } else {
      const Vector<float> weighted = row.squares ? load(row.squares + at) * nearest.value : nearest.value;
      sums.dot = sums.dot + weighted * values;
      sums.square = sums.square + weighted * nearest.value;
    }
  }
}

template <bool CODES>
EMBKERN_INLINE PackingSums quantize_at(const RowToPack& row, float inverse, uint8_t* codes) {
  PackingSums sums{};
  for (int64_t group = 0; group < row.groups; ++group) {
    const int64_t first = group * 32;
    switch (row.bits[group]) {
#define EMBKERN_BITS(bits)                                         \
  case bits:                                                       \
    quantize_group<bits, CODES>(row, first, inverse, sums, codes); \
    break;
      EMBKERN_BITS(1)
      EMBKERN_BITS(2)
      EMBKERN_BITS(3)
      EMBKERN_BITS(4)
      EMBKERN_BITS(5)
      EMBKERN_BITS(6)
      EMBKERN_BITS(7)
      EMBKERN_BITS(8)
#undef EMBKERN_BITS
      default:
        if constexpr (CODES) std::memset(codes + first, 0, 32);
    }
  }
  return sums;
}

inline double total(Vector<float> vector) {
  double sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += vector[i];
  return sum;
}

inline PackedFit quantize_row(const RowToPack& row, uint8_t* codes) {
  Vector<float> squares{};
  for (int64_t at = 0; at < row.groups * 32; at += kLanes<float>) {
    const Vector<float> values = load(row.values + at);
    squares = squares + values * values;
  }
  double root = std::sqrt(total(squares) / static_cast<double>(row.groups * 32));
  if (!(root > 0)) root = 1;
  PackedFit best{0, -1};
  float chosen = 1;
  for (int64_t i = 0; i < row.tries; ++i) {
    const float inverse = static_cast<float>(1 / (root * row.factors[i]));
    const PackingSums sums = quantize_at<false>(row, inverse, nullptr);
    const double dot = total(sums.dot), square = std::max(total(sums.square), 1e-30);
    const float projection = static_cast<float>(dot / std::sqrt(square));
    if (projection > best.projection) {
      best = {static_cast<float>(dot / square), projection};
      chosen = inverse;
    }
  }
  if (codes) quantize_at<true>(row, chosen, codes);
  return best;
}
