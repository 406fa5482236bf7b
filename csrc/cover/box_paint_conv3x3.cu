// box_paint_conv3x3 on the GPU: the 3x3 convolution of painted boxes from the nine products of each embedding with the
// weight (taps); derivation in csrc/cover/box_paint_conv3x3.cpp. All levels of a pyramid in one launch.
//
// S cells of all levels and images, K boxes, C channels, e bytes an element:
//   forward   paints with taps (device_paint.h): writes S C e once; reads 9 L K C sums' bytes from the caches
//   backward  pools with taps (device_pool.h): reads S C e once for every group of boxes whose sums fit in shared
//             memory, writes 9 L K C and C sums and at most S C partial sums
// Deterministic: no atomics, sums in an order that depends only on the geometry.
#include "cover/device_paint.h"
#include "cover/device_pool.h"

#include <optional>
#include <tuple>

namespace fastkd {
namespace {

// grad_bias = the sums of all cells, strip by strip in order. A warp processes every kWarps-th strip of a channel, with
// sixteen loads in flight: there are few blocks and hundreds of strips.
template <class Sum>
FASTKD_KERNEL void bias_kernel(Global<const Sum> whole, int64_t strips, int64_t channels, Global<Sum> grad_bias) {
  FASTKD_SHARED(double, sums, kBlock);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  double sum = 0;
#pragma unroll 16
  for (int64_t strip = warp; strip < strips && channel < channels; strip += kWarps)
    sum += whole[strip * channels + channel];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other * kWarpSize + lane];
  grad_bias[channel] = static_cast<Sum>(sum);
}

// L tensors [B, H_l, W_l, C] with the dtype of `like`; taps have the accumulation type of that dtype.
std::vector<Tensor> forward(Tensor taps, std::optional<Tensor> bias, Tensor boxes, Tensor image_index, int64_t height,
                            int64_t width, int64_t batch_size, std::vector<int64_t> sides, Tensor like) {
  const char* op = "box_paint_conv3x3";
  const Sizes sizes = sizes_of(op, sides);
  check_sizes(op, sizes);
  STD_TORCH_CHECK(taps.dim() == 4 && boxes.dim() == 2 && taps.size(0) == static_cast<int64_t>(sizes.size()) &&
                      taps.size(1) == boxes.size(0) && taps.size(2) == Parts<true>::kRows,
                  op, ": taps must be [L, K, 9, C]");
  STD_TORCH_CHECK(batch_size >= 0, op, ": batch_size must not be negative, got ", batch_size);
  const int64_t channels = taps.size(3);
  const auto same = [&](const Tensor& one) {
    return one.scalar_type() == taps.scalar_type() && one.get_device() == taps.get_device();
  };
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == channels && same(*bias)), op,
                  ": bias must be [C] of the dtype and device of the taps");
  const DeviceScope scope(taps);
  std::vector<Plane> planes;
  for (const auto& [rows, columns] : sizes) {
    const Tensor level = new_tensor(taps, {batch_size, rows, columns, channels}, like.scalar_type());
    planes.push_back({level, rows, columns, true});
  }
  const Cover cover = cover_by_boxes(op, boxes, image_index, height, width, taps);
  const Tensor plain = torch::stable::contiguous(taps);
  const Tensor plain_bias = bias ? torch::stable::contiguous(*bias) : plain;
  by_type(op, like, [&](auto value) {
    using T = decltype(value);
    using Sum = sum_t<T>;
    STD_TORCH_CHECK(taps.scalar_type() == kSumType<T>, op,
                    ": taps must have the dtype in which the result's is summed");
    paint_levels<T, Sum, true>(planes, batch_size, cover, plain, bias ? &plain_bias : nullptr, channels, false);
    return 0;
  });
  return data_of(planes);
}

// The gradients of taps [L, K, 9, C] and of the bias [C], from those of the result, L tensors [B, H_l, W_l, C].
std::tuple<Tensor, Tensor> backward(std::vector<Tensor> grads, Tensor boxes, Tensor image_index, int64_t height,
                                    int64_t width) {
  const char* op = "box_paint_conv3x3_backward";
  STD_TORCH_CHECK(!grads.empty(), op, ": grads must hold at least one level");
  const Tensor& on = grads[0];
  std::vector<Plane> planes;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == on.size(0) && grad.size(3) == on.size(3) &&
                        grad.scalar_type() == on.scalar_type() && grad.get_device() == on.get_device(),
                    op, ": grads must be [B, H, W, C] and agree in B, C, dtype and device");
    const Tensor cells = torch::stable::transpose(torch::stable::transpose(grad, 2, 3), 1, 2);  // [B, C, H, W]
    const bool channels_last = !cells.is_contiguous() || grad.is_contiguous();
    const Tensor dense = torch::stable::contiguous(channels_last ? grad : cells);
    planes.push_back({dense, grad.size(1), grad.size(2), channels_last});
  }
  const Sizes sizes = sizes_of(planes);
  check_sizes(op, sizes);
  const DeviceScope scope(on);
  const Cover cover = cover_by_boxes(op, boxes, image_index, height, width, on);
  const int64_t images = on.size(0), channels = on.size(3), rows = Parts<true>::kRows;
  return by_type(op, on, [&](auto value) -> std::tuple<Tensor, Tensor> {
    using T = decltype(value);
    using Sum = sum_t<T>;
    const int64_t levels = static_cast<int64_t>(sizes.size());
    const Tensor taps = new_tensor(on, {levels, cover.count(), rows, channels}, kSumType<T>);
    const Tensor bias = new_tensor(on, {channels}, kSumType<T>);
    const int strip = strip_of(sizes, images, cover.count() * rows);
    int64_t strips = 0;
    for (const auto& [height, width] : sizes) strips += images * ((height * width + strip - 1) / strip);
    const Tensor whole = new_tensor(on, {strips, channels}, kSumType<T>);
    pool_levels<T, Sum, true>(op, planes, images, channels, cover, false, taps, &whole, strip);
    launch(on, Grid((channels + kWarpSize - 1) / kWarpSize), Grid(kBlock), 0, &bias_kernel<Sum>, output<Sum>(whole),
           strips, channels, output<Sum>(bias));
    return {taps, bias};
  });
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("box_paint_conv3x3", TORCH_BOX(&forward));
  library.impl("box_paint_conv3x3_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
