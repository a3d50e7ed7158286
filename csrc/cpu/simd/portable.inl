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

// Lane i is from[first + (i >> BITS)]; `from` is aligned.
template <int BITS>
EMBKERN_INLINE Vector<float> repeat_lanes(const float* from, int first) {
  Vector<float> result;
  for (int i = 0; i < kLanes<float>; ++i) result[i] = from[first + (i >> BITS)];
  return result;
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
