// The bit planes of a packed group: bit i of word p is bit p of the code of value i.

// Bit BIT of the index of every value. The values before the first one of a group are the last ones of the same
// group, so the planes of earlier codes are rotated.
template <int BITS, int BIT>
EMBKERN_INLINE uint32_t index_plane(const int32_t* words) {
  constexpr IndexBit kFrom = index_bit(BITS, BIT);
  const uint32_t word = static_cast<uint32_t>(words[kFrom.plane]);
  if constexpr (kFrom.before == 0)
    return word;
  else
    return word << kFrom.before | word >> (32 - kFrom.before);
}

template <int BITS, class Use, int... BIT>
EMBKERN_INLINE void for_each_plane(const int32_t* words, Use use, std::integer_sequence<int, BIT...>) {
  (use(BIT, index_plane<BITS, BIT>(words)), ...);
}

// Calls use(bit, plane) for the COUNT lowest bits of the index.
template <int BITS, int COUNT, class Use>
EMBKERN_INLINE void for_planes(const int32_t* words, Use use) {
  for_each_plane<BITS>(words, use, std::make_integer_sequence<int, COUNT>{});
}

// ---- windows ------------------------------------------------------------------------------------------------

// Of the index of a code of up to 4 bits, the bits that come from one plane: its window, from bit begin() of
// the index on. Where bit i + kFirst of the plane comes to bit 0, the window of value i lies at its place.
template <int BITS, int PLANE>
struct Window {
  static constexpr int begin() {
    int bit = 0;
    while (index_bit(BITS, bit).plane < PLANE) ++bit;
    return bit;
  }
  static constexpr int kFirst = 64 - index_bit(BITS, begin()).before - begin();  // modulo 32
  static constexpr int kBelow = (1 << begin()) - 1;                              // the bits of lower planes
};
