// box_paint_conv3x3: the 3x3 convolution of painted boxes, painted from the nine products of each embedding with the
// weight (taps): a cell of the output is the sum, over the boxes, of the taps that reach the box from this cell.
//
// Tap (i, j) reaches the box of rows [y0, y1) from the cells y0 + 1 - i <= y < y1 + 1 - i, x likewise. So rows fall
// into at most five classes by the set of reaching i: {2}, {1, 2}, {0, 1, 2}, {0, 1}, {0}; for two rows the middle
// class is empty, and one row has {2}, {1}, {0}. Columns likewise: at most 25 regions of constant value, which are the
// objects of bands.h. The bias is one more object that covers every cell.
//
// forward   sums taps to regions, paints them: every cell of the output is written once, channels-last
// backward  reads the gradient once, pools it over the regions; a tap's gradient is the sum of the regions it reaches
#include "cover/bands_kernels.h"
#include "common/call.h"

#include <memory>

namespace fastkd {
namespace box_paint_conv3x3 {

constexpr int64_t kTaps = 9, kClasses = 5, kRegions = kClasses * kClasses;

// Whether tap i of three reaches the cells of a class; thin: for a side of one cell.
constexpr bool reaches(int64_t position, int64_t tap, bool thin) {
  if (position == 2) return !thin || tap == 1;
  return position < 2 ? tap >= 2 - position : tap <= 4 - position;
}

struct Level {
  void* cells;  // output or its gradient
  int64_t rows, columns;
  bool channels_last;
};

// Objects are ordered by image: those of image b are first[b] .. first[b + 1] - 1.
struct Arguments {
  const Level* levels;
  const Bands* bands;     // [levels, images]
  const int64_t* first;   // [images + 1]
  const int64_t* object;  // [objects] indices in the arguments of the call
  const uint8_t* thin;    // [levels, objects] bit 0: one row, bit 1: one column
  const void* taps;       // [levels, objects, 9, channels] of acc_t
  const void* bias;       // [channels] of acc_t, null: none
  void* regions;          // [objects * 25 + images, stride] of acc_t: of one level, each image's bias behind its boxes
  void* grad_taps;        // as taps
  double* grad_bias;      // [levels, images, channels]
  int64_t images, objects, channels, stride;
};

// Scratch memory of one thread.
struct Workspace {
  void *nodes, *narrowed, *sums, *cells;
  double* totals;  // [regions of an image, block]
};

using Kernel = void (*)(const Arguments&, const Workspace&, const Task* begin, const Task* end);

struct Table {  // per dtype
  Kernel regions, forward, backward;
  int64_t block, lanes;
};

}  // namespace box_paint_conv3x3
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace box_paint_conv3x3;

// Offset of an image's regions in the table of a level.
FASTKD_INLINE int64_t region_row(const Arguments& arguments, int64_t image) {
  return arguments.first[image] * kRegions + image;
}

// Calls add(region, tap) for the taps that reach each region.
template <class Add>
FASTKD_INLINE void for_reaching_taps(uint8_t thin, const Add& add) {
  for (int region = 0; region < kRegions; ++region)
    for (int tap = 0; tap < kTaps; ++tap)
      if (reaches(region / kClasses, tap / 3, thin & 1) && reaches(region % kClasses, tap % 3, thin & 2))
        add(region, tap);
}

template <class scalar_t>
struct Paint {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kBlockVectors = 4, kBlock = kBlockVectors * kLanes<V>, kWidth = kLanes<V>;

  // A task is an object (`channel` is its index in the image) or, after the last one, the bias.
  static void regions(const Arguments& arguments, const Workspace&, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const int64_t channels = arguments.channels;
      const int64_t row = region_row(arguments, task->image) + task->channel * kRegions;
      acc* out = static_cast<acc*>(arguments.regions) + row * arguments.stride;
      const int64_t place = arguments.first[task->image] + task->channel;
      if (place == arguments.first[task->image + 1]) {
        const acc* bias = static_cast<const acc*>(arguments.bias);
        for (int64_t c = 0; c < arguments.stride; ++c) out[c] = bias != nullptr && c < channels ? bias[c] : 0;
        continue;
      }
      const int64_t object = task->level * arguments.objects + arguments.object[place];
      const acc* taps = static_cast<const acc*>(arguments.taps) + object * kTaps * channels;
      for (int64_t at = 0; at < kRegions * arguments.stride; ++at) out[at] = 0;
      for_reaching_taps(arguments.thin[object], [&](int region, int tap) {
        for (int64_t c = 0; c < channels; ++c) out[region * arguments.stride + c] += taps[tap * channels + c];
      });
    }
  }

  // A task is a band.
  static void forward(const Arguments& arguments, const Workspace& work, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      const Bands& bands = arguments.bands[task->level * arguments.images + task->image];
      const Band& band = bands.band[task->channel];
      const int64_t stride = arguments.stride, channels = arguments.channels;
      const acc* values = static_cast<const acc*>(arguments.regions) + region_row(arguments, task->image) * stride;
      acc* nodes = static_cast<acc*>(work.nodes);
      paint_nodes<V>(bands, band, values, stride, stride, nodes);
      scalar_t* image = static_cast<scalar_t*>(level.cells) + task->image * level.rows * level.columns * channels;
      const bool large = is_large(level.rows * level.columns * channels * static_cast<int64_t>(sizeof(scalar_t)));
      write_channels_last<V>(band, bands.segment + band.segment, nodes + band.segments * stride, stride, channels,
                             level.columns, large, static_cast<scalar_t*>(work.narrowed), image);
    }
  }

  template <class Lane, int U, bool channels_last>
  static void backward_block(const Arguments& arguments, const Workspace& work, const Task& task, int64_t channel,
                             int64_t channels) {
    constexpr int block = U * kLanes<Lane>;
    const Level& level = arguments.levels[task.level];
    const int64_t cells = level.rows * level.columns;
    const int64_t position = task.image * arguments.channels * cells + (channels_last ? channel : channel * cells);
    const scalar_t* grad = static_cast<const scalar_t*>(level.cells) + position;
    const int64_t objects = arguments.first[task.image + 1] - arguments.first[task.image];
    for (int64_t index = 0; index < (objects * kRegions + 1) * block; ++index) work.totals[index] = 0;
    const Bands& bands = arguments.bands[task.level * arguments.images + task.image];
    acc* nodes = static_cast<acc*>(work.nodes);
    if constexpr (channels_last) {
      const ChannelsLastLeaves<Lane, U, scalar_t> leaves{grad, arguments.channels, level.columns};
      pool_bands<Lane, U>(bands, leaves, nodes, work.totals);
    } else {
      acc *sums = static_cast<acc*>(work.sums), *columns = static_cast<acc*>(work.cells);
      const ContiguousLeaves<Lane, U, scalar_t> leaves{grad, channels, level.rows, level.columns, sums, columns};
      pool_bands<Lane, U>(bands, leaves, nodes, work.totals);
    }
    const double* total = work.totals;
    for (int64_t place = arguments.first[task.image]; place < arguments.first[task.image + 1]; ++place) {
      const int64_t row = task.level * arguments.objects + arguments.object[place];
      acc* out = static_cast<acc*>(arguments.grad_taps) + row * kTaps * arguments.channels + channel;
      write_taps<block>(total, arguments.thin[row], out, arguments.channels, channels);
      total += kRegions * block;
    }
    double* bias = arguments.grad_bias + (task.level * arguments.images + task.image) * arguments.channels + channel;
    for (int64_t lane = 0; lane < channels; ++lane) bias[lane] = total[lane];
  }

  template <int block>
  static void write_taps(const double* total, uint8_t thin, acc* out, int64_t stride, int64_t channels) {
    double sum[kTaps][block] = {};
    for_reaching_taps(thin, [&](int region, int tap) {
      for (int lane = 0; lane < block; ++lane) sum[tap][lane] += total[region * block + lane];
    });
    for (int tap = 0; tap < kTaps; ++tap)
      for (int64_t lane = 0; lane < channels; ++lane) out[tap * stride + lane] = static_cast<acc>(sum[tap][lane]);
  }

  static void backward(const Arguments& arguments, const Workspace& work, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      int64_t channel = task->channel;
      const int64_t last = channel + task->channels;
      if (!arguments.levels[task->level].channels_last) {
        backward_block<V, 1, false>(arguments, work, *task, channel, task->channels);
        continue;
      }
      for (; channel + kBlock <= last; channel += kBlock)
        backward_block<V, kBlockVectors, true>(arguments, work, *task, channel, kBlock);
      for (; channel + kLanes<V> <= last; channel += kLanes<V>)
        backward_block<V, 1, true>(arguments, work, *task, channel, kLanes<V>);
      for (; channel < last; ++channel) backward_block<acc, 1, true>(arguments, work, *task, channel, 1);
    }
  }

  static constexpr Table table() { return {regions, forward, backward, kBlock, kWidth}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

FASTKD_KERNEL_TABLES(box_paint_conv3x3::Table, Paint, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

// The classes of a side [first, end) of a box, clipped to [0, cells).
struct Classes {
  int32_t low[kClasses], high[kClasses];

  Classes(int64_t first, int64_t end, int64_t cells) {
    const bool thin = end - first == 1;
    const int64_t edge[] = {first - 1, first, thin ? first : first + 1, thin ? end : end - 1, end, end + 1};
    for (int64_t c = 0; c < kClasses; ++c) {
      low[c] = static_cast<int32_t>(std::clamp<int64_t>(edge[c], 0, cells));
      high[c] = static_cast<int32_t>(std::clamp<int64_t>(edge[c + 1], 0, cells));
    }
  }
};

// The cover of the regions of all boxes, and of the bias, the last object of every image.
struct Call {
  std::vector<std::pair<int64_t, int64_t>> sizes;
  std::vector<Level> levels;
  ObjectsByImage by_image;
  std::vector<uint8_t> thin;
  std::vector<BandList> lists;  // [levels, images]
  std::vector<Bands> bands;
  Arguments arguments{};
  const Table& table;

  Call(const Tensor& like, const Tensor& boxes, const Tensor& image_index, int64_t height, int64_t width, int64_t images,
       int64_t channels, const std::vector<std::pair<int64_t, int64_t>>& sizes)
      : sizes(sizes), table(kernels_for<Table>(like)) {
    STD_TORCH_CHECK(images >= 0, "box_paint_conv3x3: batch_size must not be negative, got ", images);
    check_sizes(sizes);
    const std::vector<Rectangle> rectangles = cover_boxes(boxes, height, width, sizes);
    arguments.images = images;
    arguments.objects = boxes.size(0);
    arguments.channels = channels;
    arguments.stride = (channels + table.lanes - 1) / table.lanes * table.lanes;
    by_image = objects_by_image(image_index, arguments.objects, images);
    for (const Rectangle& box : rectangles) thin.push_back((box.y1 - box.y0 == 1) + 2 * (box.x1 - box.x0 == 1));
    lists.resize(sizes.size() * images);
    torch::stable::parallel_for(0, static_cast<int64_t>(lists.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t map = begin; map < end; ++map) fill(map, rectangles);
    });
    for (const BandList& list : lists) bands.push_back(list.view());
    arguments.bands = bands.data();
    arguments.first = by_image.first.data();
    arguments.object = by_image.object.data();
    arguments.thin = thin.data();
  }

  int64_t objects_of(int64_t image) const { return by_image.first[image + 1] - by_image.first[image]; }
  int64_t cells(int64_t level) const { return sizes[level].first * sizes[level].second; }
  int64_t count() const { return static_cast<int64_t>(sizes.size()); }

  void fill(int64_t map, const std::vector<Rectangle>& rectangles) {
    const int64_t level = map / arguments.images, image = map % arguments.images;
    const auto [rows, columns] = sizes[level];
    if (columns == 0) return;
    const int32_t objects = static_cast<int32_t>(objects_of(image)), end = static_cast<int32_t>(columns);
    std::vector<Classes> vertical, horizontal;
    for (int32_t slot = 0; slot < objects; ++slot) {
      const Rectangle& box = rectangles[level * arguments.objects + by_image.object[by_image.first[image] + slot]];
      const bool empty = box.empty();  // no cells in any class
      vertical.emplace_back(empty ? -9 : box.y0, empty ? -9 : box.y1, rows);
      horizontal.emplace_back(box.x0, box.x1, columns);
    }
    lists[map].build(static_cast<int32_t>(rows), end, [&](int32_t y, std::vector<Run>& runs) {
      for (int32_t slot = 0; slot < objects; ++slot)
        for (int32_t row = 0; row < kClasses; ++row) {
          if (y < vertical[slot].low[row] || y >= vertical[slot].high[row]) continue;
          for (int32_t column = 0; column < kClasses; ++column) {
            const int32_t low = horizontal[slot].low[column], high = horizontal[slot].high[column];
            if (low < high) runs.push_back({(slot * 5 + row) * 5 + column, low, high});
          }
        }
      runs.push_back({objects * 25, 0, end});
    });
  }

  void add_level(void* cells, bool channels_last) {
    const auto [rows, columns] = sizes[levels.size()];
    levels.push_back({cells, rows, columns, channels_last});
    arguments.levels = levels.data();
  }

  template <class Cost>
  void run(Kernel kernel, const std::vector<Task>& tasks, const Cost& cost, int64_t node_width, int64_t total_width) {
    int64_t segments = 1, columns = 1, objects = 0;
    for (const BandList& list : lists) segments = std::max(segments, list.most_segments);
    for (const auto& size : sizes) columns = std::max(columns, size.second);
    for (int64_t image = 0; image < arguments.images; ++image) objects = std::max(objects, objects_of(image));
    const int64_t lanes = table.lanes, row = (columns + 2 * lanes) * lanes;
    run_balanced(tasks, cost, [&](const Task* begin, const Task* end) {
      const auto room = [](int64_t numbers) { return std::unique_ptr<double[]>(new double[numbers]); };
      const auto nodes = room(painted_nodes(segments) * node_width), narrowed = room(segments * node_width);
      const auto totals = room((objects * kRegions + 1) * total_width);
      std::vector<double> sums(row), cells(row);  // zeros for missing channels
      kernel(arguments, {nodes.get(), narrowed.get(), sums.data(), cells.data(), totals.get()}, begin, end);
    });
  }
};

std::vector<std::pair<int64_t, int64_t>> pairs(const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(sides.size() % 2 == 0, "box_paint_conv3x3: sizes must be H_0, W_0, H_1, W_1, ...");
  std::vector<std::pair<int64_t, int64_t>> sizes;
  for (size_t at = 0; at < sides.size(); at += 2) sizes.emplace_back(sides[at], sides[at + 1]);
  return sizes;
}

void check_taps(const Tensor& taps, const Tensor& boxes, int64_t levels) {
  STD_TORCH_CHECK(taps.dim() == 4 && taps.is_cpu() && boxes.dim() == 2 && taps.size(0) == levels &&
                      taps.size(1) == boxes.size(0) && taps.size(2) == kTaps,
                  "box_paint_conv3x3: taps must be [L, K, 9, C] on the CPU");
  STD_TORCH_CHECK(widened(taps) == taps.scalar_type(), "box_paint_conv3x3: taps must be float32 or float64");
}

// L tensors [B, H_l, W_l, C] with the dtype of `like`; taps have the accumulation type of that dtype.
std::vector<Tensor> forward(Tensor taps, std::optional<Tensor> bias, Tensor boxes, Tensor image_index, int64_t height,
                            int64_t width, int64_t batch_size, std::vector<int64_t> sides, Tensor like) {
  const auto sizes = pairs(sides);
  check_taps(taps, boxes, static_cast<int64_t>(sizes.size()));
  const int64_t channels = taps.size(3);
  STD_TORCH_CHECK(widened(like) == taps.scalar_type() && like.is_cpu(),
                  "box_paint_conv3x3: taps must have the dtype in which the result's is summed");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == channels && bias->is_cpu() &&
                            bias->scalar_type() == taps.scalar_type()),
                  "box_paint_conv3x3: bias must be [C] of the dtype of the taps");
  std::vector<Tensor> out;
  for (const auto& [rows, columns] : sizes) out.push_back(new_tensor(like, {batch_size, rows, columns, channels}));
  Call call(like, boxes, image_index, height, width, batch_size, channels, sizes);
  for (Tensor& level : out) call.add_level(level.mutable_data_ptr(), true);
  const Tensor plain = torch::stable::contiguous(taps);
  const Tensor plain_bias = bias ? torch::stable::contiguous(*bias) : plain;
  call.arguments.taps = plain.const_data_ptr();
  call.arguments.bias = bias ? plain_bias.const_data_ptr() : nullptr;
  const int64_t stride = call.arguments.stride;
  Tensor regions = new_tensor(taps, {call.arguments.objects * kRegions + batch_size, stride});
  call.arguments.regions = regions.mutable_data_ptr();
  for (int64_t level = 0; level < call.count(); ++level) {
    if (channels * call.cells(level) == 0) continue;
    std::vector<Task> objects, bands;
    for (int64_t image = 0; image < batch_size; ++image) {
      for (int64_t slot = 0; slot <= call.objects_of(image); ++slot) objects.push_back({level, image, slot, 1, 0});
      const int64_t count = call.lists[level * batch_size + image].count();
      for (int64_t band = 0; band < count; ++band) bands.push_back({level, image, band, 1, 0});
    }
    call.run(call.table.regions, objects, [&](const Task&) { return kRegions * stride; }, 0, 0);
    const auto cost = [&](const Task& task) {
      const Band& band = call.bands[task.level * batch_size + task.image].band[task.channel];
      return ((band.y1 - band.y0) * call.sizes[task.level].second + band.segments + band.spans) * stride;
    };
    call.run(call.table.forward, bands, cost, stride, 0);
  }
  return out;
}

// The gradients of taps [L, K, 9, C] and of the bias [C], from those of the result, L tensors [B, H_l, W_l, C].
std::tuple<Tensor, Tensor> backward(std::vector<Tensor> grads, Tensor boxes, Tensor image_index, int64_t height,
                                    int64_t width) {
  STD_TORCH_CHECK(!grads.empty(), "box_paint_conv3x3_backward: grads must hold at least one level");
  std::vector<std::pair<int64_t, int64_t>> sizes;
  std::vector<Tensor> plain;
  std::vector<bool> channels_last;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.dim() == 4 && grad.is_cpu() && grad.scalar_type() == grads[0].scalar_type() &&
                        grad.size(0) == grads[0].size(0) && grad.size(3) == grads[0].size(3),
                    "box_paint_conv3x3_backward: grads must be [B, H, W, C] on the CPU and agree in B, C and dtype");
    sizes.emplace_back(grad.size(1), grad.size(2));
    const Tensor planes = torch::stable::transpose(torch::stable::transpose(grad, 2, 3), 1, 2);  // [B, C, H, W]
    channels_last.push_back(!planes.is_contiguous() || grad.is_contiguous());
    plain.push_back(torch::stable::contiguous(channels_last.back() ? grad : planes));
  }
  const int64_t images = grads[0].size(0), channels = grads[0].size(3);
  Call call(grads[0], boxes, image_index, height, width, images, channels, sizes);
  for (size_t level = 0; level < plain.size(); ++level)
    call.add_level(const_cast<void*>(plain[level].const_data_ptr()), channels_last[level]);
  const ScalarType wide = widened(grads[0]);
  Tensor grad_taps = new_tensor(grads[0], {call.count(), call.arguments.objects, kTaps, channels}, wide);
  torch::stable::zero_(grad_taps);
  std::vector<double> parts(call.count() * images * channels);
  call.arguments.grad_taps = grad_taps.mutable_data_ptr();
  call.arguments.grad_bias = parts.data();
  std::vector<Task> tasks;
  for (int64_t level = 0; level < call.count(); ++level) {
    const int64_t block = call.levels[level].channels_last ? call.table.block : call.table.lanes;
    for (int64_t image = 0; image < images && call.cells(level) > 0; ++image)
      for (int64_t channel = 0; channel < channels; channel += block)
        tasks.push_back({level, image, channel, std::min(block, channels - channel), 0});
  }
  const auto cost = [&](const Task& task) { return task.channels * call.cells(task.level); };
  const int64_t block = std::max(call.table.block, call.table.lanes);
  call.run(call.table.backward, tasks, cost, block, block);
  std::vector<double> bias(channels);
  for (size_t at = 0; at < parts.size(); ++at) bias[at % channels] += parts[at];
  return {grad_taps, tensor_of(bias, grads[0], {channels}, wide)};
}

}  // namespace

FASTKD_OP("box_paint_conv3x3",
          "(Tensor taps, Tensor? bias, Tensor boxes, Tensor image_index, int height, int width, int batch_size, int[] "
          "sizes, Tensor like) -> Tensor[]",
          forward)
FASTKD_OP("box_paint_conv3x3_backward",
          "(Tensor[] grads, Tensor boxes, Tensor image_index, int height, int width) -> (Tensor, Tensor)",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
