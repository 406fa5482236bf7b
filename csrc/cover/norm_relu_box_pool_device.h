// Shared by the kernels of norm_relu_box_pool.cu: the levels and objects of a call, and the moments of an image.
#pragma once

#include "cover/covered_range.h"
#include "common/device_call.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kTile = kThreads;           // cells of a block of backward
constexpr int kPacksOfThread = 4;         // of a chunk of moments, in registers
template <class T>
constexpr int kChunk = kThreads * kPacksOfThread * kPack<T>;  // elements

template <class T>
struct Level {
  Global<const T> x;
  Global<T> gradient;
  int rows, columns, cells;
  int strip_rows, strips;              // of an image, for sums
  int64_t chunks;                      // of an image, for moments
  int64_t first_chunk, first_strip;    // of the preceding levels
  int64_t first_block;                 // of the preceding levels in this launch
  bool channels_last;
};

template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count, groups;  // groups: of channels, a block each
  int64_t images, channels, strips, chunks;
};

// Cells (y, x) with y0 <= y < y1 and x0 <= x < x1.
struct Area {
  int y0, y1, x0, x1;
  FASTKD_DEVICE bool empty() const { return y0 >= y1 || x0 >= x1; }
  FASTKD_DEVICE int cells() const { return empty() ? 0 : (y1 - y0) * (x1 - x0); }
  FASTKD_DEVICE bool contains(int y, int x) const { return y0 <= y && y < y1 && x0 <= x && x < x1; }
};

struct Objects {
  Global<const float> box;      // [count, 4] xyxy
  Global<const int64_t> image;  // [count]: any value
  int64_t count, height, width;

  // The cells of a level that object k covers; empty if its image is not in [0, images).
  template <class T>
  FASTKD_DEVICE Area area(const Level<T>& level, int64_t images, int64_t k) const {
    const int64_t own = image[k];
    if (own < 0 || own >= images) return {0, 0, 0, 0};
    const CellRange down = covered_range(box[4 * k + 1], box[4 * k + 3], height, level.rows);
    const CellRange across = covered_range(box[4 * k], box[4 * k + 2], width, level.columns);
    return {static_cast<int>(down.first), static_cast<int>(down.end), static_cast<int>(across.first),
            static_cast<int>(across.end)};
  }
};

// The level a block of this launch belongs to.
template <class T>
FASTKD_DEVICE int level_of_block(const Levels<T>& levels) {
  int level = 0;
  while (level + 1 < levels.count && blockIdx.x >= levels.level[level + 1].first_block) ++level;
  return level;
}

// x - mean, with the mean as a sum of two numbers: if it is large and the variance small, rounding would dominate.
template <class Sum>
struct Centre {
  Sum high, low;
  FASTKD_DEVICE explicit Centre(double mean) : high(static_cast<Sum>(mean)), low(static_cast<Sum>(mean - high)) {}
  FASTKD_DEVICE Sum operator()(Sum x) const { return (x - high) - low; }
};

// Count, mean and centred squares of each chunk of an image: partial [3, chunks]. The chunk stays in registers. The
// elements before the first pack belong to the first chunk, those after the last pack to the last chunk.
template <class T, class index_t>
FASTKD_KERNEL void moments_kernel(Levels<T> levels, Global<double> partial) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kWarpSize);
  int index = 0;
  while (index + 1 < levels.count && blockIdx.x >= levels.level[index + 1].first_chunk) ++index;
  const Level<T>& level = levels.level[index];
  const int64_t chunk = (blockIdx.x - level.first_chunk) % level.chunks;
  const int64_t image = (blockIdx.x - level.first_chunk) / level.chunks, elements = levels.channels * level.cells;
  const Global<const T> x = level.x + static_cast<index_t>(image * elements);
  const int64_t unaligned = (kPackBytes - address_of<const T>(x) % kPackBytes) % kPackBytes / sizeof(T);
  const int64_t head = unaligned < elements ? unaligned : elements, packs = (elements - head) / kPack<T>;
  const int64_t tail = head + packs * kPack<T>, first = chunk * kThreads * kPacksOfThread;
  const bool last = chunk == level.chunks - 1;

  Pack<T> values[kPacksOfThread];
  bool has[kPacksOfThread];
#pragma unroll
  for (int u = 0; u < kPacksOfThread; ++u) {
    const int64_t pack = first + u * kThreads + threadIdx.x;
    has[u] = pack < packs;
    if (has[u]) values[u] = load_pack(x + static_cast<index_t>(head + pack * kPack<T>));
  }
  int64_t single = elements;  // at most one more per thread
  if (chunk == 0 && threadIdx.x < head) single = threadIdx.x;
  if (last && threadIdx.x >= kWarpSize) single = tail + threadIdx.x - kWarpSize;
  const bool has_single = single < elements;
  const Sum rest = has_single ? widened<T>(x[static_cast<index_t>(single)]) : Sum(0);
  const auto each = [&](auto visit) {
#pragma unroll
    for (int u = 0; u < kPacksOfThread; ++u)
      if (has[u]) {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) visit(widened<T>(values[u].value[j]));
      }
    if (has_single) visit(rest);
  };

  const int64_t left = packs - first, most = kThreads * kPacksOfThread;
  const int64_t count = (left < 0 ? 0 : left < most ? left : most) * kPack<T> + (chunk == 0 ? head : 0) +
                        (last ? elements - tail : 0);
  Sum sum = 0, apart = 0, square = 0;
  each([&](Sum value) { sum += value; });
  const Sum centre = block_sum<Sum>(sum, scratch) / static_cast<Sum>(count > 0 ? count : 1);
  each([&](Sum value) {
    apart += value - centre;
    square += (value - centre) * (value - centre);
  });
  apart = block_sum<Sum>(apart, scratch);
  square = block_sum<Sum>(square, scratch);
  if (threadIdx.x != 0) return;
  const double mean = static_cast<double>(apart) / static_cast<double>(count > 0 ? count : 1);
  partial[blockIdx.x] = static_cast<double>(count);
  partial[levels.chunks + blockIdx.x] = centre + mean;
  partial[2 * levels.chunks + blockIdx.x] = square - mean * apart;
}

// One block per image of a level: merges its chunks in a fixed order (Chan et al.) to mean and rstd: normal [2, L, B].
template <class T>
FASTKD_KERNEL void normal_kernel(Levels<T> levels, Global<const double> partial, double eps, Global<double> normal) {
  FASTKD_SHARED(double, scratch, kWarpSize);
  const Level<T>& level = levels.level[blockIdx.x / levels.images];
  const int64_t first = level.first_chunk + blockIdx.x % levels.images * level.chunks;
  double mean = 0, square = 0, elements = static_cast<double>(levels.channels * level.cells);
  if (elements < 1) elements = 1;
  for (int64_t chunk = threadIdx.x; chunk < level.chunks; chunk += blockDim.x)
    mean += partial[first + chunk] * partial[levels.chunks + first + chunk];
  mean = block_sum<double>(mean, scratch) / elements;
  for (int64_t chunk = threadIdx.x; chunk < level.chunks; chunk += blockDim.x) {
    const double apart = partial[levels.chunks + first + chunk] - mean;
    square += partial[2 * levels.chunks + first + chunk] + partial[first + chunk] * apart * apart;
  }
  square = block_sum<double>(square, scratch) / elements;
  if (threadIdx.x != 0) return;
  normal[blockIdx.x] = mean;
  normal[levels.count * levels.images + blockIdx.x] = 1.0 / sqrt((square > 0 ? square : 0.0) + eps);
}

}  // namespace
}  // namespace fastkd
