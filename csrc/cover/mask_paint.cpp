// mask_paint: a pyramid whose cells sum the embeddings of the objects whose masks cover them, and its
// backward, a sum over the cells of each mask (pool_paint.h).
#include "cover/pool_paint.h"

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

std::vector<Tensor> forward(Tensor embeddings, Tensor masks, Tensor image_index,
                            int64_t batch_size, std::vector<int64_t> level_sizes) {
  const Sizes sizes = sizes_of(level_sizes);
  std::vector<Tensor> levels = new_levels(embeddings, batch_size, sizes, std::vector<bool>(sizes.size(), true));
  paint_levels(embeddings, cover_by_masks(masks, image_index, batch_size, sizes), false, levels);
  return levels;
}

Tensor backward(std::vector<Tensor> grads, Tensor masks, Tensor image_index) {
  const Sizes sizes = sizes_of(grads);
  return pool_levels(grads, cover_by_masks(masks, image_index, grads[0].size(0), sizes), false);
}

}  // namespace

FASTKD_OP("mask_paint",
          "(Tensor embeddings, Tensor masks, Tensor image_index, SymInt batch_size, SymInt[] level_sizes) -> Tensor[]",
          forward)
FASTKD_OP("mask_paint_backward", "(Tensor[] grads, Tensor masks, Tensor image_index) -> Tensor", backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
