// Strips of instance_norm_mse: its sums and gradients on one row, or on some channels of a channels-last image.
// instance_norm_mse_kernels.h selects among them.
#pragma once

#include "normalised/instance_norm_mse.h"
#include "common/reduce.h"

#include <cmath>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace instance_norm_mse;

constexpr int64_t kTile = 64;           // cells of a channels-last tile
constexpr double kMostCancelled = 32;  // maximum ratio of the terms to their remainder after cancellation

// A strip of both pyramids (reduce.h), followed by `tail` elements if it is one row.
template <class scalar_t>
struct Strip {
  const scalar_t *s, *t;
  scalar_t *grad_s, *grad_t;  // null: not computed
  int64_t steps, stride, tail, row;

  // The tail as a strip of groups of `width` elements.
  FASTKD_INLINE Strip rest(int64_t width) const {
    const int64_t body = steps * stride;
    scalar_t* rest_s = grad_s == nullptr ? nullptr : grad_s + body;
    scalar_t* rest_t = grad_t == nullptr ? nullptr : grad_t + body;
    return {s + body, t + body, rest_s, rest_t, tail / width, width, tail % width, row};
  }
};

// Coefficients of IN(x) = (x - mean) * scale + ((x - mean) * scale_low + offset); scale_low and offset correct the
// rounding errors of scale and mean. Four arrays with one value per row and stride `stride`.
template <class acc>
struct Normal {
  acc* mean;
  int64_t stride;

  // Stores mean and 1 / sqrt(variance + eps) with twice the precision; returns the latter.
  FASTKD_INLINE double keep(int64_t row, double exact_mean, double variance, double eps) const {
    acc* out = mean + row;
    const double scale = 1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + eps);
    out[0] = static_cast<acc>(exact_mean);
    out[stride] = static_cast<acc>(scale);
    out[stride * 2] = static_cast<acc>(scale - out[stride]);
    out[stride * 3] = static_cast<acc>((out[0] - exact_mean) * scale);
    return scale;
  }
};

template <class acc>
FASTKD_INLINE Normal<acc> normal_of(const Arguments& arguments, Moment side, int64_t row) {
  return {static_cast<acc*>(arguments.moments) + side * arguments.rows + row, arguments.rows};
}

template <class V, int U, bool one_row>
struct NormalVectors {
  V mean[U], scale[U], scale_low[U], offset[U];
  FASTKD_INLINE explicit NormalVectors(const Normal<Element<V>>& normal) {
    spread<V, U, one_row>(normal.mean, mean);
    spread<V, U, one_row>(normal.mean + normal.stride, scale);
    spread<V, U, one_row>(normal.mean + normal.stride * 2, scale_low);
    spread<V, U, one_row>(normal.mean + normal.stride * 3, offset);
  }
};

// a = IN(s), b = IN(t), e = a - b: the large parts are subtracted first, so that e does not contain the rounding errors
// of a and b and is exactly 0 where s = t.
template <class V>
struct Errors {
  V a, b, e;
};

template <class V, int U, bool one_row>
FASTKD_INLINE Errors<V> errors(V s, V t, const NormalVectors<V, U, one_row>& student,
                               const NormalVectors<V, U, one_row>& teacher, int u) {
  const V centred_s = s - student.mean[u], centred_t = t - teacher.mean[u];
  const V a = centred_s * student.scale[u], b = centred_t * teacher.scale[u];
  const V a_low = multiply_add(centred_s, student.scale_low[u], student.offset[u]);
  const V b_low = multiply_add(centred_t, teacher.scale_low[u], teacher.offset[u]);
  return {a + a_low, b + b_low, (a - b) + (a_low - b_low)};
}

// Three passes.

template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_errors(const Arguments& arguments, const Strip<scalar_t>& strip, double* total, double* total_s,
                              double* total_t) {
  const NormalVectors<V, U, one_row> student(normal_of<Element<V>>(arguments, kStudent, strip.row));
  const NormalVectors<V, U, one_row> teacher(normal_of<Element<V>>(arguments, kTeacher, strip.row));
  for (int64_t first = 0; first < strip.steps; first += kFlush) {
    const int64_t last = first + kFlush < strip.steps ? first + kFlush : strip.steps;
    V square[U] = {}, with_s[U] = {}, with_t[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const int64_t at = step * strip.stride + u * kLanes<V>;
        const auto [a, b, e] = errors(load<V>(strip.s + at), load<V>(strip.t + at), student, teacher, u);
        square[u] = multiply_add(e, e, square[u]);
        with_s[u] = multiply_add(e, a, with_s[u]);
        with_t[u] = multiply_add(e, b, with_t[u]);
      }
    flush<V, U>(square, total);
    flush<V, U>(with_s, total_s);
    flush<V, U>(with_t, total_t);
  }
}

// The normal of one side of a strip.
template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void normalise(const scalar_t* x, const Strip<scalar_t>& strip, double eps, Normal<Element<V>> normal) {
  using acc = Element<V>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  const double count = one_row ? strip.steps * width + strip.tail : strip.steps;
  const scalar_t* rest = x + strip.steps * strip.stride;

  double total[width] = {};
  add_sums<V, U>(x, strip.steps, strip.stride, total);
  if constexpr (one_row) {
    gather<width>(total);
    add_sums<acc, 1>(rest, strip.tail, 1, total);
  }
  for (int row = 0; row < rows; ++row) normal.mean[row] = static_cast<acc>(total[row] / count);

  double left[width] = {}, square[width] = {};
  add_centred<V, U, one_row>(x, strip.steps, strip.stride, normal.mean, left, square);
  if constexpr (one_row) {
    gather<width>(left);
    gather<width>(square);
    add_centred<acc, 1, true>(rest, strip.tail, 1, normal.mean, left, square);
  }
  for (int row = 0; row < rows; ++row) {
    const double left_out = left[row] / count;
    normal.keep(row, normal.mean[row] + left_out, square[row] / count - left_out * left_out, eps);
  }
}

template <class V, int U, bool one_row, class scalar_t>
void careful_strip(const Arguments& arguments, const Strip<scalar_t>& strip) {
  using acc = Element<V>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  normalise<V, U, one_row>(strip.s, strip, arguments.eps, normal_of<acc>(arguments, kStudent, strip.row));
  normalise<V, U, one_row>(strip.t, strip, arguments.eps, normal_of<acc>(arguments, kTeacher, strip.row));

  double square[width] = {}, with_s[width] = {}, with_t[width] = {};
  add_errors<V, U, one_row>(arguments, strip, square, with_s, with_t);
  if constexpr (one_row) {
    gather<width>(square);
    gather<width>(with_s);
    gather<width>(with_t);
    add_errors<acc, 1, true>(arguments, strip.rest(1), square, with_s, with_t);
  }
  const double count = one_row ? strip.steps * width + strip.tail : strip.steps;
  acc* moments = static_cast<acc*>(arguments.moments) + strip.row;
  for (int row = 0; row < rows; ++row) {
    moments[kSlopeS * arguments.rows + row] = static_cast<acc>(with_s[row] / count);
    moments[kSlopeT * arguments.rows + row] = static_cast<acc>(with_t[row] / count);
    arguments.row_errors[strip.row + row] = square[row];
  }
}

// One pass.

// Guess of the mean of each row: the mean of eight elements, exact if all are equal. x[cell * stride + row].
template <class acc, class scalar_t>
FASTKD_INLINE acc guess_mean(const scalar_t* x, int64_t cells, int64_t stride) {
  const acc first = load<acc>(x + cells / 16 * stride);
  acc sum = 0;
  for (int64_t sample = 1; sample < 8; ++sample) sum += load<acc>(x + cells * (2 * sample + 1) / 16 * stride) - first;
  return first + sum / 8;
}

// total[sum * sums_stride + lane] += the five sums
template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_products(const Strip<scalar_t>& strip, const Element<V>* guess_s, const Element<V>* guess_t,
                                double* total, int64_t sums_stride) {
  constexpr int64_t kSteps = 64;  // sums in float
  V c_s[U], c_t[U];
  spread<V, U, one_row>(guess_s, c_s);
  spread<V, U, one_row>(guess_t, c_t);
  for (int64_t first = 0; first < strip.steps; first += kSteps) {
    const int64_t last = first + kSteps < strip.steps ? first + kSteps : strip.steps;
    V sum[kSums][U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const int64_t at = step * strip.stride + u * kLanes<V>;
        const V x = load<V>(strip.s + at) - c_s[u], y = load<V>(strip.t + at) - c_t[u];
        sum[kX][u] += x;
        sum[kY][u] += y;
        sum[kXX][u] = multiply_add(x, x, sum[kXX][u]);
        sum[kYY][u] = multiply_add(y, y, sum[kYY][u]);
        sum[kXY][u] = multiply_add(x, y, sum[kXY][u]);
      }
    for (int k = 0; k < kSums; ++k) flush<V, U>(sum[k], total + k * sums_stride);
  }
}

// Moments and error of a row from its five sums with stride sums_stride. False if they cancel too much.
template <class acc>
FASTKD_INLINE bool finish_row(const Arguments& arguments, int64_t row, const double* sums, int64_t sums_stride,
                              double count, acc guess_s, acc guess_t) {
  const double x = sums[kX * sums_stride] / count, y = sums[kY * sums_stride] / count;
  const double xx = sums[kXX * sums_stride] / count, yy = sums[kYY * sums_stride] / count;
  const double variance_s = xx - x * x, variance_t = yy - y * y;
  if (!(xx <= kMostCancelled * variance_s && yy <= kMostCancelled * variance_t)) return false;
  const double scale_s = normal_of<acc>(arguments, kStudent, row).keep(0, guess_s + x, variance_s, arguments.eps);
  const double scale_t = normal_of<acc>(arguments, kTeacher, row).keep(0, guess_t + y, variance_t, arguments.eps);
  const double aa = variance_s * scale_s * scale_s, bb = variance_t * scale_t * scale_t;
  const double ab = (sums[kXY * sums_stride] / count - x * y) * scale_s * scale_t, ee = aa + bb - 2 * ab;
  if (!(aa + bb <= kMostCancelled * ee)) return false;
  acc* moments = static_cast<acc*>(arguments.moments) + row;
  moments[kSlopeS * arguments.rows] = static_cast<acc>(aa - ab);
  moments[kSlopeT * arguments.rows] = static_cast<acc>(ab - bb);
  arguments.row_errors[row] = ee * count;
  return true;
}

template <class V, int U, class scalar_t>
void forward_row(const Arguments& arguments, const scalar_t* s, const scalar_t* t, int64_t cells, int64_t row) {
  using acc = Element<V>;
  constexpr int lanes = kLanes<V>, width = U * lanes;
  const Strip<scalar_t> strip{s, t, nullptr, nullptr, cells / width, width, cells % width, row};
  const Strip<scalar_t> vectors = strip.rest(lanes);
  const acc guess_s = guess_mean<acc>(s, cells, 1), guess_t = guess_mean<acc>(t, cells, 1);
  double sums[kSums * width] = {};
  add_products<V, U, true>(strip, &guess_s, &guess_t, sums, width);
  add_products<V, 1, true>(vectors, &guess_s, &guess_t, sums, width);
  for (int k = 0; k < kSums; ++k) gather<width>(sums + k * width);
  add_products<acc, 1, true>(vectors.rest(1), &guess_s, &guess_t, sums, width);
  if (!finish_row(arguments, row, sums, width, static_cast<double>(cells), guess_s, guess_t))
    careful_strip<V, U, true>(arguments, strip);
}

template <class V, int U, bool one_row, bool for_s, bool for_t, bool past_caches, class scalar_t>
FASTKD_INLINE void write_gradients(const Arguments& arguments, const Strip<scalar_t>& strip) {
  using acc = Element<V>;
  const NormalVectors<V, U, one_row> student(normal_of<acc>(arguments, kStudent, strip.row));
  const NormalVectors<V, U, one_row> teacher(normal_of<acc>(arguments, kTeacher, strip.row));
  V slope_s[U], slope_t[U];
  spread<V, U, one_row>(static_cast<acc*>(arguments.moments) + kSlopeS * arguments.rows + strip.row, slope_s);
  spread<V, U, one_row>(static_cast<acc*>(arguments.moments) + kSlopeT * arguments.rows + strip.row, slope_t);
  const acc factor = static_cast<acc>(arguments.factor);
  for (int64_t step = 0; step < strip.steps; ++step)
    for (int u = 0; u < U; ++u) {
      const int64_t at = step * strip.stride + u * kLanes<V>;
      const auto [a, b, e] = errors(load<V>(strip.s + at), load<V>(strip.t + at), student, teacher, u);
      if constexpr (for_s) put<past_caches>(strip.grad_s + at, V((e - slope_s[u] * a) * (student.scale[u] * factor)));
      if constexpr (for_t) put<past_caches>(strip.grad_t + at, V((slope_t[u] * b - e) * (teacher.scale[u] * factor)));
    }
}

template <class V, int U, bool one_row, bool past_caches, class scalar_t>
FASTKD_INLINE void backward_strip(const Arguments& arguments, const Strip<scalar_t>& strip) {
  if (strip.grad_s != nullptr && strip.grad_t != nullptr) {
    write_gradients<V, U, one_row, true, true, past_caches>(arguments, strip);
  } else if (strip.grad_s != nullptr) {
    write_gradients<V, U, one_row, true, false, past_caches>(arguments, strip);
  } else if (strip.grad_t != nullptr) {
    write_gradients<V, U, one_row, false, true, past_caches>(arguments, strip);
  }
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
