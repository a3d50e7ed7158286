// Primitives without an instruction below AVX-512, lane by lane.

// 1 / (scale * sqrt(x) + eps).
template <class T>
EMBKERN_INLINE Vector<T> inverse_of_root(Vector<T> x, T scale, T eps) {
  return constant(T(1)) / (scale * square_root(x) + eps);
}

// ---- quantization -------------------------------------------------------------------------------------------

struct Rounded {
  Vector<float> value;
  int32_t code[kLanes<float>];
};

// The nearest of 2^BITS ascending levels, by binary search among the edges between them.
template <int BITS>
EMBKERN_INLINE Rounded nearest_level(Vector<float> values, const float* edges, const float* levels) {
  Rounded result;
  for (int i = 0; i < kLanes<float>; ++i) {
    int code = 0;
    for (int step = 1 << (BITS - 1); step > 0; step /= 2) code += values[i] > edges[code + step - 1] ? step : 0;
    result.value[i] = levels[code];
    result.code[i] = code;
  }
  return result;
}

// The nearest of 2^BITS multiples of `step`, which lie around zero. The result is in units of the step.
template <int BITS>
EMBKERN_INLINE Rounded nearest_step(Vector<float> values, float step) {
  constexpr int kMost = (1 << BITS) - 1;
  constexpr float kMiddle = kMost / 2.0f;
  Rounded result;
  for (int i = 0; i < kLanes<float>; ++i) {
    const float steps = std::nearbyint(values[i] / step + kMiddle);
    result.code[i] = static_cast<int>(std::min(std::max(steps, 0.0f), static_cast<float>(kMost)));
    result.value[i] = static_cast<float>(result.code[i]) - kMiddle;
  }
  return result;
}

EMBKERN_INLINE void store_codes(const Rounded& rounded, uint8_t* to) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<uint8_t>(rounded.code[i]);
}
