// Shared by box_pool, box_paint, mask_pool and mask_paint: two sums over the cells that objects cover, each the
// backward of the other.
#pragma once

#include "cover/bands.h"
#include "common/call.h"

#if FASTKD_GENERIC_PASS
namespace fastkd {

using Sizes = std::vector<std::pair<int64_t, int64_t>>;  // (H_l, W_l) of the levels

// Sizes of levels [B, C, H_l, W_l]; throws unless there is at least one, on the CPU, and they agree in B, C and dtype.
Sizes sizes_of(const std::vector<Tensor>& levels);

// Sizes from a list H_0, W_0, H_1, W_1, ...
Sizes sizes_of(const std::vector<int64_t>& sides);

// [L, K, C]: out[l, k] = sum, or mean, of levels[l] over the cells that object k covers; 0 where there are none.
Tensor pool_levels(const std::vector<Tensor>& levels, const Cover& cover, bool mean);

// Allocates L tensors [B, C, H_l, W_l] for paint_levels, so that excessive sizes fail before the cover is computed.
std::vector<Tensor> new_levels(const Tensor& values, int64_t images, const Sizes& sizes,
                                              const std::vector<bool>& channels_last);

// Cells of levels[l] = sum of values[l, k] over the objects that cover it, divided by the number of cells they cover if
// mean. values is [L, K, C].
void paint_levels(const Tensor& values, const Cover& cover, bool mean,
                  const std::vector<Tensor>& levels);

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
