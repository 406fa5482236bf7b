// The cells of one side of a level that a box covers, as box_cover in fastkd/ops/_support/coverage.py, for the CPU and
// the GPU.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_HOST_DEVICE __host__ __device__
#else
#define FASTKD_HOST_DEVICE
#endif

namespace fastkd {

struct CellRange {  // first <= cell < end
  int64_t first, end;
};

// The integers i in [0, cells) with low * cells / side <= i <= high * cells / side, low and high clamped to
// [0, side - 1] first; all in float, with the same operations as the reference. NaN covers nothing.
FASTKD_HOST_DEVICE inline CellRange covered_range(float low, float high, int64_t side, int64_t cells) {
  const auto scaled = [&](float value) {
    const float last = static_cast<float>(side - 1);
    const float clamped = value < 0.0f ? 0.0f : value > last ? last : value;
    return clamped * static_cast<float>(cells) / static_cast<float>(side);
  };
  const float first = std::ceil(scaled(low)), last = std::floor(scaled(high));
  if (!(first <= last)) return {0, 0};
  const int64_t begin = static_cast<int64_t>(first), end = static_cast<int64_t>(last) + 1;
  return {begin < cells ? begin : cells, end < cells ? end : cells};
}

}  // namespace fastkd
