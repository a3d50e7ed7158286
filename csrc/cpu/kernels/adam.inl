// One step of Adam; see AdamStep.

template <class T>
void adam(const AdamStep<T>& step, int64_t n, const T* grad, T* p, T* m, T* v) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vector<T> g = load(grad + i, left);
    Vector<T> first = load(m + i, left), second = load(v + i, left);
    first = first + step.rest1 * (g + T(-1) * first);
    second = step.beta2 * second + step.rest2 * (g * g);
    store(first, m + i, left);
    store(second, v + i, left);
    store(load(p + i, left) +
              (-step.step_size) * first * inverse_of_root<T>(second, step.root_correction, step.eps),
          p + i, left);
  }
}
