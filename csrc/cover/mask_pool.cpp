// mask_pool: the mean of a pyramid over the cells of each object's mask, and its backward, a paint (pool_paint.h).
#include "cover/pool_paint.h"

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

Tensor forward(std::vector<Tensor> levels, Tensor masks, Tensor image_index) {
  const Sizes sizes = sizes_of(levels);
  return pool_levels(levels, cover_by_masks(masks, image_index, levels[0].size(0), sizes), true);
}

std::vector<Tensor> backward(Tensor grad, Tensor masks, Tensor image_index,
                             int64_t batch_size, std::vector<int64_t> level_sizes, std::vector<bool> channels_last) {
  const Sizes sizes = sizes_of(level_sizes);
  std::vector<Tensor> levels = new_levels(grad, batch_size, sizes, channels_last);
  paint_levels(grad, cover_by_masks(masks, image_index, batch_size, sizes), true, levels);
  return levels;
}

}  // namespace

FASTKD_OP("mask_pool", "(Tensor[] levels, Tensor masks, Tensor image_index) -> Tensor", forward)
FASTKD_OP("mask_pool_backward",
          "(Tensor grad, Tensor masks, Tensor image_index, SymInt batch_size, SymInt[] level_sizes, bool[] "
          "channels_last) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
