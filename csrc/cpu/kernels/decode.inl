// Records of a packed table to values: the bit planes of a group are combined in registers. The index of a
// value has the bits of its code or, up to four bits, of its trellis state, and selects one of 128 levels.

constexpr int kStateBits = 7;
static_assert(1 << kStateBits == kTrellisStates, "");
constexpr float kLevelStep = 1.0f / 4096;

// Decodes groups of BITS bits. The levels stay in registers from one group to the next where a level has room.
template <int BITS>
class GroupDecoder {
 public:
  static constexpr bool kTrellis = BITS <= 4;
  static constexpr float kStep = kTrellis ? kLevelStep : 1;

  EMBKERN_INLINE explicit GroupDecoder(const int16_t* levels)
      : levels_(levels + (kTrellis ? kTrellisStates * (BITS - 1) : 0)) {}

  // The 32 values of a group.
  EMBKERN_INLINE void operator()(const int32_t* words, Vector<float>* values) const {
    steps(words, values);
    if constexpr (kTrellis)
      EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) values[v] = kStep * values[v];
  }

  // The same in units of kStep.
  EMBKERN_INLINE void steps(const int32_t* words, Vector<float>* values) const {
    const GroupIndices indices = group_indices<BITS, kTrellis ? kStateBits : BITS>(words);
    if constexpr (kTrellis) {
      levels_.look_up(indices, values);
    } else {
      to_floats(indices, values);
      EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) values[v] = values[v] + -kMiddle;
    }
  }

 private:
  static constexpr float kMiddle = ((1 << BITS) - 1) / 2.0f;

  Table128 levels_;
};

// Calls use(first, lanes of A) for the 32 values from `first` on.
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

// Decodes groups `group` to `last`, all of BITS bits, for use_group. Returns the words after them.
template <class A, int BITS, class Use>
EMBKERN_INLINE const int32_t* use_groups(int64_t group, int64_t last, const int32_t* words,
                                         const int16_t* levels, Use use) {
  if constexpr (BITS == 0) {
    const Vector<float> zeros[kGroupVectors] = {};
    for (; group < last; ++group) use_group<A>(group * 32, zeros, use);
  } else {
    const GroupDecoder<BITS> decode(levels);
    for (; group < last; ++group, words += BITS) {
      Vector<float> values[kGroupVectors];
      decode(words, values);
      use_group<A>(group * 32, values, use);
    }
  }
  return words;
}

// Calls use(first, lanes of A) for all values of a row, a run of groups of equal bits at a time.
template <class A, class T, class Use>
EMBKERN_INLINE void for_values(const PackedRow<T>& row, Use use) {
  const int32_t* words = row.words;
  const int64_t groups = (row.width + 31) / 32;
  const auto bits_of = [&](int64_t group) { return group < row.groups ? row.bits[group] : 0; };
  for (int64_t group = 0, last; group < groups; group = last) {
    const int bits = bits_of(group);
    for (last = group + 1; last < groups && bits_of(last) == bits;) ++last;
    with_bits<8>(bits,
                 [&](auto width) { words = use_groups<A, width.value>(group, last, words, row.levels, use); });
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
