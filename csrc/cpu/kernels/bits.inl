// Bit widths as constants.

// Calls body(width) with a constant equal to `bits`, 0 to MOST. Other numbers count as MOST.
template <int MOST, int LEAST = 0, class Body>
EMBKERN_INLINE void with_bits(int bits, Body body) {
  if constexpr (LEAST == MOST) {
    body(std::integral_constant<int, MOST>{});
  } else {
    if (bits == LEAST)
      body(std::integral_constant<int, LEAST>{});
    else
      with_bits<MOST, LEAST + 1>(bits, body);
  }
}

// Calls body(quarter) with constants 0 to 3.
template <class Body>
EMBKERN_INLINE void for_quarters(Body body) {
  body(std::integral_constant<int, 0>{});
  body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 3>{});
}
