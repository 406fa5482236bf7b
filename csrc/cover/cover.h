// Shared by box_pool, box_paint, mask_pool, mask_paint, box_paint_conv3x3 and norm_relu_box_pool on the CPU: the cells
// of a level that a box covers (box_cover in fastkd/ops/_support/coverage.py), and the objects of an image.
#pragma once

#include "common/capability.h"

#if FASTKD_GENERIC_PASS
#include "cover/covered_range.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastkd {

// Cells (y, x) with y0 <= y < y1 and x0 <= x < x1; empty() where there is none.
struct Rectangle {
  int64_t y0, y1, x0, x1;
  bool empty() const { return y0 >= y1 || x0 >= x1; }
  int64_t cells() const { return empty() ? 0 : (y1 - y0) * (x1 - x0); }
};

// The rectangles of all boxes [K, 4] xyxy on all levels of sizes (H_l, W_l), K per level.
inline std::vector<Rectangle> cover_boxes(const torch::stable::Tensor& boxes, int64_t height, int64_t width,
                                          const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.is_cpu(), "fastkd: boxes must be [K, 4] on the CPU");
  STD_TORCH_CHECK(height > 0 && width > 0, "fastkd: image_size must be two positive numbers");
  const torch::stable::Tensor plain =
      torch::stable::contiguous(torch::stable::to(boxes, ScalarType::Float));
  const float* box = plain.const_data_ptr<float>();
  std::vector<Rectangle> rectangles;
  rectangles.reserve(sizes.size() * plain.size(0));
  for (const auto& [rows, columns] : sizes)
    for (int64_t k = 0; k < plain.size(0); ++k) {
      const auto [y0, y1] = covered_range(box[4 * k + 1], box[4 * k + 3], height, rows);
      const auto [x0, x1] = covered_range(box[4 * k], box[4 * k + 2], width, columns);
      rectangles.push_back({y0, y1, x0, x1});
    }
  return rectangles;
}

// Objects grouped by image: those of image b are object[first[b]] .. object[first[b + 1] - 1], in ascending order.
struct ObjectsByImage {
  std::vector<int64_t> object, first;
};

// Throws if an index is outside [0, images), so that no access leaves the memory of an image.
inline ObjectsByImage objects_by_image(const torch::stable::Tensor& image_index, int64_t objects, int64_t images) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(image_index.dim() == 1 && image_index.size(0) == objects && image_index.is_cpu() &&
                      image_index.scalar_type() == ScalarType::Long,
                  "fastkd: image_index must be [", objects, "] int64 on the CPU");
  const torch::stable::Tensor plain = torch::stable::contiguous(image_index);
  const int64_t* image = plain.const_data_ptr<int64_t>();
  ObjectsByImage groups{std::vector<int64_t>(objects), std::vector<int64_t>(images + 1, 0)};
  for (int64_t k = 0; k < objects; ++k) {
    STD_TORCH_CHECK(image[k] >= 0 && image[k] < images, "fastkd: image_index must be in [0, ", images, "), got ",
                    image[k], "; pass the image of every object");
    ++groups.first[image[k] + 1];
  }
  for (int64_t b = 0; b < images; ++b) groups.first[b + 1] += groups.first[b];
  std::vector<int64_t> next(groups.first.begin(), groups.first.end() - 1);
  for (int64_t k = 0; k < objects; ++k) groups.object[next[image[k]]++] = k;
  return groups;
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
