// box_pool, box_paint, mask_pool, mask_paint and their backwards on the GPU: two sums over the cells that objects
// cover, each the other's backward (device_pool.h, device_paint.h), all levels of a pyramid in one launch.
//
// S cells of all levels and images, K objects, C channels, e bytes an element:
//   pool    reads the covered part of S C e once, in packs of 16 bytes, writes L K C e; at most S / 512 x (objects of
//           an image) C partial sums are written and read once
//   paint   writes S C e once; reads L K C e from the caches
//   masks   are first converted to one bit per object and cell: reads the sampled pixels of K H W, writes K S / 8 bytes
// Deterministic: no atomics, sums in an order that depends only on the geometry.
#include "cover/device_paint.h"
#include "cover/device_pool.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;

// word = one bit per cell of each level and mask [H, W], that of the pixel (y H / H_l, x W / W_l). A thread processes
// one cell of 32 masks.
FASTKD_KERNEL void pack_masks_kernel(Levels<const unsigned char> levels, Global<const unsigned char> masks, int count,
                                     int height, int width, Global<uint32_t> word) {
  const Place<const unsigned char, int64_t> place(levels);
  const int cell = place.begin + threadIdx.x, first = blockIdx.y * kWarpSize;
  const bool inside = cell < place.end;
  const int64_t y = inside ? cell / place.level.columns : 0, x = inside ? cell % place.level.columns : 0;
  const int64_t pixel = y * height / place.level.rows * width + x * width / place.level.columns;
  const int64_t size = static_cast<int64_t>(height) * width;
#pragma unroll 4
  for (int k = first; k < first + kWarpSize && k < count; ++k) {
    const bool set = inside && masks[k * size + pixel] != 0;
    const uint32_t bits = __ballot_sync(kAllLanes, set);
    if (threadIdx.x % kWarpSize == 0 && inside)
      word[place.level.first_word * count + int64_t{k} * place.level.words + cell / kWarpSize] = bits;
  }
}

// cells = number of set bits of each level and mask [L, K]. One per warp.
FASTKD_KERNEL void count_cells_kernel(Levels<const unsigned char> levels, Global<const uint32_t> word, int count,
                                      Global<int> cells) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const bool inside = row < static_cast<int64_t>(levels.count) * count;
  const Level<const unsigned char> level = levels.level[inside ? row / count : 0];
  const int64_t first = level.first_word * count + row % count * level.words;
  int sum = 0;
  for (int at = threadIdx.x % kWarpSize; inside && at < level.words; at += kWarpSize)
    sum += count_bits(word[first + at]);
  for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (inside && threadIdx.x % kWarpSize == 0) cells[row] = sum;
}

Cover cover_by_masks(const char* op, const Tensor& masks, const Tensor& image_index, const Sizes& sizes, bool mean,
                     const Tensor& on) {
  STD_TORCH_CHECK(masks.dim() == 3 && masks.scalar_type() == ScalarType::Bool && masks.size(1) > 0 &&
                      masks.size(2) > 0 && masks.size(1) < (1 << 30) && masks.size(2) < (1 << 30) &&
                      masks.size(0) <= 65535 * kWarpSize,
                  op, ": masks must be [K, H, W] bool with H and W at least 1");
  check_sizes(op, sizes);
  Cover cover = new_cover(op, masks, image_index, on);
  cover.objects.masks = true;
  const int64_t count = cover.count(), chunks = (count + kWarpSize - 1) / kWarpSize;
  const Tensor plain = torch::stable::contiguous(masks);
  int64_t blocks = 0, words = 0;
  const auto levels = levels_of<const unsigned char>(sizes, 1, 1, kTile, 1, blocks);
  for (const auto& [rows, columns] : sizes) words += (rows * columns + kWarpSize - 1) / kWarpSize;
  cover.kept.push_back(new_tensor(on, {count * words}, ScalarType::Int));
  const auto word = output<uint32_t>(cover.kept.back());
  launch(on, Grid(blocks, chunks), Grid(kBlock), 0, &pack_masks_kernel, levels, global<const unsigned char>(plain),
         cover.objects.count, static_cast<int>(masks.size(1)), static_cast<int>(masks.size(2)), word);
  cover.objects.word = word;
  if (!mean) return cover;
  const int64_t rows = static_cast<int64_t>(sizes.size()) * count;
  cover.kept.push_back(new_tensor(on, {rows}, ScalarType::Int));
  const auto cells = output<int>(cover.kept.back());
  launch(on, Grid((rows + kWarps - 1) / kWarps), Grid(kBlock), 0, &count_cells_kernel, levels, word,
         cover.objects.count, cells);
  cover.objects.cells = cells;
  return cover;
}

// Levels [B, C, H_l, W_l], without copy if they are dense in either memory format.
std::vector<Plane> planes_of(const char* op, const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), op, ": levels must be at least one");
  std::vector<Plane> planes;
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 4 && level.size(0) == levels[0].size(0) && level.size(1) == levels[0].size(1) &&
                        level.scalar_type() == levels[0].scalar_type() && level.get_device() == levels[0].get_device(),
                    op, ": levels must be [B, C, H_l, W_l] and agree in B, C, dtype and device");
    const bool channels_last = is_channels_last(level);
    planes.push_back({dense(level, channels_last), level.size(2), level.size(3), channels_last});
  }
  check_sizes(op, sizes_of(planes));
  return planes;
}

Tensor pool(const char* op, const std::vector<Plane>& planes, const Cover& cover, bool mean) {
  const Tensor& on = planes[0].data;
  const int64_t images = on.size(0), channels = on.size(1), levels = static_cast<int64_t>(planes.size());
  const Tensor pooled = new_tensor(on, {levels, cover.count(), channels}, on.scalar_type());
  by_type(op, on, [&](auto value) {
    using T = decltype(value);
    const int strip = strip_of(sizes_of(planes), images, cover.count());
    pool_levels<T, T, false>(op, planes, images, channels, cover, mean, pooled, nullptr, strip);
    return 0;
  });
  return pooled;
}

std::vector<Tensor> paint(const char* op, const Tensor& values, const Cover& cover, bool mean, int64_t images,
                          const Sizes& sizes, const std::vector<bool>& channels_last) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == static_cast<int64_t>(sizes.size()) &&
                      values.size(1) == cover.count() && channels_last.size() == sizes.size(),
                  op, ": values must be [", sizes.size(), ", ", cover.count(), ", C], with an order for each level");
  STD_TORCH_CHECK(images >= 0, op, ": batch_size must not be negative, got ", images);
  check_sizes(op, sizes);
  const int64_t channels = values.size(2);
  std::vector<Plane> planes;
  std::vector<Tensor> levels;
  for (size_t index = 0; index < sizes.size(); ++index) {
    const auto [rows, columns] = sizes[index];
    if (channels_last[index]) {
      const Tensor cells = new_tensor(values, {images, rows, columns, channels}, values.scalar_type());
      levels.push_back(torch::stable::transpose(torch::stable::transpose(cells, 1, 3), 2, 3));
    } else {
      levels.push_back(new_tensor(values, {images, channels, rows, columns}, values.scalar_type()));
    }
    planes.push_back({levels.back(), rows, columns, channels_last[index]});
  }
  const Tensor plain = torch::stable::contiguous(values);
  by_type(op, values, [&](auto value) {
    using T = decltype(value);
    paint_levels<T, T, false>(planes, images, cover, plain, nullptr, channels, mean);
    return 0;
  });
  return levels;
}

std::pair<int64_t, int64_t> sides_of(const char* op, const std::vector<int64_t>& image_size) {
  STD_TORCH_CHECK(image_size.size() == 2, op, ": image_size must be (H, W)");
  return {image_size[0], image_size[1]};
}

Tensor box_pool(std::vector<Tensor> levels, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size) {
  const std::vector<Plane> planes = planes_of("box_pool", levels);
  const auto [height, width] = sides_of("box_pool", image_size);
  const DeviceScope scope(levels[0]);
  return pool("box_pool", planes, cover_by_boxes("box_pool", boxes, image_index, height, width, levels[0]), true);
}

std::vector<Tensor> box_pool_backward(Tensor grad, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size,
                                      int64_t batch_size, std::vector<int64_t> level_sizes,
                                      std::vector<bool> channels_last) {
  const char* op = "box_pool_backward";
  const auto [height, width] = sides_of(op, image_size);
  const DeviceScope scope(grad);
  const Cover cover = cover_by_boxes(op, boxes, image_index, height, width, grad);
  return paint(op, grad, cover, true, batch_size, sizes_of(op, level_sizes), channels_last);
}

std::vector<Tensor> box_paint(Tensor embeddings, Tensor boxes, Tensor image_index, std::vector<int64_t> image_size,
                              int64_t batch_size, std::vector<int64_t> level_sizes) {
  const Sizes sizes = sizes_of("box_paint", level_sizes);
  const auto [height, width] = sides_of("box_paint", image_size);
  const DeviceScope scope(embeddings);
  const Cover cover = cover_by_boxes("box_paint", boxes, image_index, height, width, embeddings);
  return paint("box_paint", embeddings, cover, false, batch_size, sizes, std::vector<bool>(sizes.size(), true));
}

Tensor box_paint_backward(std::vector<Tensor> grads, Tensor boxes, Tensor image_index,
                          std::vector<int64_t> image_size) {
  const char* op = "box_paint_backward";
  const std::vector<Plane> planes = planes_of(op, grads);
  const auto [height, width] = sides_of(op, image_size);
  const DeviceScope scope(grads[0]);
  return pool(op, planes, cover_by_boxes(op, boxes, image_index, height, width, grads[0]), false);
}

Tensor mask_pool(std::vector<Tensor> levels, Tensor masks, Tensor image_index) {
  const std::vector<Plane> planes = planes_of("mask_pool", levels);
  const DeviceScope scope(levels[0]);
  const Cover cover = cover_by_masks("mask_pool", masks, image_index, sizes_of(planes), true, levels[0]);
  return pool("mask_pool", planes, cover, true);
}

std::vector<Tensor> mask_pool_backward(Tensor grad, Tensor masks, Tensor image_index, int64_t batch_size,
                                       std::vector<int64_t> level_sizes, std::vector<bool> channels_last) {
  const char* op = "mask_pool_backward";
  const Sizes sizes = sizes_of(op, level_sizes);
  const DeviceScope scope(grad);
  const Cover cover = cover_by_masks(op, masks, image_index, sizes, true, grad);
  return paint(op, grad, cover, true, batch_size, sizes, channels_last);
}

std::vector<Tensor> mask_paint(Tensor embeddings, Tensor masks, Tensor image_index, int64_t batch_size,
                               std::vector<int64_t> level_sizes) {
  const Sizes sizes = sizes_of("mask_paint", level_sizes);
  const DeviceScope scope(embeddings);
  const Cover cover = cover_by_masks("mask_paint", masks, image_index, sizes, false, embeddings);
  return paint("mask_paint", embeddings, cover, false, batch_size, sizes, std::vector<bool>(sizes.size(), true));
}

Tensor mask_paint_backward(std::vector<Tensor> grads, Tensor masks, Tensor image_index) {
  const char* op = "mask_paint_backward";
  const std::vector<Plane> planes = planes_of(op, grads);
  const DeviceScope scope(grads[0]);
  return pool(op, planes, cover_by_masks(op, masks, image_index, sizes_of(planes), false, grads[0]), false);
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("box_pool", TORCH_BOX(&box_pool));
  library.impl("box_pool_backward", TORCH_BOX(&box_pool_backward));
  library.impl("box_paint", TORCH_BOX(&box_paint));
  library.impl("box_paint_backward", TORCH_BOX(&box_paint_backward));
  library.impl("mask_pool", TORCH_BOX(&mask_pool));
  library.impl("mask_pool_backward", TORCH_BOX(&mask_pool_backward));
  library.impl("mask_paint", TORCH_BOX(&mask_paint));
  library.impl("mask_paint_backward", TORCH_BOX(&mask_paint_backward));
}

}  // namespace fastkd
