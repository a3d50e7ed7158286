// Records of a packed table to values: the bit planes of a group are combined in registers. The index of a
// value (index_bit) has the bits of its code or, up to four bits, of its trellis state, and selects one of 128
// levels.

constexpr float kLevelStep = 1.0f / 4096;

// Decodes groups of BITS bits. The levels stay in registers from one group to the next where a level has room.
template <int BITS>
class GroupDecoder {
 public:
  static constexpr bool kTrellis = BITS <= 4;
  static constexpr float kStep = kTrellis ? kLevelStep * Table128::kUnit : 1;

  EMBKERN_INLINE explicit GroupDecoder(const int16_t* levels)
      : levels_(levels + (kTrellis ? kTrellisStates * (BITS - 1) : 0)) {}

  // The 32 values of a group in units of kStep.
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

// The 32 values of a group in vectors of A.
template <class A>
constexpr int kVectorsOfGroup = 32 / kLanes<A>;

template <class A, class Use>
EMBKERN_INLINE void use_group(int64_t first, const Vector<float>* values, Use use) {
  if constexpr (std::is_same_v<A, float>) {
    use(first, values);
  } else {
    float line[32];
    std::memcpy(line, values, sizeof(line));
    Vector<A> wide[kVectorsOfGroup<A>];
    for (int i = 0; i < 32; ++i) wide[i / kLanes<A>][i % kLanes<A>] = line[i];
    use(first, wide);
  }
}

// Decodes groups `group` to `last`, all of BITS bits, for use(first, vectors of A, step): the 32 values from
// column `first` on are the vectors times the step, a power of two. Returns the words after them.
template <class A, int BITS, class Use>
EMBKERN_INLINE const int32_t* use_groups(int64_t group, int64_t last, const int32_t* words,
                                         const int16_t* levels, Use use) {
  if constexpr (BITS == 0) {
    const Vector<float> zeros[kGroupVectors] = {};
    for (; group < last; ++group)
      use_group<A>(group * 32, zeros,
                   [&](int64_t first, const Vector<A>* values) { use(first, values, A(1)); });
  } else {
    const GroupDecoder<BITS> decoder(levels);
    for (; group < last; ++group, words += BITS) {
      Vector<float> steps[kGroupVectors];
      decoder.steps(words, steps);
      use_group<A>(group * 32, steps, [&](int64_t first, const Vector<A>* values) {
        use(first, values, A(GroupDecoder<BITS>::kStep));
      });
    }
  }
  return words;
}

// Calls use(first, vectors of A, step) for all groups of a row, a run of groups of equal bits at a time.
template <class A, class T, class Use>
EMBKERN_INLINE void for_values(const PackedRow<T>& row, Use use) {
  const int32_t* words = row.words;
  const int64_t groups = (row.width + 31) / 32;
  const auto bits_of = [&](int64_t group) { return group < row.groups ? row.bits[group] : 0; };
  for (int64_t group = 0, last; group < groups; group = last) {
    const int bits = bits_of(group);
    for (last = group == 0 ? row.equal : group + 1; last < groups && bits_of(last) == bits;) ++last;
    with_bits<8>(bits,
                 [&](auto width) { words = use_groups<A, width.value>(group, last, words, row.levels, use); });
  }
}

template <class T>
void decode_row(const PackedRow<T>& row, const T* offset, acc_t<T> scale, T* to) {
  using A = acc_t<T>;
  constexpr A kTiny = 1e-25f;   // times any step this is a normal number
  const A factor = row.factor;  // a copy, since for the compiler the stores to `to` may change the row
  // A group that is cut off at the end of the row goes through these.
  const int64_t whole = row.width / 32 * 32;
  alignas(64) T end[32], offset_end[32] = {};
  if (offset) std::memcpy(offset_end, offset + whole, (row.width - whole) * sizeof(T));
  if (!offset && (std::abs(factor) > kTiny || factor == 0)) {
    for_values<A>(row, [&](int64_t first, const Vector<A>* values, A step) {
      T* line = first < whole ? to + first : end;
      EMBKERN_UNROLL for (int v = 0; v < kVectorsOfGroup<A>; ++v)
          store((factor * step) * values[v], line + v * kLanes<A>);
    });
  } else {
    for_values<A>(row, [&](int64_t first, const Vector<A>* values, A step) {
      T* line = first < whole ? to + first : end;
      const T* own = offset && first < whole ? offset + first : offset_end;
      EMBKERN_UNROLL for (int v = 0; v < kVectorsOfGroup<A>; ++v)
          store(factor * (step * values[v]) + scale * load(own + v * kLanes<A>), line + v * kLanes<A>);
    });
  }
  if (whole < row.width) std::memcpy(to + whole, end, (row.width - whole) * sizeof(T));
}

template <class T, class S>
void decode_coefficients(const PackedRow<T>& row, void* to) {
  using A = acc_t<T>;
  const A factor = row.factor;
  for_values<A>(row, [&](int64_t first, const Vector<A>* values, A step) {
    S* line = static_cast<S*>(to) + first;
    EMBKERN_UNROLL for (int v = 0; v < kVectorsOfGroup<A>; ++v)
        store(factor * (step * values[v]), line + v * kLanes<A>);
  });
}

inline void copy_streamed(const void* from, void* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    store_streamed(static_cast<const char*>(from) + at, static_cast<char*>(to) + at);
}
