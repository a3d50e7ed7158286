// Primitives of the portable level.

// Registers as on x86-64. A level with 32 of them gets larger tiles.
constexpr int kVectorBytes = 16, kRegisters = 16;
constexpr bool kHasVectorPower = false;

#include "cpu/simd/vector.inl"

template <class V>
EMBKERN_INLINE V square_root(V x) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

EMBKERN_INLINE void store_streamed(const char* from, char* to) { std::memcpy(to, from, 64); }

EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return x * y + z;
}

// ---- whole numbers of 16 bits -------------------------------------------------------------------------------

#if defined(__GNUC__)
EMBKERN_INLINE Costs add_saturated(Costs x, Costs y) {
  const Costs sum = x + y;
  return sum | (Costs)(sum < x);
}
EMBKERN_INLINE Costs subtract_saturated(Costs x, Costs y) { return (x - y) & (Costs)(x > y); }

// `exact` unless it has another sign than x where `same` is negative, which means that it wrapped around.
EMBKERN_INLINE Differences saturated(Differences exact, Differences x, Differences same) {
  const Differences wrapped = (same & (x ^ exact)) >> 15;
  return (exact & ~wrapped) | ((x >> 15 ^ static_cast<int16_t>(32767)) & wrapped);
}
EMBKERN_INLINE Differences add_saturated(Differences x, Differences y) {
  return saturated((Differences)((Costs)x + (Costs)y), x, ~(x ^ y));
}
EMBKERN_INLINE Differences subtract_saturated(Differences x, Differences y) {
  return saturated((Differences)((Costs)x - (Costs)y), x, x ^ y);
}

// -2^15 stays.
EMBKERN_INLINE Differences absolute(Differences x) {
  const Differences sign = x >> 15;
  return (Differences)((Costs)(x ^ sign) - (Costs)sign);
}
EMBKERN_INLINE Costs smaller(Costs x, Costs y) { return x - subtract_saturated(x, y); }
// x * y / 2^15, rounded, and x * x / 2^15.
EMBKERN_INLINE Differences multiply_rounded(Differences x, Differences y) {
  typedef int32_t Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide product = __builtin_convertvector(x, Wide) * __builtin_convertvector(y, Wide);
  return __builtin_convertvector((product + (1 << 14)) >> 15, Differences);
}
EMBKERN_INLINE Costs rounded_square(Differences x) { return (Costs)multiply_rounded(x, x); }
// x * y / 2^16, rounded down.
EMBKERN_INLINE Costs multiply_high(Costs x, Costs y) {
  typedef uint32_t Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide product = __builtin_convertvector(x, Wide) * __builtin_convertvector(y, Wide);
  return __builtin_convertvector(product >> 16, Costs);
}
#else
template <class T>
EMBKERN_INLINE T limited(int value) {
  using Limits = std::numeric_limits<T>;
  return static_cast<T>(std::min<int>(std::max<int>(value, Limits::min()), Limits::max()));
}
template <class V>
EMBKERN_INLINE V add_saturated(V x, V y) {
  for (int i = 0; i < kLanes<int16_t>; ++i) x[i] = limited<std::decay_t<decltype(x[i])> >(x[i] + y[i]);
  return x;
}
template <class V>
EMBKERN_INLINE V subtract_saturated(V x, V y) {
  for (int i = 0; i < kLanes<int16_t>; ++i) x[i] = limited<std::decay_t<decltype(x[i])> >(x[i] - y[i]);
  return x;
}
// -2^15 stays.
EMBKERN_INLINE Differences absolute(Differences x) {
  return each_lane(x, [](int value) { return static_cast<int16_t>(std::abs(value)); });
}
EMBKERN_INLINE Costs smaller(Costs x, Costs y) {
  for (int i = 0; i < kLanes<uint16_t>; ++i) x[i] = std::min(x[i], y[i]);
  return x;
}
// x * y / 2^15, rounded, and x * x / 2^15.
EMBKERN_INLINE Differences multiply_rounded(Differences x, Differences y) {
  for (int i = 0; i < kLanes<int16_t>; ++i) x[i] = static_cast<int16_t>((x[i] * y[i] + (1 << 14)) >> 15);
  return x;
}
EMBKERN_INLINE Costs rounded_square(Differences x) {
  Costs result;
  for (int i = 0; i < kLanes<int16_t>; ++i) result[i] = static_cast<uint16_t>((x[i] * x[i] + (1 << 14)) >> 15);
  return result;
}
// x * y / 2^16, rounded down.
EMBKERN_INLINE Costs multiply_high(Costs x, Costs y) {
  for (int i = 0; i < kLanes<uint16_t>; ++i) x[i] = static_cast<uint16_t>(uint32_t{x[i]} * y[i] >> 16);
  return x;
}
#endif

// The sum of the squares of the differences of both bytes, which saturate. -128 counts as a difference whose
// square is 3 * 2^14.
EMBKERN_INLINE Costs squares_of_pairs(Differences x, Differences y) {
  Costs result;
  for (int i = 0; i < kLanes<uint16_t>; ++i) {
    const auto square = [](int a, int b) {
      const int size = std::min(std::abs(std::max(a - b, -128)), a < b ? 128 : 127);
      return size == 128 ? 3 << 14 : size * size;
    };
    const int low = square(static_cast<int8_t>(x[i]), static_cast<int8_t>(y[i]));
    result[i] = static_cast<uint16_t>(low + square(x[i] >> 8, y[i] >> 8));
  }
  return result;
}

EMBKERN_INLINE uint16_t smallest_lane(Costs x) {
  uint16_t least = x[0];
  for (int i = 1; i < kLanes<uint16_t>; ++i) least = std::min<uint16_t>(least, x[i]);
  return least;
}

// Of each lane the least of four vectors, the first one if several have it. Its number takes two bits: of every
// kChoiceLanes lanes the lower ones, then the higher ones.
constexpr int kChoiceLanes = 8;
EMBKERN_INLINE Costs least_of_four(const Costs (&from)[4], uint8_t* choice) {
  Costs a = from[0], b = from[1], c = from[2], d = from[3];
#if defined(__GNUC__)
  typedef int64_t Pairs __attribute__((vector_size(kVectorBytes)));
  const Differences second = b < a, fourth = d < c;
  const Costs low = second ? b : a, high = fourth ? d : c;
  const Differences upper = high < low, lower = upper ? fourth : second;
  const auto mask = [](Differences set) {
    const Pairs bits = (Pairs)(set & Differences{1, 2, 4, 8, 16, 32, 64, 128});
    const int64_t both = bits[0] | bits[1], half = both | both >> 32;
    return static_cast<uint8_t>(half | half >> 16);
  };
  choice[0] = mask(lower);
  choice[1] = mask(upper);
  return upper ? high : low;
#else
  choice[0] = choice[1] = 0;
  for (int i = 0; i < kLanes<uint16_t>; ++i) {
    const bool second = b[i] < a[i], fourth = d[i] < c[i];
    const uint16_t low = second ? b[i] : a[i], high = fourth ? d[i] : c[i];
    const bool upper = high < low;
    choice[0] |= (upper ? fourth : second) << i;
    choice[1] |= upper << i;
    a[i] = upper ? high : low;
  }
  return a;
#endif
}

// Lane i is lane QUARTER * lanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Costs spread_quarter(Costs x) {
  const uint16_t low = x[2 * QUARTER], high = x[2 * QUARTER + 1];
  return Costs{low, low, low, low, high, high, high, high};
}

#include "cpu/simd/lanewise.inl"

// ---- groups of a packed table -------------------------------------------------------------------------------

// The codes of the 32 values of a group of 5 to 8 bits.
struct GroupCodes {
  int32_t value[32];
};

template <int BITS>
EMBKERN_INLINE GroupCodes group_codes(const int32_t* words) {
  GroupCodes codes;
  for (int i = 0; i < 32; ++i) {
    int code = 0;
    for (int bit = 0; bit < BITS; ++bit) code |= (words[bit] >> i & 1) << bit;
    codes.value[i] = code;
  }
  return codes;
}

EMBKERN_INLINE void to_floats(const GroupCodes& codes, Vector<float>* values) {
  float line[32];
  for (int i = 0; i < 32; ++i) line[i] = static_cast<float>(codes.value[i]);
  std::memcpy(values, line, sizeof(line));
}

// 64 bytes by position, of which word 2 j + g has those of group g in lane j.
struct Block {
  uint64_t words[8];
};

constexpr uint64_t kEachByte = 0x0101010101010101;

// The block of function(lane, group).
template <class Function>
EMBKERN_INLINE Block block_of(Function function) {
  Block block;
  for (int lane = 0; lane < 4; ++lane)
    for (int group = 0; group < 2; ++group) block.words[2 * lane + group] = function(lane, group);
  return block;
}

struct Table16 {
  const int8_t* entries;
};

EMBKERN_INLINE Table16 table_of_16(const int8_t* entries) { return {entries}; }

// The windows of 64 steps of a stream: byte 0 of lane 0 is its first one. 6 words are read.
EMBKERN_INLINE Block windows(const int32_t* from) {
  uint64_t stream[3];
  std::memcpy(stream, from, sizeof(stream));
  return block_of([&](int lane, int group) {
    const uint64_t next = stream[group + 1] << 1 << (63 - 2 * lane);
    return stream[group] >> 2 * lane | next;
  });
}

// The same of fewer words, after which `after` follows; windows behind it are arbitrary. No more is read.
EMBKERN_INLINE Block last_windows(const int32_t* from, int64_t words, int32_t after) {
  int32_t all[6] = {};
  for (int64_t i = 0; i <= words; ++i) all[i] = i < words ? from[i] : after;
  return windows(all);
}

// The byte after each one; `next` is the block after `block`.
EMBKERN_INLINE Block next_bytes(const Block& block, const Block& next) {
  return block_of([&](int lane, int group) {
    const uint64_t after = group ? next.words[2 * lane] : block.words[2 * lane + 1];
    return block.words[2 * lane + group] >> 8 | after << 56;
  });
}

EMBKERN_INLINE Block operator+(const Block& x, const Block& y) {
  constexpr uint64_t kSign = 128 * kEachByte;
  return block_of([&](int lane, int group) {
    const uint64_t a = x.words[2 * lane + group], b = y.words[2 * lane + group];
    return ((a & ~kSign) + (b & ~kSign)) ^ ((a ^ b) & kSign);
  });
}

// The lowest four bits are those of every byte, shifted; others are arbitrary.
template <int COUNT>
EMBKERN_INLINE Block shifted_right(const Block& x) {
  return block_of([&](int lane, int group) { return x.words[2 * lane + group] >> COUNT; });
}

EMBKERN_INLINE Block high_nibbles(const Block& x) {
  return block_of([&](int lane, int group) { return x.words[2 * lane + group] >> 4 & 15 * kEachByte; });
}

// (x ^ y) & 15
EMBKERN_INLINE Block low_nibbles_of_difference(const Block& x, const Block& y) {
  return block_of([&](int lane, int group) {
    return (x.words[2 * lane + group] ^ y.words[2 * lane + group]) & 15 * kEachByte;
  });
}

EMBKERN_INLINE Block look_up(const Table16& table, const Block& index) {
  return block_of([&](int lane, int group) {
    const uint64_t all = index.words[2 * lane + group];
    uint64_t found = 0;
    for (int shift = 0; shift < 64; shift += 8)
      found |= static_cast<uint64_t>(static_cast<uint8_t>(table.entries[all >> shift & 15])) << shift;
    return found;
  });
}

// In table `one` where the further bit of a value is set, else in `zero`: bit i of byte j of a group's word is
// that of byte i of the group in lane j. One word is read unless `two` groups are there.
EMBKERN_INLINE Block look_up_either(const Table16& zero, const Table16& one, const Block& index,
                                    const int32_t* further, bool two) {
  const uint32_t words[2] = {static_cast<uint32_t>(further[0]), two ? static_cast<uint32_t>(further[1]) : 0};
  const Block zeros = look_up(zero, index), ones = look_up(one, index);
  return block_of([&](int lane, int group) {
    // A byte eight times, of which each keeps its own bit; then 255 where that is set.
    const uint64_t own = (words[group] >> 8 * lane & 255) * kEachByte & 0x8040201008040201;
    const uint64_t mask = ((own + 127 * kEachByte) >> 7 & kEachByte) * 255;
    return (ones.words[2 * lane + group] & mask) | (zeros.words[2 * lane + group] & ~mask);
  });
}

// `index` with its two lowest bits replaced by the further bits of every value, bits 2 j and 2 j + 1 of its
// byte of the two words of a group. Those of one group are read unless `two` are there.
EMBKERN_INLINE Block with_further_bits(const Block& index, const int32_t* further, bool two) {
  const uint64_t words[2] = {load_as<uint64_t>(further), two ? load_as<uint64_t>(further + 2) : 0};
  return block_of([&](int lane, int group) {
    return (words[group] >> 2 * lane & 3 * kEachByte) | (index.words[2 * lane + group] & 12 * kEachByte);
  });
}

// Of each lane, the first two words of 32 bits of x and y in turn, and the last two.
template <int HALF>
EMBKERN_INLINE Block interleave(const Block& x, const Block& y) {
  return block_of([&](int lane, int group) {
    const uint64_t a = x.words[2 * lane + HALF] >> 32 * group, b = y.words[2 * lane + HALF] >> 32 * group;
    return (a & 0xffffffff) | b << 32;
  });
}
EMBKERN_INLINE Block interleave_low(const Block& x, const Block& y) { return interleave<0>(x, y); }
EMBKERN_INLINE Block interleave_high(const Block& x, const Block& y) { return interleave<1>(x, y); }

constexpr float kWidenedUnit = 1;  // of the floats that `widen` makes

// The 32 signed bytes of group GROUP, 0 or 1, of a block.
template <int GROUP>
EMBKERN_INLINE void widen(const Block& block, Vector<float>* values) {
  int8_t bytes[32];
  for (int lane = 0; lane < 4; ++lane)
    for (int q = 0; q < 2; ++q) {
      const uint32_t four = static_cast<uint32_t>(block.words[2 * lane + GROUP] >> 32 * q);
      std::memcpy(bytes + 16 * q + 4 * lane, &four, sizeof(four));
    }
  float line[32];
  for (int i = 0; i < 32; ++i) line[i] = bytes[i];
  std::memcpy(values, line, sizeof(line));
}
