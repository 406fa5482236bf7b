// norm_relu_box_pool: mean of relu(xhat) over the cells of boxes, xhat = (x - mean) * rstd over all elements of an
// image of a level (GroupNorm with one group).
//
// moments   reads every level once: chunks that fit in L1, each summed and then centred, merged in double
// forward   reads the cells in boxes once more; relu(xhat) = rstd * max(x - mean, 0), so xhat is not stored.
//           Saved for backward: the mean of relu(xhat) and the fraction of cells with xhat > 0 per box and channel
// backward  reads every level once, writes its gradient once:
//             dx = rstd * (dy' - mean(dy') - xhat * mean(dy' xhat)),  dy' = [xhat > 0] * sum over boxes of grad / cells
//           both means, over the elements of the image, are sums over boxes of grad times the values saved by forward
// The mean has twice the precision: if it is large and the variance small, its rounding error would dominate.
#include "cover/norm_relu_box_pool_kernels.h"
#include "common/call.h"

#include <cmath>
#include <memory>
#include <tuple>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNEL_TABLES(norm_relu_box_pool::Table, Pool, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

// The levels of a call, dense, and the cover of the boxes.
struct Call {
  std::vector<Tensor> dense_levels;
  std::vector<Level> levels;
  Cover cover;
  std::vector<Bands> bands;
  std::vector<Normal> normals;  // [levels, images]
  Arguments arguments{};
  const Table& table;
  int64_t images = 0, channels = 0;

  Call(const std::vector<Tensor>& given, const Tensor& boxes, const Tensor& image_index, int64_t height,
       int64_t width)
      : table(kernels_for<Table>("norm_relu_box_pool", given)) {
    std::vector<std::pair<int64_t, int64_t>> sizes;
    for (const Tensor& level : given) {
      STD_TORCH_CHECK(level.dim() == 4 && level.is_cpu() && level.scalar_type() == given[0].scalar_type() &&
                          level.size(0) == given[0].size(0) && level.size(1) == given[0].size(1),
                      "norm_relu_box_pool: levels must be [B, C, H, W] on the CPU and agree in B, C and dtype");
      sizes.emplace_back(level.size(2), level.size(3));
    }
    images = given[0].size(0);
    channels = given[0].size(1);
    cover = cover_by_boxes(boxes, image_index, height, width, images, sizes);
    for (const Tensor& level : given) add_level(level);
    for (const int64_t place : cover.place) bands.push_back(cover.lists[place].view());
    normals.resize(levels.size() * images);
    arguments.levels = levels.data();
    arguments.bands = bands.data();
    arguments.first = cover.by_image.first.data();
    arguments.object = cover.by_image.object.data();
    arguments.cells = cover.cells.data();
    arguments.normals = normals.data();
    arguments.levels_count = static_cast<int64_t>(levels.size());
    arguments.images = images;
    arguments.objects = cover.objects;
    for (const BandList& list : cover.lists)
      arguments.most_segments = std::max(arguments.most_segments, list.most_segments);
  }

  void add_level(const Tensor& level) {
    const bool channels_last = is_channels_last(level);
    dense_levels.push_back(dense(level, channels_last));
    levels.push_back(
        {dense_levels.back().const_data_ptr(), nullptr, channels, level.size(2), level.size(3), channels_last,
         is_large(level.numel() * level.element_size())});
  }

  int64_t cells(int64_t level) const { return levels[level].rows * levels[level].columns; }

  std::vector<int64_t> shape() const { return {arguments.levels_count, arguments.objects, channels}; }

  // Calls add(level, image) for every image of every level that has elements.
  template <class Add>
  void for_maps(const Add& add) const {
    for (int64_t level = 0; level < arguments.levels_count; ++level)
      for (int64_t image = 0; image < images && channels * cells(level) > 0; ++image) add(level, image);
  }

  // One task for each block of channels.
  void add_blocks(std::vector<Task>& tasks, int64_t level, int64_t image) const {
    const int64_t block = levels[level].channels_last ? table.block : table.lanes;
    for (int64_t channel = 0; channel < channels; channel += block)
      tasks.push_back({level, image, channel, std::min(block, channels - channel), 0});
  }

  // node_width: numbers of a node, total_width: of the sums of an object, stretch: whether a kernel paints planes.
  template <class Cost>
  void run(Kernel kernel, const std::vector<Task>& tasks, const Cost& cost, int64_t node_width, int64_t total_width,
           bool stretch = false) {
    const int64_t segments = arguments.most_segments;
    int64_t columns = 1, objects = 0, bytes = 0;
    for (const Level& level : levels) columns = std::max(columns, level.columns);
    for (int64_t b = 0; b < images; ++b)
      objects = std::max(objects, arguments.first[b + 1] - arguments.first[b]);
    const int64_t lanes = table.lanes;
    for (const Level& level : levels)  // the longest rows do not need the most
      if (stretch && level.columns > 0)
        bytes = std::max(bytes, table.stretch_bytes(lanes, level.columns, segments));
    run_balanced(tasks, cost, [&](const Task* begin, const Task* end) {
      const std::unique_ptr<double[]> nodes(new double[painted_nodes(segments) * node_width]);
      std::vector<double> buffer(2 * (columns + lanes) * lanes), totals(objects * total_width);
      const std::unique_ptr<char[]> rows(new char[bytes + kLineBytes]);
      char* start = rows.get() + kLineBytes - reinterpret_cast<uintptr_t>(rows.get()) % kLineBytes;
      kernel(arguments, {nodes.get(), buffer.data(), totals.data(), start}, begin, end);
    });
  }
};

// Mean and rstd of every image of every level: chunks in the order of memory, merged two at a time (Chan et al.).
void find_moments(Call& call, double eps) {
  std::vector<Task> tasks;
  call.for_maps([&](int64_t level, int64_t image) {
    const int64_t elements = call.channels * call.cells(level);
    for (int64_t at = 0; at < elements; at += kChunk)
      tasks.push_back({level, image, at, std::min(kChunk, elements - at), static_cast<int64_t>(tasks.size())});
  });
  std::vector<Moments> chunks(tasks.size());
  call.arguments.chunks = chunks.data();
  call.run(call.table.moments, tasks, [](const Task& task) { return task.channels; }, 0, 0);
  std::vector<Moments> whole(call.normals.size(), Moments{0, 0, 0});
  for (const Task& task : tasks) {
    Moments& sum = whole[task.level * call.images + task.image];
    const Moments& part = chunks[task.row];
    const double count = sum.count + part.count, apart = part.mean - sum.mean;
    sum.square += part.square + apart * apart * (sum.count * part.count / count);
    sum.mean += apart * (part.count / count);
    sum.count = count;
  }
  for (size_t map = 0; map < whole.size(); ++map) {
    const double variance = whole[map].square / std::max(whole[map].count, 1.0);
    call.normals[map] = {whole[map].mean, 1 / std::sqrt(variance + eps), 0, 0};
  }
}

// The pooled means; [2, L, K, C] of what backward needs of them; [2, L, B] mean and rstd.
std::tuple<Tensor, Tensor, Tensor> forward(std::vector<Tensor> levels, Tensor boxes, Tensor image_index, int64_t height,
                                           int64_t width, double eps) {
  Call call(levels, boxes, image_index, height, width);
  std::vector<int64_t> shape = call.shape();
  Tensor out = new_tensor(levels[0], shape);
  shape.insert(shape.begin(), 2);
  Tensor kept = torch::stable::fill_(new_tensor(levels[0], shape, widened(levels[0])), 0.0);
  torch::stable::fill_(out, 0.0);
  Tensor normal = new_tensor(levels[0], {2, shape[1], call.images}, ScalarType::Double);
  find_moments(call, eps);
  double* numbers = normal.mutable_data_ptr<double>();
  for (size_t map = 0; map < call.normals.size(); ++map) {
    numbers[map] = call.normals[map].mean;
    numbers[call.normals.size() + map] = call.normals[map].rstd;
  }

  std::vector<int64_t> covered(call.normals.size());  // approximate number of cells to read
  std::vector<Task> tasks;
  call.for_maps([&](int64_t level, int64_t image) {
    int64_t& cells = covered[level * call.images + image];
    for (int64_t at = call.arguments.first[image]; at < call.arguments.first[image + 1]; ++at)
      cells += call.cover.cells[level * call.arguments.objects + call.arguments.object[at]];
    cells = std::min(cells, call.cells(level));
    if (cells > 0) call.add_blocks(tasks, level, image);
  });
  call.arguments.out = out.mutable_data_ptr();
  call.arguments.kept = kept.mutable_data_ptr();
  const auto cost = [&](const Task& task) { return task.channels * covered[task.level * call.images + task.image]; };
  const int64_t width_of_two = 2 * std::max(call.table.block, call.table.lanes);
  call.run(call.table.forward, tasks, cost, width_of_two, width_of_two);
  return {out, kept, normal};
}

// values [L, K, stride] = rstd * grad / cells, the images' objects together, and the means of dy' and dy' xhat.
template <class acc>
std::vector<double> weigh(Call& call, const Tensor& grad, const Tensor& kept, int64_t stride) {
  const int64_t levels = call.arguments.levels_count, objects = call.arguments.objects, channels = call.channels;
  std::vector<double> memory(levels * objects * stride);  // storage for acc, aligned
  acc* values = reinterpret_cast<acc*>(memory.data());
  const acc *grads = grad.const_data_ptr<acc>(), *means = kept.const_data_ptr<acc>();
  const acc* shares = means + levels * objects * channels;
  for (int64_t level = 0; level < levels; ++level)
    for (int64_t image = 0; image < call.images; ++image) {
      Normal& normal = call.normals[level * call.images + image];
      const double elements = static_cast<double>(std::max<int64_t>(channels * call.cells(level), 1));
      for (int64_t at = call.arguments.first[image]; at < call.arguments.first[image + 1]; ++at) {
        const int64_t row = level * objects + call.arguments.object[at], cells = call.cover.cells[row];
        acc* value = values + (level * objects + at) * stride;
        if (cells == 0) continue;  // 0, as the memory is
        for (int64_t c = 0; c < channels; ++c) {
          const double one = grads[row * channels + c];
          value[c] = static_cast<acc>(normal.rstd * one / cells);
          normal.mean_grad += one * shares[row * channels + c] / elements;
          normal.slope += one * means[row * channels + c] / elements;
        }
      }
    }
  return memory;
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> levels, Tensor boxes, Tensor image_index, int64_t height,
                             int64_t width, Tensor kept, Tensor normal) {
  Call call(levels, boxes, image_index, height, width);
  const std::vector<int64_t> shape = call.shape();
  const ScalarType type = widened(levels[0]);
  STD_TORCH_CHECK(is_dense(kept, {2, shape[0], shape[1], shape[2]}, type) &&
                      is_dense(normal, {2, shape[0], call.images}, ScalarType::Double),
                  "norm_relu_box_pool_backward: kept and normal must be those of the forward call");
  const Tensor wide = torch::stable::contiguous(torch::stable::to(grad, type));
  STD_TORCH_CHECK(is_dense(wide, shape, type), "norm_relu_box_pool_backward: grad must be [L, K, C] on the CPU");
  const double* numbers = normal.const_data_ptr<double>();
  for (size_t map = 0; map < call.normals.size(); ++map)
    call.normals[map] = {numbers[map], numbers[call.normals.size() + map], 0, 0};

  const int64_t lanes = call.table.lanes, stride = (call.channels + lanes - 1) / lanes * lanes;
  const std::vector<double> values = type == ScalarType::Double ? weigh<double>(call, wide, kept, stride)
                                                                : weigh<float>(call, wide, kept, stride);
  call.arguments.values = values.data();
  call.arguments.value_stride = stride;
  const std::vector<Tensor> gradients = new_gradients(call.dense_levels, call.levels, &Level::grad);
  std::vector<Task> tasks;
  call.for_maps([&](int64_t level, int64_t image) {
    if (!call.levels[level].channels_last) return call.add_blocks(tasks, level, image);
    for (int64_t band = 0; band < call.cover.list(level, image).count(); ++band)
      tasks.push_back({level, image, band, 1, 0});
  });
  const auto cost = [&](const Task& task) {
    if (!call.levels[task.level].channels_last) return task.channels * call.cells(task.level);
    const Band& band = call.bands[task.level * call.images + task.image].band[task.channel];
    return (band.y1 - band.y0) * call.levels[task.level].columns * call.channels;
  };
  call.run(call.table.backward, tasks, cost, stride, 0, true);
  return gradients;
}

}  // namespace

FASTKD_OP("norm_relu_box_pool",
          "(Tensor[] levels, Tensor boxes, Tensor image_index, int height, int width, float eps) -> (Tensor, Tensor, "
          "Tensor)",
          forward)
FASTKD_OP("norm_relu_box_pool_backward",
          "(Tensor grad, Tensor[] levels, Tensor boxes, Tensor image_index, int height, int width, Tensor kept, "
          "Tensor normal) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
