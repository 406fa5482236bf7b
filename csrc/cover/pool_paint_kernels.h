// pool and paint over bands (bands.h), the kernels of box_pool, box_paint, mask_pool, mask_paint and their backwards.
//
// pool    reads the covered cells once; writes [L, K, C]. Sums in float over at most kBandRows x kSegmentCells cells,
//         then pairwise over the segments of a band, then in double over bands; contiguous levels: see pool_planes.h.
//         a task: a block of channels of one image of one level
// paint   writes every cell once; reads [L, K, C], which is first widened and divided per block or image (`widen`).
//         a task: a block of channels of an image (contiguous) or one band, all channels (channels-last)
// Results do not depend on the number of threads, as those of a task do not depend on the thread.
#pragma once

#include "cover/pool_planes.h"
#include "common/pyramid.h"

namespace fastkd {
namespace pool_paint {

struct Level {
  const void* in;  // pool: the level
  void* out;  // paint: the level
  const Bands* bands;  // of each image
  int64_t channels, rows, columns, elements, most_segments;
  bool channels_last, large;  // large: exceeds the caches of a core
};

struct Arguments {
  const Level* levels;
  const int64_t *first, *object;  // the objects of image b: object[first[b]] .. object[first[b + 1] - 1]
  const int64_t* cells;  // [L, K], the divisors; null: none
  int64_t objects, most_objects, channels, width;  // K, of an image, C, C rounded up to whole vectors
  void* pooled;  // [L, K, C]
  const void* values;  // [L, K, C]: painted values
};

// scratch: 64-byte aligned, scratch_bytes long
using Kernel = void (*)(const Arguments&, const Task* begin, const Task* end, char* scratch);

struct Table {  // per dtype
  Kernel pool, paint;
  int64_t (*stretch_bytes)(int64_t width, int64_t columns, int64_t most_segments);
  // channels of a vector; channels of a task that pools a channels-last level or a piled image of a contiguous level
  int64_t lanes, block, piled;
  int64_t most_objects;  // limit per image for pooling contiguous levels by columns
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
  static constexpr int64_t kMostObjects = 1024;  // limit per image for separate lanes per object
  static constexpr int kVectors = 64 / kWidth > 4 ? 64 / kWidth : 4;
  static constexpr int kBlock = kVectors * kWidth;  // channels
  static constexpr int kPiledVectors = 2, kPiled = kPiledVectors * kWidth;

  // The results of `width` channels, of which the first `channels` exist.
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

  // A task is a vector of channels; for a piled image, kPiledVectors vectors.
  static void pool_contiguous(const Arguments& arguments, const Task& task, char* scratch) {
    const Level& level = arguments.levels[task.level];
    const Bands& bands = level.bands[task.image];
    const int64_t objects = arguments.first[task.image + 1] - arguments.first[task.image];
    if (task.channels > kWidth) return pool_piled<kPiledVectors>(arguments, task, scratch);
    if (bands.piled || objects > kMostObjects) return pool_piled<1>(arguments, task, scratch);
    const scalar_t* end = static_cast<const scalar_t*>(level.in) + level.elements;
    double* totals = new_totals(arguments, task, kWidth, scratch);
    acc* sums = take<acc>(scratch, kWidth * padded<V>(level.columns));
    acc* partial = take<acc>(scratch, PlanesPool<V, scalar_t>::partial_length(objects));
    const PlanesPool<V, scalar_t> pool{planes_of(level, task), end,     task.channels, level.rows,
                                       level.columns,          objects, sums,          partial};
    pool(bands, totals);
    write_pooled(arguments, task, task.channel, kWidth, task.channels, totals);
  }

  template <int U>
  static void pool_piled(const Arguments& arguments, const Task& task, char* scratch) {
    constexpr int width = U * kWidth;
    const Level& level = arguments.levels[task.level];
    double* totals = new_totals(arguments, task, width, scratch);
    acc* sums = take<acc>(scratch, width * padded<V>(level.columns));
    for (int64_t at = 0; at < width * padded<V>(level.columns); ++at) sums[at] = 0;  // missing channels
    acc* cells = take<acc>(scratch, width * padded<V>(level.columns));
    const ContiguousLeaves<V, U, scalar_t> leaves{planes_of(level, task), task.channels, level.rows,
                                                  level.columns,          sums,          cells};
    pool_bands<V, U>(level.bands[task.image], leaves, take<acc>(scratch, 2 * level.most_segments * width), totals);
    write_pooled(arguments, task, task.channel, width, task.channels, totals);
  }

  static const scalar_t* planes_of(const Level& level, const Task& task) {
    const int64_t plane = task.image * level.channels + task.channel;
    return static_cast<const scalar_t*>(level.in) + plane * level.rows * level.columns;
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
    acc* nodes = take<acc>(scratch, painted_nodes(level.most_segments) * width);
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
    const Task* widened = nullptr;  // a task of the image whose rows are widened
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

  static constexpr Table table() { return {pool, paint, stretch_bytes, kWidth, kBlock, kPiled, kMostObjects}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
