// The integer tensors of a packed table, as programs of the emulator read them.
#pragma once

#include "arguments.h"
#include "cuda/packed_record.cuh"

namespace emulator {

// `Header` has the sizes words, num_embeddings, tiers and groups.
class PackedArrays {
 public:
  template <class Header>
  explicit PackedArrays(const Header& header)
      : records_(header.words),
        directory_(embkern::cuda::ceil_div(header.num_embeddings, embkern::cuda::kGroup) *
                   embkern::cuda::kEntry),
        tiers_(header.tiers * (1 + header.groups)),
        levels_(embkern::cuda::kLevels),
        table_{records_.data(),
               directory_.data(),
               tiers_.data(),
               levels_.data(),
               header.words,
               header.num_embeddings,
               static_cast<int>(header.tiers),
               static_cast<int>(header.groups)} {}

  embkern::cuda::PackedTable read() {
    records_.read(), directory_.read(), tiers_.read(), levels_.read();
    return table_;
  }

 private:
  Array<int32_t> records_, directory_;
  Array<uint8_t> tiers_;
  Array<int8_t> levels_;
  embkern::cuda::PackedTable table_;
};

}  // namespace emulator
