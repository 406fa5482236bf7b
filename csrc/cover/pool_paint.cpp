// Calls of the kernels of pool_paint_kernels.h.
#include "cover/pool_paint.h"

#include "cover/pool_paint_kernels.h"

#include <memory>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNEL_TABLES(pool_paint::Table, PoolPaint, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {

Sizes sizes_of(const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), "fastkd: levels must be at least one");
  Sizes sizes;
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 4 && level.is_cpu(), "fastkd: levels must be [B, C, H_l, W_l] on the CPU");
    STD_TORCH_CHECK(level.size(0) == levels[0].size(0) && level.size(1) == levels[0].size(1) &&
                        level.scalar_type() == levels[0].scalar_type(),
                    "fastkd: levels must agree in B, C and dtype");
    sizes.emplace_back(level.size(2), level.size(3));
  }
  return sizes;
}

Sizes sizes_of(const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(sides.size() % 2 == 0, "fastkd: level_sizes must be pairs (H_l, W_l)");
  Sizes sizes;
  for (size_t at = 0; at < sides.size(); at += 2) sizes.emplace_back(sides[at], sides[at + 1]);
  return sizes;
}

namespace {
using namespace pool_paint;

// A call: the arguments of the kernels, the tasks, and their memory.
class Call {
 public:
  Arguments arguments{};
  const Table& table;
  const int64_t lanes;

  Call(const Tensor& like, const Cover& cover, int64_t channels, bool mean)
      : table(kernels_for<Table>(like)), lanes(table.lanes), cover_(cover) {
    arguments.first = cover.by_image.first.data();
    arguments.object = cover.by_image.object.data();
    arguments.cells = mean ? cover.cells.data() : nullptr;
    arguments.objects = cover.objects;
    arguments.channels = channels;
    arguments.width = (channels + lanes - 1) / lanes * lanes;
    for (const int64_t place : cover.place) bands_.push_back(cover.lists[place].view());
  }

  // in or out is a level in the given memory format. A level without elements, or read without objects, has no tasks.
  void add_level(const void* in, void* out, bool channels_last, int64_t bytes) {
    const int64_t index = static_cast<int64_t>(levels_.size()), channels = arguments.channels;
    const auto [rows, columns] = cover_.sizes[index];
    levels_.push_back({in, out, bands_.data() + index * cover_.images, channels, rows, columns,
                       cover_.images * channels * rows * columns, 1, channels_last, is_large(bytes)});
    if (rows * columns * channels == 0) return;
    for (int64_t image = 0; image < cover_.images; ++image) {
      const BandList& list = cover_.list(index, image);
      levels_.back().most_segments = std::max(levels_.back().most_segments, list.most_segments);
      const int64_t objects = cover_.by_image.first[image + 1] - cover_.by_image.first[image];
      arguments.most_objects = std::max(arguments.most_objects, objects);
      if (out != nullptr && channels_last) {
        for (int64_t band = 0; band < list.count(); ++band) tasks_.push_back({index, image, 0, channels, band});
      } else if (out != nullptr || objects > 0) {
        const bool piled = bands_[index * cover_.images + image].piled || objects > table.most_objects;
        const int64_t block = channels_last    ? table.block
                              : out != nullptr ? 2 * lanes
                              : piled          ? table.piled
                                               : lanes;
        for (int64_t channel = 0; channel < channels; channel += block)
          tasks_.push_back({index, image, channel, std::min(block, channels - channel), 0});
      }
    }
  }

  void run(Kernel kernel) {
    arguments.levels = levels_.data();
    const auto cost = [&](const Task& task) {
      const Level& level = levels_[task.level];
      const Band& band = level.bands[task.image].band[task.row];
      const bool one_band = level.out != nullptr && level.channels_last;
      return task.channels * level.columns * (one_band ? band.y1 - band.y0 : level.rows);
    };
    const int64_t bytes = scratch_bytes();
    run_balanced(tasks_, cost, [&](const Task* begin, const Task* end) {
      const std::unique_ptr<char[]> scratch(new char[bytes + 64]);
      char* start = scratch.get();
      kernel(arguments, begin, end, start + (64 - reinterpret_cast<uintptr_t>(start) % 64));
    });
  }

 private:
  const Cover& cover_;
  std::vector<Bands> bands_;
  std::vector<Level> levels_;
  std::vector<Task> tasks_;

  // Scratch of the largest task (blocks have at least two vectors).
  int64_t scratch_bytes() const {
    constexpr int64_t wide = sizeof(double);
    const int64_t block = table.block;
    int64_t bytes = 0;
    for (const Level& level : levels_) {
      const int64_t segments = level.most_segments;
      if (level.out == nullptr) {  // nodes, totals, rows of a contiguous level
        const int64_t rows = level.channels_last ? 0 : 2 * (level.columns + 2 * lanes);
        const int64_t partial = level.channels_last ? 0 : std::min(arguments.most_objects, table.most_objects) * lanes;
        bytes = std::max(bytes, wide * block * (2 * segments + arguments.most_objects + rows + partial));
      } else {  // rows of the objects, nodes and narrowed leaves or a stretch
        const int64_t width = std::max(arguments.width, 2 * lanes);
        const int64_t rows = arguments.most_objects * width * wide;
        const int64_t painted = (painted_nodes(segments) + segments) * width * wide;
        const int64_t columns = std::max<int64_t>(level.columns, 1);
        const int64_t stretch = table.stretch_bytes(2 * lanes, columns, segments);
        bytes = std::max(bytes, rows + (level.channels_last ? painted : stretch));
      }
    }
    return bytes + 8 * 64;  // each part is aligned to a cache line
  }
};

}  // namespace

Tensor pool_levels(const std::vector<Tensor>& levels, const Cover& cover, bool mean) {
  const int64_t channels = levels[0].size(1);
  Tensor pooled = new_tensor(levels[0], {cover.levels(), cover.objects, channels});
  Call call(levels[0], cover, channels, mean);
  call.arguments.pooled = pooled.mutable_data_ptr();
  std::vector<Tensor> kept;
  for (size_t index = 0; index < levels.size(); ++index) {
    const bool channels_last = is_channels_last(levels[index]);
    kept.push_back(dense(levels[index], channels_last));
    const auto [rows, columns] = cover.sizes[index];
    if (rows * columns == 0) {
      Tensor row = torch::stable::select(pooled, 0, static_cast<int64_t>(index));
      torch::stable::zero_(row);
    }
    call.add_level(kept.back().const_data_ptr(), nullptr, channels_last, 0);
  }
  call.run(call.table.pool);
  return pooled;
}

std::vector<Tensor> new_levels(const Tensor& values, int64_t images, const Sizes& sizes,
                               const std::vector<bool>& channels_last) {
  STD_TORCH_CHECK(values.dim() == 3 && values.is_cpu() && values.size(0) == static_cast<int64_t>(sizes.size()),
                  "fastkd: embeddings must be [", sizes.size(), ", K, C] on the CPU");
  STD_TORCH_CHECK(channels_last.size() == sizes.size(), "fastkd: channels_last must have one entry for each level");
  STD_TORCH_CHECK(images >= 0, "fastkd: batch_size must not be negative, got ", images);
  check_sizes(sizes);
  std::vector<Tensor> levels;
  for (size_t index = 0; index < sizes.size(); ++index) {
    const auto [rows, columns] = sizes[index];
    const int64_t channels = values.size(2);
    if (channels_last[index]) {
      const Tensor cells = new_tensor(values, {images, rows, columns, channels});
      levels.push_back(torch::stable::transpose(torch::stable::transpose(cells, 1, 3), 2, 3));
    } else {
      levels.push_back(new_tensor(values, {images, channels, rows, columns}));
    }
  }
  return levels;
}

void paint_levels(const Tensor& values, const Cover& cover, bool mean, const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(values.size(1) == cover.objects, "fastkd: embeddings must have one row for each of the ",
                  cover.objects, " objects");
  const Tensor plain = torch::stable::contiguous(values);
  Call call(values, cover, values.size(2), mean);
  call.arguments.values = plain.const_data_ptr();
  for (const Tensor& level : levels)
    call.add_level(nullptr, level.mutable_data_ptr(), is_channels_last(level), level.numel() * level.element_size());
  call.run(call.table.paint);
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
