// Trellis codes of a row: Viterbi's algorithm finds, for each group of 32 values, the codes whose decoded
// values are nearest.
//
// The state at a value is the code of that value and those before it, 7 bits in all. A group is circular: the
// code before its first value is that of its last one, so a path has to end in the state in which it began.
// A first pass without that condition, which begins in the middle of the group, gives a good choice of this
// state: the one that its path passes at the group's end.

// Viterbi's algorithm for codes of BITS bits. States that differ only in their highest BITS bits, which the
// next step drops, have the same successors. Such a set of states is called a parent here.
template <int BITS>
struct Trellis {
  static constexpr int kParents = kTrellisStates >> BITS;
  static constexpr int kRoom = std::max(kParents, kLanes<float>);

  const float* levels;
  alignas(64) float cost[kTrellisStates];
  uint8_t dropped[32][kRoom];  // by step and parent: the highest bits of its cheapest state

  // Extends the paths by the value x of step `step`.
  EMBKERN_INLINE void advance(int step, float x, float weight) {
    alignas(64) float best[kRoom];
    column_minima<1 << BITS, kParents>(cost, best, dropped[step]);
    EMBKERN_UNROLL for (int s = 0; s < kTrellisStates; s += kLanes<float>) {
      const Vector<float> error = load(levels + s) + -x;
      store(weight * (error * error) + repeat_lanes<BITS>(best, s >> BITS), cost + s);
    }
  }

  // The state before `state` on its path.
  EMBKERN_INLINE int predecessor(int step, int state) const {
    const int parent = state >> BITS;
    return dropped[step][parent] * kParents + parent;
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
    for (int step = 31; step >= 16; --step) state = predecessor(step, state);  // now the state of value 31
    for (float& each : cost) each = std::numeric_limits<float>::infinity();
    cost[state] = 0;
    for (int step = 0; step < 32; ++step) advance(step, x[step], weights[step]);
    for (int step = 31; step >= 0; --step) {
      states[step] = static_cast<uint8_t>(state);
      state = predecessor(step, state);
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
      with_bits<4>(row.bits[group], [&](auto width) {
        if constexpr (width.value > 0)
          trellis_group<width.value>(row, first, inverse, &dot, &square, scratch);
        else
          std::memset(scratch + first, 0, 32);
      });
    }
    square = std::max(square, 1e-30);
    const float projection = static_cast<float>(dot / std::sqrt(square));
    if (i == 0 || projection > best.projection) {  // negative where the scale is far too large
      best = {static_cast<float>(dot / square), projection};
      if (codes) std::memcpy(codes, scratch, row.groups * 32);
    }
  }
  return best;
}
