// The bit planes of a packed group: bit i of word p is bit p of the code of value i.

// The plane of bit BIT of the index of every value. Up to 4 bits the index is a trellis state: the code of the
// value in its lowest BITS bits, then the code of the value before it, and so on. The values before the first
// one of a group are the last ones of the same group, so those planes are rotated.
template <int BITS, int BIT>
EMBKERN_INLINE uint32_t index_plane(const int32_t* words) {
  constexpr int kBefore = BITS <= 4 ? BIT / BITS : 0;  // values back
  const uint32_t word = static_cast<uint32_t>(words[BIT - kBefore * BITS]);
  if constexpr (kBefore == 0)
    return word;
  else
    return word << kBefore | word >> (32 - kBefore);
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
