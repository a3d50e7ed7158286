// Sums of rows.

// Sums of up to kPartialTerms rows are kept in A, and longer ones are sums of these in fp64: a frequent token
// has thousands of rows in a batch.
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
