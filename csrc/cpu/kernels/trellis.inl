// Trellis codes of a row: Viterbi's algorithm finds the codes of all groups of up to 4 bits, one ring, whose
// decoded values are nearest.
//
// The window of a step has its own 2 bits in the lowest places and those of the steps after it above. The
// search therefore runs from the last step to the first: a step shifts its bits in from below, and drops the
// highest two. What the steps before it in the ring see of a path are the other 10 bits, its state. A step
// extends a path in state s to the windows 4 s to 4 s + 3; of the four windows that end in the same state, that
// of the cheapest path is kept.
//
// A path has to end in the state in which it begins. The search goes kBefore steps, then around the ring. The
// best path passes a good state for the beginning. The best path that ends in this state mostly begins in it as
// well, since the paths of a long search share their first steps. If it does not, the ring is searched once
// more, from this state alone. The steps before are the last ones of a row: of coefficients in a basis, these
// have the smallest weights, so that what such a short search misses costs least.
//
// Costs are 16 bits without a sign, relative to that of the best path and in units that the steps of a ring
// choose (cpu/ops/trellis_steps.h). They saturate. Whole numbers make the codes the same at every instruction
// set.
//
// Work: a step extends 1024 paths to 4096 windows. With AVX-512 these are 128 vectors, each of which takes an
// instruction for spreading costs, three for squared errors at 1 and 2 bits (four at 3, nine at 4 bits) and two
// for the choice of the best. Costs and levels fill half of an L1 cache of 32 KB.

constexpr int kStates = kTrellisStates, kQuarter = kStates / 4;
constexpr int kDigits = 5;           // of 2 bits in a state
constexpr int64_t kBefore = 48;      // steps that the search goes before the path begins
constexpr int64_t kStepsToBest = 4;  // from which costs are made relative to the best one

// The levels of a step less its value.
template <bool SCALED>
struct Difference {
  Differences scale, value;

  Difference(const TrellisStep& step, int which)
      : scale(constant(step.scale[which])), value(constant(step.value[which])) {}

  EMBKERN_INLINE Differences operator()(const int16_t* level) const {
    Differences at = load_as<Differences>(level);
    if constexpr (SCALED) at = multiply_rounded(at, scale);
    return subtract_saturated(at, value);
  }
};

// A class of errors has the squared errors of a step at windows from `window` on, a multiple of 4 lanes plus
// QUARTER lanes; window >> 10 is `part`.
struct ErrorsOf1 {
  const TrellisLevels& levels;
  Difference<true> first, second;

  ErrorsOf1(const TrellisLevels& given, const TrellisStep& step)
      : levels(given), first(step, 0), second(step, 1) {}

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int) const {
    return add_saturated(rounded_square(first(levels.one[0] + window)),
                         rounded_square(second(levels.one[1] + window)));
  }
};

// The same of levels that are not scaled.
struct ErrorsOfPairs {
  const TrellisLevels& levels;
  Differences values;

  ErrorsOfPairs(const TrellisLevels& given, const TrellisStep& step)
      : levels(given), values(constant(step.value[0])) {}

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int) const {
    return squares_of_pairs(load_as<Differences>(levels.pairs + window), values);
  }
};

template <bool SCALED>
struct ErrorsOf2 {
  const TrellisLevels& levels;
  Difference<SCALED> difference;

  ErrorsOf2(const TrellisLevels& given, const TrellisStep& step) : levels(given), difference(step, 0) {}

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int) const {
    return rounded_square(difference(levels.two + window));
  }
};

// The nearer of two levels is as far away as the value is from their middle, less half of their distance.
template <bool SCALED>
struct ErrorsOf3 {
  const TrellisLevels& levels;
  Difference<SCALED> difference;

  ErrorsOf3(const TrellisLevels& given, const TrellisStep& step) : levels(given), difference(step, 0) {}

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int) const {
    Differences half = load_as<Differences>(levels.three[1] + window);
    if constexpr (SCALED) half = multiply_rounded(half, difference.scale);
    return rounded_square(subtract_saturated(absolute(difference(levels.three[0] + window)), half));
  }
};

template <bool SCALED>
struct ErrorsOf4 {
  static constexpr int kLane = kLanes<int16_t>, kVectors = kLane < 16 ? 16 / kLane : 1;
  const TrellisLevels& levels;
  Difference<SCALED> difference;
  Differences own[4][5][kVectors];

  ErrorsOf4(const TrellisLevels& given, const TrellisStep& step) : levels(given), difference(step, 0) {
    EMBKERN_UNROLL for (int part = 0; part < 4; ++part) EMBKERN_UNROLL for (int i = 0; i < 5; ++i) {
      EMBKERN_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Differences each = load_as<Differences>(levels.own[part][i] + v * kLane);
        own[part][i][v] = SCALED ? multiply_rounded(each, difference.scale) : each;
      }
    }
  }

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int part) const {
    const auto parts = [&](int i) { return own[part][i][QUARTER % kVectors]; };
    const Differences rest = difference(levels.common + window);
    const auto side = [&](int i) { return if_larger(rest, parts(0), parts(i), parts(i + 1)); };
    const Differences error = subtract_saturated(absolute(subtract_saturated(rest, side(1))), side(3));
    return rounded_square(add_saturated(error, error));
  }
};

// The same where sums of the tables wrap around.
template <bool SCALED>
struct ErrorsOfAny4 {
  const TrellisLevels& levels;
  Difference<SCALED> difference;

  ErrorsOfAny4(const TrellisLevels& given, const TrellisStep& step) : levels(given), difference(step, 0) {}

  template <int QUARTER>
  EMBKERN_INLINE Costs at(int window, int) const {
    Costs least = constant<uint16_t>(65535);
    for (const int16_t (&each)[kTrellisWindows] : levels.four) {
      const Differences error = difference(each + window);
      least = smaller(least, rounded_square(add_saturated(error, error)));
    }
    return least;
  }
};

constexpr int kAnyPart = 4;

// Extends the paths by a step. Costs fall by `best`; the least cost of those that are kept is returned if it is
// needed, else 0. Only paths from states whose highest two bits are `from` are extended, or all of them.
template <bool SCALED, class Errors>
EMBKERN_INLINE uint16_t extend_paths(const uint16_t* cost, uint16_t best, int from, const TrellisStep& step,
                                     const Errors& errors, uint16_t* next, uint8_t* choices, bool needs_best) {
  constexpr int kLane = kLanes<uint16_t>;
  const Costs all_best = constant(best), least = constant(step.least), factor = constant(step.factor),
              power = constant(step.power), most = constant<uint16_t>(65535 / step.power);
  Costs next_best = constant<uint16_t>(65535);
  for (int s = 0; s < kQuarter; s += kLane) {
    Costs before[4];
    EMBKERN_UNROLL for (int part = 0; part < 4; ++part) {
      before[part] = load_as<Costs>(cost + part * kQuarter + s);
      if (best) before[part] = subtract_saturated(before[part], all_best);
      if (step.factor) before[part] = smaller(multiply_high(before[part], factor), most) * power;
      if (from != kAnyPart && from != part) before[part] = constant<uint16_t>(65535);
    }
    for_quarters([&](auto quarter) {
      constexpr int kOwn = quarter.value;
      const int state = 4 * s + kOwn * kLane;
      Costs after[4];
      EMBKERN_UNROLL for (int part = 0; part < 4; ++part) {
        Costs squares = errors.template at<kOwn>(part * kStates + state, part);
        if constexpr (SCALED) squares = subtract_saturated(squares, least);
        after[part] = add_saturated(spread_quarter<kOwn>(before[part]), squares);
      }
      const Costs kept = least_of_four(after, choices + state / 4);
      if (needs_best) next_best = smaller(next_best, kept);
      std::memcpy(next + state, &kept, sizeof(kept));
    });
  }
  return needs_best ? smallest_lane(next_best) : 0;
}

class TrellisSearch {
 public:
  explicit TrellisSearch(const TrellisRing& ring) : ring_(ring), cost_(ring.costs[0]), next_(ring.costs[1]) {}

  // Writes the two bits of every step.
  void solve(uint8_t* bits) {
    const int64_t steps = ring_.count, ahead = std::max(steps, TrellisRing::kLeastSteps);
    begin();
    for (int64_t i = -kBefore; i < ahead; ++i) extend(i, kAnyPart);
    int end = static_cast<int>(std::min_element(cost_, cost_ + kStates) - cost_);
    for (int64_t i = ahead - 1; i >= 0; --i) end = previous(end, choice(i, end));
    if (trace(end, bits, false) == end) return;
    begin();
    for (int64_t i = 0; i < steps; ++i) extend(i, i < kDigits ? dropped(end, i) : kAnyPart);
    trace(end, bits, true);
  }

 private:
  // Writes the bits of the path that ends in a state, which it also begins in if `closed`; returns the state in
  // which it begins.
  int trace(int end, uint8_t* bits, bool closed) const {
    int state = end;
    for (int64_t i = ring_.count - 1; i >= 0; --i) {
      bits[step_at(i)] = state & 3;
      state = previous(state, closed && i < kDigits ? dropped(end, i) : choice(i, state));
    }
    return state;
  }

  // The i-th step of the search, from -kBefore on.
  int64_t step_at(int64_t i) const {
    const int64_t back = (i + kBefore) % ring_.count;
    return ring_.count - 1 - back;
  }

  // What the i-th step of a path drops that begins in a state.
  static int dropped(int state, int64_t i) { return state >> (2 * (kDigits - 1 - i)) & 3; }

  void begin() {
    std::fill_n(cost_, kStates, static_cast<uint16_t>(0));
    best_ = 0;
  }

  // The highest two bits of the state before `state` on the path that the i-th step of a pass has kept.
  int choice(int64_t i, int state) const {
    const int bit = state / kChoiceLanes * 2 * kChoiceLanes + state % kChoiceLanes;
    const uint8_t* choices = ring_.choices + i * TrellisRing::kChoiceBytes;
    const auto at = [&](int place) { return choices[place / 8] >> place % 8 & 1; };
    return at(bit) + 2 * at(bit + kChoiceLanes);
  }

  static int previous(int state, int highest) { return highest * kQuarter + state / 4; }

  // Extends the paths by step `at` of the ring, the i-th of a pass.
  void extend(int64_t i, int from) {
    const TrellisStep& step = ring_.steps[step_at(i)];
    const TrellisLevels& levels = *ring_.levels;
    const bool needs_best = step.scaled || i % kStepsToBest == 0;
    const auto with = [&](const auto& errors, auto scaled) {
      uint8_t* const choices = ring_.choices + std::max<int64_t>(i, 0) * TrellisRing::kChoiceBytes;
      best_ = extend_paths<scaled.value>(cost_, best_, from, step, errors, next_, choices, needs_best);
    };
    const auto of_bits = [&](auto scaled) {
      if (step.bits == 1 && scaled.value)
        with(ErrorsOf1(levels, step), scaled);
      else if (step.bits == 1)
        with(ErrorsOfPairs(levels, step), scaled);
      else if (step.bits == 2)
        with(ErrorsOf2<scaled.value>(levels, step), scaled);
      else if (step.bits == 3)
        with(ErrorsOf3<scaled.value>(levels, step), scaled);
      else if (levels.split)
        with(ErrorsOf4<scaled.value>(levels, step), scaled);
      else
        with(ErrorsOfAny4<scaled.value>(levels, step), scaled);
    };
    if (step.scaled)
      of_bits(std::true_type{});
    else
      of_bits(std::false_type{});
    std::swap(cost_, next_);
  }

  const TrellisRing& ring_;
  uint16_t *cost_, *next_, best_ = 0;
};

inline void search_trellis(const TrellisRing& ring, uint8_t* bits) { TrellisSearch(ring).solve(bits); }
