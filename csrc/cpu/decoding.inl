// Records of a packed table to values: bit planes are put together in registers, and codes of up to four bits
// looked up among the 128 levels of their trellis, which two shuffles of 64 do.

constexpr int kGroupVectors = 32 / kLanes<float>;
constexpr int kStateBits = 7;  // of kTrellisStates
constexpr float kLevelStep = 1.0f / 4096;

// Bit BIT of what selects the values of a group: of the codes, or of a state, which is the codes of the values
// before by the next bits. Those of a group's first value are its last ones, so that planes are turned round.
template <int BITS, int BIT>
EMBKERN_INLINE uint32_t selecting_plane(const int32_t* words) {
  constexpr int kBefore = BITS <= 4 ? BIT / BITS : 0;
  const uint32_t word = static_cast<uint32_t>(words[BIT - kBefore * BITS]);
  if constexpr (kBefore == 0)
    return word;
  else
    return word << kBefore | word >> (32 - kBefore);
}

// Calls use(BIT, its plane) for each BIT.
template <int BITS, class Use, int... BIT>
EMBKERN_INLINE void for_planes(const int32_t* words, Use use, std::integer_sequence<int, BIT...>) {
  (use(BIT, selecting_plane<BITS, BIT>(words)), ...);
}

#if defined(EMBKERN_AVX512)
// The COUNT bits that select each of 32 values.
template <int BITS, int COUNT>
EMBKERN_INLINE __m256i gathered_bits(const int32_t* words) {
#if defined(EMBKERN_AVX512_BF16)
  // A word per plane, the last first, turned round; then the bytes of 8 lanes side by side; then 8 x 8 bits
  // are transposed, as a product over GF(2) with a matrix whose rows they are.
  const auto place = [](int last_first) { return 7 - last_first < COUNT ? 7 - last_first : 0; };
  const auto plane = [&](int at) { return COUNT == BITS ? place(at) : place(at) % BITS; };
  const auto before = [&](int at) { return COUNT == BITS ? 0 : place(at) / BITS; };
  const __m256i planes =
      _mm256_setr_epi32(plane(0), plane(1), plane(2), plane(3), plane(4), plane(5), plane(6), plane(7));
  const __m256i turns =
      _mm256_setr_epi32(before(0), before(1), before(2), before(3), before(4), before(5), before(6), before(7));
  const __m256i lanes_of_8 = _mm256_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29, 2, 6,
                                              10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  const __m256i record = _mm256_maskz_loadu_epi32(static_cast<__mmask8>((1 << BITS) - 1), words);
  const __mmask8 there = static_cast<__mmask8>(0xff << (8 - COUNT));
  const __m256i turned = _mm256_rolv_epi32(_mm256_maskz_permutexvar_epi32(there, planes, record), turns);
  return _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x(0x8040201008040201),
                                       _mm256_permutexvar_epi8(lanes_of_8, turned), 0);
#else
  __m256i parts[2] = {};  // sums of half of the planes each: half as long a chain
  for_planes<BITS>(
      words,
      [&](int plane, uint32_t word) {
        __m256i& part = parts[plane % 2];
        part = _mm256_mask_add_epi8(part, word, part, _mm256_set1_epi8(static_cast<char>(1 << plane)));
      },
      std::make_integer_sequence<int, COUNT>{});
  return _mm256_or_si256(parts[0], parts[1]);
#endif
}
#endif

// Groups of BITS bits to their values; what it looks up stays in registers from one group to the next.
template <int BITS>
struct GroupDecoder {
  static constexpr bool kTrellis = BITS <= 4;
  static constexpr float kMiddle = ((1 << BITS) - 1) / 2.0f;
  static constexpr int kPlanes = kTrellis ? kStateBits : BITS;
  static constexpr float kStep = kTrellis ? kLevelStep : 1;  // of `steps`, whose values are exact in fp32

  const int16_t* levels;
#if defined(EMBKERN_AVX512)
  __m512i quarter[4];  // of the levels
#endif

  EMBKERN_INLINE explicit GroupDecoder(const int16_t* all_levels)
      : levels(all_levels + (kTrellis ? kTrellisStates * (BITS - 1) : 0)) {
#if defined(EMBKERN_AVX512)
    if constexpr (kTrellis)
      EMBKERN_UNROLL for (int i = 0; i < 4; ++i) quarter[i] = _mm512_loadu_si512(levels + 32 * i);
#endif
  }

  // The 32 values of a group.
  EMBKERN_INLINE void operator()(const int32_t* words, Vector<float>* values) const {
    steps(words, values);
    EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) values[v] = kStep * values[v];
  }

  // The same in units of kStep.
  EMBKERN_INLINE void steps(const int32_t* words, Vector<float>* values) const {
#if defined(EMBKERN_AVX512)
    const __m256i bytes = gathered_bits<BITS, kPlanes>(words);
    if constexpr (kTrellis) {
      const __m512i index = _mm512_cvtepu8_epi16(bytes);
      const __mmask32 upper = _mm256_movepi8_mask(_mm256_slli_epi16(bytes, 1));  // by bit 6
      const __m512i steps =
          _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(quarter[0], index, quarter[1]),
                                  _mm512_permutex2var_epi16(quarter[2], index, quarter[3]));
      EMBKERN_UNROLL for (int half = 0; half < 2; ++half) {
        const __m256i own = half ? _mm512_extracti64x4_epi64(steps, 1) : _mm512_castsi512_si256(steps);
        values[half] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(own));
      }
    } else {
      EMBKERN_UNROLL for (int half = 0; half < 2; ++half) {
        const __m512i code =
            _mm512_cvtepu8_epi32(half ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes));
        values[half] = (Vector<float>)_mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(kMiddle));
      }
    }
#elif defined(EMBKERN_AVX2)
    EMBKERN_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
      const __m256i lane_bit =
          _mm256_sllv_epi32(_mm256_set1_epi32(1 << (8 * quarter)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      __m256i code = _mm256_setzero_si256();
      for_planes<BITS>(
          words,
          [&](int plane, uint32_t word) {
            const __m256i bit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(word)), lane_bit);
            const __m256i set = _mm256_cmpeq_epi32(bit, lane_bit);
            code = _mm256_or_si256(code, _mm256_and_si256(set, _mm256_set1_epi32(1 << plane)));
          },
          std::make_integer_sequence<int, kPlanes>{});
      if constexpr (kTrellis) {
        const __m256i pair = _mm256_i32gather_epi32(reinterpret_cast<const int*>(levels), code, 2);
        const __m256i step = _mm256_srai_epi32(_mm256_slli_epi32(pair, 16), 16);
        values[quarter] = (Vector<float>)_mm256_cvtepi32_ps(step);
      } else {
        values[quarter] = (Vector<float>)_mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(kMiddle));
      }
    }
#else
    float line[32];
    for (int i = 0; i < 32; ++i) {
      int code = 0;
      for_planes<BITS>(
          words, [&](int plane, uint32_t word) { code |= (word >> i & 1) << plane; },
          std::make_integer_sequence<int, kPlanes>{});
      line[i] =
          kTrellis ? static_cast<float>(levels[code % kTrellisStates]) : static_cast<float>(code) - kMiddle;
    }
    std::memcpy(values, line, sizeof(line));
#endif
  }
};

// Calls use(first, lanes of A) for 32 values from `first` on.
template <class A, class Use>
EMBKERN_INLINE void use_group(int64_t first, const Vector<float>* values, Use use) {
  if constexpr (std::is_same_v<A, float>) {
    EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) use(first + v * kLanes<float>, values[v]);
  } else {
    float line[32];
    std::memcpy(line, values, sizeof(line));
    for (int i = 0; i < 32; i += kLanes<A>) {
      Vector<A> wide;
      for (int lane = 0; lane < kLanes<A>; ++lane) wide[lane] = line[i + lane];
      use(first + i, wide);
    }
  }
}

// The same for neighbouring groups of BITS bits each; returns the words after them.
template <class A, int BITS, class Use>
EMBKERN_INLINE const int32_t* use_groups(int64_t group, int64_t last, const int32_t* words,
                                         const int16_t* levels, Use use) {
  const GroupDecoder<BITS> decode(levels);
  for (; group < last; ++group, words += BITS) {
    Vector<float> values[kGroupVectors];
    decode(words, values);
    use_group<A>(group * 32, values, use);
  }
  return words;
}

// Calls use(first, lanes of A) for all values of a row.
template <class A, class T, class Use>
EMBKERN_INLINE void for_values(const PackedRow<T>& row, Use use) {
  const int32_t* words = row.words;
  const int64_t groups = (row.width + 31) / 32;
  for (int64_t group = 0, last; group < groups; group = last) {
    const int bits = group < row.groups ? row.bits[group] : 0;
    for (last = group + 1; last < groups && (last < row.groups ? row.bits[last] : 0) == bits;) ++last;
    switch (bits) {
#define EMBKERN_BITS(bits)                                            \
  case bits:                                                          \
    words = use_groups<A, bits>(group, last, words, row.levels, use); \
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
      default: {
        const Vector<float> zeros[kGroupVectors] = {};
        for (int64_t each = group; each < last; ++each) use_group<A>(each * 32, zeros, use);
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

// ---- products of rows with vectors --------------------------------------------------------------------------

// total[n] += values * factors[n] over neighbouring groups of BITS bits each; returns the words after them.
template <int N, int BITS>
EMBKERN_INLINE const int32_t* add_products(int64_t group, int64_t last, const int32_t* words,
                                           const int16_t* levels, const float* const* factors,
                                           Vector<float> (&total)[N]) {
  constexpr int kChains = N < 4 ? 2 : 1;  // sums that hide the latency of an addition
  const GroupDecoder<BITS> decode(levels);
  Vector<float> sum[N][kChains] = {};
  for (; group < last; ++group, words += BITS) {
    Vector<float> values[kGroupVectors];
    decode.steps(words, values);
    EMBKERN_UNROLL for (int n = 0; n < N; ++n) {
      const float* from = factors[n] + group * 32;
      EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) sum[n][v % kChains] =
          sum[n][v % kChains] + values[v] * load(from + v * kLanes<float>);
    }
  }
  EMBKERN_UNROLL for (int n = 0; n < N; ++n) {
    EMBKERN_UNROLL for (int chain = 1; chain < kChains; ++chain) sum[n][0] = sum[n][0] + sum[n][chain];
    total[n] = total[n] + GroupDecoder<BITS>::kStep * sum[n][0];
  }
  return words;
}

template <class A, int N>
EMBKERN_INLINE void packed_products(const PackedRow<A>& row, const A* const* factors, A* out) {
  Vector<A> total[N] = {};
  if constexpr (std::is_same_v<A, float>) {
    const int32_t* words = row.words;
    for (int64_t group = 0, last; group < row.groups; group = last) {
      const int bits = row.bits[group];
      for (last = group + 1; last < row.groups && row.bits[last] == bits;) ++last;
      switch (bits) {
#define EMBKERN_BITS(bits)                                                         \
  case bits:                                                                       \
    words = add_products<N, bits>(group, last, words, row.levels, factors, total); \
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
          break;
      }
    }
  } else {
    for_values<A>(row, [&](int64_t first, Vector<A> values) {
      for (int n = 0; n < N; ++n) total[n] = total[n] + values * load(factors[n] + first);
    });
  }
  for (int n = 0; n < N; ++n) out[n] = row.factor * static_cast<A>(sum_of_lanes<A>(total[n]));
}

template <class T>
void packed_products(const PackedRow<acc_t<T>>& row, const acc_t<T>* const* factors, int64_t count,
                     acc_t<T>* out) {
  using A = acc_t<T>;
  if (count == 1) return packed_products<A, 1>(row, factors, out);
  if (count == 2) return packed_products<A, 2>(row, factors, out);
  if (count == 4) return packed_products<A, 4>(row, factors, out);
  packed_products<A, kFewStates>(row, factors, out);
}

// out[n] = sum of row[j] * factors[n][j] for j < width; the factors have whole vectors, zero beyond the width.
template <class T>
void row_products(const T* row, int64_t width, const acc_t<T>* const* factors, int64_t count, acc_t<T>* out) {
  using A = acc_t<T>;
  for (int64_t n = 0; n < count; ++n) {
    Vector<A> sum[2] = {};
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>)
      EMBKERN_UNROLL for (int v = 0; v < 2; ++v) sum[v] =
          sum[v] + load(row + j + v * kLanes<A>) * load(factors[n] + j + v * kLanes<A>);
    for (; j < width; j += kLanes<A>) sum[0] = sum[0] + load(row + j, width - j) * load(factors[n] + j);
    out[n] = static_cast<A>(sum_of_lanes<A>(sum[0] + sum[1]));
  }
}
