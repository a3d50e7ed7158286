// Vector functions of the power term: copysign and u^alpha.

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

// A non-negative value with the sign of x, and 0 where x is 0; where x is NaN the value stays.
EMBKERN_INLINE Vector<float> with_sign_of(Vector<float> x, Vector<float> value) {
  const Integers sign = (Integers)x & static_cast<int32_t>(0x80000000);
  const Integers nonzero = (Integers)(x != 0.0f);
  return (Vector<float>)(((Integers)value | sign) & nonzero);
}

template <int N>
EMBKERN_INLINE Vector<float> polynomial(Vector<float> x, const float (&terms)[N]) {
  Vector<float> sum = constant(terms[0]);
  EMBKERN_UNROLL for (int i = 1; i < N; ++i) sum = multiply_add(sum, x, constant(terms[i]));
  return sum;
}

// u^alpha for normal positive u, within 2 ulp; alpha is given as the sum of two floats. |log2 u| reaches 33 at
// 1e-10, so that alpha log2 u in one float would lose log2(33) bits of the fraction. The product with the
// exponent is therefore computed exactly.
EMBKERN_INLINE Vector<float> power(Vector<float> u, float alpha, float alpha_rest) {
  using V = Vector<float>;
  // u = 2^exponent * (1 + f) with 1 + f between sqrt(1/2) and sqrt(2).
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
  // Two factors make up the power of two, so that the result may be subnormal or infinite.
  Integers n = __builtin_convertvector(rounded, Integers);
  n = n < -250 ? -250 + (n & 0) : n;
  n = n > 250 ? 250 + (n & 0) : n;
  const Integers half = n >> 1;
  const V scaled = result * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
  return u - u == 0.0f ? scaled : u;  // NaN and infinity
}
