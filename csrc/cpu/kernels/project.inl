// out = scale * (a @ b + offset) for gathered rows of a.

constexpr int64_t kAhead = 4;  // units that the widest tile prefetches ahead

template <class T, class M, int ROWS, int N, class Lines>
EMBKERN_INLINE void project_tile(const Projection<T>& x, int64_t units, RowMajor<typename M::Scalar, ROWS> a,
                                 Lines lines, int64_t i, int64_t j, int64_t count) {
  using A = typename M::A;
  // The output's cache lines arrive while the sums are computed.
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

// Projects columns from j on, N vectors at a time and then fewer, reading the right operand in place. Returns
// the first column that is left.
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

// Projects the N vectors of columns from j on, with a packed right operand.
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

// The distance between packed rows: an odd multiple of 16 units, since rows at a multiple of 4 KiB would share
// a set of L1.
EMBKERN_INLINE int64_t packed_stride(int64_t units) { return ((units + 15) / 16 | 1) * 16; }

template <class T, class S, class M>
void project(const Projection<T>& x) {
  using Scalar = typename M::Scalar;
  constexpr int64_t lanes = kLanes<typename M::A>, width = kPanelVectors * lanes;
  const int64_t units = (x.k + M::kTerms - 1) / M::kTerms;
  const int64_t stride = packed_stride(units);
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
