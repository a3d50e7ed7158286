// The kernels of kernels.h for one instruction set, in namespace EMBKERN_LEVEL.
//
// A product works on tiles of kRows x kPanel running sums that stay in registers: AVX-512 has 32 of them and
// holds 12 x 2 vectors, the others hold 6 x 2 in 16. Its left operand is gathered and packed once per block of
// rows, tile after tile; its right operand is packed panel by panel (32 columns x k), or read where it lies if
// the block is too small to pay for that. Every row is summed in the same order in all of these cases, so that
// the bits of a row depend neither on its neighbours nor on the number of threads.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes _mm512_undefined_epi32 of its own header, and sums that one branch fills, for uninitialised,
// and loses sight of the bounds of a tail's copy.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

namespace embkern {
namespace EMBKERN_LEVEL {
namespace {

#if defined(EMBKERN_AVX512)
constexpr int kVectorBytes = 64, kRows = 12, kWide = 16;
#elif defined(EMBKERN_AVX2)
constexpr int kVectorBytes = 32, kRows = 6, kWide = 8;
#else
constexpr int kVectorBytes = 16, kRows = 6, kWide = 8;
#endif
constexpr int kMidRows = kRows / 3;
constexpr int kPanelVectors = 2;
constexpr int64_t kAhead = 4;                // units that the widest tile asks for before it needs them
constexpr int64_t kPackingRows = 2 * kRows;  // from this many rows on, packing the right operand pays
// Running sums this long are added up, so that the rounding error of a long sum does not grow with its length.
constexpr int64_t kPartialTerms = 128;

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

#if defined(__GNUC__) && !defined(__clang__)
#define EMBKERN_UNROLL _Pragma("GCC unroll 32")
#elif defined(__clang__)
#define EMBKERN_UNROLL _Pragma("unroll")
#else
#define EMBKERN_UNROLL
#endif

template <int WRITE>
EMBKERN_INLINE void prefetch(const void* begin, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(begin) + at, WRITE);
#else
  (void)begin, (void)bytes;
#endif
}

// ---- a vector of elements, widened on load and rounded on store -------------------------------------------

template <class T>
EMBKERN_INLINE Vector<acc_t<T>> load(const T* from) {
  Vector<acc_t<T>> vector;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    std::memcpy(&vector, from, sizeof(vector));
  } else {
#if defined(EMBKERN_AVX512)
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<T, Half>)
      vector = (Vector<float>)_mm512_cvtph_ps(raw);
    else
      vector = (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(EMBKERN_AVX2)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<T, Half>)
      vector = (Vector<float>)_mm256_cvtph_ps(raw);
    else
      vector = (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
    for (int i = 0; i < kLanes<float>; ++i) vector[i] = static_cast<float>(from[i]);
#endif
  }
  return vector;
}

template <class T>
EMBKERN_INLINE void store(Vector<acc_t<T>> vector, T* to) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    std::memcpy(to, &vector, sizeof(vector));
  } else {
#if defined(EMBKERN_AVX512)
    __m256i raw;
    if constexpr (std::is_same_v<T, Half>) {
      raw = _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT);
    } else {
#if defined(EMBKERN_AVX512_BF16)
      raw = (__m256i)_mm512_cvtneps_pbh((__m512)vector);
#else
      const __m512i bits = (__m512i)vector;
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask((__m512)vector, (__m512)vector, _CMP_UNORD_Q);
      const __m512i rounded = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000));
      raw = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), raw);
#elif defined(EMBKERN_AVX2)
    __m128i raw;
    if constexpr (std::is_same_v<T, Half>) {
      raw = _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m256i bits = (__m256i)vector;
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256 nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
      const __m256 rounded = _mm256_blendv_ps((__m256)even, (__m256)_mm256_set1_epi32(0x7fc00000), nan);
      const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
      raw = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), raw);
#else
    for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<T>(vector[i]);
#endif
  }
}

// The same for the first `count` lanes only; the others are zero.
template <class T>
EMBKERN_INLINE Vector<acc_t<T>> load(const T* from, int64_t count) {
  if (count >= kLanes<acc_t<T>>) return load(from);
  T line[kLanes<acc_t<T>>] = {};
  if (count > 0) std::memcpy(line, from, std::min<int64_t>(count, kLanes<acc_t<T>>) * sizeof(T));
  return load(line);
}

template <class T>
EMBKERN_INLINE void store(Vector<acc_t<T>> vector, T* to, int64_t count) {
  if (count >= kLanes<acc_t<T>>) return store(vector, to);
  T line[kLanes<acc_t<T>>];
  store(vector, line);
  if (count > 0) std::memcpy(to, line, std::min<int64_t>(count, kLanes<acc_t<T>>) * sizeof(T));
}

// ---- how terms are multiplied: one at a time, or bf16 in pairs ---------------------------------------------

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
  // Elements i... of the unit of terms p..., of one vector per term.
  template <int SIZE, class S>
  static EMBKERN_INLINE void across(const S* const* rows, int64_t p, int64_t, int64_t i, Scalar* to) {
    EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) to[r] = static_cast<A>(rows[p][i + r]);
  }
  // `N` lines of the unit of terms p, from column j on; `count` columns exist (all of them if it is -1).
  template <int N, class S>
  static EMBKERN_INLINE void lines(const S* const* rows, int64_t p, int64_t, int64_t j, int64_t count,
                                   Line* to) {
    const S* from = rows[p] + j;
    EMBKERN_UNROLL for (int v = 0; v < N; ++v) to[v] =
        count < 0 ? load(from + v * kLanes<A>) : load(from + v * kLanes<A>, count - v * kLanes<A>);
  }
};

#if defined(EMBKERN_AVX512_BF16)
// The instruction takes bf16 subnormals (below 1.2e-38) for zero.
struct Pair {
  static constexpr int kTerms = 2;
  using A = float;
  using Scalar = uint32_t;
  using Line = __m512i;
  static EMBKERN_INLINE Vector<A> add(Vector<A> sum, Scalar x, Line y) {
    return (Vector<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)),
                                       (__m512bh)y);
  }
  static EMBKERN_INLINE uint32_t bits(const BFloat16* from) {
    uint16_t raw;
    std::memcpy(&raw, from, sizeof(raw));
    return raw;
  }
  static EMBKERN_INLINE void along(const BFloat16* row, int64_t k, Scalar* to) {
    if (k > 1) std::memcpy(to, row, k / 2 * sizeof(Scalar));  // rows of rank 0 may be nowhere
    if (k % 2) to[k / 2] = bits(row + k - 1);
  }
  template <int SIZE>
  static EMBKERN_INLINE void across(const BFloat16* const* rows, int64_t p, int64_t k, int64_t i, Scalar* to) {
    EMBKERN_UNROLL for (int r = 0; r < SIZE; ++r) to[r] =
        bits(rows[p] + i + r) | (p + 1 == k ? 0 : bits(rows[p + 1] + i + r) << 16);
  }
  static EMBKERN_INLINE __m512i columns(const BFloat16* from, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(count > 0 ? (__mmask32(1) << count) - 1 : 0, from);
  }
  template <int N>
  static EMBKERN_INLINE void lines(const BFloat16* const* rows, int64_t p, int64_t k, int64_t j, int64_t count,
                                   Line* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t exist = count < 0 ? N * 16 : std::min<int64_t>(count, N * 16);
    EMBKERN_UNROLL for (int v = 0; v < N; v += 2) {  // 32 columns make two lines of 16 pairs
      const int64_t at = v * 16;
      const __m512i even = columns(rows[p] + j + at, exist - at);
      const __m512i odd = p + 1 == k ? _mm512_setzero_si512() : columns(rows[p + 1] + j + at, exist - at);
      to[v] = _mm512_permutex2var_epi16(even, low, odd);
      if (N > 1) to[v + 1] = _mm512_permutex2var_epi16(even, high, odd);
    }
  }
};
#endif

// What an element type is multiplied with; S is the type in which its sums of rows are kept.
template <class T>
struct Product {
  using Arithmetic = Single<T>;
  using S = acc_t<T>;
};
#if defined(EMBKERN_AVX512_BF16)
template <>
struct Product<BFloat16> {
  using Arithmetic = Pair;
  using S = BFloat16;
};
#endif

// ---- scratch ----------------------------------------------------------------------------------------------

// A thread's own buffers, kept between calls: a fresh 200 KB costs fifty page faults. The largest are 192 rows
// of k terms, a panel of k x 128 bytes, and 512 x 512 sums of the outer products.
template <int SLOT, class A>
A* scratch(int64_t count) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(A));
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    capacity = bytes;
  }
  poison(memory.get(), bytes);
  return static_cast<A*>(memory.get());
}

// ---- tiles ------------------------------------------------------------------------------------------------

// The left operand of a tile, packed unit by unit or row by row.
template <class Scalar, int ROWS>
struct UnitMajor {
  const Scalar* a;
  EMBKERN_INLINE Scalar at(int64_t u, int i) const { return a[u * ROWS + i]; }
};
template <class Scalar, int ROWS>
struct RowMajor {
  const Scalar* a;
  int64_t stride;
  // Three rows per pointer: base, base + stride and base + 2 stride are addresses of one instruction.
  EMBKERN_INLINE Scalar at(int64_t u, int i) const { return (a + i / 3 * 3 * stride + u)[i % 3 * stride]; }
};

// sum[i][v] = sum over units of a.at(u, i) * lines(u)[v], in registers, in partial sums of kPartialTerms.
template <class M, int ROWS, int N, class Left, class Lines>
EMBKERN_INLINE void tile(int64_t units, Left a, Lines lines, Vector<typename M::A> (&sum)[ROWS][N]) {
  using V = Vector<typename M::A>;
  constexpr int64_t partial = kPartialTerms / M::kTerms;
  V total[ROWS][N];
  EMBKERN_UNROLL for (int i = 0; i < ROWS; ++i) EMBKERN_UNROLL for (int v = 0; v < N; ++v) sum[i][v] = V{};
  for (int64_t begin = 0; begin < units; begin += partial) {
    if (begin > 0) {
      for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < N; ++v) {
          total[i][v] = begin == partial ? sum[i][v] : total[i][v] + sum[i][v];
          sum[i][v] = V{};
        }
      }
    }
    const int64_t end = std::min(units, begin + partial);
    for (int64_t u = begin; u < end; ++u) {
      typename M::Line line[N];
      lines(u, line);
      EMBKERN_UNROLL for (int i = 0; i < ROWS; ++i) {
        const typename M::Scalar x = a.at(u, i);
        EMBKERN_UNROLL for (int v = 0; v < N; ++v) sum[i][v] = M::add(sum[i][v], x, line[v]);
      }
    }
  }
  if (units > partial) {
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < N; ++v) sum[i][v] = total[i][v] + sum[i][v];
  }
}

// Calls body(first, size) for groups of kRows, then kMidRows, then single rows; size is a constant.
template <class Body>
EMBKERN_INLINE void for_groups(int64_t m, Body body) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) body(i, std::integral_constant<int, kRows>{});
  for (; i + kMidRows <= m; i += kMidRows) body(i, std::integral_constant<int, kMidRows>{});
  for (; i < m; ++i) body(i, std::integral_constant<int, 1>{});
}

// The lines of columns j... of the right operand, N to a unit; `count` of the columns exist, or can be read.
template <class M, int N, class S>
EMBKERN_INLINE void pack_panel(const S* const* b, int64_t k, int64_t j, int64_t count,
                               typename M::Line* panel) {
  constexpr int64_t width = N * kLanes<typename M::A>;
  const bool whole = count >= width, another = count >= 2 * width;
  for (int64_t u = 0; u * M::kTerms < k; ++u) {
    M::template lines<N>(b, u * M::kTerms, k, j, whole ? -1 : count, panel + u * N);
    // The next panel's lines arrive while this one is multiplied: strided, they are beyond the prefetcher.
    if (another)
      for (int64_t p = u * M::kTerms; p < std::min(k, (u + 1) * M::kTerms); ++p)
        prefetch<0>(b[p] + j + width, width * sizeof(S));
  }
}

template <class M, int N>
struct Panel {
  const typename M::Line* packed;
  EMBKERN_INLINE void operator()(int64_t u, typename M::Line* line) const {
    EMBKERN_UNROLL for (int v = 0; v < N; ++v) line[v] = packed[u * N + v];
  }
};

// ---- gather and project -----------------------------------------------------------------------------------

template <class T, class M, int ROWS, int N, class Lines>
EMBKERN_INLINE void project_tile(const Projection<T>& x, int64_t units, RowMajor<typename M::Scalar, ROWS> a,
                                 Lines lines, int64_t i, int64_t j, int64_t count) {
  using A = typename M::A;
  // The sums take longer than the output's lines take to arrive.
  for (int r = 0; r < ROWS; ++r) prefetch<1>(x.out[i + r] + j, count * sizeof(T));
  Vector<A> sum[ROWS][N];
  tile<M, ROWS, N>(units, a, lines, sum);
  EMBKERN_UNROLL for (int v = 0; v < N; ++v) {
    const int64_t at = v * kLanes<A>, left = count - at;
    const Vector<A> offset = x.offset ? load(x.offset + j + at, left) : Vector<A>{};
    EMBKERN_UNROLL for (int r = 0; r < ROWS; ++r)
        store(x.scale * (sum[r][v] + offset), x.out[i + r] + j + at, left);
  }
}

// As many columns from j on as N vectors at a time allow, the right operand read where it lies.
template <class T, class M, int ROWS, int N>
EMBKERN_INLINE int64_t project_direct(const Projection<T>& x, int64_t units,
                                      RowMajor<typename M::Scalar, ROWS> a, int64_t i, int64_t j) {
  constexpr int64_t columns = N * kLanes<typename M::A>;
  for (; j + columns <= x.last; j += columns)
    project_tile<T, M, ROWS, N>(
        x, units, a,
        [&](int64_t u, typename M::Line* line) {
          if (u + kAhead < units && N == kWide)
            prefetch<0>(x.b[(u + kAhead) * M::kTerms] + j, columns * sizeof(T));
          M::template lines<N>(x.b, u * M::kTerms, x.k, j, -1, line);
        },
        i, j, columns);
  if constexpr (N == kWide)
    return project_direct<T, M, ROWS, 4>(x, units, a, i, j);
  else if constexpr (N > kPanelVectors)
    return project_direct<T, M, ROWS, kPanelVectors>(x, units, a, i, j);
  else
    return j;
}

// The panel of N vectors of columns from j on.
template <class T, class M, int N>
EMBKERN_INLINE void project_panel(const Projection<T>& x, int64_t units, const typename M::Scalar* packed,
                                  int64_t stride, int64_t j) {
  typename M::Line* panel = scratch<1, typename M::Line>(units * N);
  const int64_t count = x.last - j;
  pack_panel<M, N>(x.b, x.k, j, count + x.padding, panel);
  for_groups(x.m, [&](int64_t i, auto rows) {
    constexpr int size = decltype(rows)::value;
    const RowMajor<typename M::Scalar, size> left{packed + i * stride, stride};
    project_tile<T, M, size, N>(x, units, left, Panel<M, N>{panel}, i, j,
                                std::min<int64_t>(count, N * kLanes<typename M::A>));
  });
}

template <class T, class S, class M>
void project(const Projection<T>& x) {
  using Scalar = typename M::Scalar;
  constexpr int64_t lanes = kLanes<typename M::A>, width = kPanelVectors * lanes;
  const int64_t units = (x.k + M::kTerms - 1) / M::kTerms;
  // An odd number of 16 units apart: rows a multiple of 4 KiB apart would share a set of L1.
  const int64_t stride = ((units + 15) / 16 | 1) * 16;
  Scalar* packed = scratch<0, Scalar>(stride * x.m);
  for (int64_t i = 0; i < x.m; ++i) {
    if (i + kRows < x.m) prefetch<0>(x.a[i + kRows], x.k * sizeof(S));
    M::along(static_cast<const S*>(x.a[i]), x.k, packed + i * stride);
  }
  int64_t j = x.first;
  if (x.m < kPackingRows) {
    for_groups(x.m, [&](int64_t i, auto rows) {
      constexpr int size = decltype(rows)::value;
      constexpr int vectors = size == kRows ? kPanelVectors : size == 1 ? kWide : 4;
      const RowMajor<Scalar, size> left{packed + i * stride, stride};
      j = project_direct<T, M, size, vectors>(x, units, left, i, x.first);
    });
  }
  for (; j + lanes < x.last; j += width) project_panel<T, M, kPanelVectors>(x, units, packed, stride, j);
  if (j < x.last) project_panel<T, M, 1>(x, units, packed, stride, j);
}

// ---- sum of outer products --------------------------------------------------------------------------------

constexpr int64_t kSumRows = 512;  // of the result that are summed at a time

template <class T, class S, class M>
EMBKERN_INLINE void outer_sum_rows(const OuterSum<T>& x, int64_t row, int64_t m) {
  using A = typename M::A;
  using Scalar = typename M::Scalar;
  using Line = typename M::Line;
  constexpr int64_t width = kPanelVectors * kLanes<A>;
  const int64_t columns = (x.last - x.first + width - 1) / width * width;
  A* total = scratch<2, A>(m * columns);
  for (int64_t i = 0; i < m * columns; ++i) total[i] = A(0);
  Scalar* packed = scratch<0, Scalar>(m * kPartialTerms);
  Line* panel = scratch<1, Line>(kPartialTerms * kPanelVectors);
  for (int64_t begin = 0; begin < x.k; begin += kPartialTerms) {
    const int64_t k = std::min(kPartialTerms, x.k - begin), units = (k + M::kTerms - 1) / M::kTerms;
    const T* const* a = x.a + begin;
    const S* const* b = reinterpret_cast<const S* const*>(x.b + begin);
    for (int64_t u = 0; u < units; ++u) {
      for_groups(m, [&](int64_t i, auto rows) {
        constexpr int size = decltype(rows)::value;
        M::template across<size>(a, u * M::kTerms, k, row + i, packed + i * units + u * size);
      });
    }
    for (int64_t j = x.first; j < x.last; j += width) {
      pack_panel<M, kPanelVectors>(b, k, j, x.last - j, panel);
      for_groups(m, [&](int64_t i, auto rows) {
        constexpr int size = decltype(rows)::value;
        Vector<A> sum[size][kPanelVectors];
        tile<M, size, kPanelVectors>(units, UnitMajor<Scalar, size>{packed + i * units},
                                     Panel<M, kPanelVectors>{panel}, sum);
        for (int r = 0; r < size; ++r) {
          A* to = total + (i + r) * columns + j - x.first;
          for (int v = 0; v < kPanelVectors; ++v)
            store(load(to + v * kLanes<A>) + sum[r][v], to + v * kLanes<A>);
        }
      });
    }
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = x.first; j < x.last; j += kLanes<A>)
      store(x.scale * load(total + i * columns + j - x.first), x.out + (row + i) * x.ld + j, x.last - j);
}

template <class T, class S, class M>
void outer_sum(const OuterSum<T>& x) {
  for (int64_t row = 0; row < x.m; row += kSumRows)
    outer_sum_rows<T, S, M>(x, row, std::min(kSumRows, x.m - row));
}

// ---- sums of rows -----------------------------------------------------------------------------------------

// Up to kPartialTerms rows add up in A; the partial sums of a longer column add up in fp64, as an id like that
// of "the" has thousands of rows.
template <class T, class S, int N>
EMBKERN_INLINE void sum_columns(const T* const* rows, int64_t count, int64_t j, int64_t width, S* to) {
  using A = acc_t<T>;
  Vector<A> sum[N] = {};
  double total[N * kLanes<A>] = {};
  for (int64_t begin = 0; begin < count; begin += kPartialTerms) {
    if (begin > 0) {
      for (int v = 0; v < N; ++v) {
        for (int lane = 0; lane < kLanes<A>; ++lane) total[v * kLanes<A> + lane] += sum[v][lane];
        sum[v] = Vector<A>{};
      }
    }
    const int64_t end = std::min(count, begin + kPartialTerms);
    for (int64_t i = begin; i < end; ++i) {
      EMBKERN_UNROLL for (int v = 0; v < N; ++v) {
        const int64_t at = j + v * kLanes<A>;
        sum[v] = sum[v] + (N == 1 ? load(rows[i] + at, width - at) : load(rows[i] + at));
      }
    }
  }
  for (int v = 0; v < N; ++v) {
    const int64_t at = j + v * kLanes<A>;
    if (count > kPartialTerms)
      for (int lane = 0; lane < kLanes<A>; ++lane)
        sum[v][lane] = static_cast<A>(total[v * kLanes<A> + lane] + sum[v][lane]);
    if constexpr (std::is_same_v<S, T>)
      store(sum[v], to + at, width - at);
    else
      store<A>(sum[v], to + at, width - at);
  }
}

template <class T, class S>
EMBKERN_INLINE void sum_rows_to(const T* const* rows, int64_t count, int64_t first, int64_t last, S* to) {
  constexpr int vectors = 8, columns = vectors * kLanes<acc_t<T>>;
  int64_t j = first;
  for (; j + columns <= last; j += columns) sum_columns<T, S, vectors>(rows, count, j, last, to);
  for (; j < last; j += kLanes<acc_t<T>>) sum_columns<T, S, 1>(rows, count, j, last, to);
}

template <class T, class S>
void sum_rows(const T* const* rows, int64_t count, int64_t width, void* out) {
  sum_rows_to(rows, count, 0, width, static_cast<S*>(out));
}

template <class T>
void total_rows(const T* const* rows, int64_t count, int64_t first, int64_t last, acc_t<T>* out) {
  sum_rows_to(rows, count, first, last, out);
}

#include "cpu/training.inl"
#include "cpu/decoding.inl"
#include "cpu/encoding.inl"
#include "cpu/trellis.inl"

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  using S = typename Product<T>::S;
  using M = typename Product<T>::Arithmetic;
  static constexpr Kernels<T> table = {std::is_same_v<S, T>,
                                       project<T, T, M>,
                                       project<T, S, M>,
                                       outer_sum<T, S, M>,
                                       sum_rows<T, S>,
                                       total_rows<T>,
                                       row_sums<T>,
                                       row_power<T>,
                                       row_gradient<T>,
                                       decode_row<T>,
                                       decode_coefficients<T, S>,
                                       packed_products<T>,
                                       row_products<T>};
  return table;
}

template <class T>
const TrainingKernels<T>& training_kernels() {
  static constexpr TrainingKernels<T> table = {packed_size<T>,    pack<T>,         pack_transposed<T>,
                                               project_packed<T>, outer_update<T>, adam<T>};
  return table;
}

template <class T>
const PackingKernels& packing_kernels() {
  static constexpr PackingKernels table = {quantize_row, trellis_row};
  return table;
}

template const PackingKernels& packing_kernels<float>();
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();
template const TrainingKernels<float>& training_kernels<float>();
template const TrainingKernels<double>& training_kernels<double>();

}  // namespace EMBKERN_LEVEL
}  // namespace embkern

#undef EMBKERN_UNROLL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
