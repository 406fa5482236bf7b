// The sums of norm_relu_box_pool.cu over boxes. A block processes the cells of a strip of a level that one object
// covers, for a group of channels; the sums of the strips are added in order.
#pragma once

#include "common/device_channels.h"
#include "cover/norm_relu_box_pool_device.h"

namespace fastkd {
namespace {

constexpr int kStripCells = 512;       // approximate cells per strip of whole rows
constexpr int kUnroll = 4;             // loads of a thread in flight
constexpr int kChannelsOfWarp = kUnroll;  // of a contiguous level

// The work of a block: the cells of a strip that object k covers.
template <class T>
struct Part {
  int index, group;
  int64_t k, image, row;  // row: of the sums [strips, K, C]
  Area area;
  FASTKD_DEVICE Part(const Levels<T>& levels, const Objects& objects) : index(level_of_block(levels)) {
    const Level<T>& level = levels.level[index];
    const int64_t inner = (blockIdx.x - level.first_block) / levels.groups;
    group = static_cast<int>((blockIdx.x - level.first_block) % levels.groups);
    k = inner % objects.count;
    image = objects.image[k];
    const int strip = static_cast<int>(inner / objects.count), first = strip * level.strip_rows;
    row = (level.first_strip + strip) * objects.count + k;
    area = objects.area(level, levels.images, k);
    if (area.y0 < first) area.y0 = first;
    if (area.y1 - first > level.strip_rows) area.y1 = first + level.strip_rows;
  }
};

// Sum of max(x - mean, 0) and number of x > mean.
template <class Sum>
FASTKD_DEVICE void add_above(Sum centred, Sum& sum, Sum& count) {
  sum += centred > 0 ? centred : Sum(0);
  count += centred > 0 ? Sum(1) : Sum(0);
}

// partial [2, strips, K, C], for non-empty parts. A warp processes every kWarps-th cell, a thread `width` channels.
template <class T, class index_t, int width>
FASTKD_KERNEL void pool_channels_last_kernel(Levels<T> levels, Objects objects, Global<const double> normal,
                                             Global<sum_t<T>> partial) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kThreads * width);
  const Part<T> part(levels, objects);
  if (part.area.empty()) return;
  const Level<T>& level = levels.level[part.index];
  const int warp = threadIdx.x / kWarpSize;
  const int64_t channel = (static_cast<int64_t>(part.group) * kWarpSize + threadIdx.x % kWarpSize) * width;
  const bool inside = channel < levels.channels;
  const Centre<Sum> centre(normal[part.index * levels.images + part.image]);
  const int cells = part.area.cells(), columns = part.area.x1 - part.area.x0;
  const int64_t origin = (part.image * level.cells + part.area.y0 * level.columns + part.area.x0) * levels.channels;
  const Global<const T> x = level.x + static_cast<index_t>(inside ? origin + channel : 0);
  Sum sum[width] = {}, count[width] = {};
  for (int first = warp; inside && first < cells; first += kWarps * kUnroll) {
    Sum values[kUnroll][width];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int cell = first + u * kWarps;
      const index_t place = static_cast<index_t>(cell / columns * level.columns + cell % columns);
      if (cell < cells) load_channels<T, width>(x + place * static_cast<index_t>(levels.channels), values[u]);
    }
    Sum few[width] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kWarps < cells) {
#pragma unroll
        for (int j = 0; j < width; ++j) add_above(centre(values[u][j]), few[j], count[j]);
      }
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] += few[j];
  }
  sum_over_warps<Sum, width>(sum, scratch, warp, kWarps);
  sum_over_warps<Sum, width>(count, scratch, warp, kWarps);
  if (warp != 0 || !inside) return;
  const int64_t at = part.row * levels.channels + channel;
  for (int j = 0; j < width; ++j) {
    partial[at + j] = sum[j];
    partial[levels.strips * objects.count * levels.channels + at + j] = count[j];
  }
}

// The same for contiguous levels: a warp processes kChannelsOfWarp channels, a thread every 32nd pack of the part's
// rows. Rows are unaligned: packs that are only partly in the part are read element by element.
template <class T, class index_t>
FASTKD_KERNEL void pool_contiguous_kernel(Levels<T> levels, Objects objects, Global<const double> normal,
                                          Global<sum_t<T>> partial) {
  using Sum = sum_t<T>;
  const Part<T> part(levels, objects);
  if (part.area.empty()) return;
  const Level<T>& level = levels.level[part.index];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t channel = (static_cast<int64_t>(part.group) * kWarps + warp) * kChannelsOfWarp;
  if (channel >= levels.channels) return;
  const Centre<Sum> centre(normal[part.index * levels.images + part.image]);
  const int width = part.area.x1 - part.area.x0, packs = width / kPack<T> + 2;  // of a row at any alignment
  const int items = (part.area.y1 - part.area.y0) * packs;
  Sum sum[kChannelsOfWarp] = {}, count[kChannelsOfWarp] = {};
  for (int item = lane; item < items; item += kWarpSize) {
    const int64_t corner = (part.area.y0 + item / packs) * static_cast<int64_t>(level.columns) + part.area.x0;
    Pack<T> values[kChannelsOfWarp];
    int first[kChannelsOfWarp];  // of the pack, relative to the row
#pragma unroll
    for (int c = 0; c < kChannelsOfWarp; ++c) {
      first[c] = width;
      if (channel + c >= levels.channels) continue;
      const Global<const T> row =
          level.x + static_cast<index_t>((part.image * levels.channels + channel + c) * level.cells + corner);
      first[c] = item % packs * kPack<T> - static_cast<int>(address_of<const T>(row) % kPackBytes / sizeof(T));
      if (first[c] >= 0 && first[c] + kPack<T> <= width) values[c] = load_pack(row + first[c]);
    }
#pragma unroll
    for (int c = 0; c < kChannelsOfWarp; ++c) {
      Sum few = 0;
      if (first[c] >= 0 && first[c] + kPack<T> <= width) {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) add_above(centre(widened<T>(values[c].value[j])), few, count[c]);
      } else if (first[c] < width) {
        const int64_t row = (part.image * levels.channels + channel + c) * level.cells + corner;
        for (int i = first[c] < 0 ? 0 : first[c]; i < first[c] + kPack<T> && i < width; ++i)
          add_above(centre(widened<T>(level.x[static_cast<index_t>(row + i)])), few, count[c]);
      }
      sum[c] += few;
    }
  }
  const int64_t at = part.row * levels.channels + channel;
#pragma unroll
  for (int c = 0; c < kChannelsOfWarp; ++c) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
      count[c] += __shfl_xor_sync(kAllLanes, count[c], step);
    }
    if (lane != 0 || channel + c >= levels.channels) continue;
    partial[at + c] = sum[c];
    partial[levels.strips * objects.count * levels.channels + at + c] = count[c];
  }
}

// One block per level and object: out [L, K, C], kept [2, L, K, C] = mean of relu(xhat), fraction of xhat > 0.
template <class T>
FASTKD_KERNEL void pooled_kernel(Levels<T> levels, Objects objects, Global<const double> normal,
                                 Global<const sum_t<T>> partial, Global<T> out, Global<sum_t<T>> kept) {
  using Sum = sum_t<T>;
  const int index = static_cast<int>(blockIdx.x / objects.count);
  const int64_t k = blockIdx.x % objects.count, maps = levels.count * levels.images;
  const Level<T>& level = levels.level[index];
  const Area area = objects.area(level, levels.images, k);
  const int cells = area.cells();
  const double rstd = cells > 0 ? normal[maps + index * levels.images + objects.image[k]] : 0.0;
  const int64_t all = levels.strips * objects.count * levels.channels;
  for (int64_t channel = threadIdx.x; channel < levels.channels; channel += blockDim.x) {
    double sum = 0, count = 0;
    for (int strip = area.y0 / level.strip_rows; cells > 0 && strip * level.strip_rows < area.y1; ++strip) {
      const int64_t at = ((level.first_strip + strip) * objects.count + k) * levels.channels + channel;
      sum += partial[at];
      count += partial[all + at];
    }
    const Sum mean = static_cast<Sum>(cells > 0 ? rstd * sum / cells : 0.0);
    const int64_t at = blockIdx.x * levels.channels + channel;
    out[at] = static_cast<T>(mean);
    kept[at] = mean;
    kept[levels.count * objects.count * levels.channels + at] = static_cast<Sum>(cells > 0 ? count / cells : 0.0);
  }
}

}  // namespace
}  // namespace fastkd
