// Sums, power term and gradient of one row of the loss; see RowSums and RowGradient.

// Where the sums of squares lie between these, the coefficients of the gradient are far from the ends of fp32's
// range, too.
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
  constexpr int kUnroll = 2;  // two sums of each kind hide the latency of an addition
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

constexpr double kPowerBias = 1e-10;  // added to |e| in the power term

template <class T>
double row_power_by_vector(const T* output, const T* target, int64_t width, double alpha, acc_t<T>* slope) {
  using A = acc_t<T>;
  const A high = static_cast<A>(alpha), low = static_cast<A>(alpha - high);
  double total = 0;
  Vector<A> sum{};
  for (int64_t j = 0; j < width; j += kLanes<A>) {
    const int64_t left = width - j;
    const Vector<A> e = load(output + j, left) + A(-1) * load(target + j, left);
    const Vector<A> u = absolute(e) + static_cast<A>(kPowerBias);
    const Vector<A> value = power(u, high, low);
    if (slope) store<A>(with_sign_of(e, high * value / u), slope + j, left);
    if (left >= kLanes<A>) {
      sum = sum + value;
    } else {
      for (int64_t lane = 0; lane < left; ++lane) total += value[lane];
    }
  }
  return total + sum_of_lanes<A>(sum);
}

template <class T>
double row_power_by_element(const T* output, const T* target, int64_t width, double alpha, acc_t<T>* slope) {
  using A = acc_t<T>;
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
double row_power(const T* output, const T* target, int64_t width, double alpha, acc_t<T>* slope) {
  if constexpr (kHasVectorPower && std::is_same_v<acc_t<T>, float>)
    return row_power_by_vector(output, target, width, alpha, slope);
  else
    return row_power_by_element(output, target, width, alpha, slope);
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
  // Folding the error's coefficient into those of x and y would cancel: the error of a good fit is small.
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
