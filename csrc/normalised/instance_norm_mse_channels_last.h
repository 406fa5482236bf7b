// The kernels of instance_norm_mse.cu for channels-last levels; traffic and order of sums are described there.
#pragma once

#include "common/device_channels.h"
#include "normalised/instance_norm_mse_device.h"

namespace fastkd {
namespace {

// The position of a channels-last block: a thread processes `width` channels of one image from `channel` on, and every
// (threads / kWarpSize)-th cell of the chunk, starting at its warp index.
template <class T, int width>
struct Place {
  int level, chunk, cells, first_cell, warp, warps;
  int64_t image, channel, row, offset, chunk_row;  // row and chunk_row of the first channel
  bool inside;
  FASTKD_DEVICE explicit Place(const Levels<T>& levels) {
    const int64_t block = blockIdx.x;
    level = level_of_block(levels, block);
    const Level<T>& mine = levels.level[level];
    const int64_t groups = (levels.channels + kWarpSize * width - 1) / (kWarpSize * width);
    const int64_t inner = block - mine.first_block;
    chunk = static_cast<int>(inner % mine.chunks);
    const int64_t group = inner / mine.chunks % groups;
    image = inner / mine.chunks / groups;
    warp = threadIdx.x / kWarpSize;
    warps = blockDim.x / kWarpSize;
    channel = (group * kWarpSize + threadIdx.x % kWarpSize) * width;
    inside = channel < levels.channels;
    first_cell = chunk * kChunk;
    cells = static_cast<int>(mine.cells - first_cell < kChunk ? mine.cells - first_cell : kChunk);
    row = mine.first_row + image * levels.channels + channel;
    chunk_row = mine.first_chunk_row + (image * mine.chunks + chunk) * levels.channels + channel;
    offset = (image * mine.cells + first_cell) * levels.channels + channel;
  }
};

// The results of chunk_moments_kernel per chunk and channel: the student's mean, its rounding error and the centred
// squares; the same for the teacher; and the centred products of both.
enum Part { kMean, kRest, kSquares, kProducts = 6, kParts };
constexpr double kMostCancelled = 32;  // maximum ratio of the terms to their remainder after cancellation

// partial [kParts, chunk rows]. The chunk is read twice, the second time from a cache.
template <class T, class index_t, int width>
FASTKD_KERNEL void chunk_moments_kernel(Levels<T> levels, Global<sum_t<T>> partial, int64_t chunk_rows) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kThreads * width);
  const Place<T, width> place(levels);
  const Level<T> level = levels.level[place.level];
  const auto start = static_cast<index_t>(place.inside ? place.offset : 0);
  const Global<const T> s = level.student + start, t = level.teacher + start;
  const auto each = [&](auto visit) {
    for (int cell = place.warp; place.inside && cell < place.cells; cell += place.warps) {
      Sum x[width], y[width];
      const index_t at = static_cast<index_t>(cell) * static_cast<index_t>(levels.channels);
      load_channels<T, width>(s + at, x);
      load_channels<T, width>(t + at, y);
#pragma unroll
      for (int j = 0; j < width; ++j) visit(j, x[j], y[j]);
    }
  };
  Sum mean[2][width] = {}, left[2][width] = {}, square[2][width] = {}, product[width] = {};
  each([&](int j, Sum x, Sum y) {
    mean[0][j] += x;
    mean[1][j] += y;
  });
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sum_over_warps<Sum, width>(mean[side], scratch, place.warp, place.warps);
    for (int j = 0; j < width; ++j) mean[side][j] /= place.cells;
  }
  each([&](int j, Sum x, Sum y) {
    const Sum a = x - mean[0][j], b = y - mean[1][j];
    left[0][j] += a;
    left[1][j] += b;
    square[0][j] += a * a;
    square[1][j] += b * b;
    product[j] += a * b;
  });
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sum_over_warps<Sum, width>(left[side], scratch, place.warp, place.warps);
    sum_over_warps<Sum, width>(square[side], scratch, place.warp, place.warps);
  }
  sum_over_warps<Sum, width>(product, scratch, place.warp, place.warps);
  if (place.warp != 0 || !place.inside) return;
#pragma unroll
  for (int j = 0; j < width; ++j) {
    const Global<Sum> out = partial + (place.chunk_row + j);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Sum rest = left[side][j] / place.cells;
      out[(3 * side + kMean) * chunk_rows] = mean[side][j];
      out[(3 * side + kRest) * chunk_rows] = rest;
      out[(3 * side + kSquares) * chunk_rows] = square[side][j] - rest * left[side][j];
    }
    out[kProducts * chunk_rows] = product[j] - left[0][j] / place.cells * left[1][j];
  }
}

// The row of a lane of a merging block, and the chunks of its warp: every kWarps-th.
template <class T>
struct MergedRow {
  Level<T> level;
  int64_t row, first_chunk_row;  // first_chunk_row: of chunk 0, the next chunk's is `channels` on
  int warp;
  bool inside;
  FASTKD_DEVICE explicit MergedRow(const Levels<T>& levels) {
    const int64_t own = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    inside = own < levels.own_rows;
    level = levels.level[inside ? level_of_own_row(levels, own) : 0];
    const int64_t inner = inside ? own - level.first_own : 0;
    row = level.first_row + inner;
    const int64_t image = inner / levels.channels, channel = inner % levels.channels;
    first_chunk_row = level.first_chunk_row + image * level.chunks * levels.channels + channel;
  }
  FASTKD_DEVICE int64_t chunks() const { return inside ? level.chunks : 0; }
};

// One lane per row: merges chunk moments to the row's normals, slopes and error. If the error suffers from
// cancellation, row_errors is set to -1 and the two kernels below recompute it; they skip all other rows.
template <class T>
FASTKD_KERNEL void merge_moments_kernel(Levels<T> levels, Global<const sum_t<T>> partial, int64_t chunk_rows,
                                        Global<sum_t<T>> moments, Global<double> row_errors, double eps) {
  FASTKD_SHARED(double, scratch, 3 * kThreads);
  const MergedRow<T> mine(levels);
  const Level<T>& level = mine.level;
  const int64_t row = mine.row;
  const Global<const sum_t<T>> first = partial + mine.first_chunk_row;
  const auto number = [&](int part, int64_t chunk) {
    return static_cast<double>(first[part * chunk_rows + chunk * levels.channels]);
  };
  const auto count_of = [&](int64_t chunk) {
    const int64_t left = level.cells - chunk * kChunk;
    return static_cast<double>(left < kChunk ? left : kChunk);
  };
  double mean[2] = {}, squares[3] = {};  // squares: of the student, of the teacher, their product
#pragma unroll 4
  for (int64_t chunk = mine.warp; chunk < mine.chunks(); chunk += kWarps)
    for (int side = 0; side < 2; ++side)
      mean[side] += count_of(chunk) * (number(3 * side + kMean, chunk) + number(3 * side + kRest, chunk));
  sum_over_warps<double, 2>(mean, scratch, mine.warp, kWarps);
  for (int side = 0; side < 2; ++side) mean[side] /= level.cells;
#pragma unroll 4
  for (int64_t chunk = mine.warp; chunk < mine.chunks(); chunk += kWarps) {
    double apart[2];
    for (int side = 0; side < 2; ++side) {
      apart[side] = number(3 * side + kMean, chunk) + number(3 * side + kRest, chunk) - mean[side];
      squares[side] += number(3 * side + kSquares, chunk) + count_of(chunk) * apart[side] * apart[side];
    }
    squares[2] += number(kProducts, chunk) + count_of(chunk) * apart[0] * apart[1];
  }
  sum_over_warps<double, 3>(squares, scratch, mine.warp, kWarps);
  if (mine.warp != 0 || !mine.inside) return;
  double scale[2], own_square[2];
  for (int side = 0; side < 2; ++side) {
    const double variance = squares[side] / level.cells;
    scale[side] = 1.0 / sqrt((variance > 0 ? variance : 0.0) + eps);
    own_square[side] = variance * scale[side] * scale[side];
    const auto normal = make_normal<sum_t<T>>(mean[side], 0.0, variance, eps);
    write_normal(moments, levels.rows, row, side == 0 ? kStudent : kTeacher, normal);
  }
  const double both = squares[2] / level.cells * scale[0] * scale[1];
  const double error = own_square[0] + own_square[1] - 2 * both;
  const bool exact = own_square[0] + own_square[1] <= kMostCancelled * error;
  moments[kSlopeS * levels.rows + row] = static_cast<sum_t<T>>(own_square[0] - both);
  moments[kSlopeT * levels.rows + row] = static_cast<sum_t<T>>(both - own_square[1]);
  row_errors[row] = exact ? error * level.cells : -1.0;
}

// e^2, e a and e b of each channel over a chunk: partial [3, chunk rows], if a row of the block needs recomputation.
template <class T, class index_t, int width>
FASTKD_KERNEL void chunk_errors_kernel(Levels<T> levels, Global<const sum_t<T>> moments,
                                       Global<const double> row_errors, Global<sum_t<T>> partial, int64_t chunk_rows) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kThreads * width);
  const Place<T, width> place(levels);
  const Level<T> level = levels.level[place.level];
  bool wanted = false;
  for (int j = 0; place.inside && j < width; ++j) wanted = wanted || row_errors[place.row + j] < 0;
  if (__ballot_sync(kAllLanes, wanted) == 0u) return;  // the same for all warps: they have the same channels
  Sum sums[kErrors][width] = {};
  if (place.inside) {
    Normal<Sum> student[width], teacher[width];
    for (int j = 0; j < width; ++j) {
      student[j] = read_normal<Sum>(moments, levels.rows, place.row + j, kStudent);
      teacher[j] = read_normal<Sum>(moments, levels.rows, place.row + j, kTeacher);
    }
    const Global<const T> s = level.student + static_cast<index_t>(place.offset);
    const Global<const T> t = level.teacher + static_cast<index_t>(place.offset);
    for (int cell = place.warp; cell < place.cells; cell += place.warps) {
      Sum x[width], y[width];
      const index_t at = static_cast<index_t>(cell) * static_cast<index_t>(levels.channels);
      load_channels<T, width>(s + at, x);
      load_channels<T, width>(t + at, y);
      for (int j = 0; j < width; ++j) {
        const Pair<Sum> pair = normalised(x[j], y[j], student[j], teacher[j]);
        sums[kSquare][j] += pair.e * pair.e;
        sums[kWithS][j] += pair.e * pair.a;
        sums[kWithT][j] += pair.e * pair.b;
      }
    }
  }
#pragma unroll
  for (int error = 0; error < kErrors; ++error) {
    sum_over_warps<Sum, width>(sums[error], scratch, place.warp, place.warps);
    if (place.warp != 0 || !place.inside) continue;
    for (int j = 0; j < width; ++j) partial[error * chunk_rows + place.chunk_row + j] = sums[error][j];
  }
}

// One lane per row: merges chunk errors to slopes and error of the rows to recompute.
template <class T>
FASTKD_KERNEL void merge_errors_kernel(Levels<T> levels, Global<const sum_t<T>> partial, int64_t chunk_rows,
                                       Global<sum_t<T>> moments, Global<double> row_errors) {
  FASTKD_SHARED(double, scratch, kErrors * kThreads);
  const MergedRow<T> mine(levels);
  const bool wanted = mine.inside && row_errors[mine.row] < 0;
  if (__ballot_sync(kAllLanes, wanted) == 0u) return;  // the same for all warps: they have the same rows
  double total[kErrors] = {};
  for (int64_t chunk = mine.warp; wanted && chunk < mine.chunks(); chunk += kWarps)
    for (int error = 0; error < kErrors; ++error)
      total[error] += partial[error * chunk_rows + mine.first_chunk_row + chunk * levels.channels];
  sum_over_warps<double, kErrors>(total, scratch, mine.warp, kWarps);  // row_errors may change after its barriers
  if (mine.warp != 0 || !wanted) return;
  moments[kSlopeS * levels.rows + mine.row] = static_cast<sum_t<T>>(total[kWithS] / mine.level.cells);
  moments[kSlopeT * levels.rows + mine.row] = static_cast<sum_t<T>>(total[kWithT] / mine.level.cells);
  row_errors[mine.row] = total[kSquare];
}

// A thread keeps ten values per channel: without launch bounds the compiler uses so many registers that only one block
// fits a multiprocessor. With 64-bit indices one block is accepted, as the index would be spilled.
template <class T, class index_t, int width>
FASTKD_KERNEL FASTKD_LAUNCH_BOUNDS(kThreads, sizeof(index_t) == 8 ? 1 : 2) void backward_chunks_kernel(
    Levels<T> levels, Global<const sum_t<T>> moments, Global<const sum_t<T>> grad, double elements) {
  using Sum = sum_t<T>;
  const Place<T, width> place(levels);
  if (!place.inside) return;
  const Level<T> level = levels.level[place.level];
  Gradient<Sum> gradient[width];
  for (int j = 0; j < width; ++j)
    gradient[j] = Gradient<Sum>(moments, levels.rows, place.row + j, static_cast<Sum>(2.0 * grad[0] / elements));
  const index_t offset = static_cast<index_t>(place.offset);
  for (int cell = place.warp; cell < place.cells; cell += place.warps) {
    Sum x[width], y[width];
    const index_t at = offset + static_cast<index_t>(cell) * static_cast<index_t>(levels.channels);
    load_channels<T, width>(level.student + at, x);
    load_channels<T, width>(level.teacher + at, y);
    Pack<T> out_s, out_t;
    for (int j = 0; j < width; ++j) {
      const Pair<Sum> pair = normalised(x[j], y[j], gradient[j].student, gradient[j].teacher);
      out_s.value[j] = static_cast<T>(gradient[j].of_student(pair));
      out_t.value[j] = static_cast<T>(gradient[j].of_teacher(pair));
    }
    if constexpr (width == 1) {
      if (level.grad_student) level.grad_student[at] = out_s.value[0];
      if (level.grad_teacher) level.grad_teacher[at] = out_t.value[0];
    } else {
      if (level.grad_student) store_pack(level.grad_student + at, out_s);
      if (level.grad_teacher) store_pack(level.grad_teacher + at, out_t);
    }
  }
}

}  // namespace
}  // namespace fastkd
