// A packed table as the ops read it: its tensors checked once per call, and the place of every record.
// docs/packed-format.md describes the format.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common/arguments.h"
#include "cpu/common/compiler.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"

namespace embkern {
namespace {  // torch's Tensor is hidden, and so must be what holds one

constexpr int64_t kGroup = 32, kMaxTiers = 16;

// A tensor, or a contiguous copy of it. Copies of a Tensor count references, which is most of the time that the
// arguments of a small call take.
class Contiguous {
 public:
  explicit Contiguous(const Tensor& tensor) : tensor_(&tensor) {
    if (tensor.is_contiguous()) return;
    copy_ = torch::stable::contiguous(tensor);
    tensor_ = &*copy_;
  }
  Contiguous(const Contiguous&) = delete;
  const Tensor& operator*() const { return *tensor_; }
  const Tensor* operator->() const { return tensor_; }

 private:
  const Tensor* tensor_;
  std::optional<Tensor> copy_;
};

// The tiers of a table, checked, and what follows from them. They are a copy, since they bound the reads of
// records, and another thread may write to the tensor.
struct Tiers {
  std::vector<uint8_t> bytes;
  int64_t count, groups, basis_rows, width;
  std::array<int64_t, kMaxTiers> size{}, used{};  // words and groups of a tier's record
  std::array<int32_t, 256> pair;                  // words of two records, by the byte with their tiers

  Tiers(const uint8_t* all, int64_t count, int64_t groups, int64_t basis_rows, int64_t width)
      : bytes(all, all + count * (1 + groups)),
        count(count),
        groups(groups),
        basis_rows(basis_rows),
        width(width) {
    for (int64_t tier = 0; tier < count; ++tier) {
      const uint8_t* own = bytes.data() + tier * (1 + groups);
      const int64_t most = own[0] != 0 ? basis_rows : width + kGroup - 1;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t bits = own[1 + group];
        check(bits <= kMostBits && (bits == 0 || (group + 1) * kGroup <= most / kGroup * kGroup),
              "tiers: expected up to 8 bits in a group of the row, got ", bits, " in group ", group,
              " of tier ", tier);
        size[tier] += bits;
        if (bits) used[tier] = group + 1;
      }
      lay_out(tier, own + 1);
    }
    for (size_t i = 0; i < pair.size(); ++i) pair[i] = static_cast<int32_t>(size[i & 15] + size[i >> 4]);
  }

  Tiers(const Tiers&) = delete;

  bool from(const uint8_t* all, int64_t count_, int64_t groups_, int64_t basis_rows_, int64_t width_) const {
    return count == count_ && groups == groups_ && basis_rows == basis_rows_ && width == width_ &&
           std::memcmp(bytes.data(), all, bytes.size()) == 0;
  }

  // The layout of a tier's record with the groups up to the last one that has bits, and with only those that
  // have bits.
  const RecordLayout& layout(int64_t tier) const { return layouts_[tier]; }
  const RecordLayout& stored_layout(int64_t tier) const { return stored_layouts_[tier]; }

 private:
  std::array<std::vector<Run>, kMaxTiers> runs_, stored_runs_;
  std::array<RecordLayout, kMaxTiers> layouts_{}, stored_layouts_{};

  void lay_out(int64_t tier, const uint8_t* bits) {
    std::vector<Run>&all = runs_[tier], &stored = stored_runs_[tier];
    int64_t stream = 0, further = 0;
    for (int64_t group = 0; group < used[tier]; ++group) {
      append(all, bits[group]);
      if (bits[group] > 0) append(stored, bits[group]);
      if (bits[group] == 0 || bits[group] > kTrellisBits) continue;
      stream += std::min<int64_t>(bits[group], 2);
      further += std::max<int64_t>(bits[group] - 2, 0);
    }
    layouts_[tier] = {all.data(), all.data() + all.size(), stream, further};
    stored_layouts_[tier] = {stored.data(), stored.data() + stored.size(), stream, further};
  }

  static void append(std::vector<Run>& to, int bits) {
    if (to.empty() || to.back().bits != bits) to.push_back({0, bits});
    ++to.back().groups;
  }
};

// What follows from tensors of a call. Each thread keeps that of its latest tables and recognises it by their
// content, so that it does not matter whose memory they are in.
template <class Derived, class... From>
std::shared_ptr<const Derived> derived(From... from) {
  constexpr size_t kKept = 4;
  thread_local std::array<std::shared_ptr<const Derived>, kKept> kept;
  thread_local size_t oldest = 0;
  for (const auto& each : kept)
    if (each && each->from(from...)) return each;
  auto made = std::make_shared<const Derived>(from...);
  kept[oldest] = made;
  oldest = (oldest + 1) % kKept;
  return made;
}

inline const int8_t* checked_levels(const Tensor& tensor) {
  const bool fits = tensor.dim() == 2 && tensor.size(0) == kLevelTables && tensor.size(1) == kTableEntries;
  if (!fits || !has_dtype(tensor, ScalarType::Char)) {
    std::string shape;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim)
      shape += (dim ? ", " : "") + std::to_string(tensor.size(dim));
    check(false, "levels: expected dtype int8 of shape (", kLevelTables, ", ", kTableEntries, "), got ",
          torch::headeronly::toString(tensor.scalar_type()), " of shape (", shape, ")");
  }
  check_tensor("levels", tensor, 2, ScalarType::Char);
  return static_cast<const int8_t*>(tensor.const_data_ptr());
}

// Where the first record of an entry of the directory begins; the word has no sign.
EMBKERN_INLINE int64_t first_word(const int32_t* entry) { return static_cast<uint32_t>(entry[0]); }

// A checked table.
struct PackedTable {
  ScalarType type;  // of scales, basis and offset
  const int32_t *records, *directory;
  const int8_t* levels;
  std::shared_ptr<const Tiers> tiers;
  int64_t count, vocabulary, words;  // numbers of tiers, rows, words of the records
  int64_t basis_rows, width;
  const int64_t *size, *used;  // words and groups of a tier's record

  const uint8_t* bits(int64_t tier) const { return tiers->bytes.data() + tier * (1 + tiers->groups) + 1; }
  bool transform(int64_t tier) const { return bits(tier)[-1] != 0; }

  // Where the directory says that the record of a row is.
  struct Place {
    int64_t start, tier;
  };

  EMBKERN_INLINE Place find(int64_t id) const {
    const int32_t* entry = directory + id / kGroup * 5;
    uint64_t tiers_of[2];  // of 16 rows each, a byte for two
    std::memcpy(tiers_of, entry + 1, sizeof(tiers_of));
    const int64_t lane = id % kGroup, before = lane / 2;
    const int64_t own = tiers_of[before / 8] >> 8 * (before % 8) & 255;
    // All 16 bytes are looked up, since a loop of unknown length costs a mispredicted branch. The bytes from
    // that of the row on are made 0, and what they add is subtracted.
    const uint64_t mask = (uint64_t(1) << 8 * (before % 8)) - 1;
    const uint64_t low = tiers_of[0] & (before < 8 ? mask : ~uint64_t(0)),
                   high = before < 8 ? 0 : tiers_of[1] & mask;
    const int32_t* pair = tiers->pair.data();
    int64_t start = first_word(entry) - (kGroup / 2 - before) * pair[0];
    EMBKERN_UNROLL for (int i = 0; i < 64; i += 8) start += pair[low >> i & 255];
    EMBKERN_UNROLL for (int i = 0; i < 64; i += 8) start += pair[high >> i & 255];
    if (lane % 2) start += size[own & 15];
    return {start, own >> 4 * (lane % 2) & 15};
  }

  bool valid(const Place& place) const {
    return place.tier < count && place.start >= 0 && place.start + size[place.tier] <= words;
  }

  void check_place(int64_t id) const {
    const Place place = find(id);
    check(valid(place), "directory: expected records within their ", words, " words and tiers below ", count,
          ", got tier ", place.tier, " at ", place.start, " for id ", id);
  }
};

inline PackedTable checked_table(const Tensor& records, const Tensor& directory, const Tensor& tiers,
                                 const Tensor& levels, const Tensor& scales, const std::optional<Tensor>& basis,
                                 const std::optional<Tensor>& offset, int64_t width) {
  PackedTable table;
  const ScalarType type = table.type = scales.scalar_type();
  check_tensor("records", records, 1, ScalarType::Int);
  check_tensor("directory", directory, 2, ScalarType::Int);
  check_tensor("tiers", tiers, 2, ScalarType::Byte);
  check_tensor("scales", scales, 1, type);
  table.vocabulary = scales.size(0), table.words = records.size(0), table.count = tiers.size(0);
  const int64_t groups = tiers.size(1) - 1;
  check_size("directory", directory, 0, (table.vocabulary + kGroup - 1) / kGroup);
  check_size("directory", directory, 1, 5);
  check(table.vocabulary > 0, "scales: expected at least 1, got 0");
  check(table.words > 0, "records: expected at least 1 word, got 0");
  check(table.count >= 1 && table.count <= kMaxTiers && groups >= 1,
        "tiers: expected shape (T, 1 + G) with T up to 16 and G >= 1");
  check(width > 0, "embedding_dim: expected at least 1, got ", width);
  table.records = static_cast<const int32_t*>(records.const_data_ptr());
  table.directory = static_cast<const int32_t*>(directory.const_data_ptr());
  table.levels = checked_levels(levels);
  table.width = width, table.basis_rows = 0;
  if (basis) {
    check_tensor("basis", *basis, 2, type);
    check_size("basis", *basis, 1, width);
    table.basis_rows = basis->size(0);
    check(table.basis_rows % kGroup == 0, "basis: expected a multiple of 32 rows, got ", table.basis_rows);
  }
  if (offset) {
    check_tensor("offset", *offset, 1, type);
    check_size("offset", *offset, 0, width);
  }
  table.tiers = derived<Tiers>(static_cast<const uint8_t*>(tiers.const_data_ptr()), table.count, groups,
                               table.basis_rows, width);
  table.size = table.tiers->size.data(), table.used = table.tiers->used.data();
  return table;
}

}  // namespace
}  // namespace embkern
