// box_paint: a pyramid whose cells sum the embeddings of the boxes that cover them, and its backward, a sum over the
// cells of each box (pool_paint.h).
#include "cover/pool_paint.h"

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

std::pair<int64_t, int64_t> image_sides(const std::vector<int64_t>& image_size) {
  STD_TORCH_CHECK(image_size.size() == 2, "box_paint: image_size must be (H, W)");
  return {image_size[0], image_size[1]};
}

std::vector<Tensor> forward(Tensor embeddings, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size,
                            int64_t batch_size, std::vector<int64_t> level_sizes) {
  const Sizes sizes = sizes_of(level_sizes);
  const auto [height, width] = image_sides(image_size);
  std::vector<Tensor> levels = new_levels(embeddings, batch_size, sizes, std::vector<bool>(sizes.size(), true));
  paint_levels(embeddings, cover_by_boxes(boxes, image_index, height, width, batch_size, sizes), false, levels);
  return levels;
}

Tensor backward(std::vector<Tensor> grads, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size) {
  const Sizes sizes = sizes_of(grads);
  const auto [height, width] = image_sides(image_size);
  return pool_levels(grads, cover_by_boxes(boxes, image_index, height, width, grads[0].size(0), sizes), false);
}

}  // namespace

FASTKD_OP("box_paint",
          "(Tensor embeddings, Tensor boxes, Tensor image_index, SymInt[] image_size, SymInt batch_size, SymInt[] "
          "level_sizes) -> Tensor[]",
          forward)
FASTKD_OP("box_paint_backward",
          "(Tensor[] grads, Tensor boxes, Tensor image_index, SymInt[] image_size) -> Tensor",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
