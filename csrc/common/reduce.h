// Sums over strips. A strip is `steps` groups of U vectors with stride `stride`: a contiguous row (stride = length of U
// vectors; all lanes belong to one row), or a block of channels of a channels-last image (stride = C; each lane is a
// row).
//
// Sums are kept in float for kFlush steps, then in double, in an order that depends only on the shape:
// deterministic, and the error does not grow with the length of a row.
#pragma once

#include "common/simd.h"

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

constexpr int64_t kFlush = 16;

// total[lane] += sum[lane]
template <class V, int U>
FASTKD_INLINE void flush(const V (&sum)[U], double* total) {
  Element<V> lanes[U * kLanes<V>];
  std::memcpy(lanes, sum, sizeof(lanes));
  for (int lane = 0; lane < U * kLanes<V>; ++lane) total[lane] += lanes[lane];
}

// total[0] = pairwise sum over the lanes; total[1] .. total[width - 1] are overwritten
template <int width>
FASTKD_INLINE void gather(double* total) {
  static_assert((width & (width - 1)) == 0);
  for (int half = width / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
}

// The values of the rows as vectors: the same for all lanes of a contiguous row, else one per lane.
template <class V, int U, bool one_row>
FASTKD_INLINE void spread(const Element<V>* values, V (&out)[U]) {
  for (int u = 0; u < U; ++u) out[u] = one_row ? broadcast<V>(values[0]) : load<V>(values + u * kLanes<V>);
}

// total[lane] += x
template <class V, int U, class scalar_t>
FASTKD_INLINE void add_sums(const scalar_t* x, int64_t steps, int64_t stride, double* total) {
  for (int64_t first = 0; first < steps; first += kFlush) {
    const int64_t last = first + kFlush < steps ? first + kFlush : steps;
    V sum[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) sum[u] += load<V>(x + step * stride + u * kLanes<V>);
    flush<V, U>(sum, total);
  }
}

// total[lane] += x - mean, total_square[lane] += (x - mean)^2
template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_centred(const scalar_t* x, int64_t steps, int64_t stride, const Element<V>* means, double* total,
                               double* total_square) {
  V mean[U];
  spread<V, U, one_row>(means, mean);
  for (int64_t first = 0; first < steps; first += kFlush) {
    const int64_t last = first + kFlush < steps ? first + kFlush : steps;
    V sum[U] = {}, square[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const V centred = load<V>(x + step * stride + u * kLanes<V>) - mean[u];
        sum[u] += centred;
        square[u] = multiply_add(centred, centred, square[u]);
      }
    flush<V, U>(sum, total);
    flush<V, U>(square, total_square);
  }
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
