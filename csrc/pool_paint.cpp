// pool and paint over bands (bands.h), the kernels of box_pool, box_paint, mask_pool, mask_paint and their backwards.
//
// pool    reads the covered cells once; writes [L, K, C]. Sums in float over at most kBandRows x kSegmentCells cells,
//         then pairwise over the segments of a band, then in double over bands; contiguous levels: see pool_planes.h.
//         a task: a block of channels of one image of one level
// paint   writes every cell once; reads [L, K, C], widens and divides it first, for each block or image (`widen`).
//         a task: a block of channels of an image (contiguous) or one band, all channels (channels-last)
// Results do not depend on the number of threads: a task's do not depend on who runs it.
#include "pool_paint.h"

#include "pool_planes.h"
#include "pyramid.h"

#include <memory>

namespace fastkd {
namespace pool_paint {

struct Level {
  const void* in;  // pool: the level
  void* out;  // paint: the level
  const Bands* bands;  // of each image
  int64_t channels, rows, columns, elements, most_segments;
  bool channels_last, large;  // large: beyond the caches near a core
};

struct Arguments {
  const Level* levels;
  const int64_t *first, *object;  // the objects of image b: object[first[b]] .. object[first[b + 1] - 1]
  const int64_t* cells;  // [L, K], the divisors; null: none
  int64_t objects, most_objects, channels, width;  // K, of an image, C, C rounded up to whole vectors
  void* pooled;  // [L, K, C]
  const void* values;  // [L, K, C]: what is painted
};

// scratch: 64-byte aligned, scratch_bytes long
using Kernel = void (*)(const Arguments&, const Task* begin, const Task* end, char* scratch);

struct Table {  // of float, double, BFloat16, Half
  Kernel pool[4], paint[4];
  int64_t (*stretch_bytes[4])(int64_t width, int64_t columns, int64_t most_segments);
  int64_t lanes[4], block[4];  // channels of a vector, and of a task that pools a channels-last level
  int64_t most_objects;  // of an image whose contiguous levels are pooled by columns
};

}  // namespace pool_paint
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace pool_paint;

template <class scalar_t>
struct PoolPaint {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kWidth = kLanes<V>;
  static constexpr int64_t kMostObjects = 1024;  // of an image whose objects each have lanes of their own
  static constexpr int kVectors = 64 / kWidth > 4 ? 64 / kWidth : 4;
  static constexpr int kBlock = kVectors * kWidth;  // channels

  // The results of `width` channels, the first `channels` of which exist.
  static void write_pooled(const Arguments& arguments, const Task& task, int64_t channel, int64_t width,
                           int64_t channels, const double* totals) {
    const int64_t first = arguments.first[task.image], count = arguments.first[task.image + 1] - first;
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t row = task.level * arguments.objects + arguments.object[first + slot];
      const int64_t cells = arguments.cells == nullptr ? 1 : arguments.cells[row];
      const double divisor = cells > 1 ? static_cast<double>(cells) : 1.0;
      scalar_t* out = static_cast<scalar_t*>(arguments.pooled) + row * arguments.channels + channel;
      for (int64_t at = 0; at < channels; ++at)
        out[at] = static_cast<scalar_t>(static_cast<acc>(totals[slot * width + at] / divisor));
    }
  }

  static double* new_totals(const Arguments& arguments, const Task& task, int64_t width, char*& scratch) {
    const int64_t count = (arguments.first[task.image + 1] - arguments.first[task.image]) * width;
    double* totals = take<double>(scratch, count);
    for (int64_t at = 0; at < count; ++at) totals[at] = 0;
    return totals;
  }

  template <class Lane, int U>
  static void pool_block(const Arguments& arguments, const Task& task, int64_t channel, char* scratch) {
    constexpr int width = U * kLanes<Lane>;
    const Level& level = arguments.levels[task.level];
    const int64_t position = task.image * level.rows * level.columns * level.channels + channel;
    const ChannelsLastLeaves<Lane, U, scalar_t> leaves{static_cast<const scalar_t*>(level.in) + position,
                                                       level.channels, level.columns};
    double* totals = new_totals(arguments, task, width, scratch);
    pool_bands<Lane, U>(level.bands[task.image], leaves, take<acc>(scratch, 2 * level.most_segments * width), totals);
    write_pooled(arguments, task, channel, width, width, totals);
  }

  static void pool_channels_last(const Arguments& arguments, const Task& task, char* scratch) {
    int64_t channel = task.channel;
    const int64_t end = channel + task.channels;
    for (; channel + kBlock <= end; channel += kBlock) pool_block<V, kVectors>(arguments, task, channel, scratch);
    for (; channel + kWidth <= end; channel += kWidth) pool_block<V, 1>(arguments, task, channel, scratch);
    for (; channel < end; ++channel) pool_block<acc, 1>(arguments, task, channel, scratch);
  }

  // A task is a vector of channels.
  static void pool_contiguous(const Arguments& arguments, const Task& task, char* scratch) {
    const Level& level = arguments.levels[task.level];
    const Bands& bands = level.bands[task.image];
    const int64_t plane = level.rows * level.columns;
    const int64_t objects = arguments.first[task.image + 1] - arguments.first[task.image];
    const scalar_t* in = static_cast<const scalar_t*>(level.in);
    const scalar_t *planes = in + (task.image * level.channels + task.channel) * plane, *end = in + level.elements;
    double* totals = new_totals(arguments, task, kWidth, scratch);
    acc* sums = take<acc>(scratch, kWidth * padded<V>(level.columns));
    if (bands.piled || objects > kMostObjects) {
      for (int64_t at = 0; at < kWidth * padded<V>(level.columns); ++at) sums[at] = 0;  // of channels that do not exist
      acc* cells = take<acc>(scratch, kWidth * padded<V>(level.columns));
      const ContiguousLeaves<V, 1, scalar_t> leaves{planes, task.channels, level.rows, level.columns, sums, cells};
      pool_bands<V, 1>(bands, leaves, take<acc>(scratch, 2 * level.most_segments * kWidth), totals);
    } else {
      acc* partial = take<acc>(scratch, objects * kWidth * kWidth);
      const PlanesPool<V, scalar_t> pool{planes,         end,     task.channels, level.rows,
                                         level.columns, objects, sums,          partial};
      pool(bands, totals);
    }
    write_pooled(arguments, task, task.channel, kWidth, task.channels, totals);
  }

  static void pool(const Arguments& arguments, const Task* task, const Task* end, char* scratch) {
    for (; task != end; ++task)
      if (arguments.levels[task->level].channels_last)
        pool_channels_last(arguments, *task, scratch);
      else
        pool_contiguous(arguments, *task, scratch);
  }

  // rows [objects, width] = the values of the task's image, `channels` of them from the task's first channel on,
  // divided, then zeros.
  static void widen(const Arguments& arguments, const Task& task, int64_t width, int64_t channels, acc* rows) {
    const int64_t first = arguments.first[task.image], end = arguments.first[task.image + 1];
    for (int64_t place = first; place < end; ++place, rows += width) {
      const int64_t row = task.level * arguments.objects + arguments.object[place];
      const int64_t cells = arguments.cells == nullptr ? 1 : arguments.cells[row];
      const acc divisor = static_cast<acc>(cells > 1 ? cells : 1);
      const scalar_t* in = static_cast<const scalar_t*>(arguments.values) + row * arguments.channels + task.channel;
      int64_t at = 0;
      for (; at + kWidth <= channels; at += kWidth) store(rows + at, V(load<V>(in + at) / divisor));
      for (; at < channels; ++at) rows[at] = load<acc>(in + at) / divisor;
      for (; at < width; ++at) rows[at] = 0;
    }
  }

  static void paint_channels_last(const Arguments& arguments, const Task& task, const acc* rows, char* scratch) {
    const Level& level = arguments.levels[task.level];
    const Bands& bands = level.bands[task.image];
    const Band& band = bands.band[task.row];
    const int64_t width = arguments.width;
    acc* nodes = take<acc>(scratch, 2 * level.most_segments * width);
    scalar_t* narrowed = take<scalar_t>(scratch, level.most_segments * width);
    paint_nodes<V>(bands, band, rows, width, width, nodes);
    scalar_t* image = static_cast<scalar_t*>(level.out) + task.image * level.rows * level.columns * level.channels;
    write_channels_last<V>(band, bands.segment + band.segment, nodes + band.segments * width, width, level.channels,
                           level.columns, level.large, narrowed, image);
  }

  static void paint_contiguous(const Arguments& arguments, const Task& task, acc* rows, char* scratch) {
    const Level& level = arguments.levels[task.level];
    const int64_t width = (task.channels + kWidth - 1) / kWidth * kWidth;
    const auto room = [&](auto element, int64_t count) { return take<decltype(element)>(scratch, count); };
    Stretch<V, scalar_t> stretch(width, level.columns, level.most_segments, room);
    widen(arguments, task, width, task.channels, rows);
    scalar_t* planes = static_cast<scalar_t*>(level.out) +
                       (task.image * level.channels + task.channel) * level.rows * level.columns;
    const int64_t columns = level.columns;
    stretch.template paint<true>(
        level.bands[task.image], rows, width, task.channels,
        [&](int64_t channel, int64_t first, int64_t count, bool one_row) {
          scalar_t *out = planes + (channel * level.rows + first) * columns, *in = stretch.rows;
          if (level.large)
            one_row ? stream_rows(out, in, columns, count * columns) : stream_copy(out, in, count * columns);
          else
            for (int64_t y = 0; y < count; ++y) copy(out + y * columns, one_row ? in : in + y * columns, columns);
        });
    if (level.large) end_stream();
  }

  static void paint(const Arguments& arguments, const Task* task, const Task* end, char* scratch) {
    const Task* widened = nullptr;  // a task of the image whose rows are there
    const int64_t width = arguments.width > 2 * kWidth ? arguments.width : 2 * kWidth;
    acc* rows = take<acc>(scratch, arguments.most_objects * width);
    for (; task != end; ++task) {
      if (!arguments.levels[task->level].channels_last) {
        paint_contiguous(arguments, *task, rows, scratch);
        continue;
      }
      if (widened == nullptr || widened->level != task->level || widened->image != task->image)
        widen(arguments, *task, arguments.width, arguments.channels, rows);
      widened = task;
      paint_channels_last(arguments, *task, rows, scratch);
    }
  }

  static int64_t stretch_bytes(int64_t width, int64_t columns, int64_t most_segments) {
    return Stretch<V, scalar_t>::bytes(width, columns, most_segments);
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

namespace fastkd {
template <>
const pool_paint::Table& kernels<pool_paint::Table, FASTKD_CAPABILITY>() {
  using F = PoolPaint<float>;
  using D = PoolPaint<double>;
  using B = PoolPaint<BFloat16>;
  using H = PoolPaint<Half>;
  static const pool_paint::Table table = {{F::pool, D::pool, B::pool, H::pool},
                                          {F::paint, D::paint, B::paint, H::paint},
                                          {F::stretch_bytes, D::stretch_bytes, B::stretch_bytes, H::stretch_bytes},
                                          {F::kWidth, D::kWidth, B::kWidth, H::kWidth},
                                          {F::kBlock, D::kBlock, B::kBlock, H::kBlock},
                                          F::kMostObjects};
  return table;
}
}  // namespace fastkd
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

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

// A call: what the kernels are told, the tasks, and the memory both live in.
class Call {
 public:
  Arguments arguments{};
  const Table& table = active_kernels<Table>();
  const int64_t type, lanes;

  Call(const Tensor& like, const Cover& cover, int64_t channels, bool mean)
      : type(type_index(like)), lanes(table.lanes[type]), cover_(cover) {
    arguments.first = cover.by_image.first.data();
    arguments.object = cover.by_image.object.data();
    arguments.cells = mean ? cover.cells.data() : nullptr;
    arguments.objects = cover.objects;
    arguments.channels = channels;
    arguments.width = (channels + lanes - 1) / lanes * lanes;
    for (const int64_t place : cover.place) bands_.push_back(cover.lists[place].view());
  }

  // in or out is a level in the given order. A level without elements, or one that is read for no object, has no tasks.
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
        const int64_t block = channels_last ? table.block[type] : out == nullptr ? lanes : 2 * lanes;
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

  // For the largest task (no block is less than two vectors): what its kernel takes.
  int64_t scratch_bytes() const {
    constexpr int64_t wide = sizeof(double);
    const int64_t block = table.block[type];
    int64_t bytes = 0;
    for (const Level& level : levels_) {
      const int64_t segments = level.most_segments;
      if (level.out == nullptr) {  // nodes, totals, rows of a contiguous level
        const int64_t rows = level.channels_last ? 0 : 2 * (level.columns + 2 * lanes);
        const int64_t partial = level.channels_last ? 0 : std::min(arguments.most_objects, table.most_objects) * lanes;
        bytes = std::max(bytes, wide * block * (2 * segments + arguments.most_objects + rows + partial));
      } else {  // rows of the objects, nodes and narrowed leaves or a stretch
        const int64_t width = std::max(arguments.width, 2 * lanes);
        const int64_t rows = arguments.most_objects * width * wide, painted = 3 * segments * width * wide;
        const int64_t columns = std::max<int64_t>(level.columns, 1);
        const int64_t stretch = table.stretch_bytes[type](2 * lanes, columns, segments);
        bytes = std::max(bytes, rows + (level.channels_last ? painted : stretch));
      }
    }
    return bytes + 8 * 64;  // each of the pieces begins on a cache line
  }
};

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(shape.data(), shape.size()));
}

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
  call.run(call.table.pool[call.type]);
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
  call.run(call.table.paint[call.type]);
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
