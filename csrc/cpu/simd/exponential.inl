// exp and tanh of vectors of floats, where there is a fused multiply-add. vector.inl has them lane by lane.

// exp(x) within 1 ulp: subnormal results are rounded once more, and below them it is 0.
EMBKERN_INLINE Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
  // Beyond these the result is 0 or infinite, and x - whole * log 2 would overflow. NaN stays.
  x = x < -110.0f ? constant(-110.0f) : x;
  x = x > 100.0f ? constant(100.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bit below 1
  V whole = multiply_add(x, constant(1.44269504f), constant(kRound));
  whole = whole - kRound;
  // log 2 as the sum of two floats
  V rest = multiply_add(whole, constant(-0.693147182f), x);
  rest = multiply_add(whole, constant(1.9046543e-9f), rest);
  // exp(rest) = 1 + rest + rest^2 P(rest) for |rest| up to log(2) / 2
  const V p = polynomial<5>(rest, {0.00138145406f, 0.00836874545f, 0.041668389f, 0.166665211f, 0.49999994f});
  const V result = multiply_add(rest * rest, p, rest) + 1.0f;
  return times_power_of_two(result, whole);
}

// tanh(x) within 2 ulp.
EMBKERN_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
  using V = Vector<float>;
  const V u = absolute(x), square = x * x;
  // Near 0, where 1 - 2 / (exp(2 u) + 1) cancels, tanh(x) = x + x^3 P(x^2).
  const V p =
      polynomial<5>(square, {-0.00570498873f, 0.0206390888f, -0.0537397155f, 0.133314422f, -0.333332819f});
  const V near = multiply_add(square * x, p, x);
  const V far = 1.0f + -2.0f / (exponential(2.0f * u) + 1.0f);
  return u < 0.625f ? near : with_sign_of(x, far);
}
