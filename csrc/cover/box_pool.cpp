// box_pool: the mean of a pyramid over the cells each box covers, and its backward, a paint (pool_paint.h).
#include "cover/pool_paint.h"

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

std::pair<int64_t, int64_t> image_sides(const std::vector<int64_t>& image_size) {
  STD_TORCH_CHECK(image_size.size() == 2, "box_pool: image_size must be (H, W)");
  return {image_size[0], image_size[1]};
}

Tensor forward(std::vector<Tensor> levels, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size) {
  const Sizes sizes = sizes_of(levels);
  const auto [height, width] = image_sides(image_size);
  return pool_levels(levels, cover_by_boxes(boxes, image_index, height, width, levels[0].size(0), sizes), true);
}

std::vector<Tensor> backward(Tensor grad, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size,
                             int64_t batch_size, std::vector<int64_t> level_sizes, std::vector<bool> channels_last) {
  const Sizes sizes = sizes_of(level_sizes);
  const auto [height, width] = image_sides(image_size);
  std::vector<Tensor> levels = new_levels(grad, batch_size, sizes, channels_last);
  paint_levels(grad, cover_by_boxes(boxes, image_index, height, width, batch_size, sizes), true, levels);
  return levels;
}

}  // namespace

FASTKD_OP("box_pool", "(Tensor[] levels, Tensor boxes, Tensor image_index, SymInt[] image_size) -> Tensor", forward)
FASTKD_OP("box_pool_backward",
          "(Tensor grad, Tensor boxes, Tensor image_index, SymInt[] image_size, SymInt batch_size, SymInt[] "
          "level_sizes, bool[] channels_last) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
