// The kernels of the loss and of training, for one instruction set. Part of kernels.inl, whose vectors and
// tiles it uses.

// ---- vectors of floats: what the language does not have ----------------------------------------------------

// The sum of the lanes, pairwise.
template <class A>
EMBKERN_INLINE double sum_of_lanes(Vector<A> vector) {
  A lane[kLanes<A>];
  std::memcpy(lane, &vector, sizeof(vector));
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

template <class A>
EMBKERN_INLINE Vector<A> constant(A value) {
  return Vector<A>{} + value;
}

#if defined(EMBKERN_AVX512)
EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
}
#elif defined(EMBKERN_AVX2)
EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
}
#else
template <class V>
EMBKERN_INLINE V square_root(V x) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#endif

#if defined(EMBKERN_AVX512) || defined(EMBKERN_AVX2)
#define EMBKERN_VECTOR_POWER 1
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

template <int N>
EMBKERN_INLINE Vector<float> polynomial(Vector<float> x, const float (&terms)[N]) {
  Vector<float> sum = constant(terms[0]);
  EMBKERN_UNROLL for (int i = 1; i < N; ++i) sum = multiply_add(sum, x, constant(terms[i]));
  return sum;
}

// u^alpha for normal positive u, within 2 ulp: 2^(alpha log2 u) loses log2(33) bits where alpha log2 u is one
// float (|log2 u| reaches 33 at 1e-10), so its integer part comes from an exact product.
EMBKERN_INLINE Vector<float> power(Vector<float> u, float alpha, float alpha_rest) {
  using V = Vector<float>;
  // u = 2^exponent * mantissa with a mantissa of sqrt(1/2) to sqrt(2).
  const Integers bits = (Integers)u, exponent = (bits - 0x3f3504f3) >> 23;
  const V f = (V)(bits - (exponent << 23)) - 1.0f;
  // log(1 + f) = f - f^2 / 2 + f^3 P(f)
  const V p = polynomial<9>(f, {0.069533661f, -0.116357923f, 0.117728084f, -0.124054529f, 0.142355889f,
                                -0.16668494f, 0.200013191f, -0.249999911f, 0.333333254f});
  const V square = f * f;
  const V log = multiply_add(square * f, p, multiply_add(square, constant(-0.5f), f));
  const V whole = __builtin_convertvector(exponent, V);
  const V product = alpha * whole;
  const V rest =
      multiply_add(constant(alpha), whole, -1.0f * product) + alpha_rest * whole + (alpha * 1.44269504f) * log;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bit below 1
  V rounded = (product + rest) + kRound;
  rounded = rounded - kRound;
  const V fraction = (product - rounded) + rest;
  const V result = polynomial<7>(fraction, {0.000154697322f, 0.00134004327f, 0.00961802527f, 0.0555032715f,
                                            0.240226507f, 0.693147182f, 1.0f});
  // Two factors of a power of two, so that the result may be subnormal or infinite.
  Integers n = __builtin_convertvector(rounded, Integers);
  n = n < -250 ? -250 + (n & 0) : n;
  n = n > 250 ? 250 + (n & 0) : n;
  const Integers half = n >> 1;
  const V scaled = result * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
  return u - u == 0.0f ? scaled : u;  // NaN and infinity
}
#endif

// ---- rows of the loss ---------------------------------------------------------------------------------------

// Squares of a row whose sum lies between these are far from the ends of fp32's range, and so is every
// coefficient of its gradient.
constexpr double kSmallSquare = 1e-24, kLargeSquare = 1e30;

template <class T>
RowSums wide_row_sums(const T* output, const T* target, int64_t width) {
  RowSums sums{0, 0, 0, 0, true};
  for (int64_t j = 0; j < width; ++j) {
    const double y = static_cast<double>(output[j]), x = static_cast<double>(target[j]);
    sums.dot += x * y;
    sums.output_square += y * y;
    sums.target_square += x * x;
    sums.error_square += (y - x) * (y - x);
  }
  return sums;
}

template <class T>
RowSums row_sums(const T* output, const T* target, int64_t width) {
  using A = acc_t<T>;
  constexpr int kUnroll = 2;  // two sums of each kind cover the latency of their additions
  Vector<A> dot[kUnroll] = {}, yy[kUnroll] = {}, xx[kUnroll] = {}, ee[kUnroll] = {};
  const auto add = [&](int u, Vector<A> y, Vector<A> x) {
    const Vector<A> e = y + A(-1) * x;
    dot[u] = dot[u] + x * y;
    yy[u] = yy[u] + y * y;
    xx[u] = xx[u] + x * x;
    ee[u] = ee[u] + e * e;
  };
  int64_t j = 0;
  for (; j + kUnroll * kLanes<A> <= width; j += kUnroll * kLanes<A>)
    EMBKERN_UNROLL for (int u = 0; u < kUnroll; ++u)
        add(u, load(output + j + u * kLanes<A>), load(target + j + u * kLanes<A>));
  for (; j < width; j += kLanes<A>) add(0, load(output + j, width - j), load(target + j, width - j));
  const auto total = [](const Vector<A>(&sum)[kUnroll]) { return sum_of_lanes<A>(sum[0] + sum[1]); };
  const RowSums sums{total(dot), total(yy), total(xx), total(ee), false};
  if constexpr (std::is_same_v<A, double>) return sums;
  const auto inside = [](double square) { return square > kSmallSquare && square < kLargeSquare; };
  if (inside(sums.output_square) && inside(sums.target_square)) return sums;
  return wide_row_sums(output, target, width);
}

constexpr double kPowerBias = 1e-10;  // of |e| in the power term

template <class T>
double row_power(const T* output, const T* target, int64_t width, double alpha, acc_t<T>* slope) {
  using A = acc_t<T>;
#if defined(EMBKERN_VECTOR_POWER)
  if constexpr (std::is_same_v<A, float>) {
    using V = Vector<float>;
    const float high = static_cast<float>(alpha), low = static_cast<float>(alpha - high);
    double total = 0;
    V sum{};
    for (int64_t j = 0; j < width; j += kLanes<float>) {
      const int64_t left = width - j;
      const V e = load(output + j, left) + -1.0f * load(target + j, left);
      const Integers sign = (Integers)e & static_cast<int32_t>(0x80000000);
      const V u = (V)((Integers)e & 0x7fffffff) + static_cast<float>(kPowerBias);
      const V value = power(u, high, low);
      if (slope) {
        const V magnitude = high * value / u;
        const Integers nonzero = (Integers)(e != 0.0f);  // NaN is not 0
        store<float>((V)(((Integers)magnitude | sign) & nonzero), slope + j, left);
      }
      if (left >= kLanes<float>) {
        sum = sum + value;
      } else {
        for (int64_t lane = 0; lane < left; ++lane) total += value[lane];
      }
    }
    return total + sum_of_lanes<float>(sum);
  }
#endif
  double sum = 0;
  for (int64_t j = 0; j < width; ++j) {
    const A e = static_cast<A>(output[j]) - static_cast<A>(target[j]);
    const A u = std::abs(e) + static_cast<A>(kPowerBias);
    const A value = std::pow(u, static_cast<A>(alpha));
    sum += value;
    if (slope) slope[j] = e == A(0) ? A(0) : std::copysign(static_cast<A>(alpha) * value / u, e);
  }
  return sum;
}

template <class T>
void row_gradient(const T* output, const T* target, int64_t width, const RowGradient<acc_t<T>>& to, T* grad) {
  using A = acc_t<T>;
  if (to.wide) {
    for (int64_t j = 0; j < width; ++j) {
      const double y = static_cast<double>(output[j]), x = static_cast<double>(target[j]);
      double sum = to.from_output * y + to.from_target * x + to.from_error * (y - x);
      if (to.slope) sum += to.from_slope * static_cast<double>(to.slope[j]);
      grad[j] = static_cast<T>(static_cast<A>(sum));
    }
    return;
  }
  // Kept apart and not folded into two coefficients: the error of a good fit is small against x and y.
  const A from_output = static_cast<A>(to.from_output), from_target = static_cast<A>(to.from_target);
  const A from_error = static_cast<A>(to.from_error), from_slope = static_cast<A>(to.from_slope);
  for (int64_t j = 0; j < width; j += kLanes<A>) {
    const int64_t left = width - j;
    const Vector<A> y = load(output + j, left), x = load(target + j, left);
    Vector<A> sum = from_output * y + from_target * x + from_error * (y + A(-1) * x);
    if (to.slope) sum = sum + from_slope * load(to.slope + j, left);
    store(sum, grad + j, left);
  }
}

// ---- products of training -----------------------------------------------------------------------------------

// A packed right operand is a list of panels of kPanelVectors vectors by k terms; the last may be one vector
// wide.
template <class T>
int64_t packed_size(int64_t k, int64_t n) {
  return k * ((n + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
}

template <class T>
void pack(const T* const* b, int64_t k, int64_t n, T* packed) {
  constexpr int64_t lanes = kLanes<T>, width = kPanelVectors * lanes;
  for (int64_t j = 0; j < n; j += width) {
    const int64_t columns = n - j > lanes ? width : lanes;
    T* panel = packed + j * k;
    for (int64_t p = 0; p < k; ++p)
      for (int64_t v = 0; v < columns; v += lanes)
        store(load(b[p] + j + v, n - j - v), panel + p * columns + v);
  }
}

// Exchanges the off-diagonal quarters of every 2 D x 2 D square of rows a and b, D rows apart.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EMBKERN_SHUFFLE 1
#endif
#endif
template <int D, class V, int... LANE>
EMBKERN_INLINE void exchange(V& a, V& b, std::integer_sequence<int, LANE...>) {
  constexpr int lanes = sizeof...(LANE);
#if defined(EMBKERN_SHUFFLE)
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

template <class T>
void pack_transposed(const T* const* b, int64_t k, int64_t n, T* packed) {
  constexpr int64_t lanes = kLanes<T>, width = kPanelVectors * lanes;
  for (int64_t j = 0; j < n; j += width) {
    const int64_t columns = n - j > lanes ? width : lanes;
    T* panel = packed + j * k;
    for (int64_t v = 0; v < columns; v += lanes) {
      for (int64_t p = 0; p < k; p += lanes) {
        Vector<T> square[lanes];
        for (int64_t i = 0; i < lanes; ++i)
          square[i] = j + v + i < n ? load(b[j + v + i] + p, k - p) : Vector<T>{};
        transpose<T>(square);
        for (int64_t i = 0; i < std::min(lanes, k - p); ++i) store(square[i], panel + (p + i) * columns + v);
      }
    }
  }
}

template <class T>
void project_packed(const Projection<T>& x, const T* packed) {
  using M = Single<T>;
  constexpr int64_t lanes = kLanes<T>, width = kPanelVectors * lanes;
  const int64_t stride = ((x.k + 15) / 16 | 1) * 16;
  T* left = scratch<0, T>(stride * x.m);
  for (int64_t i = 0; i < x.m; ++i) {
    if (i + kRows < x.m) prefetch<0>(x.a[i + kRows], x.k * sizeof(T));
    M::along(static_cast<const T*>(x.a[i]), x.k, left + i * stride);
  }
  const auto panel = [&](auto vectors, int64_t j) {
    constexpr int N = decltype(vectors)::value;
    const auto* lines = reinterpret_cast<const Vector<T>*>(packed + j * std::max(x.k, x.packed_terms));
    for_groups(x.m, [&](int64_t i, auto rows) {
      constexpr int size = decltype(rows)::value;
      project_tile<T, M, size, N>(x, x.k, RowMajor<T, size>{left + i * stride, stride}, Panel<M, N>{lines}, i,
                                  j, std::min<int64_t>(x.last - j, N * lanes));
    });
  };
  int64_t j = 0;
  for (; x.last - j > lanes; j += width) panel(std::integral_constant<int, kPanelVectors>{}, j);
  if (j < x.last) panel(std::integral_constant<int, 1>{}, j);
}

// The columns j... of SIZE rows of an update; all kPanelVectors vectors of them exist if WHOLE.
template <class T, int SIZE, bool WHOLE>
EMBKERN_INLINE void update_tile(const T* const* b, int64_t k, const T* packed, int64_t j, int64_t count,
                                bool overwrite, T* out, int64_t ld) {
  using M = Single<T>;
  Vector<T> sum[SIZE][kPanelVectors] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vector<T> line[kPanelVectors];
    M::template lines<kPanelVectors>(b, p, k, j, WHOLE ? -1 : count, line);
    EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) {
      const T x = packed[p * SIZE + r];
      EMBKERN_UNROLL for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = M::add(sum[r][v], x, line[v]);
    }
  }
  EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) {
    EMBKERN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      T* to = out + r * ld + j + v * kLanes<T>;
      const int64_t left = WHOLE ? kLanes<T> : std::max<int64_t>(0, count - v * kLanes<T>);
      store(overwrite ? sum[r][v] : load(to, left) + sum[r][v], to, left);
    }
  }
}

template <class T>
void outer_update(const OuterUpdate<T>& x) {
  using M = Single<T>;
  constexpr int64_t width = kPanelVectors * kLanes<T>;
  T* packed = scratch<0, T>(x.m * kPartialTerms);
  for (int64_t begin = 0; begin < x.k; begin += kPartialTerms) {
    const int64_t k = std::min(kPartialTerms, x.k - begin);
    const bool overwrite = x.overwrite && begin == 0;
    const T* const* a = x.a + begin;
    const T* const* b = x.b + begin;
    for_groups(x.m, [&](int64_t i, auto rows) {
      constexpr int size = decltype(rows)::value;
      for (int64_t p = 0; p < k; ++p) M::template across<size>(a, p, k, i, packed + i * k + p * size);
    });
    for (int64_t j = 0; j < x.n; j += width) {
      const int64_t count = x.n - j;
      for_groups(x.m, [&](int64_t i, auto rows) {
        constexpr int size = decltype(rows)::value;
        T* out = x.out + i * x.ld;
        if (count >= width)
          update_tile<T, size, true>(b, k, packed + i * k, j, count, overwrite, out, x.ld);
        else
          update_tile<T, size, false>(b, k, packed + i * k, j, count, overwrite, out, x.ld);
      });
    }
  }
}

// 1 / (scale * sqrt(x) + eps): a square root and a division take 20 cycles of Zen 4 for 16 floats, two
// estimates of 14 bits and a Newton step for each half of that. The result is within 3 ulp.
template <class T>
EMBKERN_INLINE Vector<T> inverse_of_root(Vector<T> x, T scale, T eps) {
#if defined(EMBKERN_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    using V = Vector<float>;
    const V guess = (V)_mm512_rsqrt14_ps((__m512)x);
    const V root = x * guess;
    V exact = root + (0.5f * guess) * multiply_add(-1.0f * root, root, x);
    // Where the estimate is infinite (0 and subnormals, which it takes for 0) so is the root of less use: 0.
    exact = x < 1.17549435e-38f ? V{} : exact;
    const V divisor = scale * exact + eps;
    const V inverse = (V)_mm512_rcp14_ps((__m512)divisor);
    return inverse + inverse * multiply_add(-1.0f * divisor, inverse, constant(1.0f));
  }
#endif
  return constant(T(1)) / (scale * square_root(x) + eps);
}

template <class T>
void adam(const AdamStep<T>& step, int64_t n, const T* grad, T* p, T* m, T* v) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vector<T> g = load(grad + i, left);
    Vector<T> first = load(m + i, left), second = load(v + i, left);
    first = first + step.rest1 * (g + T(-1) * first);
    second = step.beta2 * second + step.rest2 * (g * g);
    store(first, m + i, left);
    store(second, v + i, left);
    store(load(p + i, left) +
              (-step.step_size) * first * inverse_of_root<T>(second, step.root_correction, step.eps),
          p + i, left);
  }
}
