// Products with a right operand that is packed once for many rows, and sums of outer products in place.

// A packed right operand is a list of panels of kPanelVectors vectors by k terms. The last panel may be one
// vector wide.
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
  const int64_t stride = packed_stride(x.k);
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

// Columns j... of SIZE rows of an update. If WHOLE, all kPanelVectors vectors of columns exist.
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
