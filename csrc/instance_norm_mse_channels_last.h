// The kernels of instance_norm_mse.cu for channels-last levels; traffic and order of sums are described there.
#pragma once

#include "device_channels.h"
#include "instance_norm_mse_device.h"

namespace fastkd {
namespace {

// The place of a channels-last block: a thread has `width` channels of one image from `channel` on, and every
// (threads / kWarpSize)-th cell of the chunk from its warp's number on.
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

// Of each channel over a chunk: the mean, what rounding left out of it, and centred squares: partial [6, chunk rows].
template <class T, class index_t, int width>
FASTKD_KERNEL void chunk_moments_kernel(Levels<T> levels, Global<sum_t<T>> partial, int64_t chunk_rows) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kThreads * width);
  const Place<T, width> place(levels);
  const Level<T> level = levels.level[place.level];
  for (int side = 0; side < 2; ++side) {
    const auto start = static_cast<index_t>(place.inside ? place.offset : 0);
    const Global<const T> x = (side == 0 ? level.student : level.teacher) + start;
    Sum mean[width] = {}, square[width] = {}, left[width] = {}, values[width];
    for (int cell = place.warp; place.inside && cell < place.cells; cell += place.warps) {
      load_channels<T, width>(x + static_cast<index_t>(cell) * static_cast<index_t>(levels.channels), values);
      for (int j = 0; j < width; ++j) mean[j] += values[j];
    }
    sum_over_warps<Sum, width>(mean, scratch, place.warp, place.warps);
    for (int j = 0; j < width; ++j) mean[j] /= place.cells;
    for (int cell = place.warp; place.inside && cell < place.cells; cell += place.warps) {
      load_channels<T, width>(x + static_cast<index_t>(cell) * static_cast<index_t>(levels.channels), values);
      for (int j = 0; j < width; ++j) {
        left[j] += values[j] - mean[j];
        square[j] += (values[j] - mean[j]) * (values[j] - mean[j]);
      }
    }
    sum_over_warps<Sum, width>(left, scratch, place.warp, place.warps);
    sum_over_warps<Sum, width>(square, scratch, place.warp, place.warps);
    if (place.warp != 0 || !place.inside) continue;
    for (int j = 0; j < width; ++j) {
      const Sum rest = left[j] / place.cells;
      const Global<Sum> out = partial + (3 * side * chunk_rows + place.chunk_row + j);
      out[0] = mean[j];
      out[chunk_rows] = rest;
      out[2 * chunk_rows] = square[j] - rest * left[j];
    }
  }
}

// One thread a row: chunk moments to the row's normals.
template <class T>
FASTKD_KERNEL void merge_moments_kernel(Levels<T> levels, Global<const sum_t<T>> partial, int64_t chunk_rows,
                                        Global<sum_t<T>> moments, double eps) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (own >= levels.own_rows) return;
  const Level<T> level = levels.level[level_of_own_row(levels, own)];
  const int64_t image = (own - level.first_own) / levels.channels, channel = (own - level.first_own) % levels.channels;
  const int64_t row = level.first_row + own - level.first_own;
  const int64_t first = level.first_chunk_row + image * level.chunks * levels.channels + channel;
  for (int side = 0; side < 2; ++side) {
    const auto each = [&](auto visit) {
      for (int64_t chunk = 0; chunk < level.chunks; ++chunk) {
        const int64_t left = level.cells - chunk * kChunk;
        const int64_t at = 3 * side * chunk_rows + first + chunk * levels.channels;
        visit(static_cast<double>(left < kChunk ? left : kChunk),
              static_cast<double>(partial[at]) + static_cast<double>(partial[at + chunk_rows]),
              static_cast<double>(partial[at + 2 * chunk_rows]));
      }
    };
    double mean = 0, square = 0;
    each([&](double count, double chunk_mean, double) { mean += count * chunk_mean; });
    mean /= level.cells;
    each([&](double count, double chunk_mean, double chunk_square) {
      square += chunk_square + count * (chunk_mean - mean) * (chunk_mean - mean);
    });
    const auto normal = make_normal<sum_t<T>>(mean, 0.0, square / level.cells, eps);
    write_normal(moments, levels.rows, row, side == 0 ? kStudent : kTeacher, normal);
  }
}

// e^2, e a and e b of each channel over a chunk: partial [3, chunk rows].
template <class T, class index_t, int width>
FASTKD_KERNEL void chunk_errors_kernel(Levels<T> levels, Global<const sum_t<T>> moments, Global<sum_t<T>> partial,
                                       int64_t chunk_rows) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kThreads * width);
  const Place<T, width> place(levels);
  const Level<T> level = levels.level[place.level];
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

// One thread a row: chunk errors to the row's slopes and error.
template <class T>
FASTKD_KERNEL void merge_errors_kernel(Levels<T> levels, Global<const sum_t<T>> partial, int64_t chunk_rows,
                                       Global<sum_t<T>> moments, Global<double> row_errors) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (own >= levels.own_rows) return;
  const Level<T> level = levels.level[level_of_own_row(levels, own)];
  const int64_t image = (own - level.first_own) / levels.channels, channel = (own - level.first_own) % levels.channels;
  const int64_t row = level.first_row + own - level.first_own;
  double total[kErrors] = {};
  for (int64_t chunk = 0; chunk < level.chunks; ++chunk) {
    const int64_t at = level.first_chunk_row + (image * level.chunks + chunk) * levels.channels + channel;
    for (int error = 0; error < kErrors; ++error) total[error] += partial[error * chunk_rows + at];
  }
  moments[kSlopeS * levels.rows + row] = static_cast<sum_t<T>>(total[kWithS] / level.cells);
  moments[kSlopeT * levels.rows + row] = static_cast<sum_t<T>>(total[kWithT] / level.cells);
  row_errors[row] = total[kSquare];
}

template <class T, class index_t, int width>
FASTKD_KERNEL void backward_chunks_kernel(Levels<T> levels, Global<const sum_t<T>> moments, Global<const sum_t<T>> grad,
                                          double elements) {
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
