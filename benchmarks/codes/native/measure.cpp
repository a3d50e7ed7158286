// Checks every decoder against a plain loop over the same bits, and times it while it multiplies rows with a
// vector. `python -m benchmarks codes` compiles this file once per instruction set.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "decoders.h"
#include "first_edition.h"

namespace {

constexpr int kBlocks = 10, kWidth = 64 * kBlocks, kRows = 16;  // rows of 640 values

struct Vectors {
  alignas(64) float floats[kWidth];
  // Integers in the order that `Sums` takes, whole = 128 high + low; their sum is a factor of the bias.
  alignas(64) int8_t high[kWidth], low[kWidth];
  alignas(64) int16_t whole[kWidth], in_order[kWidth];
};

struct Problem {
  Tables tables;
  Vectors vectors;
  std::vector<uint8_t> rows;  // of up to 4 bits, 32 bytes a block

  explicit Problem(unsigned seed) : rows(kRows * kBlocks * 32 + 64) {
    std::mt19937 random(seed);
    for (auto& table : tables.nibbles)
      for (auto& each : table) each = static_cast<int8_t>(random() % 51) - 25;
    for (auto& each : tables.bytes) each = static_cast<int8_t>(random() % 201) - 100;
    for (auto& each : tables.words) each = static_cast<int16_t>(random() % 20001) - 10000;
    for (auto& each : tables.floats) each = static_cast<float>(static_cast<int>(random() % 20001) - 10000);
    for (auto& each : tables.quadruples) each = static_cast<uint32_t>(random());
    for (auto& each : tables.eights) {
      each = 0;
      for (int i = 0; i < 8; ++i) each |= static_cast<uint64_t>(random() % 100) << 8 * i;
    }
    for (auto& each : rows) each = static_cast<uint8_t>(random());
    std::normal_distribution<float> normal;
    for (auto& each : vectors.floats) each = normal(random);
    for (int i = 0; i < kWidth; ++i) {
      const int block = i / 64, position = position_of(i % 64);
      const int number =
          std::max(-16000, std::min(16000, static_cast<int>(std::lrint(vectors.floats[i] * 4000))));
      vectors.in_order[i] = static_cast<int16_t>(number);
      const int upper = (number + 64) >> 7;
      vectors.high[64 * block + position] = static_cast<int8_t>(upper);
      vectors.low[64 * block + position] = static_cast<int8_t>(number - 128 * upper);
      // Of a register's lanes, the lower halves come first.
      const int lanes = sizeof(Part) / 16, part = position / 16 / lanes, lane = position / 16 % lanes,
                k = position % 16;
      vectors.whole[64 * block + part * 16 * lanes + k / 8 * 8 * lanes + lane * 8 + k % 8] =
          vectors.in_order[i];
    }
  }
};

template <class D>
INLINE const uint8_t* row_of(const Problem& problem, int row) {
  return problem.rows.data() + row * kBlocks * 8 * D::kBits;
}

template <int COUNT>
INLINE float sum_of(const Floats* sums) {
  Floats sum = sums[0];
  for (int i = 1; i < COUNT; ++i) sum = sum + sums[i];
#if defined(__AVX512BW__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
#else
  const __m256 half = sum;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Products with floats, which is what both kinds of decoders allow.
template <class D>
__attribute__((noinline)) void multiply(const Problem& problem, float* out) {
  const D decoder(problem.tables, 0);
  for (int row = 0; row < kRows; ++row) {
    constexpr int kChains = kParts == 1 ? 4 : 2;
    Floats sums[kChains] = {};
    const auto add = [&](int block, const Values& values) {
      for (int v = 0; v < kBlockVectors; ++v)
        sums[v % kChains] = OP(fmadd_ps)(
            values.vector[v], OP(load_ps)(problem.vectors.floats + 64 * block + v * kLanes), sums[v % kChains]);
    };
    decoder.run(row_of<D>(problem, row), kBlocks, [&](int block, const auto& values) {
      if constexpr (std::is_same_v<std::decay_t<decltype(values)>, Block>)
        add(block, widen(values));
      else
        add(block, values);
    });
    out[row] = sum_of<kChains>(sums);
  }
}

// Products with integers.
template <class D>
__attribute__((noinline)) void multiply_integers(const Problem& problem, int64_t bias, int64_t* out) {
  const D decoder(problem.tables, 128);
  const Vectors& vectors = problem.vectors;
  for (int row = 0; row < kRows; ++row) {
    Sums sums;
    decoder.run(row_of<D>(problem, row), kBlocks, [&](int block, const Block& levels) {
      sums.add(levels, vectors.high + 64 * block, vectors.low + 64 * block, vectors.whole + 64 * block);
    });
    out[row] = sums.total() - bias;
  }
}

// Whether all values, and products of integers, are those of a plain loop.
template <class D, bool BYTES>
bool right(const Problem& problem) {
  bool equal = true;
  const D decoder(problem.tables, 0);
  int64_t whole[kRows], expected[kRows] = {}, bias = 0;
  for (int i = 0; i < kWidth; ++i) bias += 128 * problem.vectors.in_order[i];
  for (int row = 0; row < kRows; ++row) {
    const uint8_t* from = row_of<D>(problem, row);
    decoder.run(from, kBlocks, [&](int block, const auto& given) {
      alignas(64) float values[64];
      float unit = 1;
      if constexpr (BYTES) {
        const Values wide = widen(given);
        std::memcpy(values, &wide, sizeof(values));
        unit = 1 << 24;
      } else {
        std::memcpy(values, &given, sizeof(values));
      }
      for (int i = 0; i < 64; ++i) {
        const auto level = D::level(problem.tables, from, kBlocks, block, i);
        equal = equal && values[i] == unit * static_cast<float>(level);
        expected[row] += static_cast<int64_t>(level) * problem.vectors.in_order[64 * block + i];
      }
    });
  }
  if constexpr (BYTES) {
    multiply_integers<D>(problem, bias, whole);
    for (int row = 0; row < kRows; ++row) equal = equal && whole[row] == expected[row];
  }
  return equal;
}

template <class Run>
double least_ticks(Run run, int repeats) {
  double least = 1e30;
  for (int i = 0; i < repeats; ++i) {
    unsigned core;
    _mm_lfence();
    const uint64_t start = __rdtsc();
    _mm_lfence();
    run();
    const uint64_t end = __rdtscp(&core);
    _mm_lfence();
    least = std::min(least, static_cast<double>(end - start));
  }
  return least;
}

struct Result {
  const char* name;
  int32_t bits, right;
  double ticks, ticks_of_integers;  // of the time-stamp counter for 32 values; 0 where there is no such product
};

template <class D, bool BYTES>
Result measured(const char* name, const Problem& problem, int repeats) {
  float out[kRows];
  int64_t whole[kRows];
  constexpr double kGroups = kRows * kWidth / 32;
  Result result{name, D::kBits, right<D, BYTES>(problem), 0, 0};
  result.ticks = least_ticks([&] { multiply<D>(problem, out); }, repeats) / kGroups;
  if constexpr (BYTES)
    result.ticks_of_integers = least_ticks([&] { multiply_integers<D>(problem, 0, whole); }, repeats) / kGroups;
  return result;
}

}  // namespace

extern "C" uint64_t ticks() { return __rdtsc(); }

// Ticks of the time-stamp counter per cycle of the core, from a chain of 4096 dependent additions of a cycle
// each.
extern "C" double ticks_per_cycle(int repeats) {
  return least_ticks(
             [] {
               uint64_t x = 1;
               for (int i = 0; i < 256; ++i)
                 asm volatile(
                     "add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, "
                     "%0\n add $1, %0\n"
                     "add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n add $1, "
                     "%0\n add $1, %0\n"
                     : "+r"(x));
             },
             repeats) /
         4096;
}

// Measures every decoder of this instruction set; returns how many there are.
extern "C" int measure(int repeats, unsigned seed, Result* results) {
  const Problem problem(seed);
  int count = 0;
#define MEASURE(name, bytes, ...) results[count++] = measured<__VA_ARGS__, bytes>(name, problem, repeats)
  MEASURE("planes", false, Planes128<1, true>);
  MEASURE("planes", false, Planes128<2, true>);
  MEASURE("planes", false, Planes128<3, true>);
  MEASURE("planes", false, Planes128<4, true>);
  MEASURE("windows", false, Planes128<1, false>);
  MEASURE("windows", false, Planes128<2, false>);
  MEASURE("windows", false, Planes128<3, false>);
  MEASURE("windows", false, Planes128<4, false>);
  MEASURE("scalar", true, Scalar<2>);
  MEASURE("scalar", true, Scalar<4>);
  MEASURE("trellis-16", true, Trellis16);
  MEASURE("sums-256", true, Sums256);
#if defined(__AVX512VBMI__)
  MEASURE("trellis-64", true, TrellisBytes<6, true>);
  MEASURE("trellis-128", true, TrellisBytes<7, true>);
  MEASURE("trellis-128-rings", true, TrellisBytes<7, false>);
#endif
  MEASURE("sums-4096", true, Sums4096<1>);
  MEASURE("sums-4096", true, Sums4096<2>);
  MEASURE("sums-4096", true, Sums4096<3>);
  MEASURE("sums-4096", true, Sums4096<4>);
  MEASURE("gathered-4096", false, Gathered4096);
  MEASURE("computed-65536", false, Computed65536<2>);
  MEASURE("computed-65536", false, Computed65536<4>);
  MEASURE("pairs", true, Pairs);
  MEASURE("quadruples", true, Quadruples);
  MEASURE("eights", true, Eights);
#undef MEASURE
  return count;
}

// Rows of `sums-4096` with given tables (6, 16) to levels (rows, 640) in the order of the values.
extern "C" void decode_sums(int bits, const int8_t* nibbles, const uint8_t* rows, int64_t count, float* out) {
  Tables tables{};
  std::memcpy(tables.nibbles, nibbles, 96);
  const auto decode = [&](auto width) {
    using D = Sums4096<decltype(width)::value>;
    const D decoder(tables, 0);
    for (int64_t row = 0; row < count; ++row) {
      decoder.run(rows + row * kBlocks * 8 * D::kBits, kBlocks, [&](int block, const Block& levels) {
        const Values values = widen(levels);
        float numbers[64];
        std::memcpy(numbers, &values, sizeof(numbers));
        for (int i = 0; i < 64; ++i) out[row * kWidth + block * 64 + i] = numbers[i] / (1 << 24);
      });
    }
  };
  if (bits == 1) decode(std::integral_constant<int, 1>{});
  if (bits == 2) decode(std::integral_constant<int, 2>{});
  if (bits == 3) decode(std::integral_constant<int, 3>{});
  if (bits == 4) decode(std::integral_constant<int, 4>{});
}
