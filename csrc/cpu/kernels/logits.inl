// The softmax over the rows of a block of logits, and its gradient; hidden states lie along the lanes.

template <class A>
EMBKERN_INLINE Vector<A> capped_by_tanh(Vector<A> logit, A cap) {
  return cap * hyperbolic_tangent(logit / constant(cap));
}

// The derivative of capped_by_tanh: with r = 1 - tanh, r (2 - r), where nothing cancels.
template <class A>
EMBKERN_INLINE Vector<A> slope_of_cap(Vector<A> logit, A cap) {
  const Vector<A> twice = logit / constant(A(0.5) * cap);
  const Vector<A> rest = constant(A(2)) / (exponential(larger(twice, A(-1) * twice)) + constant(A(1)));
  return rest * (constant(A(2)) + A(-1) * rest);
}

// The same from the result of capped_by_tanh, whose rounding counts where it is near the cap.
template <class A>
EMBKERN_INLINE Vector<A> slope_at_capped(Vector<A> capped, A cap) {
  const Vector<A> tangent = capped / constant(cap);
  return (constant(A(1)) + A(-1) * tangent) * (constant(A(1)) + tangent);
}

// Calls body(n, states left, whether logits are capped) for every vector of states.
template <class A, class Body>
EMBKERN_INLINE void for_states(const LogitBlock<A>& x, Body body) {
  for (int64_t n = 0; n < x.states; n += kLanes<A>) {
    if (x.cap != 0)
      body(n, x.states - n, std::true_type{});
    else
      body(n, x.states - n, std::false_type{});
  }
}

// A logit before its cap.
template <class A>
EMBKERN_INLINE Vector<A> logit_at(const LogitBlock<A>& x, int64_t i, int64_t n, Vector<A> offset) {
  const A scale = x.scales ? x.scales[i] : A(1), bias = x.biases ? x.biases[i] : A(0);
  return (scale * load(x.sums + i * x.stride + n) + offset) + bias;
}

template <class A>
void finish_logits(const LogitBlock<A>& x, A* maxima, A* totals) {
  for_states(x, [&](int64_t n, int64_t left, auto capped) {
    const Vector<A> offset = load(x.offsets + n, left);
    Vector<A> most = constant(-std::numeric_limits<A>::infinity()), total{};
    for (int64_t i = 0; i < x.rows; ++i) {
      Vector<A> logit = logit_at(x, i, n, offset);
      if constexpr (decltype(capped)::value) logit = capped_by_tanh<A>(logit, x.cap);
      store(logit, x.sums + i * x.stride + n);
      most = larger(logit, most);
      total = total + logit;
    }
    store(most, maxima + n, left);
    if (totals) store(total, totals + n, left);
  });
}

template <class A>
void sum_exponentials(const LogitBlock<A>& x, const A* shifts, bool keep, A* totals) {
  for_states(x, [&](int64_t n, int64_t left, auto capped) {
    const Vector<A> shift = A(-1) * load(shifts + n, left);
    Vector<A> total{};
    for (int64_t i = 0; i < x.rows; ++i) {
      A* at = x.sums + i * x.stride + n;
      const Vector<A> logit = load(at), value = exponential(logit + shift);
      total = total + value;
      if (!keep) continue;
      if constexpr (decltype(capped)::value)
        store(value * slope_at_capped<A>(logit, x.cap), at);
      else
        store(value, at);
    }
    store(total, totals + n, left);
  });
}

template <class A>
void logit_gradients(const LogitBlock<A>& x, const SoftmaxGradient<A>& to, A* gradients, int64_t stride) {
  for_states(x, [&](int64_t n, int64_t left, auto capped) {
    const Vector<A> offset = load(x.offsets + n, left), shift = A(-1) * load(to.shifts + n, left);
    const Vector<A> factor = load(to.factors + n, left), uniform = load(to.uniform + n, left);
    for (int64_t i = 0; i < x.rows; ++i) {
      const Vector<A> logit = logit_at(x, i, n, offset);
      if constexpr (decltype(capped)::value) {
        const Vector<A> value = exponential(capped_by_tanh<A>(logit, x.cap) + shift);
        store((factor * value + uniform) * slope_of_cap<A>(logit, x.cap), gradients + i * stride + n);
      } else {
        store(factor * exponential(logit + shift) + uniform, gradients + i * stride + n);
      }
    }
  });
}

template <class A>
void exp_and_tanh(const A* values, int64_t count, A* exponentials, A* tangents) {
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    const Vector<A> value = load(values + j, count - j);
    store(exponential(value), exponentials + j, count - j);
    store(hyperbolic_tangent(value), tangents + j, count - j);
  }
}
