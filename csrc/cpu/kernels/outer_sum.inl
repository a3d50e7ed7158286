// out = scale * a^T @ b, a sum of outer products of gathered rows.

constexpr int64_t kSumRows = 512;  // rows of the result that are summed at a time

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
