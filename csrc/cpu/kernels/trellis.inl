// Trellis codes of a row: Viterbi's algorithm finds the codes of all groups of up to 4 bits, one ring, whose
// decoded values are nearest.
//
// The window of a step has its own 2 bits in the lowest places and those of the steps after it above. The
// search therefore runs from the last step to the first: a step shifts its bits in from below, and drops the
// highest two. Windows that differ only in these have the same four successors, 4 p to 4 p + 3 for the rest p.
// Such a set of windows is called a parent here.
//
// The window before the first step of the search is that after its last one. A first pass without this
// condition, over the steps on either side of the ring's end, gives a good choice of this window: the one that
// its path passes there. The second pass begins and ends in it.
//
// Work: a step extends 4096 paths. With AVX-512 these are 256 vectors of costs; each takes three operations and
// more for further bits, one load of levels and a store. Two buffers of costs and one table of levels fill an
// L1 cache of 48 KB.

constexpr int kParents = kTrellisWindows / 4;
constexpr int64_t kMostOfFirstPass = 64;  // steps on either side of the end of the ring

// A class of errors adds the squared errors of a step, divided by its weight, to the costs of windows from
// `window` on, a multiple of 4 kLanes plus QUARTER kLanes. `shift` is minus a value.
struct ErrorsOf1 {
  const uint32_t* levels;
  Vector<float> shift, root, other_shift;  // of the second value, times the root of its weight

  template <int QUARTER>
  EMBKERN_INLINE Vector<float> add(int window, Vector<float> cost) const {
    const Halves of = halves(levels + window);
    const Vector<float> first = of.upper + shift, second = multiply_add(of.lower, root, other_shift);
    return multiply_add(second, second, multiply_add(first, first, cost));
  }
};

struct ErrorsOf2 {
  const float* levels;
  Vector<float> shift;

  template <int QUARTER>
  EMBKERN_INLINE Vector<float> add(int window, Vector<float> cost) const {
    const Vector<float> error = load(levels + window) + shift;
    return multiply_add(error, error, cost);
  }
};

// The nearer of two levels is as far away as the value is from their middle, less half of their distance.
struct ErrorsOf3 {
  const uint32_t* levels;
  Vector<float> shift;

  template <int QUARTER>
  EMBKERN_INLINE Vector<float> add(int window, Vector<float> cost) const {
    const Halves of = halves(levels + window);
    const Vector<float> error = absolute(of.upper + shift) - of.lower;
    return multiply_add(error, error, cost);
  }
};

struct ErrorsOf4 {
  static constexpr int kVectors = 16 / kLanes<float>;
  const float* levels;
  Vector<float> shift, own[5][kVectors];

  ErrorsOf4(const float* common, const float (*rest)[16], float value)
      : levels(common), shift(constant(-value)) {
    EMBKERN_UNROLL for (int i = 0; i < 5; ++i) EMBKERN_UNROLL for (int v = 0; v < kVectors; ++v) own[i][v] =
        load(rest[i] + v * kLanes<float>);
  }

  template <int QUARTER>
  EMBKERN_INLINE Vector<float> add(int window, Vector<float> cost) const {
    constexpr int kOwn = QUARTER % kVectors;
    const Vector<float> rest = load(levels + window) + shift;
    const auto side = [&](int i) { return if_larger(rest, own[0][kOwn], own[i][kOwn], own[i + 1][kOwn]); };
    const Vector<float> error = absolute(rest - side(1)) - side(3);
    return multiply_add(error, error, cost);
  }
};

// The same where sums of the tables wrap around.
struct ErrorsOfAny4 {
  const float (*levels)[kTrellisWindows];
  Vector<float> shift;

  template <int>
  EMBKERN_INLINE Vector<float> add(int window, Vector<float> cost) const {
    Vector<float> least = constant(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < 4; ++i) least = larger(least, -1.0f * absolute(load(levels[i] + window) + shift));
    return multiply_add(least, least, cost);
  }
};

// Extends the paths of parents `first` to `last` by a step. Their choices take two bits each. Costs are
// relative to that of one path, so that their precision does not depend on the length of the row.
template <class Errors>
EMBKERN_INLINE void extend_paths(const float* cost, float* next, uint8_t* choices, int first, int last,
                                 float factor, const Errors& errors) {
  const Vector<float> factors = constant(factor),
                      start = constant(std::isfinite(cost[0]) ? -factor * cost[0] : 0);
  for (int p = first; p < last; p += kLanes<float>) {
    const Vector<float> best = multiply_add(least_of_four(cost + p, kParents, choices + p / 4), factors, start);
    for_quarters([&](auto quarter) {
      constexpr int kQuarter = quarter.value;
      const int window = 4 * p + kQuarter * kLanes<float>;
      store(errors.template add<kQuarter>(window, spread_quarter<kQuarter>(best)), next + window);
    });
  }
}

class TrellisSearch {
 public:
  TrellisSearch(const TrellisLevels& levels, const TrellisMemory& memory, int64_t steps)
      : levels_(levels), memory_(memory), steps_(steps), cost_(memory.costs[0]), next_(memory.costs[1]) {}

  // Writes the two bits of every step.
  void solve(uint8_t* bits) {
    const int64_t before = std::min(steps_ / 2, kMostOfFirstPass), all = std::min(steps_, 2 * kMostOfFirstPass);
    std::fill_n(cost_, kTrellisWindows, 0.0f);
    for (int64_t i = 0; i < all; ++i) extend(i, (steps_ + before - 1 - i) % steps_);
    int window = 0;
    for (int s = 1; s < kTrellisWindows; ++s)
      if (cost_[s] < cost_[window]) window = s;
    for (int64_t i = all - 1; i >= before; --i) window = predecessor(i, window);
    std::fill_n(cost_, kTrellisWindows, std::numeric_limits<float>::infinity());
    cost_[window] = 0;
    for (int64_t i = 0; i < steps_; ++i) extend(i, steps_ - 1 - i);
    for (int64_t step = 0; step < steps_; ++step) {
      bits[step] = window & 3;
      window = predecessor(steps_ - 1 - step, window);
    }
  }

 private:
  static constexpr int64_t kChoiceBytes = TrellisMemory::kChoiceBytes;

  // The window before `window` on the path that the i-th step of a pass has extended.
  int predecessor(int64_t i, int window) const {
    const int parent = window / 4, bit = parent / kLanes<float> * 2 * kLanes<float> + parent % kLanes<float>;
    const uint8_t* choices = memory_.choices + i * kChoiceBytes;
    const auto at = [&](int place) { return choices[place / 8] >> place % 8 & 1; };
    return (at(bit) + 2 * at(bit + kLanes<float>)) * kParents + parent;
  }

  // Extends the paths by step `at` of the ring, the i-th of a pass; the search comes from the step after it.
  void extend(int64_t i, int64_t at) {
    const TrellisStep &step = memory_.steps[at], &previous = memory_.steps[(at + 1) % steps_];
    uint8_t* const choices = memory_.choices + i * kChoiceBytes;
    const float factor = previous.weight / step.weight;  // Costs are in units of the weight of a step.
    const auto all = [&](const auto& errors) {
      extend_paths(cost_, next_, choices, 0, kParents, factor, errors);
    };
    const Vector<float> shift = constant(-step.values[0]);
    if (step.bits == 1) {
      all(ErrorsOf1{levels_.one, shift, constant(step.other), constant(-step.other * step.values[1])});
    } else if (step.bits == 2) {
      all(ErrorsOf2{levels_.two, shift});
    } else if (step.bits == 3) {
      all(ErrorsOf3{levels_.three, shift});
    } else if (!levels_.split) {
      all(ErrorsOfAny4{levels_.four, shift});
    } else {
      for (int part = 0; part < 4; ++part) {
        const int first = part * kParents / 4;
        extend_paths(cost_, next_, choices, first, first + kParents / 4, factor,
                     ErrorsOf4(levels_.common, levels_.own[part], step.values[0]));
      }
    }
    std::swap(cost_, next_);
  }

  const TrellisLevels& levels_;
  const TrellisMemory& memory_;
  const int64_t steps_;
  float *cost_, *next_;
};

// The place in its group of the value of a step, of two values that of the first one. 16 values are a matrix of
// 4 x 4, transposed.
constexpr int place_of_step(int step) { return step / 16 * 16 + step % 4 * 4 + step / 4 % 4; }

// Weights below this part of the largest one are raised to it: costs in units of them stay finite.
constexpr float kLeastWeight = 1e-12f;

// The steps of a row, in units of its scale; returns how many there are.
inline int64_t trellis_steps(const TrellisRow& row, float inverse, TrellisStep* steps) {
  float most = 0;
  if (row.squares)
    for (int64_t i = 0; i < 32 * row.groups; ++i) most = std::max(most, row.squares[i]);
  const auto weight = [&](int64_t place) {
    return most > 0 ? std::max(row.squares[place], kLeastWeight * most) : 1.0f;
  };
  int64_t count = 0;
  for (int64_t group = 0; group < row.groups; ++group) {
    const int bits = row.bits[group];
    for (int i = 0; i < (bits == 0 ? 0 : bits == 1 ? 16 : 32); ++i) {
      const int64_t place = group * 32 + place_of_step(i), other = place + (bits == 1 ? 16 : 0);
      steps[count++] = {bits,
                        static_cast<int32_t>(place),
                        {inverse * row.values[place], inverse * row.values[other]},
                        weight(place),
                        std::sqrt(weight(other) / weight(place))};
    }
  }
  return count;
}

// Writes the codes of a row, given the bits of its steps, and adds up its products with the decoded row.
inline void finish_codes(const TrellisRow& row, const TrellisStep* steps, int64_t count, const uint8_t* bits,
                         uint8_t* codes, double* dot, double* square) {
  int window = 0;
  for (int64_t i = std::min<int64_t>(count, 5); i-- > 0;) window = window << 2 | bits[i];
  for (int64_t i = count; i-- > 0;) {
    window = (window << 2 | bits[i]) % kTrellisWindows;
    const TrellisStep& step = steps[i];
    for (int value = 0; value < (step.bits == 1 ? 2 : 1); ++value) {
      const auto level = [&](int further) { return row.levels->at(step.bits, value, further, window); };
      int further = 0;
      for (int e = 1; e < 1 << std::max(step.bits - 2, 0); ++e)
        if (std::abs(level(e) - step.values[0]) < std::abs(level(further) - step.values[0])) further = e;
      const int64_t place = step.place + 16 * value;
      codes[place] = static_cast<uint8_t>(step.bits == 1 ? bits[i] >> value & 1 : bits[i] | further << 2);
      const double own = level(further), weighted = row.squares ? own * row.squares[place] : own;
      *dot += weighted * row.values[place];
      *square += weighted * own;
    }
  }
}

inline PackedFit trellis_row(const TrellisRow& row, const TrellisMemory& memory, uint8_t* codes) {
  PackedFit best{};
  const int64_t width = 32 * row.groups;
  uint8_t *own = memory.codes, *bits = own + width;
  std::memset(own, 0, width);  // Groups of no bits have no steps.
  for (int64_t i = 0; i < row.tries; ++i) {
    const float inverse = row.scales[i] > 0 ? 1 / row.scales[i] : 0;
    const int64_t steps = trellis_steps(row, inverse, memory.steps);
    if (steps > 0) TrellisSearch(*row.levels, memory, steps).solve(bits);
    double dot = 0, square = 0;
    finish_codes(row, memory.steps, steps, bits, own, &dot, &square);
    square = std::max(square, 1e-30);
    const float projection = static_cast<float>(dot / std::sqrt(square));
    if (i == 0 || projection > best.projection) {  // negative where the scale is far too large
      best = {static_cast<float>(dot / square), projection};
      if (codes) std::memcpy(codes, own, width);
    }
  }
  return best;
}
