// Shared by instance_norm_mse and its kernels.
#pragma once

#include "common/pyramid.h"

namespace fastkd {
namespace instance_norm_mse {

// For each side mean, scale, scale_low, offset (Normal); then mean(e IN(s)) and mean(e IN(t)).
enum Moment { kStudent = 0, kTeacher = 4, kSlopeS = 8, kSlopeT, kMoments };

enum Sum { kX = 0, kY, kXX, kYY, kXY, kSums };

struct Level {
  const void* student;
  const void* teacher;
  void* grad_student;  // null: not computed
  void* grad_teacher;
  int64_t channels, cells;
  double* sums;  // channels-last forward: [images, parts, kSums, channels]
  int64_t parts;
  bool large;  // see is_large
};

// Cells [cell, cell + cells) of an image of a channels-last level; `row` is the image's first row.
struct Part {
  int64_t level, image, cell, cells, number, row;
};

struct Arguments {
  const Level* levels;
  void* moments;       // [kMoments, rows] of acc_t
  double* row_errors;  // [rows]; -1 marks rows to recompute
  int64_t rows;
  double eps;
  double factor;  // 2 grad / N
};

struct Table {  // of a dtype
  using OnRows = void (*)(const Arguments&, const Task* begin, const Task* end);
  using OnParts = void (*)(const Arguments&, const Part* begin, const Part* end);
  OnRows forward, backward;  // contiguous levels
  OnRows guess_rows;            // channels-last levels, in this order
  OnParts sum_parts;
  OnRows finish_rows, careful_rows;
  OnParts backward_parts;
  int64_t block;  // channels of a task of careful_rows
};

}  // namespace instance_norm_mse
}  // namespace fastkd
