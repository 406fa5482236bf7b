// The gradient of norm_relu_box_pool.cu. A block processes a tile of consecutive cells of an image of a level. A run is
// a range of cells in the tile covered by the same boxes; the contribution of the boxes is summed once per run.
#pragma once

#include "common/device_channels.h"
#include "cover/norm_relu_box_pool_device.h"

namespace fastkd {
namespace {

constexpr int kWeighThreads = 512;
constexpr int kTableChannels = 16;  // channels of a contiguous tile at a time
constexpr int kTileChannels = 64;   // of a contiguous block
constexpr int kCellsOfWarp = kTile / kWarps, kCellsAtOnce = 4;

// The objects ordered by image; objects with an image_index out of range are left out.
template <class Sum>
struct Painted {
  Global<Sum> value;      // [L, K, C] rstd * grad / cells
  Global<int> area;       // [L, K, 4]
  Global<int64_t> first;  // [B + 1]: those of image b are first[b] .. first[b + 1] - 1
  Global<double> means;   // [2, L, B] of dy' and dy' xhat over the elements of an image

  FASTKD_DEVICE Area area_at(int64_t place) const {
    const Pack<int> sides = load_pack(Global<const int>(area) + 4 * place);
    return {sides.value[0], sides.value[1], sides.value[2], sides.value[3]};
  }
};

// One block per image of a level; a warp processes an object at a time.
template <class T>
FASTKD_KERNEL void weigh_kernel(Levels<T> levels, Objects objects, Global<const T> grad, Global<const sum_t<T>> kept,
                                Global<const double> normal, Painted<sum_t<T>> painted) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(double, scratch, kWarpSize);
  FASTKD_SHARED(int, list, kWeighThreads);
  FASTKD_SHARED(int, counts, kWarpSize);
  const int index = static_cast<int>(blockIdx.x / levels.images), warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x % levels.images, channels = levels.channels;
  const int64_t all = levels.count * objects.count * channels, maps = levels.count * levels.images;
  const double rstd = normal[maps + blockIdx.x];
  double earlier = 0, mean = 0, slope = 0;
  for (int64_t k = threadIdx.x; k < objects.count; k += kWeighThreads)
    earlier += objects.image[k] >= 0 && objects.image[k] < image;
  const int64_t begin = static_cast<int64_t>(block_sum<double>(earlier, scratch));
  int64_t end = begin;
  for (int64_t first = 0; first < objects.count; first += kWeighThreads) {
    const int64_t mine = first + threadIdx.x;
    int before;
    const int total = list_threads(mine < objects.count && objects.image[mine] == image, list, counts, before);
    for (int i = warp; i < total; i += kWeighThreads / kWarpSize) {
      const int64_t k = first + list[i], from = (index * objects.count + k) * channels;
      const int64_t to = index * objects.count + end + i;
      const Area area = objects.area(levels.level[index], levels.images, k);
      const int cells = area.cells();
      if (threadIdx.x % kWarpSize == 0)
        store_pack(painted.area + 4 * to, Pack<int>{area.y0, area.y1, area.x0, area.x1});
      for (int64_t channel = threadIdx.x % kWarpSize; channel < channels; channel += kWarpSize) {
        const double one = cells > 0 ? static_cast<double>(widened<T>(grad[from + channel])) : 0.0;
        painted.value[to * channels + channel] = static_cast<Sum>(cells > 0 ? rstd * one / cells : 0.0);
        mean += one * kept[all + from + channel];
        slope += one * kept[from + channel];
      }
    }
    end += total;
  }
  mean = block_sum<double>(mean, scratch);
  slope = block_sum<double>(slope, scratch);
  if (threadIdx.x != 0) return;
  const double elements = static_cast<double>(channels * levels.level[index].cells);
  painted.means[blockIdx.x] = elements > 0 ? mean / elements : 0.0;
  painted.means[maps + blockIdx.x] = elements > 0 ? slope / elements : 0.0;
  if (index == 0) painted.first[image] = begin;
  if (index == 0 && image == levels.images - 1) painted.first[levels.images] = end;
}

// dx of an element; `value` is the contribution of the boxes.
template <class Sum>
struct Gradient {
  Centre<Sum> centre;
  Sum offset, slope;
  FASTKD_DEVICE Gradient(Global<const double> normal, Global<const double> means, int64_t maps, int64_t map)
      : centre(normal[map]),
        offset(static_cast<Sum>(normal[maps + map] * means[map])),
        slope(static_cast<Sum>(-normal[maps + map] * normal[maps + map] * means[maps + map])) {}
  FASTKD_DEVICE Sum operator()(Sum x, Sum value) const {
    const Sum centred = centre(x);
    return centred * slope + ((centred > 0 ? value : Sum(0)) - offset);
  }
};

// A block's tile and the objects near it.
template <class T>
struct Tile {
  int index, group, begin, cells;
  int64_t image, first, objects;  // of the image, in Painted
  int near_count;                 // of the list; negative: too many, all objects of the image are treated as near
  FASTKD_DEVICE explicit Tile(const Levels<T>& levels) : index(level_of_block(levels)) {
    const Level<T>& level = levels.level[index];
    const int64_t inner = (blockIdx.x - level.first_block) / levels.groups, tiles = (level.cells + kTile - 1) / kTile;
    group = static_cast<int>((blockIdx.x - level.first_block) % levels.groups);
    begin = static_cast<int>(inner % tiles) * kTile;
    image = inner / tiles;
    cells = level.cells - begin < kTile ? level.cells - begin : kTile;
  }
};

// Calls visit(area, index in Painted) for the near objects in ascending order.
template <class T, class Sum, class Visit>
FASTKD_DEVICE void over_near(const Tile<T>& tile, Shared<int> near, const Painted<Sum>& painted, int64_t count,
                             Visit visit) {
  const int64_t objects = tile.near_count < 0 ? tile.objects : tile.near_count;
  for (int64_t i = 0; i < objects; ++i) {
    const int64_t at = tile.index * count + tile.first + (tile.near_count < 0 ? i : static_cast<int64_t>(near[i]));
    visit(painted.area_at(at), at);
  }
}

// Lists the near objects (at most kTile), then the runs: run_of[cell] and run_begin[run], relative to the tile.
template <class T, class Sum>
FASTKD_DEVICE int find_runs(Tile<T>& tile, const Level<T>& level, const Painted<Sum>& painted, int64_t count,
                            Shared<int> near, Shared<int> run_begin, Shared<unsigned char> run_of) {
  FASTKD_SHARED(int, list, kThreads);
  FASTKD_SHARED(int, counts, kWarpSize);
  int before;
  tile.first = painted.first[tile.image];
  tile.objects = painted.first[tile.image + 1] - tile.first;
  tile.near_count = 0;
  for (int64_t first = 0; first < tile.objects && tile.near_count >= 0; first += kThreads) {
    bool is_near = false;
    if (first + threadIdx.x < tile.objects) {
      const Area area = painted.area_at(tile.index * count + tile.first + first + threadIdx.x);
      is_near = !area.empty() && area.y0 * level.columns + area.x0 < tile.begin + tile.cells &&
                (area.y1 - 1) * level.columns + area.x1 > tile.begin;
    }
    const int total = list_threads(is_near, list, counts, before);
    if (tile.near_count + total > kTile) {
      tile.near_count = -1;
    } else {
      if (is_near) near[tile.near_count + before] = static_cast<int>(first) + threadIdx.x;
      tile.near_count += total;
    }
  }
  __syncthreads();
  const int cell = tile.begin + threadIdx.x, y = cell / level.columns, x = cell % level.columns;
  const int last_y = x > 0 ? y : y - 1, last_x = x > 0 ? x - 1 : level.columns - 1;
  bool begins = threadIdx.x == 0;
  if (threadIdx.x > 0 && threadIdx.x < tile.cells)
    over_near(tile, near, painted, count, [&](const Area& area, int64_t) {
      begins = begins || area.contains(y, x) != area.contains(last_y, last_x);
    });
  const int runs = list_threads(begins, run_begin, counts, before);
  run_of[threadIdx.x] = static_cast<unsigned char>(before + begins - 1);
  __syncthreads();
  return runs;
}

// A warp processes kCellsOfWarp consecutive cells, a thread `width` channels.
template <class T, class index_t, int width>
FASTKD_KERNEL void backward_channels_last_kernel(Levels<T> levels, int64_t count, Global<const double> normal,
                                                 Painted<sum_t<T>> painted) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(int, near, kTile);
  FASTKD_SHARED(int, run_begin, kTile);
  FASTKD_SHARED(unsigned char, run_of, kTile);
  Tile<T> tile(levels);
  const Level<T>& level = levels.level[tile.index];
  find_runs<T, Sum>(tile, level, painted, count, near, run_begin, run_of);
  const int64_t channel = (static_cast<int64_t>(tile.group) * kWarpSize + threadIdx.x % kWarpSize) * width;
  if (channel >= levels.channels) return;
  const Gradient<Sum> gradient(normal, painted.means, levels.count * levels.images,
                               tile.index * levels.images + tile.image);
  const int first = threadIdx.x / kWarpSize * kCellsOfWarp;
  const index_t step = static_cast<index_t>(levels.channels);
  const index_t offset = static_cast<index_t>((tile.image * level.cells + tile.begin) * levels.channels + channel);
  Sum value[width] = {};
  int run = -1;
  for (int begin = first; begin < first + kCellsOfWarp && begin < tile.cells; begin += kCellsAtOnce) {
    Sum x[kCellsAtOnce][width];
#pragma unroll
    for (int u = 0; u < kCellsAtOnce; ++u)
      if (begin + u < tile.cells)
        load_channels<T, width>(level.x + (offset + static_cast<index_t>(begin + u) * step), x[u]);
#pragma unroll
    for (int u = 0; u < kCellsAtOnce; ++u) {
      if (begin + u >= tile.cells) continue;
      if (run_of[begin + u] != run) {
        run = run_of[begin + u];
        const int cell = tile.begin + run_begin[run];
        Sum lost[width] = {};
        for (int j = 0; j < width; ++j) value[j] = 0;
        over_near(tile, near, painted, count, [&](const Area& area, int64_t at) {
          if (!area.contains(cell / level.columns, cell % level.columns)) return;
          add_channels<Sum, width>(Global<const Sum>(painted.value) + (at * levels.channels + channel), value, lost);
        });
      }
      Sum out[width];
#pragma unroll
      for (int j = 0; j < width; ++j) out[j] = gradient(x[u][j], value[j]);
      store_channels<T, width>(level.gradient + (offset + static_cast<index_t>(begin + u) * step), out);
    }
  }
}

// For kTableChannels channels at a time, the contributions to each run are written to a table; then warps process
// channels.
template <class T, class index_t>
FASTKD_KERNEL void backward_contiguous_kernel(Levels<T> levels, int64_t count, Global<const double> normal,
                                              Painted<sum_t<T>> painted) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(int, near, kTile);
  FASTKD_SHARED(int, run_begin, kTile);
  FASTKD_SHARED(unsigned char, run_of, kTile);
  FASTKD_SHARED(Sum, table, kTile * (kTableChannels + 1));  // + 1: the runs of a channel are in different banks
  Tile<T> tile(levels);
  const Level<T>& level = levels.level[tile.index];
  const int runs = find_runs<T, Sum>(tile, level, painted, count, near, run_begin, run_of);
  const Gradient<Sum> gradient(normal, painted.means, levels.count * levels.images,
                               tile.index * levels.images + tile.image);
  const int64_t begin = static_cast<int64_t>(tile.group) * kTileChannels;
  const int64_t end = begin + kTileChannels < levels.channels ? begin + kTileChannels : levels.channels;
  for (int64_t first = begin; first < end; first += kTableChannels) {
    for (int item = threadIdx.x; item < runs * kTableChannels; item += kThreads) {
      const int cell = tile.begin + run_begin[item / kTableChannels];
      const int y = cell / level.columns, x = cell % level.columns;
      const int64_t channel = first + item % kTableChannels;
      Sum value = 0, lost = 0;
      over_near(tile, near, painted, count, [&](const Area& area, int64_t at) {
        if (channel < end && area.contains(y, x))
          add_exactly<Sum>(painted.value[at * levels.channels + channel], value, lost);
      });
      table[item / kTableChannels * (kTableChannels + 1) + item % kTableChannels] = value;
    }
    __syncthreads();
    for (int c = threadIdx.x / kWarpSize; c < kTableChannels && first + c < end; c += kWarps) {
      const int64_t plane = (tile.image * levels.channels + first + c) * level.cells + tile.begin;
      const Global<const T> x = level.x + static_cast<index_t>(plane);
      const Global<T> out = level.gradient + static_cast<index_t>(plane);
      const auto value = [&](int i) { return Sum(table[static_cast<int>(run_of[i]) * (kTableChannels + 1) + c]); };
      const auto whole = [&](int i) {
        const Pack<T> pack = load_pack(x + i);
        Pack<T> result;
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          result.value[j] = static_cast<T>(gradient(widened<T>(pack.value[j]), value(i + j)));
        store_pack(out + i, result);
      };
      const auto single = [&](int i) { out[i] = static_cast<T>(gradient(widened<T>(x[i]), value(i))); };
      const bool aligned_alike = address_of<const T>(x) % kPackBytes == address_of<T>(out) % kPackBytes;
      over_row<T>(out, aligned_alike, tile.cells, whole, single);
    }
    __syncthreads();  // the next channels overwrite the table
  }
}

}  // namespace
}  // namespace fastkd
