// Products of a row with vectors. The values of a packed row are multiplied while they are in registers.

// Groups `group` to `last` of a record, all of BITS bits: total[n] += values * factors[n].
template <int N, int BITS>
EMBKERN_INLINE void add_products(RecordReader& record, const int8_t* levels, int64_t group, int64_t last,
                                 const float* const* factors, Vector<float> (&total)[N]) {
  if constexpr (BITS > 0) {
    // Independent sums hide the latency of an addition. Each of two groups that are decoded together has its
    // own.
    constexpr int kChains = std::clamp(kRegisters / (4 * N), 1, N == 1 ? kRegisters / 8 : 2);
    Vector<float> sum[N][kChains] = {};
    decode_groups<BITS>(
        record, levels, group, last, [&](int64_t each, const Vector<float>* values, auto which) {
          EMBKERN_UNROLL for (int n = 0; n < N; ++n) {
            const float* from = factors[n] + each * 32;
            EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) {
              Vector<float>& own = sum[n][(decltype(which)::value * kGroupVectors + v) % kChains];
              own = own + values[v] * load(from + v * kLanes<float>);
            }
          }
        });
    EMBKERN_UNROLL for (int n = 0; n < N; ++n) {
      EMBKERN_UNROLL for (int chain = 1; chain < kChains; ++chain) sum[n][0] = sum[n][0] + sum[n][chain];
      total[n] = total[n] + kStep<BITS> * sum[n][0];
    }
  }
}

template <class A, int N>
EMBKERN_INLINE void products_of_row(const PackedRow<A>& row, const A* const* factors, A* out) {
  Vector<A> total[N] = {};
  if constexpr (std::is_same_v<A, float>) {
    RecordReader record(row.words, *row.layout);
    for_runs(row, [&](auto bits, int64_t group, int64_t last) {
      add_products<N, decltype(bits)::value>(record, row.levels, group, last, factors, total);
    });
  } else {
    for_values<A>(row, [&](int64_t first, const Vector<A>* values, A step) {
      for (int v = 0; v < kVectorsOfGroup<A>; ++v)
        for (int n = 0; n < N; ++n)
          total[n] = total[n] + (step * values[v]) * load(factors[n] + first + v * kLanes<A>);
    });
  }
  for (int n = 0; n < N; ++n) out[n] = row.factor * static_cast<A>(sum_of_lanes<A>(total[n]));
}

template <class T>
void packed_products(const PackedRow<acc_t<T>>& row, const acc_t<T>* const* factors, int64_t count,
                     acc_t<T>* out) {
  using A = acc_t<T>;
  if (count == 1) return products_of_row<A, 1>(row, factors, out);
  if (count == 2) return products_of_row<A, 2>(row, factors, out);
  if (count == 4) return products_of_row<A, 4>(row, factors, out);
  products_of_row<A, kFewStates>(row, factors, out);
}

template <class T>
void row_products(const T* row, int64_t width, const acc_t<T>* const* factors, int64_t count, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t n = 0; n < count; ++n) {
    Vector<A> sum[2] = {};
    int64_t j = 0;
    for (; j + 2 * lanes <= width; j += 2 * lanes)
      EMBKERN_UNROLL for (int v = 0; v < 2; ++v) sum[v] =
          sum[v] + load(row + j + v * lanes) * load(factors[n] + j + v * lanes);
    for (; j < width; j += lanes) sum[0] = sum[0] + load(row + j, width - j) * load(factors[n] + j);
    out[n] = static_cast<A>(sum_of_lanes<A>(sum[0] + sum[1]));
  }
}
