// The kernels of norm_relu_box_pool.cpp (formulas there) and their arguments.
#pragma once

#include "cover/bands_kernels.h"
#include "common/pyramid.h"

namespace fastkd {
namespace norm_relu_box_pool {

struct Level {
  const void* x;
  void* grad;
  int64_t channels, rows, columns;
  bool channels_last, large;  // large: see is_large
};

// Of an image of a level.
struct Normal {
  double mean, rstd, mean_grad, slope;  // mean(dy'), mean(dy' xhat)
};

// Of a chunk of elements.
struct Moments {
  double count, mean, square;  // square: sum of (x - mean)^2
};

// Objects are ordered by image: those of image b are first[b] .. first[b + 1] - 1.
struct Arguments {
  const Level* levels;
  const Bands* bands;      // [levels, images]
  const int64_t* first;    // [images + 1]
  const int64_t* object;   // [objects] indices in the arguments of the call
  const int64_t* cells;    // [levels, objects] number of covered cells, in the order of the arguments
  Moments* chunks;
  const Normal* normals;   // [levels, images]
  void* out;               // [levels, objects, channels]
  void* kept;              // [2, levels, objects, channels] of acc_t: mean relu(xhat), share of xhat > 0
  const void* values;      // [levels, objects, value_stride] of acc_t: rstd * grad / cells, in the order of the images
  int64_t levels_count, images, objects, value_stride, most_segments;  // the latter of a band
};

// Scratch memory of one thread.
struct Workspace {
  void* nodes;    // of acc_t: [2, segments, lanes of two blocks, or channels]
  void* columns;  // of acc_t: [2, columns, lanes]
  double* totals; // [objects of an image, lanes of two blocks]
  char* stretch;  // stretch_bytes long
};

using Kernel = void (*)(const Arguments&, const Workspace&, const Task* begin, const Task* end);

struct Table {  // per dtype
  Kernel moments, forward, backward;
  int64_t block, lanes;  // channels of a task of a channels-last and of a contiguous image
  int64_t (*stretch_bytes)(int64_t width, int64_t columns, int64_t most_segments);
};

constexpr int64_t kChunk = 4096;  // elements summed, then centred

}  // namespace norm_relu_box_pool
}  // namespace fastkd

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace norm_relu_box_pool;

// The sum over the lanes of all vectors, which may be overwritten by pairwise sums.
template <class V, int U>
FASTKD_INLINE double sum_lanes(const V (&values)[U]) {
  static_assert(U == 4);
  double lanes[kLanes<V>] = {};
  const V whole[1] = {(values[0] + values[1]) + (values[2] + values[3])};
  flush<V, 1>(whole, lanes);
  for (int step = kLanes<V> / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
}

// The chunk is short enough for float sums: the first sum only determines the centre, the others are small.
template <class scalar_t>
Moments moments_of(const scalar_t* x, int64_t count) {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  constexpr int vectors = 4, width = vectors * kLanes<V>;
  const int64_t whole = count / width * width;
  V sum[vectors] = {}, centred[vectors] = {}, square[vectors] = {};
  for (int64_t at = 0; at < whole; at += width)
    for (int u = 0; u < vectors; ++u) sum[u] += load<V>(x + at + u * kLanes<V>);
  double first = sum_lanes(sum);
  for (int64_t at = whole; at < count; ++at) first += load<acc>(x + at);
  const acc centre = static_cast<acc>(first / count);
  for (int64_t at = 0; at < whole; at += width)
    for (int u = 0; u < vectors; ++u) {
      const V apart = load<V>(x + at + u * kLanes<V>) - broadcast<V>(centre);
      centred[u] += apart;
      square[u] = multiply_add(apart, apart, square[u]);
    }
  double apart = sum_lanes(centred), squares = sum_lanes(square);
  add_centred<acc, 1, true>(x + whole, count - whole, 1, &centre, &apart, &squares);
  return {static_cast<double>(count), centre + apart / count, squares - apart * apart / count};
}

template <class scalar_t>
void moments_kernel(const Arguments& arguments, const Workspace&, const Task* task, const Task* end) {
  for (; task != end; ++task) {  // `channel` and `channels` count elements here
    const Level& level = arguments.levels[task->level];
    const int64_t position = task->image * level.channels * level.rows * level.columns + task->channel;
    arguments.chunks[task->row] = moments_of(static_cast<const scalar_t*>(level.x) + position, task->channels);
  }
}

// x - mean, with the mean as a sum of two numbers of the vector's type.
template <class V>
struct Centre {
  V high, low;

  explicit Centre(double mean) : high(broadcast<V>(static_cast<Element<V>>(mean))), low{} {
    low = broadcast<V>(static_cast<Element<V>>(mean - static_cast<double>(static_cast<Element<V>>(mean))));
  }
  FASTKD_INLINE V operator()(V x) const { return (x - high) - low; }
};

// Sums of max(x - mean, 0) and counts of x > mean.
template <class V>
struct Above {
  V sum = {}, count = {};

  FASTKD_INLINE void add(V centred) {
    const V zero = {}, one = broadcast<V>(1);
    sum += centred > 0 ? centred : zero;
    count += centred > 0 ? one : zero;
  }
};

// Leaves for pool_bands: U vectors of sums, then U of counts; of U vectors of channels of a channels-last image.
template <class V, int U, class scalar_t>
struct ChannelsLastAbove {
  const scalar_t* cells;  // the first channel of cell (0, 0)
  int64_t channels, columns;
  Centre<V> centre;

  FASTKD_INLINE void operator()(const Band& band, const Segment* segment, Element<V>* leaf) const {
    constexpr int width = U * kLanes<V>;
    for (int64_t y = band.y0; y < band.y1; ++y) {
      const scalar_t* row = cells + y * columns * channels;
      for (int64_t s = 0; s < band.segments; ++s) {
        Above<V> above[U];
        if (segment[s].covered)
          for (int64_t x = segment[s].x0; x < segment[s].x1; ++x)
            for (int u = 0; u < U; ++u) above[u].add(centre(load<V>(row + x * channels + u * kLanes<V>)));
        for (int u = 0; u < U; ++u) {
          Element<V>* out = leaf + s * 2 * width + u * kLanes<V>;
          store(out, y == band.y0 ? above[u].sum : V(load<V>(out) + above[u].sum));
          store(out + width, y == band.y0 ? above[u].count : V(load<V>(out + width) + above[u].count));
        }
      }
    }
  }
};

// The first `count` elements, 0 in the other lanes.
template <class V, class scalar_t>
FASTKD_INLINE V load_some(const scalar_t* pointer, int64_t count) {
  if (count >= kLanes<V>) return load<V>(pointer);
  scalar_t elements[kLanes<V>] = {};
  for (int64_t lane = 0; lane < count; ++lane) elements[lane] = pointer[lane];
  return load<V>(elements);
}

template <class V, class scalar_t>
FASTKD_INLINE void store_some(scalar_t* pointer, V value, int64_t count) {
  if (count >= kLanes<V>) return store(pointer, value);
  scalar_t elements[kLanes<V>];
  store(elements, value);
  for (int64_t lane = 0; lane < count; ++lane) pointer[lane] = elements[lane];
}

// The start of the vector at x, shifted to the left if it would exceed the row. Some cells are then processed twice,
// with the same result.
template <class V>
FASTKD_INLINE int64_t fitted(int64_t x, int64_t columns) {
  if (x + kLanes<V> <= columns) return x;
  return columns > kLanes<V> ? columns - kLanes<V> : 0;
}

// The same leaves for a contiguous image and one vector of channels.
template <class V, class scalar_t>
struct ContiguousAbove {
  using acc = Element<V>;
  const scalar_t* planes;  // the first of the channels
  int64_t channels, rows, columns;
  Centre<V> centre;
  acc* sums;  // [2, columns, lanes]: the cells of the band's rows together

  FASTKD_INLINE void operator()(const Band& band, const Segment* segment, acc* leaf) const {
    constexpr int lanes = kLanes<V>;
    int64_t first = 0, last = band.segments - 1;
    while (!segment[first].covered) ++first;
    while (!segment[last].covered) --last;
    for (int64_t x = segment[first].x0; x < segment[last].x1; x += lanes) add_rows(band, fitted<V>(x, columns));
    for (int64_t s = 0; s < band.segments; ++s) {
      V sum = {}, count = {};
      if (segment[s].covered)
        for (int64_t x = segment[s].x0; x < segment[s].x1; ++x) {
          sum += load<V>(sums + x * lanes);
          count += load<V>(sums + (columns + x) * lanes);
        }
      store(leaf + s * 2 * lanes, sum);
      store(leaf + (s * 2 + 1) * lanes, count);
    }
  }

  FASTKD_INLINE void add_rows(const Band& band, int64_t x) const {
    constexpr int lanes = kLanes<V>;
    const int64_t count = columns - x;
    V sum[lanes] = {}, counts[lanes] = {};
    for (int64_t channel = 0; channel < channels; ++channel) {
      Above<V> above;
      const scalar_t* plane = planes + channel * rows * columns + x;
      for (int64_t y = band.y0; y < band.y1; ++y) {
        const scalar_t* next = plane + (y + band.y1 - band.y0) * columns;
        fetch(next, next + 1);
        above.add(centre(load_some<V>(plane + y * columns, count)));
      }
      sum[channel] = above.sum;
      counts[channel] = above.count;
    }
    transpose(sum);
    transpose(counts);
    for (int64_t lane = 0; lane < lanes && lane < count; ++lane) {
      store(sums + (x + lane) * lanes, sum[lane]);
      store(sums + (columns + x + lane) * lanes, counts[lane]);
    }
  }
};

// Converts the sums of pool_bands over `channels` channels to means.
template <class scalar_t>
void write_means(const Arguments& arguments, const double* totals, const Task& task, int64_t channel,
                 int64_t channels, int64_t block) {
  using acc = acc_t<scalar_t>;
  const int64_t all = arguments.levels[task.level].channels, first = arguments.first[task.image];
  const double rstd = arguments.normals[task.level * arguments.images + task.image].rstd;
  acc* kept = static_cast<acc*>(arguments.kept);
  for (int64_t place = first; place < arguments.first[task.image + 1]; ++place, totals += 2 * block) {
    const int64_t row = task.level * arguments.objects + arguments.object[place], cells = arguments.cells[row];
    for (int64_t lane = 0; lane < channels; ++lane) {
      const int64_t at = row * all + channel + lane;
      const acc mean = cells == 0 ? 0 : static_cast<acc>(rstd * (totals[lane] / cells));
      static_cast<scalar_t*>(arguments.out)[at] = static_cast<scalar_t>(mean);
      kept[at] = mean;
      kept[arguments.levels_count * arguments.objects * all + at] =
          cells == 0 ? 0 : static_cast<acc>(totals[block + lane] / cells);
    }
  }
}

// The normal of an image, for the gradient of a vector of cells: dx = [xhat > 0] * value - offset - (x - mean) * slope.
template <class V>
struct Gradient {
  Centre<V> centre;
  V offset, slope;

  explicit Gradient(const Normal& normal)
      : centre(normal.mean),
        offset(broadcast<V>(static_cast<Element<V>>(normal.rstd * normal.mean_grad))),
        slope(broadcast<V>(static_cast<Element<V>>(-normal.rstd * normal.rstd * normal.slope))) {}
  FASTKD_INLINE V operator()(V x, V value) const {
    const V centred = centre(x), zero = V{};
    return multiply_add(centred, slope, V((centred > 0 ? value : zero) - offset));
  }
};

template <class scalar_t>
struct Pool {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kLineVectors = 64 / static_cast<int>(kLanes<V> * sizeof(scalar_t));  // vectors in a cache line
  static constexpr int kBlockVectors = kLineVectors > 4 ? kLineVectors : 4;
  static constexpr int kBlock = kBlockVectors * kLanes<V>, kLanesOf = kLanes<V>;

  template <class Lane, int U, bool channels_last>
  static void forward_block(const Arguments& arguments, const Workspace& work, const Task& task,
                            int64_t channel, int64_t channels) {
    constexpr int block = U * kLanes<Lane>;
    const Level& level = arguments.levels[task.level];
    const int64_t map = task.level * arguments.images + task.image, cells = level.rows * level.columns;
    const int64_t position = task.image * level.channels * cells + (channels_last ? channel : channel * cells);
    const scalar_t* x = static_cast<const scalar_t*>(level.x) + position;
    const Centre<Lane> centre(arguments.normals[map].mean);
    const int64_t objects = arguments.first[task.image + 1] - arguments.first[task.image];
    for (int64_t index = 0; index < objects * 2 * block; ++index) work.totals[index] = 0;
    acc* nodes = static_cast<acc*>(work.nodes);
    if constexpr (channels_last) {
      const ChannelsLastAbove<Lane, U, scalar_t> leaves{x, level.channels, level.columns, centre};
      pool_bands<Lane, 2 * U>(arguments.bands[map], leaves, nodes, work.totals);
    } else {
      acc* columns = static_cast<acc*>(work.columns);
      const ContiguousAbove<Lane, scalar_t> leaves{x, channels, level.rows, level.columns, centre, columns};
      pool_bands<Lane, 2>(arguments.bands[map], leaves, nodes, work.totals);
    }
    write_means<scalar_t>(arguments, work.totals, task, channel, channels, block);
  }

  // In reverse order: the data that moments_kernel read last is still in the caches.
  static void forward(const Arguments& arguments, const Workspace& work, const Task* begin, const Task* end) {
    for (const Task* task = end; task != begin;) {
      --task;
      int64_t channel = task->channel, last = channel + task->channels;
      if (!arguments.levels[task->level].channels_last) {
        forward_block<V, 1, false>(arguments, work, *task, channel, task->channels);
        continue;
      }
      for (; channel + kBlock <= last; channel += kBlock)
        forward_block<V, kBlockVectors, true>(arguments, work, *task, channel, kBlock);
      for (; channel + kLanes<V> <= last; channel += kLanes<V>)
        forward_block<V, 1, true>(arguments, work, *task, channel, kLanes<V>);
      for (; channel < last; ++channel) forward_block<acc, 1, true>(arguments, work, *task, channel, 1);
    }
  }

  // The values of the image's objects, from `channel` on.
  static const acc* values_of(const Arguments& arguments, const Task& task, int64_t channel) {
    const int64_t row = task.level * arguments.objects + arguments.first[task.image];
    return static_cast<const acc*>(arguments.values) + row * arguments.value_stride + channel;
  }

  // A task is a band.
  static void band_channels_last(const Arguments& arguments, const Workspace& work, const Task& task) {
    const Level& level = arguments.levels[task.level];
    const int64_t map = task.level * arguments.images + task.image, stride = arguments.value_stride;
    const Bands& bands = arguments.bands[map];
    const Band& band = bands.band[task.channel];
    const Gradient<V> gradient(arguments.normals[map]);
    acc* nodes = static_cast<acc*>(work.nodes);
    paint_nodes<V>(bands, band, values_of(arguments, task, 0), stride, stride, nodes);
    const bool lines = level.large && level.channels * static_cast<int64_t>(sizeof(scalar_t)) % kLineBytes == 0;
    int64_t position = (task.image * level.rows + band.y0) * level.columns * level.channels;
    for (int64_t y = band.y0; y < band.y1; ++y)
      for (int64_t s = 0; s < band.segments; ++s) {
        const Segment& segment = bands.segment[band.segment + s];
        const acc* value = nodes + (band.segments + s) * stride;
        for (int64_t cell = segment.x0; cell < segment.x1; ++cell, position += level.channels)
          lines ? write_gradients<true>(level, gradient, position, level.channels, value)
                : write_gradients<false>(level, gradient, position, level.channels, value);
      }
  }

  // The gradient of `count` consecutive elements; values is padded to whole vectors. past_caches: streaming stores for
  // whole cache lines; elements before and after are written by overlapping vectors.
  template <bool past_caches>
  static FASTKD_INLINE void write_gradients(const Level& level, const Gradient<V>& gradient, int64_t position,
                                            int64_t count, const acc* values) {
    const scalar_t* x = static_cast<const scalar_t*>(level.x) + position;
    scalar_t* grad = static_cast<scalar_t*>(level.grad) + position;
    const auto write = [&](int64_t i) __attribute__((always_inline)) {
      const int64_t at = fitted<V>(i, count);
      store_some(grad + at, gradient(load_some<V>(x + at, count), load<V>(values + at)), count);
    };
    int64_t i = 0;
    if constexpr (past_caches) {
      constexpr int64_t line = kLineVectors * kLanes<V>;
      const int64_t head = elements_to_line(grad);
      for (; i < head && i < count; i += kLanes<V>) write(i);
      for (i = head; i + line <= count; i += line)
        for (int64_t at = i; at < i + line; at += kLanes<V>)
          stream(grad + at, gradient(load<V>(x + at), load<V>(values + at)));
    }
    for (; i < count; i += kLanes<V>) write(i);
  }

  // A task is one vector of channels.
  static void planes_contiguous(const Arguments& arguments, const Workspace& work, const Task& task) {
    const Level& level = arguments.levels[task.level];
    const int64_t map = task.level * arguments.images + task.image;
    const Bands& bands = arguments.bands[map];
    const Gradient<V> gradient(arguments.normals[map]);
    char* free = work.stretch;
    const auto room = [&](auto element, int64_t count) { return take<decltype(element)>(free, count); };
    Stretch<V, acc> stretch(kLanes<V>, level.columns, arguments.most_segments, room);
    const acc* painted = values_of(arguments, task, task.channel);
    const auto write = [&](int64_t channel, int64_t first, int64_t count, bool) {
      const int64_t plane = (task.image * level.channels + task.channel + channel) * level.rows;
      const int64_t position = (plane + first) * level.columns;
      level.large ? write_gradients<true>(level, gradient, position, count * level.columns, stretch.rows)
                  : write_gradients<false>(level, gradient, position, count * level.columns, stretch.rows);
    };
    stretch.template paint<false>(bands, painted, arguments.value_stride, task.channels, write);
  }

  static int64_t stretch_bytes(int64_t width, int64_t columns, int64_t most_segments) {
    return Stretch<V, acc>::bytes(width, columns, most_segments);
  }

  static void backward(const Arguments& arguments, const Workspace& work, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const bool channels_last = arguments.levels[task->level].channels_last;
      channels_last ? band_channels_last(arguments, work, *task) : planes_contiguous(arguments, work, *task);
    }
    end_stream();
  }

  static constexpr Table table() { return {moments_kernel<scalar_t>, forward, backward, kBlock, kLanesOf, stretch_bytes}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
