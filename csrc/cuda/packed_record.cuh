// Records of a packed table, decoded by warps: a lane has one value of each group of 32. docs/packed-format.md
// specifies what is read here.
#pragma once

#include <cstdint>

#include "cuda/vectors.cuh"

namespace embkern::cuda {

constexpr int kGroup = 32, kMostTiers = 16, kEntry = 5;  // values of a group, tiers, words of an entry
constexpr int kLevelBits = 4, kMostBits = 8, kEntries = 16, kLevels = 17 * kEntries;

// The integer tensors of a packed table.
struct PackedTable {
  const int32_t* records;
  const int32_t* directory;
  const uint8_t* tiers;  // (T, 1 + G): whether values are coefficients, then the bits of each group
  const int8_t* levels;
  int64_t words;           // W
  int64_t num_embeddings;  // V
  int tier_count;          // T
  int groups;              // G
};

// Words of the records of a tier: all of them, those of the ring, and those of the further bits.
struct TierSizes {
  int words, ring, further;
};

EMBKERN_DEVICE int ring_words(int bits) { return bits > kLevelBits ? 0 : smaller(bits, 2); }
EMBKERN_DEVICE int further_words(int bits) { return bits > kLevelBits || bits < 3 ? 0 : bits - 2; }

// The sum of a value over the lanes of a warp.
EMBKERN_DEVICE int warp_sum(int value) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) value += ptx::shuffle_xor(value, bit);
  return value;
}

constexpr int kTablesBytes = kMostTiers * static_cast<int>(sizeof(TierSizes)) + kLevels;

// Writes the sizes of every tier, a warp per tier, and the levels, kTablesBytes together; the caller
// synchronises the block.
EMBKERN_DEVICE void load_tables(const PackedTable& table, TierSizes* sizes, int8_t* levels) {
  const int lane = threadIdx.x % kLanes;
  for (int i = threadIdx.x; i < kLevels; i += kThreads) levels[i] = table.levels[i];
  for (int tier = threadIdx.x / kLanes; tier < table.tier_count; tier += kWarps) {
    TierSizes sum{0, 0, 0};
    for (int group = lane; group < table.groups; group += kLanes) {
      const int bits = table.tiers[tier * (1 + table.groups) + 1 + group];
      if (bits > kMostBits) ptx::fail("tiers: expected at most 8 bits");
      sum.words += bits, sum.ring += ring_words(bits), sum.further += further_words(bits);
    }
    const int words = warp_sum(sum.words), ring = warp_sum(sum.ring), further = warp_sum(sum.further);
    if (lane == 0) sizes[tier] = {words, ring, further};
  }
}

// Where a row lies, and how.
struct Record {
  const int32_t* at;
  const uint8_t* bits;  // of each group
  int ring, further;    // words
  bool indirect;        // values are coefficients of the basis
};

// The record of a row, found by the 32 lanes together.
EMBKERN_DEVICE Record find_record(const PackedTable& table, const TierSizes* sizes, int64_t id, int lane) {
  const int32_t* entry = table.directory + id / kGroup * kEntry;
  const int place = static_cast<int>(id % kGroup);
  const auto tier_of = [&](int row) {
    return static_cast<int>(static_cast<uint32_t>(entry[1 + row / 8]) >> row % 8 * 4 & 15);
  };
  const int tier = tier_of(place), other = tier_of(lane);
  const int before = warp_sum(lane < place && other < table.tier_count ? sizes[other].words : 0);
  const int64_t start = static_cast<int64_t>(entry[0]) + before;
  if (tier >= table.tier_count || start < 0 || start + sizes[tier].words > table.words)
    ptx::fail("the directory does not fit tiers and records");
  const uint8_t* described = table.tiers + tier * (1 + table.groups);
  return {table.records + start, described + 1, sizes[tier].ring, sizes[tier].further, described[0] != 0};
}

// Reads the groups of a record in their order.
class RecordReader {
 public:
  EMBKERN_DEVICE RecordReader(const Record& record, int lane)
      : record_(record.at),
        ring_(record.ring),
        further_(record.ring),
        planes_(record.ring + record.further),
        lane_(lane) {}

  // The lane's value of the next group, which has `bits` bits.
  EMBKERN_DEVICE float next(int bits, const int8_t* levels) {
    if (bits == 0) return 0.f;
    return bits > kLevelBits ? uniform(bits) : sum_of_levels(bits, levels);
  }

 private:
  // code - (2^bits - 1) / 2; bit i of word p is bit p of the code of value i.
  EMBKERN_DEVICE float uniform(int bits) {
    int code = 0;
    for (int plane = 0; plane < bits; ++plane)
      code |= static_cast<int>(static_cast<uint32_t>(record_[planes_ + plane]) >> lane_ & 1) << plane;
    planes_ += bits;
    return 0.5f * static_cast<float>(2 * code + 1 - (1 << bits));
  }

  // Value 16 q + 4 j + m has its window of 12 bits at bit 8 m + 2 j of word q.
  EMBKERN_DEVICE float sum_of_levels(int bits, const int8_t* levels) {
    const int q = lane_ / 16, j = lane_ / 4 % 4, m = lane_ % 4, begin = 8 * m + 2 * j;
    const int word = stream_ + (bits == 1 ? 0 : q);
    const int after = word + 1 == ring_ ? 0 : word + 1;
    const uint64_t both = static_cast<uint64_t>(static_cast<uint32_t>(record_[after])) << 32 |
                          static_cast<uint32_t>(record_[word]);
    const uint32_t window = static_cast<uint32_t>(both >> begin);
    const int first = window >> 4 & 15, second = (window ^ window >> 8) & 15;
    const int third = (window >> 3 ^ window >> 8) & 15;
    const int row = bits == 1 ? 3 * q : bits == 2 ? 6 : bits == 3 ? 9 : 13;
    const int8_t* tables = levels + row * kEntries;
    int level = tables[first] + tables[kEntries + second];
    int further = 0;
    if (bits == 3) {
      further = static_cast<uint32_t>(record_[further_]) >> (8 * j + 4 * q + m) & 1;
    } else if (bits == 4) {
      const int e = static_cast<uint32_t>(record_[further_ + q]) >> begin & 3;
      level += tables[3 * kEntries + e + (second & 12)];
    }
    level += tables[(2 + further) * kEntries + third];
    stream_ += ring_words(bits), further_ += further_words(bits);
    return static_cast<float>(static_cast<int8_t>(level)) * (1.f / 32);  // sums are modulo 256
  }

  const int32_t* record_;
  int ring_, stream_ = 0, further_, planes_, lane_;
};

}  // namespace embkern::cuda
