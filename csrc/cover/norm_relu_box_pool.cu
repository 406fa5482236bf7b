// norm_relu_box_pool on the GPU: the formulas of csrc/cover/norm_relu_box_pool.cpp, all levels of a pyramid in one
// launch.
//
// forward   moments: every level once, in chunks that stay in registers while they are centred on their mean, merged in
//           double; xhat is not stored. Sums: one block per box and strip of rows; cells in several boxes are read
//           again, mostly from L2. Strips are added in double, in order
//           traffic: n + sum over boxes of cells * C reads; sums 2 strips K C written and read, about 50 strips per
//           call
// backward  the objects are sorted by image and their gradients scaled (L K C values); then every level is read once
//           and its gradient written once: n reads, n writes
// Contiguous and channels-last levels have separate kernels, with one launch each if both occur. No atomics; the order
// of every sum depends only on shapes and boxes: deterministic. An image_index out of range matches no image, NaN in
// boxes covers nothing.
#include "cover/norm_relu_box_pool_backward.h"
#include "cover/norm_relu_box_pool_forward.h"

#include <tuple>

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;

// The tensors of a call, dense in their memory order, and their tables.
struct Call {
  std::vector<Tensor> level, gradient;
  Tensor boxes, image_index;
  int64_t images = 0, channels = 0, height, width;

  Call(const std::vector<Tensor>& levels, const Tensor& given_boxes, const Tensor& index, int64_t height, int64_t width)
      : boxes(given_boxes), image_index(index), height(height), width(width) {
    STD_TORCH_CHECK(!levels.empty() && levels.size() <= kMaxLevels, "norm_relu_box_pool: levels must be 1 to ",
                    kMaxLevels);
    for (const Tensor& one : levels) {
      STD_TORCH_CHECK(one.dim() == 4 && is_beside(one, levels[0]) && one.scalar_type() == levels[0].scalar_type() &&
                          one.size(0) == levels[0].size(0) && one.size(1) == levels[0].size(1),
                      "norm_relu_box_pool: levels must be [B, C, H, W] and agree in B, C, dtype and device");
      check_cells("norm_relu_box_pool", one.size(2), one.size(3));
      level.push_back(dense(one, is_channels_last(one)));
    }
    images = levels[0].size(0);
    channels = levels[0].size(1);
    STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && is_beside(boxes, levels[0]),
                    "norm_relu_box_pool: boxes must be [K, 4] on the device of the levels");
    STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == boxes.size(0) && index.scalar_type() == ScalarType::Long &&
                        is_beside(index, levels[0]),
                    "norm_relu_box_pool: image_index must be [K] int64 on the device of the levels");
    STD_TORCH_CHECK(height > 0 && width > 0, "norm_relu_box_pool: image_size must be two positive numbers");
    boxes = torch::stable::contiguous(torch::stable::to(boxes, ScalarType::Float));
    image_index = torch::stable::contiguous(index);
  }

  int64_t count() const { return static_cast<int64_t>(level.size()); }
  int64_t maps() const { return count() * images; }
  bool aligned() const { return is_aligned(level) && is_aligned(gradient); }

  Objects objects() const {
    return {global<const float>(boxes), global<const int64_t>(image_index), boxes.size(0), height, width};
  }

  template <class T>
  Levels<T> levels() const {
    Levels<T> result{};
    result.count = static_cast<int>(count());
    result.images = images;
    result.channels = channels;
    for (int64_t index = 0; index < count(); ++index) {
      Level<T>& one = result.level[index];
      one.x = global<const T>(level[index]);
      one.gradient = gradient.empty() ? Global<T>(nullptr) : output<T>(gradient[index]);
      one.rows = static_cast<int>(level[index].size(2));
      one.columns = static_cast<int>(level[index].size(3));
      one.cells = one.rows * one.columns;
      one.strip_rows = std::max(1, kStripCells / std::max(1, one.columns));
      one.strips = one.cells == 0 ? 0 : (one.rows + one.strip_rows - 1) / one.strip_rows;
      one.chunks = (channels * one.cells + kChunk<T> - 1) / kChunk<T>;
      one.channels_last = is_channels_last(level[index]);
      one.first_strip = result.strips;
      one.first_chunk = result.chunks;
      result.strips += one.strips;
      result.chunks += images * one.chunks;
    }
    return result;
  }
};

// Assigns blocks to the levels of one memory format, `of_level` per group of `group` channels; returns their number.
template <class T, class Blocks>
int64_t arrange(Levels<T>& levels, bool channels_last, int64_t group, const Blocks& of_level) {
  int64_t blocks = 0;
  levels.groups = static_cast<int>((levels.channels + group - 1) / group);
  for (int index = 0; index < levels.count; ++index) {
    Level<T>& level = levels.level[index];
    level.first_block = blocks;
    if (level.channels_last == channels_last && level.cells > 0) blocks += of_level(level) * levels.groups;
  }
  return blocks;
}

template <class T, class index_t, int width>
void pool(const Call& call, Levels<T> levels, Global<const double> normal, Global<sum_t<T>> sums) {
  const Objects objects = call.objects();
  const auto parts = [&](const Level<T>& level) { return level.strips * objects.count; };
  const int64_t last = arrange(levels, true, kWarpSize * width, parts);
  launch(call.level[0], Grid(last), Grid(kThreads), 0, &pool_channels_last_kernel<T, index_t, width>, levels, objects,
         normal, sums);
  const int64_t rows = arrange(levels, false, kWarps * kChannelsOfWarp, parts);
  launch(call.level[0], Grid(rows), Grid(kThreads), 0, &pool_contiguous_kernel<T, index_t>, levels, objects, normal,
         sums);
}

template <class T, class index_t>
std::tuple<Tensor, Tensor, Tensor> forward_typed(const Call& call, double eps) {
  const Tensor& on = call.level[0];
  const Objects objects = call.objects();
  const Levels<T> levels = call.levels<T>();
  const int64_t count = call.count(), channels = call.channels;
  const Tensor out = new_tensor(on, {count, objects.count, channels}, on.scalar_type());
  const Tensor kept = new_tensor(on, {2, count, objects.count, channels}, kSumType<T>);
  const Tensor normal = new_tensor(on, {2, count, call.images}, ScalarType::Double);
  const Tensor chunks = new_tensor(on, {3, levels.chunks}, ScalarType::Double);
  const Tensor parts = new_tensor(on, {2, levels.strips, objects.count, channels}, kSumType<T>);
  const auto moments = output<double>(chunks), numbers = output<double>(normal);
  const auto sums = output<sum_t<T>>(parts);
  launch(on, Grid(levels.chunks), Grid(kThreads), 0, &moments_kernel<T, index_t>, levels, moments);
  launch(on, Grid(call.maps()), Grid(kThreads), 0, &normal_kernel<T>, levels, moments, eps, numbers);
  if (channels % kPack<T> == 0 && call.aligned()) {
    pool<T, index_t, kPack<T>>(call, levels, numbers, sums);
  } else {
    pool<T, index_t, 1>(call, levels, numbers, sums);
  }
  const int64_t threads = std::clamp<int64_t>((channels + kWarpSize - 1) / kWarpSize * kWarpSize, kWarpSize, kThreads);
  launch(on, Grid(count * objects.count), Grid(threads), 0, &pooled_kernel<T>, levels, objects, numbers, sums,
         output<T>(out), output<sum_t<T>>(kept));
  return {out, kept, normal};
}

template <class T, class index_t, int width>
void backward_levels(const Call& call, Levels<T> levels, Global<const double> normal, Painted<sum_t<T>> painted) {
  const Tensor& on = call.level[0];
  const int64_t objects = call.boxes.size(0);
  const auto tiles = [&](const Level<T>& level) { return call.images * ((level.cells + kTile - 1) / kTile); };
  const int64_t last = arrange(levels, true, kWarpSize * width, tiles);
  launch(on, Grid(last), Grid(kThreads), 0, &backward_channels_last_kernel<T, index_t, width>, levels, objects, normal,
         painted);
  const int64_t rows = arrange(levels, false, kTileChannels, tiles);
  launch(on, Grid(rows), Grid(kThreads), 0, &backward_contiguous_kernel<T, index_t>, levels, objects, normal, painted);
}

template <class T, class index_t>
void backward_typed(const Call& call, const Tensor& grad, const Tensor& kept, const Tensor& normal) {
  const Tensor& on = call.level[0];
  const Objects objects = call.objects();
  const Levels<T> levels = call.levels<T>();
  const Tensor value = new_tensor(on, {call.count(), objects.count, call.channels}, kSumType<T>);
  const Tensor area = new_tensor(on, {call.count(), objects.count, 4}, ScalarType::Int);
  const Tensor first = new_tensor(on, {call.images + 1}, ScalarType::Long);
  const Tensor means = new_tensor(on, {2, call.maps()}, ScalarType::Double);
  const Painted<sum_t<T>> painted{output<sum_t<T>>(value), output<int>(area), output<int64_t>(first),
                                  output<double>(means)};
  const auto numbers = global<const double>(normal);
  launch(on, Grid(call.maps()), Grid(kWeighThreads), 0, &weigh_kernel<T>, levels, objects, global<const T>(grad),
         global<const sum_t<T>>(kept), numbers, painted);
  if (call.channels % kPack<T> == 0 && call.aligned()) {
    backward_levels<T, index_t, kPack<T>>(call, levels, numbers, painted);
  } else {
    backward_levels<T, index_t, 1>(call, levels, numbers, painted);
  }
}

// The pooled means; [2, L, K, C] of what backward needs of them; [2, L, B] mean and rstd.
std::tuple<Tensor, Tensor, Tensor> forward(std::vector<Tensor> levels, Tensor boxes, Tensor image_index, int64_t height,
                                           int64_t width, double eps) {
  const Call call(levels, boxes, image_index, height, width);
  const DeviceScope scope(call.level[0]);
  return by_type("norm_relu_box_pool", call.level[0], [&](auto value) {
    using T = decltype(value);
    return is_narrow(call.level) ? forward_typed<T, narrow_index>(call, eps) : forward_typed<T, int64_t>(call, eps);
  });
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type, const Tensor& on) {
  bool same = is_beside(tensor, on) && tensor.scalar_type() == type && tensor.is_contiguous() &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t dim = 0; same && dim < shape.size(); ++dim) same = tensor.size(dim) == shape[dim];
  return same;
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> levels, Tensor boxes, Tensor image_index, int64_t height,
                             int64_t width, Tensor kept, Tensor normal) {
  Call call(levels, boxes, image_index, height, width);
  const Tensor& on = call.level[0];
  const DeviceScope scope(on);
  const int64_t count = call.count(), objects = boxes.size(0);
  const Tensor given = torch::stable::contiguous(torch::stable::to(grad, on.scalar_type()));
  STD_TORCH_CHECK(has_shape(given, {count, objects, call.channels}, on.scalar_type(), on),
                  "norm_relu_box_pool_backward: grad must be [L, K, C] on the device of the levels");
  for (const Tensor& level : call.level) call.gradient.push_back(torch::stable::empty_like(level));
  by_type("norm_relu_box_pool_backward", on, [&](auto value) {
    using T = decltype(value);
    STD_TORCH_CHECK(has_shape(kept, {2, count, objects, call.channels}, kSumType<T>, on) &&
                        has_shape(normal, {2, count, call.images}, ScalarType::Double, on),
                    "norm_relu_box_pool_backward: kept and normal must be those of the forward call");
    is_narrow(call.level) ? backward_typed<T, narrow_index>(call, given, kept, normal)
                          : backward_typed<T, int64_t>(call, given, kept, normal);
    return 0;
  });
  return call.gradient;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("norm_relu_box_pool", TORCH_BOX(&forward));
  library.impl("norm_relu_box_pool_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
