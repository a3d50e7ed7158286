// Viterbi's algorithm over trellises of any size, for `python -m benchmarks codes`.
//
// A step shifts CODED bits into a register of `window` bits, from below. With further bits above it, the
// register is a state, and VALUES values follow from the state through `levels`, (values, 2^window, further).
// Steps form rings of `steps`: the register before the first step of a ring is that after its last one. A first
// pass without that condition, begun in the middle of the ring, gives the register at its end; a second pass
// finds the best path that begins and ends there. Further bits do not lead to another register: the best ones
// are chosen at each step.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
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

template <int STEP, int CODED, int VALUES>
class Search {
 public:
  Search(int window, int steps, const float* levels)
      : registers_(1 << window),
        parents_(registers_ >> CODED),
        steps_(steps),
        levels_(levels),
        cost_(registers_),
        best_(parents_ + kLanes),
        dropped_(static_cast<size_t>(steps) * (parents_ + kLanes)) {}

  // Writes the states of one ring.
  void solve(const float* x, int32_t* states) {
    std::fill(cost_.begin(), cost_.end(), 0.0f);
    for (int step = 0; step < steps_; ++step) advance(step, x + (step + steps_ / 2) % steps_ * VALUES);
    int state = 0;
    for (int s = 1; s < registers_; ++s)
      if (cost_[s] < cost_[state]) state = s;
    for (int step = steps_ - 1; step >= steps_ - steps_ / 2; --step) state = predecessor(step, state);
    std::fill(cost_.begin(), cost_.end(), std::numeric_limits<float>::infinity());
    cost_[state] = 0;
    for (int step = 0; step < steps_; ++step) advance(step, x + step * VALUES);
    for (int step = steps_ - 1; step >= 0; --step) {
      states[step] = with_further_bits(state, x + step * VALUES);
      state = predecessor(step, state);
    }
  }

 private:
  static constexpr int kFurther = 1 << (STEP - CODED);  // choices of further bits

  uint8_t* dropped(int step) { return dropped_.data() + static_cast<size_t>(step) * (parents_ + kLanes); }
  int predecessor(int step, int state) {
    const int parent = state >> CODED;
    return dropped(step)[parent] * parents_ + parent;
  }
  const float* levels(int further, int value) const {
    return levels_ + (static_cast<size_t>(value) * kFurther + further) * registers_;
  }

  int with_further_bits(int state, const float* x) const {
    int chosen = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int further = 0; further < kFurther; ++further) {
      float sum = 0;
      for (int v = 0; v < VALUES; ++v) {
        const float error = levels(further, v)[state] - x[v];
        sum += error * error;
      }
      if (sum < least) least = sum, chosen = further;
    }
    return chosen * registers_ + state;
  }

  void advance(int step, const float* x) {
    uint8_t* const from = dropped(step);
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
    for (int s = 0; s < registers_; s += kLanes) {
      Floats least = {};
      for (int further = 0; further < kFurther; ++further) {
        Floats sum = {};
        for (int v = 0; v < VALUES; ++v) {
          const Floats error = load(levels(further, v) + s) - x[v];
          sum += error * error;
        }
        least = further == 0 ? sum : sum < least ? sum : least;
      }
      least += repeat<CODED>(&best_[s >> CODED]);
      std::memcpy(&cost_[s], &least, sizeof(least));
    }
  }

  int registers_, parents_, steps_;
  const float* levels_;
  std::vector<float> cost_, best_;
  std::vector<uint8_t> dropped_;
};

template <int STEP, int CODED, int VALUES>
void encode(int window, int steps, const float* levels, const float* x, int64_t rings, int32_t* states) {
  Search<STEP, CODED, VALUES> search(window, steps, levels);
  for (int64_t i = 0; i < rings; ++i) search.solve(x + i * steps * VALUES, states + i * steps);
}

}  // namespace

// levels (values, 2^(step - coded), 2^window), x (rings, steps, values) -> states (rings, steps). The window
// has at least 4 bits. Returns whether there is a search for this shape.
extern "C" int encode_rings(int step, int coded, int values, int window, int steps, const float* levels,
                            const float* x, int64_t rings, int32_t* states) {
#define SEARCH(STEP, CODED, VALUES)                                       \
  if (step == STEP && coded == CODED && values == VALUES) {               \
    encode<STEP, CODED, VALUES>(window, steps, levels, x, rings, states); \
    return 1;                                                             \
  }
  SEARCH(1, 1, 1)
  SEARCH(2, 2, 1)
  SEARCH(3, 3, 1)
  SEARCH(4, 4, 1)
  SEARCH(3, 2, 1)
  SEARCH(4, 2, 1)
  SEARCH(2, 2, 2)
  SEARCH(4, 4, 2)
#undef SEARCH
  return 0;
}
