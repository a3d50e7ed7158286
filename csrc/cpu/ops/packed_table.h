// A packed table as the ops read it: its tensors checked once per call, and the place of every record.
// docs/packed-format.md describes the format.
#pragma once

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"

namespace embkern {
namespace {  // torch's Tensor is hidden, and so must be what holds one

constexpr int64_t kGroup = 32, kMaxTiers = 16, kLevelBits = 4;

// A checked table. What bounds the reads is a copy: another thread may write to the tensors after the check.
struct PackedTable {
  const int32_t *records, *directory;
  std::vector<uint8_t> tiers;
  int64_t count, vocabulary, groups, words;  // numbers of tiers, rows, groups of a tier, words of the records
  int64_t basis_rows, width;
  std::array<int64_t, kMaxTiers> size{}, used{};  // words and groups of a tier's record
  std::array<int32_t, 256> pair;                  // words of two records, by the byte with their tiers
  std::array<int16_t, kLevelBits * kTrellisStates + 2> levels{};

  const uint8_t* bits(int64_t tier) const { return tiers.data() + tier * (1 + groups) + 1; }
  bool transform(int64_t tier) const { return tiers[tier * (1 + groups)] != 0; }

  // Finds the record of a row and returns its tier.
  int64_t locate(int64_t id, const int32_t** record) const {
    std::array<int32_t, 5> entry;
    std::memcpy(entry.data(), directory + id / kGroup * 5, sizeof(entry));
    int64_t start = entry[0];
    const int64_t lane = id % kGroup;
    const auto two = [&](int64_t i) { return static_cast<uint32_t>(entry[1 + i / 4]) >> 8 * (i % 4) & 255; };
    for (int64_t i = 0; i < lane / 2; ++i) start += pair[two(i)];
    if (lane % 2) start += size[two(lane / 2) & 15];
    const int64_t tier = two(lane / 2) >> 4 * (lane % 2) & 15;
    check(tier < count && start >= 0 && start + size[tier] <= words,
          "directory: expected records within their ", words, " words and tiers below ", count, ", got tier ",
          tier, " at ", start, " for id ", id);
    *record = records + start;
    return tier;
  }
};

inline PackedTable checked_table(const Tensor& records, const Tensor& directory, const Tensor& tiers,
                                 const Tensor& levels, const Tensor& scales, const std::optional<Tensor>& basis,
                                 const std::optional<Tensor>& offset, int64_t width) {
  const ScalarType type = scales.scalar_type();
  check_tensor("records", records, 1, ScalarType::Int);
  check_tensor("directory", directory, 2, ScalarType::Int);
  check_tensor("tiers", tiers, 2, ScalarType::Byte);
  check_tensor("levels", levels, 2, ScalarType::Short);
  check_tensor("scales", scales, 1, type);
  check_size("directory", directory, 0, (scales.size(0) + kGroup - 1) / kGroup);
  check_size("directory", directory, 1, 5);
  check_size("levels", levels, 0, kLevelBits);
  check_size("levels", levels, 1, kTrellisStates);
  check(scales.size(0) > 0, "scales: expected at least 1, got 0");
  check(records.size(0) > 0, "records: expected at least 1 word, got 0");
  check(tiers.size(0) >= 1 && tiers.size(0) <= kMaxTiers && tiers.size(1) >= 2,
        "tiers: expected shape (T, 1 + G) with T up to 16 and G >= 1");
  check(width > 0, "embedding_dim: expected at least 1, got ", width);
  PackedTable table;
  table.records = static_cast<const int32_t*>(records.const_data_ptr());
  table.directory = static_cast<const int32_t*>(directory.const_data_ptr());
  const auto* all_tiers = static_cast<const uint8_t*>(tiers.const_data_ptr());
  table.tiers.assign(all_tiers, all_tiers + tiers.numel());
  table.count = tiers.size(0), table.vocabulary = scales.size(0), table.groups = tiers.size(1) - 1;
  table.words = records.numel(), table.width = width, table.basis_rows = 0;
  if (basis) {
    check_tensor("basis", *basis, 2, type);
    check_size("basis", *basis, 1, width);
    check(basis->size(0) % kGroup == 0, "basis: expected a multiple of 32 rows, got ", basis->size(0));
    table.basis_rows = basis->size(0);
  }
  if (offset) {
    check_tensor("offset", *offset, 1, type);
    check_size("offset", *offset, 0, width);
  }
  for (int64_t tier = 0; tier < table.count; ++tier) {
    const int64_t most = table.transform(tier) ? table.basis_rows : width + kGroup - 1;
    for (int64_t group = 0; group < table.groups; ++group) {
      const int64_t bits = table.bits(tier)[group];
      check(bits <= 8 && (bits == 0 || (group + 1) * kGroup <= most / kGroup * kGroup),
            "tiers: expected up to 8 bits in a group of the row, got ", bits, " in group ", group, " of tier ",
            tier);
      table.size[tier] += bits;
      if (bits) table.used[tier] = group + 1;
    }
  }
  for (size_t i = 0; i < table.pair.size(); ++i)
    table.pair[i] = static_cast<int32_t>(table.size[i & 15] + table.size[i >> 4]);
  std::memcpy(table.levels.data(), levels.const_data_ptr(), kLevelBits * kTrellisStates * sizeof(int16_t));
  return table;
}

}  // namespace
}  // namespace embkern
