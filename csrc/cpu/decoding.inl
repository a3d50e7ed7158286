// Records of a packed table to values: bit planes are put together in registers, and codes of up to four bits
// looked up by a shuffle of their 16 levels.

constexpr int kGroupVectors = 32 / kLanes<float>;

// The 32 values of a group of BITS bits.
template <int BITS>
EMBKERN_INLINE void decode_group(const int32_t* words, const float* levels, Vector<float>* values) {
  constexpr float kMiddle = ((1 << BITS) - 1) / 2.0f;
#if defined(EMBKERN_AVX512)
  __m256i bytes = _mm256_setzero_si256();  // 32 codes: half the work of 16 words at a time
  EMBKERN_UNROLL for (int plane = 0; plane < BITS; ++plane) {
    const __mmask32 set = static_cast<__mmask32>(words[plane]);
    bytes = _mm256_mask_add_epi8(bytes, set, bytes, _mm256_set1_epi8(static_cast<char>(1 << plane)));
  }
  EMBKERN_UNROLL for (int half = 0; half < 2; ++half) {
    const __m512i code =
        _mm512_cvtepu8_epi32(half ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes));
    if constexpr (BITS <= 4)
      values[half] = (Vector<float>)_mm512_permutexvar_ps(code, _mm512_loadu_ps(levels + 16 * (BITS - 1)));
    else
      values[half] = (Vector<float>)_mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(kMiddle));
  }
#elif defined(EMBKERN_AVX2)
  EMBKERN_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
    const __m256i lane_bit =
        _mm256_sllv_epi32(_mm256_set1_epi32(1 << (8 * quarter)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i code = _mm256_setzero_si256();
    EMBKERN_UNROLL for (int plane = 0; plane < BITS; ++plane) {
      const __m256i bit = _mm256_and_si256(_mm256_set1_epi32(words[plane]), lane_bit);
      const __m256i set = _mm256_cmpeq_epi32(bit, lane_bit);
      code = _mm256_or_si256(code, _mm256_and_si256(set, _mm256_set1_epi32(1 << plane)));
    }
    if constexpr (BITS <= 4) {
      const float* own = levels + 16 * (BITS - 1);
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(own), code);
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(own + 8), code);
      const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 to the sign
      values[quarter] = (Vector<float>)_mm256_blendv_ps(low, high, above);
    } else {
      values[quarter] = (Vector<float>)_mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(kMiddle));
    }
  }
#else
  float line[32];
  for (int i = 0; i < 32; ++i) {
    int code = 0;
    EMBKERN_UNROLL for (int plane = 0; plane < BITS; ++plane) code |=
        (static_cast<uint32_t>(words[plane]) >> i & 1) << plane;
    line[i] = BITS <= 4 ? levels[16 * (BITS - 1) + (code & 15)] : static_cast<float>(code) - kMiddle;
  }
  std::memcpy(values, line, sizeof(line));
#endif
}

EMBKERN_INLINE void decode_group(int bits, const int32_t* words, const float* levels, Vector<float>* values) {
  switch (bits) {
    case 1:
      return decode_group<1>(words, levels, values);
    case 2:
      return decode_group<2>(words, levels, values);
    case 3:
      return decode_group<3>(words, levels, values);
    case 4:
      return decode_group<4>(words, levels, values);
    case 5:
      return decode_group<5>(words, levels, values);
    case 6:
      return decode_group<6>(words, levels, values);
    case 7:
      return decode_group<7>(words, levels, values);
    case 8:
      return decode_group<8>(words, levels, values);
    default:
      for (int v = 0; v < kGroupVectors; ++v) values[v] = Vector<float>{};
  }
}

// Calls use(first, lanes of A) for all values of a row.
template <class A, class T, class Use>
EMBKERN_INLINE void for_values(const PackedRow<T>& row, Use use) {
  const int32_t* words = row.words;
  for (int64_t group = 0; group * 32 < row.width; ++group) {
    const int bits = group < row.groups ? row.bits[group] : 0;
    Vector<float> values[kGroupVectors];
    decode_group(bits, words, row.levels, values);
    words += bits;
    if constexpr (std::is_same_v<A, float>) {
      EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) use(group * 32 + v * kLanes<float>, values[v]);
    } else {
      float line[32];
      std::memcpy(line, values, sizeof(line));
      for (int first = 0; first < 32; first += kLanes<A>) {
        Vector<A> wide;
        for (int i = 0; i < kLanes<A>; ++i) wide[i] = line[first + i];
        use(group * 32 + first, wide);
      }
    }
  }
}

template <class T>
void decode_row(const PackedRow<T>& row, const T* offset, acc_t<T> scale, T* to) {
  using A = acc_t<T>;
  for_values<A>(row, [&](int64_t first, Vector<A> values) {
    const int64_t left = row.width - first;
    Vector<A> line = row.factor * values;
    if (offset) line = line + scale * load(offset + first, left);
    store(line, to + first, left);
  });
}

template <class T, class S>
void decode_coefficients(const PackedRow<T>& row, void* to) {
  using A = acc_t<T>;
  for_values<A>(row, [&](int64_t first, Vector<A> values) {
    store(row.factor * values, static_cast<S*>(to) + first, row.width - first);
  });
}
