// Shared by the kernels of instance_norm_mse.cu: the levels of a launch, the moments of a row, its gradient.
#pragma once

#include "common/device_call.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kSumThreads = 1024;  // threads of the block that sums the rows
constexpr int kChunk = 128;  // cells of a channels-last block
// as in instance_norm_mse.cpp
enum Moment { kStudent = 0, kTeacher = 4, kSlopeS = 8, kSlopeT, kMoments };
enum Error { kSquare, kWithS, kWithT, kErrors };

template <class T>
struct Level {
  Global<const T> student, teacher;
  Global<T> grad_student, grad_teacher;  // null: not computed
  int64_t cells, chunks;
  int64_t first_row;        // rows of the preceding levels of the pyramid
  int64_t first_own;        // rows, blocks and rows x chunks of the preceding levels of this launch
  int64_t first_block, first_chunk_row;
};

template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count;
  int64_t rows, own_rows, channels;  // of the pyramid, of the levels of this launch
};

// a = IN(s), b = IN(t) and e = a - b. Equal sides must give exactly 0, so a and b are rounded before the subtraction;
// otherwise the compiler would contract it with one of the products.
template <class Sum>
struct Normal {
  Sum mean, scale, scale_low, offset;
};
template <class Sum>
struct Pair {
  Sum a, b, e;
};

template <class Sum>
FASTKD_DEVICE Normal<Sum> read_normal(Global<const Sum> moments, int64_t rows, int64_t row, int side) {
  return {moments[side * rows + row], moments[(side + 1) * rows + row], moments[(side + 2) * rows + row],
          moments[(side + 3) * rows + row]};
}

template <class Sum>
FASTKD_DEVICE Normal<Sum> make_normal(double mean, double left, double square, double eps) {
  const Sum rounded = static_cast<Sum>(mean);
  const double residual = left + (mean - rounded);  // rounding error of the mean
  const double variance = square > 0 ? square : 0;
  const double scale = 1.0 / sqrt(variance + eps);
  const Sum high = static_cast<Sum>(scale);
  return {rounded, high, static_cast<Sum>(scale - high), static_cast<Sum>(-residual * scale)};
}

template <class Sum>
FASTKD_DEVICE void write_normal(Global<Sum> moments, int64_t rows, int64_t row, int side, const Normal<Sum>& normal) {
  moments[side * rows + row] = normal.mean;
  moments[(side + 1) * rows + row] = normal.scale;
  moments[(side + 2) * rows + row] = normal.scale_low;
  moments[(side + 3) * rows + row] = normal.offset;
}

template <class Sum>
FASTKD_DEVICE Pair<Sum> normalised(Sum s, Sum t, const Normal<Sum>& student, const Normal<Sum>& teacher) {
  const Sum centred_s = s - student.mean, centred_t = t - teacher.mean;
  const Sum a = rounded_product(centred_s, student.scale), b = rounded_product(centred_t, teacher.scale);
  const Sum a_low = centred_s * student.scale_low + student.offset;
  const Sum b_low = centred_t * teacher.scale_low + teacher.offset;
  return {a + a_low, b + b_low, (a - b) + (a_low - b_low)};
}

// The level that a row of this launch, or a block, belongs to.
template <class T>
FASTKD_DEVICE int level_of_own_row(const Levels<T>& levels, int64_t row) {
  int level = 0;
  while (level + 1 < levels.count && row >= levels.level[level + 1].first_own) ++level;
  return level;
}
template <class T>
FASTKD_DEVICE int level_of_block(const Levels<T>& levels, int64_t block) {
  int level = 0;
  while (level + 1 < levels.count && block >= levels.level[level + 1].first_block) ++level;
  return level;
}

template <class Sum>
struct Gradient {
  Normal<Sum> student, teacher;
  Sum slope_s, slope_t, factor;
  Gradient() = default;
  FASTKD_DEVICE Gradient(Global<const Sum> moments, int64_t rows, int64_t row, Sum factor)
      : student(read_normal<Sum>(moments, rows, row, kStudent)),
        teacher(read_normal<Sum>(moments, rows, row, kTeacher)),
        slope_s(moments[kSlopeS * rows + row]),
        slope_t(moments[kSlopeT * rows + row]),
        factor(factor) {}
  FASTKD_DEVICE Sum of_student(const Pair<Sum>& p) const { return (p.e - slope_s * p.a) * (student.scale * factor); }
  FASTKD_DEVICE Sum of_teacher(const Pair<Sum>& p) const { return (slope_t * p.b - p.e) * (teacher.scale * factor); }
};

}  // namespace
}  // namespace fastkd
