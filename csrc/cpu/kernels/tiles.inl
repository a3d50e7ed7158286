// Tiles: kRows rows by kPanelVectors vectors of running sums that stay in registers.
//
// AVX-512 has 32 registers and holds 12 x 2 vectors of sums; the other levels have 16 and hold 6 x 2. The left
// operand is gathered and packed once per block of rows. The right operand is packed panel by panel (two
// vectors of columns by k terms), or read in place if the block has too few rows to repay packing. A row is
// summed in the same order in all cases, so that its bits depend neither on the other rows nor on the number of
// threads.

constexpr int kRows = kRegisters == 32 ? 12 : 6, kMidRows = kRows / 3;
constexpr int kWide = kRegisters / 2;  // vectors of the widest tile, which has a single row
constexpr int kPanelVectors = 2;
constexpr int64_t kPackingRows = 2 * kRows;  // the least rows that repay packing the right operand
// The length of a running sum. Longer sums are sums of these, so that rounding errors grow slower with length.
constexpr int64_t kPartialTerms = 128;

// A buffer of the thread, kept between calls, since 200 KB of fresh memory cost fifty page faults. The largest
// hold 192 rows of k terms, a panel of k x 128 bytes, and 512 x 512 sums of outer products. This is not a
// Buffer: the linker would keep one copy of its functions for all levels.
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

// A packed left operand, stored unit by unit.
template <class Scalar, int ROWS>
struct UnitMajor {
  const Scalar* a;
  EMBKERN_INLINE Scalar at(int64_t u, int i) const { return a[u * ROWS + i]; }
};

// A packed left operand, stored row by row.
template <class Scalar, int ROWS>
struct RowMajor {
  const Scalar* a;
  int64_t stride;
  // One pointer serves three rows: base, base + stride and base + 2 stride are single address operands.
  EMBKERN_INLINE Scalar at(int64_t u, int i) const { return (a + i / 3 * 3 * stride + u)[i % 3 * stride]; }
};

// sum[i][v] = sum over units of a.at(u, i) * lines(u)[v], in partial sums of kPartialTerms.
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

// Calls body(first, size) for groups of kRows, then of kMidRows, then of one row. `size` is a constant.
template <class Body>
EMBKERN_INLINE void for_groups(int64_t m, Body body) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) body(i, std::integral_constant<int, kRows>{});
  for (; i + kMidRows <= m; i += kMidRows) body(i, std::integral_constant<int, kMidRows>{});
  for (; i < m; ++i) body(i, std::integral_constant<int, 1>{});
}

// Packs columns j... of the right operand, N lines per unit. `count` columns exist or can be read.
template <class M, int N, class S>
EMBKERN_INLINE void pack_panel(const S* const* b, int64_t k, int64_t j, int64_t count,
                               typename M::Line* panel) {
  constexpr int64_t width = N * kLanes<typename M::A>;
  const bool whole = count >= width, another = count >= 2 * width;
  for (int64_t u = 0; u * M::kTerms < k; ++u) {
    M::template lines<N>(b, u * M::kTerms, k, j, whole ? -1 : count, panel + u * N);
    // The hardware does not prefetch the strided lines of the next panel.
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
