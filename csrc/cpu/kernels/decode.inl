// Records of a packed table to values.
//
// The values of a trellis code follow from windows of 12 bits of the record's stream, which begin 2 bits apart:
// a level is the sum of entries of three or four tables of 16. Blocks of 64 windows, which are 16 bytes of the
// stream, are decoded at once: two groups of 2 to 4 bits, or four of 1 bit. A block holds a byte per window at
// "positions" 16 j + k: j is the lane of 128 bits, k the byte in it. Byte k of lane j is the window that begins
// at bit 8 k + 2 j, so that shifting the stream by 0, 2, 4 and 6 bits makes all of them. Byte 8 g + 4 q + m of
// lane j belongs to value 16 q + 4 j + m of group g, which is the order that widening bytes to floats restores.

constexpr int64_t kBlockWords = 4, kReadWords = 6;  // of a block, and those that are read for its windows

// The words of a record while its groups are read in their order. Nothing beyond the record is read.
class RecordReader {
 public:
  const int32_t *further, *planes;  // of the next group

  EMBKERN_INLINE RecordReader(const int32_t* words, const RecordLayout& layout)
      : further(words + layout.stream),
        planes(further + layout.further),
        stream_(words),
        next_(-layout.stream) {}

  // The windows of the block that begins `ahead` words after the first one of the next group. Those of steps
  // after the word that follows the stream's end, its first one, are arbitrary.
  EMBKERN_INLINE Block block(int64_t ahead) const {
    const int64_t first = next_ + ahead;
    return first <= -kReadWords ? windows(end_ + first) : last_windows(end_ + first, -first, *stream_);
  }

  EMBKERN_INLINE void skip(int64_t stream_words, int64_t further_words) {
    next_ += stream_words;
    further += further_words;
  }

 private:
  const int32_t *stream_, *end_ = further;
  int64_t next_;  // from the stream's end
};

// The tables of codes of BITS bits, 1 to 4, and levels in units of 2^-5 by position.
template <int BITS>
class TrellisTables {
 public:
  EMBKERN_INLINE explicit TrellisTables(const int8_t* levels) {
    EMBKERN_UNROLL for (int i = 0; i < kCount; ++i) table_[i] =
        table_of_16(levels + kTableEntries * (kFirst + i));
  }

  // `later` are the windows of four steps later, whose low bits continue those of `now`. `further` bits are
  // those of two groups, or of one if not `two`.
  EMBKERN_INLINE Block levels(const Block& now, const Block& later, const int32_t* further, bool two) const {
    const Block mixed = low_nibbles_of_difference(now, later), last = last_index(now, later);
    const Block sum = look_up(table_[0], high_nibbles(now)) + look_up(table_[1], mixed);
    if constexpr (BITS == 3)
      return sum + look_up_either(table_[2], table_[3], last, further, two);
    else if constexpr (BITS == 4)
      return sum + look_up(table_[2], last) + look_up(table_[3], with_further_bits(mixed, further, two));
    else
      return sum + look_up(table_[2], last);
  }

  // The levels of the second values of steps of 1 bit.
  EMBKERN_INLINE Block second_levels(const Block& now, const Block& later) const {
    return look_up(table_[3], high_nibbles(now)) + look_up(table_[4], low_nibbles_of_difference(now, later)) +
           look_up(table_[5], last_index(now, later));
  }

 private:
  static constexpr int kFirst = BITS == 1 ? 0 : BITS == 2 ? 6 : BITS == 3 ? 9 : 13;
  static constexpr int kCount = BITS == 1 ? 6 : BITS == 2 ? 3 : 4;

  static EMBKERN_INLINE Block last_index(const Block& now, const Block& later) {
    return low_nibbles_of_difference(shifted_right<3>(now), later);
  }

  Table16 table_[kCount];
};

// Of the 32 values of a group, the unit in which they are decoded.
template <int BITS>
constexpr float kStep = BITS >= 1 && BITS <= kTrellisBits ? kWidenedUnit / 32 : 1.0f;

// Which one of two groups that are decoded together.
using First = std::integral_constant<int, 0>;
using Second = std::integral_constant<int, 1>;

// Calls use(group, values, which one) for groups `group` and, if that is below `last`, `group` + 1 of a block.
template <class Use>
EMBKERN_INLINE void use_block(const Block& levels, int64_t group, int64_t last, Use use) {
  Vector<float> values[kGroupVectors];
  widen<0>(levels, values);
  use(group, values, First{});
  if (group + 1 >= last) return;
  widen<1>(levels, values);
  use(group + 1, values, Second{});
}

// Decodes groups `group` to `last`, all of BITS bits, for use(group, its 32 values in units of kStep<BITS>).
template <int BITS, class Use>
EMBKERN_INLINE void decode_trellis_groups(RecordReader& record, const int8_t* levels, int64_t group,
                                          int64_t last, Use use) {
  constexpr int64_t kBlockGroups = BITS == 1 ? 4 : 2, kStreamWords = BITS == 1 ? 1 : 2;
  constexpr int64_t kFurtherWords = BITS - kStreamWords;
  const TrellisTables<BITS> tables(levels);
  const int64_t groups = last - group;
  const int32_t* further = record.further;
  Block now = record.block(0);
  for (int64_t ahead = kBlockWords; group < last; group += kBlockGroups, ahead += kBlockWords) {
    const Block next = record.block(ahead), later = next_bytes(now, next);
    const Block first = tables.levels(now, later, further, group + 1 < last);
    if constexpr (BITS == 1) {
      const Block second = tables.second_levels(now, later);
      use_block(interleave_low(first, second), group, last, use);
      if (group + 2 < last) use_block(interleave_high(first, second), group + 2, last, use);
    } else {
      use_block(first, group, last, use);
    }
    now = next;
    further += kBlockGroups * kFurtherWords;
  }
  record.skip(groups * kStreamWords, groups * kFurtherWords);
}

template <int BITS, class Use>
EMBKERN_INLINE void decode_uniform_groups(RecordReader& record, int64_t group, int64_t last, Use use) {
  constexpr float kMiddle = ((1 << BITS) - 1) / 2.0f;
  for (; group < last; ++group, record.planes += BITS) {
    Vector<float> values[kGroupVectors];
    to_floats(group_codes<BITS>(record.planes), values);
    EMBKERN_UNROLL for (int v = 0; v < kGroupVectors; ++v) values[v] = values[v] + -kMiddle;
    use(group, values, First{});
  }
}

template <int BITS, class Use>
EMBKERN_INLINE void decode_groups(RecordReader& record, const int8_t* levels, int64_t group, int64_t last,
                                  Use use) {
  if constexpr (BITS == 0) {
    const Vector<float> zeros[kGroupVectors] = {};
    for (; group < last; ++group) use(group, zeros, First{});
  } else if constexpr (BITS <= kTrellisBits) {
    decode_trellis_groups<BITS>(record, levels, group, last, use);
  } else {
    decode_uniform_groups<BITS>(record, group, last, use);
  }
}

// Calls use(bits, group, last), `bits` a constant, for the runs of a row, the groups `group` to `last`.
template <class T, class Use>
EMBKERN_INLINE void for_runs(const PackedRow<T>& row, Use use) {
  int64_t group = 0;
  for (const Run* run = row.layout->runs; run != row.layout->end; ++run) {
    const int64_t last = group + run->groups;
    with_bits<kMostBits>(run->bits, [&](auto bits) { use(bits, group, last); });
    group = last;
  }
}

// The 32 values of a group in vectors of A.
template <class A>
constexpr int kVectorsOfGroup = 32 / kLanes<A>;

template <class A, class Use>
EMBKERN_INLINE void use_group(int64_t first, const Vector<float>* values, A step, Use use) {
  if constexpr (std::is_same_v<A, float>) {
    use(first, values, step);
  } else {
    float line[32];
    std::memcpy(line, values, sizeof(line));
    Vector<A> wide[kVectorsOfGroup<A>];
    for (int i = 0; i < 32; ++i) wide[i / kLanes<A>][i % kLanes<A>] = line[i];
    use(first, wide, step);
  }
}

// Calls use(first, vectors of A, step) for all groups of a row: the 32 values from column `first` on are the
// vectors times the step, a power of two. Values beyond the runs are 0.
template <class A, class T, class Use>
EMBKERN_INLINE void for_values(const PackedRow<T>& row, Use use) {
  RecordReader record(row.words, *row.layout);
  int64_t decoded = 0;
  for_runs(row, [&](auto bits, int64_t group, int64_t last) {
    decode_groups<decltype(bits)::value>(
        record, row.levels, group, last, [&](int64_t each, const Vector<float>* values, auto) {
          use_group<A>(each * 32, values, A(kStep<decltype(bits)::value>), use);
        });
    decoded = last;
  });
  decode_groups<0>(
      record, row.levels, decoded, (row.width + 31) / 32,
      [&](int64_t each, const Vector<float>* zeros, auto) { use_group<A>(each * 32, zeros, A(1), use); });
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
