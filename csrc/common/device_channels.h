// Channels-last levels: a thread processes `width` neighbouring channels, one or a pack of 16 bytes.
#pragma once

#include "common/device.h"

namespace fastkd {

template <class T, int width>
FASTKD_DEVICE void load_channels(Global<const T> pointer, sum_t<T> (&out)[width]) {
  if constexpr (width == 1) {
    out[0] = widened<T>(pointer[0]);
  } else {
    const Pack<T> pack = load_pack(pointer);
    for (int j = 0; j < width; ++j) out[j] = widened<T>(pack.value[j]);
  }
}

template <class T, int width>
FASTKD_DEVICE void store_channels(Global<T> pointer, const sum_t<T> (&values)[width]) {
  if constexpr (width == 1) {
    pointer[0] = static_cast<T>(values[0]);
  } else {
    Pack<T> pack;
    for (int j = 0; j < width; ++j) pack.value[j] = static_cast<T>(values[j]);
    store_pack(pointer, pack);
  }
}

// sum + lost += value, compensated (Kahan), so that the error does not grow with the number of terms.
template <class Sum>
FASTKD_DEVICE void add_exactly(Sum value, Sum& sum, Sum& lost) {
  const Sum corrected = value + lost, total = sum + corrected;
  lost = corrected - (total - sum);
  sum = total;
}

// sums[j] + lost[j] += the channels, which are sums themselves: one, or whole packs.
template <class Sum, int width>
FASTKD_DEVICE void add_channels(Global<const Sum> pointer, Sum (&sums)[width], Sum (&lost)[width]) {
  if constexpr (width == 1) {
    add_exactly<Sum>(pointer[0], sums[0], lost[0]);
  } else {
#pragma unroll
    for (int first = 0; first < width; first += kPack<Sum>) {
      const Pack<Sum> pack = load_pack(pointer + first);
#pragma unroll
      for (int j = 0; j < kPack<Sum>; ++j) add_exactly<Sum>(pack.value[j], sums[first + j], lost[first + j]);
    }
  }
}

// Sums sums[j] over the warps, in a fixed order; every thread gets the result. `scratch` has width values per thread.
template <class Sum, int width>
FASTKD_DEVICE void sum_over_warps(Sum (&sums)[width], Shared<Sum> scratch, int warp, int warps) {
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  for (int j = 0; j < width; ++j) scratch[(warp * width + j) * kWarpSize + lane] = sums[j];
  __syncthreads();
  for (int j = 0; j < width; ++j) {
    Sum total = 0;
    for (int other = 0; other < warps; ++other) total += scratch[(other * width + j) * kWarpSize + lane];
    sums[j] = total;
  }
}

}  // namespace fastkd
