// Trellis codes of a row: for each group of 32 values the codes whose decoded values are nearest, by Viterbi's
// algorithm.
//
// The state at a value is its code and those before it, 7 bits in all, and the code before the first value of a
// group is that of its last one. So a path has to end in the state it began in. Which one is guessed as the
// state that a path without that condition passes there, when the group is turned by half.

// parents[(first + lane) >> BITS] in every lane, of parents that are aligned like vectors.
template <int BITS>
EMBKERN_INLINE Vector<float> spread_parents(const float* parents, int first) {
  constexpr int kVector = kLanes<float>;
  const int begin = (first >> BITS) / kVector * kVector, rest = (first >> BITS) - begin;
#if defined(EMBKERN_AVX512)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i from = _mm512_add_epi32(_mm512_srli_epi32(lane, BITS), _mm512_set1_epi32(rest));
  return (Vector<float>)_mm512_permutexvar_ps(from, _mm512_load_ps(parents + begin));
#elif defined(EMBKERN_AVX2)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i from = _mm256_add_epi32(_mm256_srli_epi32(lane, BITS), _mm256_set1_epi32(rest));
  return (Vector<float>)_mm256_permutevar8x32_ps(_mm256_load_ps(parents + begin), from);
#else
  Vector<float> result;
  for (int i = 0; i < kVector; ++i) result[i] = parents[begin + rest + (i >> BITS)];
  return result;
#endif
}

template <int BITS>
struct Trellis {
  static constexpr int kParents = kTrellisStates >> BITS;  // states that differ in what is forgotten are one
  static constexpr int kRoom = std::max(kParents, kLanes<float>);

  const float* levels;
  alignas(64) float cost[kTrellisStates];
  uint8_t forgotten[32][kRoom];

  // Goes on by the value x, which is the `step`-th.
  EMBKERN_INLINE void advance(int step, float x, float weight) {
    alignas(64) float best[kRoom];
    cheapest(best, forgotten[step]);
    EMBKERN_UNROLL for (int s = 0; s < kTrellisStates; s += kLanes<float>) {
      const Vector<float> error = load(levels + s) + -x;
      store(weight * (error * error) + spread_parents<BITS>(best, s), cost + s);
    }
  }

  // The cheapest state of each parent, and what that forgets: the first of equals.
  EMBKERN_INLINE void cheapest(float* best, uint8_t* which) const {
#if defined(EMBKERN_AVX512)
    if constexpr (BITS == 4) {  // a vector is two states each of 8 parents
      __m512i own;
      const __m512 low = cheapest_of<8>(cost, 16, &own), high = _mm512_shuffle_f32x4(low, low, 0x4e);
      const __m512i other = _mm512_shuffle_i32x4(own, own, 0x4e);
      const __mmask16 less = _mm512_cmp_ps_mask(high, low, _CMP_LT_OQ);
      const __mmask16 equal = _mm512_cmp_ps_mask(high, low, _CMP_EQ_OQ);
      const __mmask16 second = less | _mm512_mask_cmplt_epi32_mask(equal, other, own);
      own = _mm512_slli_epi32(_mm512_mask_mov_epi32(own, second, other), 1);
      _mm512_store_ps(best, _mm512_min_ps(low, high));
      store_bytes(_mm512_mask_add_epi32(own, second, own, _mm512_set1_epi32(1)), which);
    } else {
      EMBKERN_UNROLL for (int p = 0; p < kParents; p += 16) {
        __m512i own;
        _mm512_store_ps(best + p, cheapest_of<1 << BITS>(cost + p, kParents, &own));
        store_bytes(own, which + p);
      }
    }
#else
    alignas(64) int32_t own[kRoom];
    for (int p = 0; p < kParents; ++p) best[p] = cost[p], own[p] = 0;
    for (int bits = 1; bits < 1 << BITS; ++bits)
      for (int p = 0; p < kParents; ++p) {
        const float other = cost[bits * kParents + p];
        const bool less = other < best[p];
        own[p] = less ? bits : own[p];
        best[p] = less ? other : best[p];
      }
    for (int p = 0; p < kParents; ++p) which[p] = static_cast<uint8_t>(own[p]);
#endif
  }

#if defined(EMBKERN_AVX512)
  // The least of COUNT costs in every lane, `stride` apart, and the number of the first of these.
  template <int COUNT>
  static EMBKERN_INLINE __m512 cheapest_of(const float* costs, int stride, __m512i* which) {
    __m512 least[COUNT];
    EMBKERN_UNROLL for (int i = 0; i < COUNT; ++i) least[i] = _mm512_load_ps(costs + i * stride);
    EMBKERN_UNROLL for (int apart = COUNT / 2; apart > 0; apart /= 2)
        EMBKERN_UNROLL for (int i = 0; i < apart; ++i) least[i] = _mm512_min_ps(least[i], least[i + apart]);
    __m512i first = _mm512_setzero_si512();
    EMBKERN_UNROLL for (int i = COUNT - 1; i > 0; --i) {
      const __mmask16 equal = _mm512_cmp_ps_mask(_mm512_load_ps(costs + i * stride), least[0], _CMP_EQ_OQ);
      first = _mm512_mask_mov_epi32(first, equal, _mm512_set1_epi32(i));
    }
    const __mmask16 equal = _mm512_cmp_ps_mask(_mm512_load_ps(costs), least[0], _CMP_EQ_OQ);
    *which = _mm512_mask_mov_epi32(first, equal, _mm512_setzero_si512());
    return least[0];
  }

  static EMBKERN_INLINE void store_bytes(__m512i values, uint8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(values));
  }
#endif

  EMBKERN_INLINE int parent(int step, int state) const {
    const int kept = state >> BITS;
    return forgotten[step][kept] * kParents + kept;
  }

  // The states of 32 values.
  EMBKERN_INLINE void solve(const float* x, const float* weights, uint8_t* states) {
    for (float& each : cost) each = 0;
    for (int step = 0; step < 32; ++step) {
      const int at = (step + 16) % 32;
      advance(step, x[at], weights[at]);
    }
    int state = 0;
    for (int s = 1; s < kTrellisStates; ++s)
      if (cost[s] < cost[state]) state = s;
    for (int step = 31; step >= 16; --step) state = parent(step, state);  // now that of the last value
    for (float& each : cost) each = std::numeric_limits<float>::infinity();
    cost[state] = 0;
    for (int step = 0; step < 32; ++step) advance(step, x[step], weights[step]);
    for (int step = 31; step >= 0; --step) {
      states[step] = static_cast<uint8_t>(state);
      state = parent(step, state);
    }
  }
};

template <int BITS>
EMBKERN_INLINE void trellis_group(const TrellisRow& row, int64_t first, float inverse, double* dot,
                                  double* square, uint8_t* codes) {
  Trellis<BITS> trellis;
  trellis.levels = row.levels + kTrellisStates * (BITS - 1);
  float x[32], weights[32];
  for (int i = 0; i < 32; ++i) {
    x[i] = inverse * row.values[first + i];
    weights[i] = row.squares ? row.squares[first + i] : 1;
  }
  uint8_t states[32];
  trellis.solve(x, weights, states);
  for (int i = 0; i < 32; ++i) {
    const double level = trellis.levels[states[i]], weighted = level * weights[i];
    *dot += weighted * row.values[first + i];
    *square += weighted * level;
    codes[first + i] = states[i] & ((1 << BITS) - 1);
  }
}

inline PackedFit trellis_row(const TrellisRow& row, uint8_t* codes, uint8_t* scratch) {
  PackedFit best{};
  for (int64_t i = 0; i < row.tries; ++i) {
    const float inverse = row.scales[i] > 0 ? 1 / row.scales[i] : 0;
    double dot = 0, square = 0;
    for (int64_t group = 0; group < row.groups; ++group) {
      const int64_t first = group * 32;
      switch (row.bits[group]) {
        case 1:
          trellis_group<1>(row, first, inverse, &dot, &square, scratch);
          break;
        case 2:
          trellis_group<2>(row, first, inverse, &dot, &square, scratch);
          break;
        case 3:
          trellis_group<3>(row, first, inverse, &dot, &square, scratch);
          break;
        case 4:
          trellis_group<4>(row, first, inverse, &dot, &square, scratch);
          break;
        default:
          std::memset(scratch + first, 0, 32);
      }
    }
    square = std::max(square, 1e-30);
    const float projection = static_cast<float>(dot / std::sqrt(square));
    if (i == 0 || projection > best.projection) {  // below 0 where the scale is far too large
      best = {static_cast<float>(dot / square), projection};
      if (codes) std::memcpy(codes, scratch, row.groups * 32);
    }
  }
  return best;
}
