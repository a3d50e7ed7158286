// Viterbi's algorithm over trellises of any size, for `python -m benchmarks codes`.
//
// A step shifts CODED bits into a register of `window` bits, from below. With further bits above it, the
// register is a state, and one or more values follow from it, through levels that may differ from step to step.
// Steps form rings: the register before the first step of a ring is that after its last one. A first pass over
// the end and the beginning of the ring gives the register between them; a second pass finds the best path that
// begins and ends there. Further bits do not lead to another register: the best ones are chosen at each step.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* from) {
  Floats vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Lane i is from[i >> CODED].
template <int CODED>
inline Floats repeat(const float* from) {
  if constexpr (CODED >= 4) {
    return Floats{} + *from;
  } else {
    const Floats all = load(from);
    Floats result;
    for (int i = 0; i < kLanes; ++i) result[i] = all[i >> CODED];
    return result;
  }
}

}  // namespace

// Of steps: levels (values, further, 2^window), and the weight of their squared errors.
struct Kind {
  const float* levels;
  int32_t further, values;
  float weight;
};

namespace {

constexpr int kMostOfFirstPass = 64;  // steps on either side of the end of a ring

template <int CODED>
class Search {
 public:
  Search(int window, int steps, const Kind* kinds, const int32_t* kind_of_step)
      : registers_(1 << window),
        parents_(registers_ >> CODED),
        steps_(steps),
        cost_(registers_),
        best_(parents_ + kLanes),
        dropped_(static_cast<size_t>(steps) * (parents_ + kLanes)) {
    for (int step = 0; step < steps; ++step) {
      kinds_.push_back(kinds + kind_of_step[step]);
      places_.push_back(values_);
      values_ += kinds_.back()->values;
    }
  }

  // Of a ring.
  int values() const { return values_; }

  // Writes the states of one ring.
  void solve(const float* x, int32_t* states) {
    const int before = std::min(steps_ / 2, kMostOfFirstPass), all = std::min(steps_, 2 * kMostOfFirstPass);
    std::fill(cost_.begin(), cost_.end(), 0.0f);
    for (int i = 0; i < all; ++i) advance(i, (steps_ - before + i) % steps_, x);
    int state = 0;
    for (int s = 1; s < registers_; ++s)
      if (cost_[s] < cost_[state]) state = s;
    for (int i = all - 1; i >= before; --i) state = predecessor(i, state);
    std::fill(cost_.begin(), cost_.end(), std::numeric_limits<float>::infinity());
    cost_[state] = 0;
    for (int step = 0; step < steps_; ++step) advance(step, step, x);
    for (int step = steps_ - 1; step >= 0; --step) {
      states[step] = with_further_bits(state, step, x);
      state = predecessor(step, state);
    }
  }

 private:
  uint8_t* dropped(int i) { return dropped_.data() + static_cast<size_t>(i) * (parents_ + kLanes); }
  int predecessor(int i, int state) {
    const int parent = state >> CODED;
    return dropped(i)[parent] * parents_ + parent;
  }
  const float* levels(const Kind& kind, int further, int value) const {
    return kind.levels + (static_cast<size_t>(value) * kind.further + further) * registers_;
  }

  int with_further_bits(int state, int step, const float* x) const {
    const Kind& kind = *kinds_[step];
    int chosen = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int further = 0; further < kind.further; ++further) {
      float sum = 0;
      for (int v = 0; v < kind.values; ++v) {
        const float error = levels(kind, further, v)[state] - x[places_[step] + v];
        sum += error * error;
      }
      if (sum < least) least = sum, chosen = further;
    }
    return chosen * registers_ + state;
  }

  // Extends the paths by the values of a step; the i-th choices are kept.
  void advance(int i, int step, const float* x) {
    uint8_t* const from = dropped(i);
    if (parents_ < kLanes) {
      for (int p = 0; p < parents_; ++p) {
        int least = 0;
        for (int d = 1; d < 1 << CODED; ++d)
          if (cost_[d * parents_ + p] < cost_[least * parents_ + p]) least = d;
        best_[p] = cost_[least * parents_ + p];
        from[p] = static_cast<uint8_t>(least);
      }
    } else {
      for (int p = 0; p < parents_; p += kLanes) {
        Floats least = load(&cost_[p]);
        Integers which = {};
        for (int d = 1; d < 1 << CODED; ++d) {
          const Floats other = load(&cost_[d * parents_ + p]);
          const Integers less = other < least;
          least = less ? other : least;
          which = less ? Integers{} + d : which;
        }
        std::memcpy(&best_[p], &least, sizeof(least));
        const Bytes bytes = __builtin_convertvector(which, Bytes);
        std::memcpy(from + p, &bytes, sizeof(bytes));
      }
    }
    const Kind& kind = *kinds_[step];
    const float* own = x + places_[step];
    if (kind.further == 1 && kind.values == 1) {
      add_errors<1, 1>(kind, own);
    } else if (kind.further == 1 && kind.values == 2) {
      add_errors<1, 2>(kind, own);
    } else if (kind.further == 2 && kind.values == 1) {
      add_errors<2, 1>(kind, own);
    } else if (kind.further == 4 && kind.values == 1) {
      add_errors<4, 1>(kind, own);
    } else {
      add_errors<0, 0>(kind, own);
    }
  }

  // The cost of every register: that of its parent, and the least error of a step. 0 stands for any number.
  template <int FURTHER, int VALUES>
  void add_errors(const Kind& kind, const float* x) {
    const int choices = FURTHER ? FURTHER : kind.further, values = VALUES ? VALUES : kind.values;
    for (int s = 0; s < registers_; s += kLanes) {
      Floats least = {};
      for (int further = 0; further < choices; ++further) {
        Floats sum = {};
        for (int v = 0; v < values; ++v) {
          const Floats error = load(levels(kind, further, v) + s) - x[v];
          sum += error * error;
        }
        least = further == 0 ? sum : sum < least ? sum : least;
      }
      least = kind.weight * least + repeat<CODED>(&best_[s >> CODED]);
      std::memcpy(&cost_[s], &least, sizeof(least));
    }
  }

  int registers_, parents_, steps_, values_ = 0;
  std::vector<const Kind*> kinds_;
  std::vector<int> places_;  // of the values of a step
  std::vector<float> cost_, best_;
  std::vector<uint8_t> dropped_;
};

template <int CODED>
void encode(int window, int steps, const Kind* kinds, const int32_t* kind_of_step, const float* x,
            int64_t rings, int32_t* states) {
  Search<CODED> search(window, steps, kinds, kind_of_step);
  for (int64_t i = 0; i < rings; ++i) search.solve(x + i * search.values(), states + i * steps);
}

}  // namespace

// x (rings, values of a ring) -> states (rings, steps). The window has at least 4 bits. Returns whether there
// is a search for steps of so many bits.
extern "C" int encode_rings(int coded, int window, int steps, const Kind* kinds, const int32_t* kind_of_step,
                            const float* x, int64_t rings, int32_t* states) {
  const auto of = [&](auto bits) {
    encode<decltype(bits)::value>(window, steps, kinds, kind_of_step, x, rings, states);
    return 1;
  };
  if (coded == 1) return of(std::integral_constant<int, 1>{});
  if (coded == 2) return of(std::integral_constant<int, 2>{});
  if (coded == 3) return of(std::integral_constant<int, 3>{});
  if (coded == 4) return of(std::integral_constant<int, 4>{});
  return 0;
}
