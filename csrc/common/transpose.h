// Square transposes in registers, for channels-last images in kernels with cells in lanes.
#pragma once

#include "common/simd.h"

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

// The first halves of a and b, element by element: a0 b0 a1 b1 ...; then the second halves.
template <class V>
FASTKD_INLINE void interleave(const V& a, const V& b, V& low, V& high) {
#if defined(__GNUC__) && !defined(__clang__)
  typedef std::conditional_t<sizeof(Element<V>) == 8, int64_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  if constexpr (kLanes<V> == 16) {
    low = __builtin_shuffle(a, b, Indices{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
    high = __builtin_shuffle(a, b, Indices{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  } else if constexpr (kLanes<V> == 8) {
    low = __builtin_shuffle(a, b, Indices{0, 8, 1, 9, 2, 10, 3, 11});
    high = __builtin_shuffle(a, b, Indices{4, 12, 5, 13, 6, 14, 7, 15});
  } else if constexpr (kLanes<V> == 4) {
    low = __builtin_shuffle(a, b, Indices{0, 4, 1, 5});
    high = __builtin_shuffle(a, b, Indices{2, 6, 3, 7});
  } else {
    low = __builtin_shuffle(a, b, Indices{0, 2});
    high = __builtin_shuffle(a, b, Indices{1, 3});
  }
#else
  constexpr int half = kLanes<V> / 2;
  const V first = a, second = b;
  for (int lane = 0; lane < half; ++lane) {
    low[2 * lane] = first[lane], low[2 * lane + 1] = second[lane];
    high[2 * lane] = first[half + lane], high[2 * lane + 1] = second[half + lane];
  }
#endif
}

// rows[i][j] becomes rows[j][i]: a perfect shuffle of the rows, log2(lanes) times.
template <class V>
FASTKD_INLINE void transpose(V (&rows)[kLanes<V>]) {
  constexpr int lanes = kLanes<V>;
  for (int round = 1; round < lanes; round *= 2) {
    V next[lanes];
    for (int row = 0; row < lanes / 2; ++row)
      interleave(rows[row], rows[row + lanes / 2], next[2 * row], next[2 * row + 1]);
    for (int row = 0; row < lanes; ++row) rows[row] = next[row];
  }
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
