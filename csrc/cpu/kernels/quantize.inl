// The codes of a row, one value at a time, and the search for its scale.

struct PackingSums {
  Vector<float> dot, square;
};

template <int BITS, bool CODES>
EMBKERN_INLINE void quantize_group(const RowToPack& row, int64_t first, float inverse, PackingSums& sums,
                                   uint8_t* codes) {
  EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) {
    const int64_t at = first + v * kLanes<float>;
    const Vector<float> values = load(row.values + at);
    Rounded nearest;
    if constexpr (BITS <= 4)
      nearest =
          nearest_level<BITS>(inverse * values, row.edges + 16 * (BITS - 1), row.levels + 16 * (BITS - 1));
    else
      nearest = nearest_step<BITS>(inverse * values, row.steps[BITS]);
    if constexpr (CODES) {
      store_codes(nearest, codes + at);
    } else {
      const Vector<float> weighted = row.squares ? load(row.squares + at) * nearest.value : nearest.value;
      sums.dot = sums.dot + weighted * values;
      sums.square = sums.square + weighted * nearest.value;
    }
  }
}

// The codes of values times `inverse` if CODES, else the sums that decide on the scale.
template <bool CODES>
EMBKERN_INLINE PackingSums quantize_at(const RowToPack& row, float inverse, uint8_t* codes) {
  PackingSums sums{};
  for (int64_t group = 0; group < row.groups; ++group) {
    const int64_t first = group * 32;
    with_bits<8>(row.bits[group], [&](auto width) {
      if constexpr (width.value > 0)
        quantize_group<width.value, CODES>(row, first, inverse, sums, codes);
      else if constexpr (CODES)
        std::memset(codes + first, 0, 32);
    });
  }
  return sums;
}

inline PackedFit quantize_row(const RowToPack& row, uint8_t* codes) {
  Vector<float> squares{};
  for (int64_t at = 0; at < row.groups * 32; at += kLanes<float>) {
    const Vector<float> values = load(row.values + at);
    squares = squares + values * values;
  }
  double root = std::sqrt(sum_in_order(squares) / static_cast<double>(row.groups * 32));
  if (!(root > 0)) root = 1;
  PackedFit best{0, -1};
  float chosen = 1;
  for (int64_t i = 0; i < row.tries; ++i) {
    const float inverse = static_cast<float>(1 / (root * row.factors[i]));
    const PackingSums sums = quantize_at<false>(row, inverse, nullptr);
    const double dot = sum_in_order(sums.dot), square = std::max(sum_in_order(sums.square), 1e-30);
    const float projection = static_cast<float>(dot / std::sqrt(square));
    if (projection > best.projection) {
      best = {static_cast<float>(dot / square), projection};
      chosen = inverse;
    }
  }
  if (codes) quantize_at<true>(row, chosen, codes);
  return best;
}
