// Vectors of kVectorBytes: type, loads, stores, shuffles. A level defines kVectorBytes before it includes this
// file, and specialises Elements for the 16-bit types it converts with instructions.

template <class A>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
#if defined(__GNUC__)
  typedef A Type __attribute__((vector_size(kVectorBytes)));
#else
  struct Type {
    A lane[kLanes];
    A& operator[](int i) { return lane[i]; }
    friend Type operator+(Type x, const Type& y) {
      for (int i = 0; i < kLanes; ++i) x.lane[i] += y.lane[i];
      return x;
    }
    friend Type operator+(Type x, A y) {
      for (int i = 0; i < kLanes; ++i) x.lane[i] += y;
      return x;
    }
    friend Type operator-(Type x, const Type& y) {
      for (int i = 0; i < kLanes; ++i) x.lane[i] -= y.lane[i];
      return x;
    }
    friend Type operator*(Type x, const Type& y) {
      for (int i = 0; i < kLanes; ++i) x.lane[i] *= y.lane[i];
      return x;
    }
    friend Type operator/(Type x, const Type& y) {
      for (int i = 0; i < kLanes; ++i) x.lane[i] /= y.lane[i];
      return x;
    }
    friend Type operator*(A x, Type y) {
      for (int i = 0; i < kLanes; ++i) y.lane[i] *= x;
      return y;
    }
  };
#endif
};
template <class A>
using Vector = typename VectorOf<A>::Type;
template <class A>
constexpr int kLanes = VectorOf<A>::kLanes;

constexpr int kGroupVectors = 32 / kLanes<float>;  // vectors of the 32 values of a packed group

template <class A>
EMBKERN_INLINE Vector<A> constant(A value) {
  return Vector<A>{} + value;
}

// ---- sums of lanes ------------------------------------------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EMBKERN_HAS_SHUFFLEVECTOR 1
#endif
#endif

// Every lane and the one D lanes away, added.
template <int D, class V, int... LANE>
EMBKERN_INLINE V added_apart(V x, std::integer_sequence<int, LANE...>) {
#if defined(EMBKERN_HAS_SHUFFLEVECTOR)
  return x + __builtin_shufflevector(x, x, (LANE ^ D)...);
#else
  V other;
  ((other[LANE] = x[LANE ^ D]), ...);
  return x + other;
#endif
}

// The sum of the lanes: those half a vector apart are added, then those a quarter apart, and so on.
template <class A, int D = kLanes<A> / 2>
EMBKERN_INLINE double sum_of_lanes(Vector<A> vector) {
  const Vector<A> sums = added_apart<D>(vector, std::make_integer_sequence<int, kLanes<A>>{});
  if constexpr (D > 1)
    return sum_of_lanes<A, D / 2>(sums);
  else
    return sums[0];
}

// The sum of the lanes, added in double in their order.
inline double sum_in_order(Vector<float> vector) {
  double sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += vector[i];
  return sum;
}

// ---- functions lane by lane ---------------------------------------------------------------------------------

template <class V, class Function>
EMBKERN_INLINE V each_lane(V x, Function function) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = function(x[i]);
  return x;
}

// Of doubles, and of floats at levels without exponential.inl.
template <class V>
EMBKERN_INLINE V exponential(V x) {
  return each_lane(x, [](auto value) { return std::exp(value); });
}
template <class V>
EMBKERN_INLINE V hyperbolic_tangent(V x) {
  return each_lane(x, [](auto value) { return std::tanh(value); });
}

// The larger lanes; y where x is NaN.
template <class V>
EMBKERN_INLINE V larger(V x, V y) {
#if defined(__GNUC__)
  return x > y ? x : y;
#else
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = x[i] > y[i] ? x[i] : y[i];
  return x;
#endif
}

// Lanes of `then` where x > y, and of `otherwise`.
template <class V>
EMBKERN_INLINE V if_larger(V x, V y, V then, V otherwise) {
#if defined(__GNUC__)
  return x > y ? then : otherwise;
#else
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i)
    otherwise[i] = x[i] > y[i] ? then[i] : otherwise[i];
  return otherwise;
#endif
}

#if defined(__GNUC__)
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
#endif

EMBKERN_INLINE Vector<float> absolute(Vector<float> x) {
#if defined(__GNUC__)
  return (Vector<float>)((Words)x & 0x7fffffffu);
#else
  return each_lane(x, [](float value) { return std::abs(value); });
#endif
}

// ---- whole numbers of 16 bits
// --------------------------------------------------------------------------------

using Costs = Vector<uint16_t>;
using Differences = Vector<int16_t>;

// ---- loads and stores ---------------------------------------------------------------------------------------

// The bytes at an address that need not be aligned, as a T.
template <class T>
EMBKERN_INLINE T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Conversion of a vector of 16-bit elements, here lane by lane.
template <class T>
struct Elements {
  static EMBKERN_INLINE Vector<float> widen(const T* from) {
    Vector<float> vector;
    for (int i = 0; i < kLanes<float>; ++i) vector[i] = static_cast<float>(from[i]);
    return vector;
  }
  static EMBKERN_INLINE void narrow(Vector<float> vector, T* to) {
    for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<T>(vector[i]);
  }
};

// Loads a vector of elements, widened to the accumulation type.
template <class T>
EMBKERN_INLINE Vector<acc_t<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    Vector<T> vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
  } else {
    return Elements<T>::widen(from);
  }
}

// Stores a vector, rounded to the element type.
template <class T>
EMBKERN_INLINE void store(Vector<acc_t<T>> vector, T* to) {
  if constexpr (std::is_same_v<T, acc_t<T>>)
    std::memcpy(to, &vector, sizeof(vector));
  else
    Elements<T>::narrow(vector, to);
}

// Loads the first `count` lanes; the others are zero.
template <class T>
EMBKERN_INLINE Vector<acc_t<T>> load(const T* from, int64_t count) {
  if (count >= kLanes<acc_t<T>>) return load(from);
  T line[kLanes<acc_t<T>>] = {};
  if (count > 0) std::memcpy(line, from, std::min<int64_t>(count, kLanes<acc_t<T>>) * sizeof(T));
  return load(line);
}

// Stores the first `count` lanes.
template <class T>
EMBKERN_INLINE void store(Vector<acc_t<T>> vector, T* to, int64_t count) {
  if (count >= kLanes<acc_t<T>>) return store(vector, to);
  T line[kLanes<acc_t<T>>];
  store(vector, line);
  if (count > 0) std::memcpy(to, line, std::min<int64_t>(count, kLanes<acc_t<T>>) * sizeof(T));
}

// ---- transposition ------------------------------------------------------------------------------------------

// Exchanges the off-diagonal quarters of every 2 D x 2 D square of rows a and b, which are D rows apart.
template <int D, class V, int... LANE>
EMBKERN_INLINE void exchange(V& a, V& b, std::integer_sequence<int, LANE...>) {
  constexpr int lanes = sizeof...(LANE);
#if defined(EMBKERN_HAS_SHUFFLEVECTOR)
  const V low = __builtin_shufflevector(a, b, (LANE & D ? LANE - D + lanes : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & D ? LANE + lanes : LANE + D)...);
  a = low;
#else
  for (int lane = 0; lane < lanes; ++lane)
    if (lane & D) std::swap(a[lane], b[lane - D]);
#endif
}

template <class T, int D = 1>
EMBKERN_INLINE void transpose(Vector<T> (&square)[kLanes<T>]) {
  EMBKERN_UNROLL for (int i = 0; i < kLanes<T>; ++i) if (!(i & D))
      exchange<D>(square[i], square[i + D], std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (2 * D < kLanes<T>) transpose<T, 2 * D>(square);
}

#undef EMBKERN_HAS_SHUFFLEVECTOR

// ---- products -----------------------------------------------------------------------------------------------

// A product takes the terms of its sums in units: one term, or two where a level has an instruction for that.
// This is the arithmetic of one term per unit.
template <class T>
struct Single {
  static constexpr int kTerms = 1;
  using A = acc_t<T>;
  using Scalar = A;        // of the left operand
  using Line = Vector<A>;  // of the right operand
  static EMBKERN_INLINE Vector<A> add(Vector<A> sum, Scalar x, Line y) { return sum + x * y; }

  // Packs a row of k terms into units; the buffer holds whole vectors.
  template <class S>
  static EMBKERN_INLINE void along(const S* row, int64_t k, Scalar* to) {
    for (int64_t p = 0; p < k; p += kLanes<A>) store(load(row + p, k - p), to + p);
  }
  // Packs the unit that begins with term p, elements i to i + SIZE; `rows` holds a vector per term.
  template <int SIZE, class S>
  static EMBKERN_INLINE void across(const S* const* rows, int64_t p, int64_t, int64_t i, Scalar* to) {
    EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) to[r] = static_cast<A>(rows[p][i + r]);
  }
  // Loads N lines of the unit that begins with term p, from column j on. `count` columns exist; -1 means all.
  template <int N, class S>
  static EMBKERN_INLINE void lines(const S* const* rows, int64_t p, int64_t, int64_t j, int64_t count,
                                   Line* to) {
    const S* from = rows[p] + j;
    EMBKERN_UNROLL for (int v = 0; v < N; ++v) to[v] =
        count < 0 ? load(from + v * kLanes<A>) : load(from + v * kLanes<A>, count - v * kLanes<A>);
  }
};

// The arithmetic of an element type at this level, and the type S in which its sums of rows are kept.
template <class T>
struct Product {
  using Arithmetic = Single<T>;
  using S = acc_t<T>;
};
