// Small matrix products on tiles of cells that stay in the cache: C (+)= A B with a block of C in registers, the
// columns of B and C in vectors and the rows of A broadcast. Also transpose and exp for tiles.
#pragma once

#include "common/simd.h"

#include <utility>

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

// Cells of a tile and its row stride: a multiple of three vectors of every kind. Rows of floats span an odd number of
// cache lines, so that a column does not map to few cache sets.
constexpr int64_t kTile = 144;
constexpr int64_t kDepth = 144;  // products accumulated in registers before C is stored, so that B stays in L1
constexpr int64_t kShortDepth = 24;  // for sums that one term may dominate: later terms are rounded to its size
constexpr bool kWide = FASTKD_CAPABILITY >= 2;  // 32 vector registers

template <class F, int... I>
FASTKD_INLINE void unroll_indices(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Calls f(0) .. f(count - 1) with constants, so that arrays indexed with them stay in registers.
template <int count, class F>
FASTKD_INLINE void unroll(const F& f) {
  unroll_indices(f, std::make_integer_sequence<int, count>{});
}

template <class V>
FASTKD_INLINE V splat(Element<V> value) {
  return value - V{};  // not V{} + value, which is not optimised away as it turns -0 into 0
}

// As many integers as V has lanes, of their size.
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongIntegers __attribute__((vector_size(kVectorBytes)));
template <class V>
using Index = std::conditional_t<sizeof(Element<V>) == 4, int32_t, int64_t>;
template <class V>
using Indices = std::conditional_t<sizeof(Element<V>) == 4, Integers, LongIntegers>;

FASTKD_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Divides n into the smallest number of nearly equal parts of at most `most`.
struct Parts {
  int64_t n, count;
  FASTKD_INLINE Parts(int64_t n, int64_t most) : n(n), count(n > most ? (n + most - 1) / most : 1) {}
  FASTKD_INLINE int64_t first(int64_t part) const { return part * n / count; }
};

// A in panels of at most kRows rows (Parts), each stored k-major. For an A that is used in many products.
struct Panels {
  static constexpr int kRows = kWide ? 8 : 6, kVectors = kWide ? 3 : 2;
  static constexpr int64_t row(int) { return 1; }
  static constexpr int64_t step(int rows) { return rows; }
};

// A as rows of a tile with stride kTile. For an A that a kernel has just computed.
struct TileRows {
  static constexpr int kRows = kWide ? 12 : 6, kVectors = 2;
  static constexpr int64_t row(int) { return kTile; }
  static constexpr int64_t step(int) { return 1; }
};

template <class acc>
using Block = void (*)(const acc* a, int64_t k, const acc* b, int64_t ldb, acc* c, int64_t ldc, bool accumulate);

template <class V, class A, int M, int U>
__attribute__((noinline)) void multiply_block(const Element<V>* a, int64_t k, const Element<V>* b, int64_t ldb,
                                              Element<V>* c, int64_t ldc, bool accumulate) {
  using acc = Element<V>;
  constexpr int64_t lanes = kLanes<V>;
  V sum[M][U];
  unroll<M>([&](auto m) __attribute__((always_inline)) {
    unroll<U>([&](auto u) __attribute__((always_inline)) { sum[m][u] = V{}; });
  });
  for (; k > 0; --k) {
    V right[U];
    unroll<U>([&](auto u) __attribute__((always_inline)) { right[u] = load<V>(b + u * lanes); });
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      const V left = splat<V>(a[m * A::row(M)]);
      unroll<U>([&](auto u) __attribute__((always_inline)) { sum[m][u] = multiply_add(left, right[u], sum[m][u]); });
    });
    a += A::step(M);
    b += ldb;
  }
  unroll<M>([&](auto m) __attribute__((always_inline)) {
    unroll<U>([&](auto u) __attribute__((always_inline)) {
      acc* out = c + m * ldc + u * lanes;
      // C is added last: a sum starting at C would be rounded to its size at each step.
      store(out, accumulate ? load<V>(out) + sum[m][u] : sum[m][u]);
    });
  });
}

template <class V, class A, int U, int... M>
FASTKD_INLINE Block<Element<V>> block_of_rows(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr Block<Element<V>> blocks[] = {multiply_block<V, A, M + 1, U>...};
  return blocks[rows - 1];
}

template <class V, class A>
FASTKD_INLINE Block<Element<V>> block_of(int64_t rows, int64_t vectors) {
  using Rows = std::make_integer_sequence<int, A::kRows>;
  if constexpr (A::kVectors >= 3)
    if (vectors == 3) return block_of_rows<V, A, 3>(rows, Rows{});
  if (vectors == 2) return block_of_rows<V, A, 2>(rows, Rows{});
  return block_of_rows<V, A, 1>(rows, Rows{});
}

// Called by a product before each of its blocks.
struct Nothing {
  FASTKD_INLINE void operator()() const {}
};

// C [rows, vectors * lanes] (+)= A [rows, k] B [k, ...]; at most `most` consecutive products in registers.
template <class V, class A, class acc = Element<V>, class Between = Nothing>
void multiply(const acc* a, int64_t rows, int64_t k, const acc* b, int64_t ldb, int64_t vectors, acc* c, int64_t ldc,
              bool accumulate, int64_t most = kDepth, Between&& between = {}) {
  if (rows == 0 || vectors == 0) return;
  const Parts depths(k, most), columns(vectors, A::kVectors), panels(rows, A::kRows);
  for (int64_t depth = 0; depth < depths.count; ++depth) {
    const int64_t k0 = depths.first(depth), steps = depths.first(depth + 1) - k0;
    for (int64_t column = 0; column < columns.count; ++column) {
      const int64_t v0 = columns.first(column), width = columns.first(column + 1) - v0;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t m0 = panels.first(panel), height = panels.first(panel + 1) - m0;
        between();
        const acc* left = a + (std::is_same_v<A, Panels> ? m0 * k + k0 * height : m0 * kTile + k0);
        block_of<V, A>(height, width)(left, steps, b + k0 * ldb + v0 * kLanes<V>, ldb, c + m0 * ldc + v0 * kLanes<V>,
                                      ldc, accumulate || depth > 0);
      }
    }
  }
}

// The panels of A [rows, k], A[m, i] = a[m * row_stride + i * step_stride].
template <class acc>
void pack_panels(const acc* a, int64_t row_stride, int64_t step_stride, int64_t rows, int64_t k, acc* out) {
  const Parts panels(rows, Panels::kRows);
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t step = 0; step < k; ++step)
      for (int64_t m = panels.first(panel); m < panels.first(panel + 1); ++m)
        *out++ = a[m * row_stride + step * step_stride];
}

// Lane i is lane indices[i] of the concatenation of a and b. Clang's builtin takes only constants.
template <class V>
FASTKD_INLINE V shuffle(V a, V b, Indices<V> indices) {
#if defined(__clang__)
  V result{};
  for (int lane = 0; lane < kLanes<V>; ++lane)
    result[lane] = indices[lane] < kLanes<V> ? a[indices[lane]] : b[indices[lane] - kLanes<V>];
  return result;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

// Transposes a lanes x lanes block in log2(lanes) exchanges of increasing sub-blocks.
template <class V>
FASTKD_INLINE void transpose_block(const Element<V>* in, int64_t ld_in, Element<V>* out, int64_t ld_out) {
  constexpr int lanes = kLanes<V>;
  V rows[lanes];
  unroll<lanes>([&](auto i) __attribute__((always_inline)) { rows[i] = load<V>(in + i * ld_in); });
  unroll<lanes == 16 ? 4 : lanes == 8 ? 3 : lanes == 4 ? 2 : 1>([&](auto stage) __attribute__((always_inline)) {
    constexpr int size = 1 << stage;
    Indices<V> low{}, high{};
    for (int lane = 0; lane < lanes; ++lane) {
      low[lane] = lane & size ? lanes + lane - size : lane;
      high[lane] = lane & size ? lanes + lane : lane + size;
    }
    unroll<lanes>([&](auto i) __attribute__((always_inline)) {
      if constexpr ((i & size) == 0) {
        const V first = rows[i], second = rows[i + size];
        rows[i] = shuffle(first, second, low);
        rows[i + size] = shuffle(first, second, high);
      }
    });
  });
  unroll<lanes>([&](auto i) __attribute__((always_inline)) { store(out + i * ld_out, rows[i]); });
}

// out [columns, rows] = in [rows, columns] transposed.
template <class V, class acc = Element<V>>
void transpose(const acc* in, int64_t ld_in, int64_t rows, int64_t columns, acc* out, int64_t ld_out) {
  constexpr int64_t lanes = kLanes<V>;
  const int64_t whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
  for (int64_t column = 0; column < whole_columns; column += lanes)
    for (int64_t row = 0; row < whole_rows; row += lanes)
      transpose_block<V>(in + row * ld_in + column, ld_in, out + column * ld_out + row, ld_out);
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < rows; ++row)
      out[column * ld_out + row] = in[row * ld_in + column];
}

// Writes zeros; `out` may be null if the count is 0.
template <class T>
FASTKD_INLINE void set_zero(T* out, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(out), 0, count * sizeof(T));
}

// e^x to 1.5 ulp, less precise for subnormal results; e^-inf = 0, NaN stays NaN.
FASTKD_INLINE FloatVector exponential(FloatVector given) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  // Beyond these bounds the result is 0 or infinite by the scaling with a power of 2.
  const __m512 above = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-110.0f), (__m512)given);  // NaN: second operand
  const FloatVector x = (FloatVector)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(89.0f), above);
#else
  const FloatVector x = given < -87.0f ? given + 16.6355324f : given;  // e^16.6355... = 2^24
#endif
  const FloatVector magic = splat<FloatVector>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVector shifted = multiply_add(x, splat<FloatVector>(1.44269504f), magic);
  const FloatVector power = shifted - magic;
  FloatVector rest = multiply_add(power, splat<FloatVector>(-0.693359375f), x);  // log 2 in two parts
  rest = multiply_add(power, splat<FloatVector>(2.12194440e-4f), rest);
  FloatVector series = splat<FloatVector>(1.9875691500e-4f);  // Cephes' polynomial
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
    series = multiply_add(series, rest, splat<FloatVector>(factor));
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  return (FloatVector)_mm512_maskz_scalef_ps(0xffff, (__m512)series, (__m512)power);
#else
  // Unsigned integers wrap if x is out of bounds; the result is then not used.
  const FloatVector scaled = (FloatVector)((BitsVector)series + (((BitsVector)shifted - (BitsVector)magic) << 23));
  const FloatVector infinite = x * __builtin_inff();  // NaN stays NaN
  const FloatVector normal = x < -87.0f ? FloatVector{} : x <= 88.0f ? scaled : infinite;
  return given < -87.0f ? normal * 5.9604645e-8f : normal;
#endif
}

FASTKD_INLINE DoubleVector exponential(DoubleVector x) {
  for (int lane = 0; lane < kLanes<DoubleVector>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

template <class V>
FASTKD_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// Reduces all lanes, combining the upper with the lower half in each step.
template <class V, class F>
FASTKD_INLINE Element<V> join_lanes(V value, const F& join) {
  constexpr int lanes = kLanes<V>;
  unroll<lanes == 16 ? 4 : lanes == 8 ? 3 : lanes == 4 ? 2 : 1>([&](auto stage) __attribute__((always_inline)) {
    Indices<V> partner{};
    for (int lane = 0; lane < lanes; ++lane) partner[lane] = lane ^ (lanes >> (stage + 1));
    value = join(value, shuffle(value, value, partner));
  });
  return value[0];
}

template <class V>
FASTKD_INLINE Element<V> largest_lane(V value) {
  return join_lanes(value, [](V a, V b) __attribute__((always_inline)) { return larger(a, b); });
}

template <class V>
FASTKD_INLINE Element<V> sum_lanes(V value) {
  return join_lanes(value, [](V a, V b) __attribute__((always_inline)) { return a + b; });
}

// The first `count` lanes of a vector, 0 in the others.
template <class V>
FASTKD_INLINE V first_lanes(V value, int64_t count) {
  Indices<V> place{};
  for (int lane = 0; lane < kLanes<V>; ++lane) place[lane] = lane;
  return place < static_cast<Index<V>>(count) ? value : V{};
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
