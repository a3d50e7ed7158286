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

// Of each lane the least of four vectors, `stride` apart and aligned, the first one if several have it. Its
// number takes two bits: the lower ones of all lanes, then the higher ones.
EMBKERN_INLINE Vector<float> least_of_four(const float* from, int64_t stride, uint8_t* choice) {
  Vector<float> a = load(from), b = load(from + stride), c = load(from + 2 * stride),
                d = load(from + 3 * stride);
#if defined(__GNUC__)
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Pairs __attribute__((vector_size(kVectorBytes)));
  const Bits second = b < a, fourth = d < c;
  const Vector<float> low = second ? b : a, high = fourth ? d : c;
  const Bits upper = high < low, lower = upper ? fourth : second;
  const Pairs both = (Pairs)((lower & Bits{1, 2, 4, 8}) | (upper & Bits{16, 32, 64, 128}));
  const int64_t all = both[0] | both[1];
  *choice = static_cast<uint8_t>(all | all >> 32);
  return upper ? high : low;
#else
  Vector<float> least = a;
  int all = 0;
  for (int i = 0; i < kLanes<float>; ++i) {
    const bool second = b[i] < a[i], fourth = d[i] < c[i];
    const float low = second ? b[i] : a[i], high = fourth ? d[i] : c[i];
    const bool upper = high < low;
    least[i] = upper ? high : low;
    all |= ((upper ? fourth : second) | upper << 4) << i;
  }
  *choice = static_cast<uint8_t>(all);
  return least;
#endif
}

// Lane i is lane QUARTER * kLanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Vector<float> spread_quarter(Vector<float> x) {
  return constant(static_cast<float>(x[QUARTER]));
}

#include "cpu/simd/lanewise.inl"
#include "cpu/simd/planes.inl"

// The indices of the 32 values of a group.
struct GroupIndices {
  int32_t value[32];
};

template <int BITS, int COUNT>
EMBKERN_INLINE GroupIndices group_indices(const int32_t* words) {
  GroupIndices indices;
  for (int i = 0; i < 32; ++i) {
    int index = 0;
    for_planes<BITS, COUNT>(words, [&](int bit, uint32_t plane) { index |= (plane >> i & 1) << bit; });
    indices.value[i] = index;
  }
  return indices;
}

EMBKERN_INLINE void to_floats(const GroupIndices& indices, Vector<float>* values) {
  float line[32];
  for (int i = 0; i < 32; ++i) line[i] = static_cast<float>(indices.value[i]);
  std::memcpy(values, line, sizeof(line));
}

// A table of 128 integers.
class Table128 {
 public:
  static constexpr float kUnit = 1;  // of the results

  EMBKERN_INLINE explicit Table128(const int16_t* entries) : entries_(entries) {}

  EMBKERN_INLINE void look_up(const GroupIndices& indices, Vector<float>* values) const {
    float line[32];
    for (int i = 0; i < 32; ++i) line[i] = static_cast<float>(entries_[indices.value[i] % 128]);
    std::memcpy(values, line, sizeof(line));
  }

 private:
  const int16_t* entries_;
};
