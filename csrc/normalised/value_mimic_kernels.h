// The kernels of value_mimic (formulas in value_mimic.cpp), compiled once per capability.
//
// A tile is kTile cells of one head, [d, kTile] of both sides, widened, in a buffer that stays in L1. Lanes are cells
// in both layouts, so that sums over channels are sums over registers. Channels-last tiles are transposed when loaded
// and stored. Cells are summed in double, in an order that depends only on the shapes.
#pragma once

#include "common/pyramid.h"
#include "common/reduce.h"
#include "common/transpose.h"

#include <cmath>

namespace fastkd {
namespace value_mimic {

struct Level {
  const void* student;
  const void* teacher;
  const void* mass;
  void* gradient;  // null in forward
  int64_t cells;
  int64_t image_stride, channel_stride, cell_stride;                 // of the values, in elements
  int64_t mass_image_stride, mass_head_stride, mass_cell_stride;
};

// Some cells and heads of an image; `slot` is the index of the first head in Arguments::errors and masses.
struct Part {
  int64_t level, image, head, heads, cell, cells, slot;
};

struct Arguments {
  const Level* levels;
  int64_t heads, depth;  // depth: channels of a head
  double eps;
  double *errors, *masses;  // forward: sums of M * mean((v - t)^2) and of M, per part and head
  const double* factors;    // backward: [B, G] 2 grad / (d max(sum M, 1e-6))
};

struct Table {  // of a dtype
  // buffer: 2 * depth * kTileBytes, of the thread
  using Kernel = void (*)(const Arguments&, const Part* begin, const Part* end, void* buffer);
  Kernel forward, backward;
};

constexpr int64_t kTileBytes = 256;  // of a channel: 64 cells in float

}  // namespace value_mimic
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace value_mimic;

template <class scalar_t>
struct Tiles {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kTile = kTileBytes / sizeof(acc), kLane = kLanes<V>;
  static constexpr int U = kTile / kLane < 2 ? kTile / kLane : 2;  // vectors of cells per step
  static constexpr int64_t kChannels = 32;                         // summed before they are added to the total

  // Cells past the end of the tile are copies of its first cell, with mass 0.
  static FASTKD_INLINE void load_tile(const scalar_t* x, const Level& level, int64_t depth, int64_t cells, acc* tile) {
    if (level.cell_stride == 1 && cells == kTile) {
      for (int64_t channel = 0; channel < depth; ++channel) {
        const scalar_t* from = x + channel * level.channel_stride;
        __builtin_prefetch(from + kTile);
        __builtin_prefetch(from + 2 * kTile - 1);
        for (int at = 0; at < kTile; at += kLane) store(tile + channel * kTile + at, load<V>(from + at));
      }
      return;
    }
    int64_t done = 0;
    if (level.channel_stride == 1) {
      for (; done + kLane <= depth; done += kLane)
        for (int at = 0; at < kTile; at += kLane) {
          V block[kLane];
          for (int row = 0; row < kLane; ++row) {
            const scalar_t* from = x + (at + row < cells ? at + row : 0) * level.cell_stride + done;
            block[row] = load<V>(from);
          }
          transpose(block);
          for (int row = 0; row < kLane; ++row) store(tile + (done + row) * kTile + at, block[row]);
        }
    }
    for (; done < depth; ++done)
      for (int at = 0; at < kTile; ++at)
        tile[done * kTile + at] =
            load<acc>(x + done * level.channel_stride + (at < cells ? at : 0) * level.cell_stride);
  }

  // Whole cache lines of a level that exceeds the caches are written with streaming stores.
  static FASTKD_INLINE bool is_streamed(const scalar_t* row, const Level& level) {
    return is_large(level.image_stride * static_cast<int64_t>(sizeof(scalar_t))) && elements_to_line(row) == 0;
  }

  static FASTKD_INLINE void put_row(scalar_t* row, const Level& level, const acc* values) {
    if (is_streamed(row, level))
      for (int at = 0; at < kTile; at += kLane) stream(row + at, load<V>(values + at));
    else
      for (int at = 0; at < kTile; at += kLane) store(row + at, load<V>(values + at));
  }

  static FASTKD_INLINE void store_tile(scalar_t* x, const Level& level, int64_t depth, int64_t cells, const acc* tile) {
    if (level.cell_stride == 1 && cells == kTile) {
      for (int64_t channel = 0; channel < depth; ++channel)
        put_row(x + channel * level.channel_stride, level, tile + channel * kTile);
      return;
    }
    int64_t done = 0;
    if (level.channel_stride == 1) {
      for (; done + kLane <= depth; done += kLane)
        for (int at = 0; at < cells; at += kLane) {
          V block[kLane];
          for (int row = 0; row < kLane; ++row) block[row] = load<V>(tile + (done + row) * kTile + at);
          transpose(block);
          for (int row = 0; row < kLane && at + row < cells; ++row)
            store(x + (at + row) * level.cell_stride + done, block[row]);
        }
    }
    for (; done < depth; ++done)
      for (int64_t at = 0; at < cells; ++at)
        store(x + done * level.channel_stride + at * level.cell_stride, tile[done * kTile + at]);
  }

  // Prefetches the lines that store_tile will write and that are not cached.
  static FASTKD_INLINE void prefetch_tile(const scalar_t* x, const Level& level, int64_t depth, int64_t cells) {
    constexpr int64_t line = 64 / sizeof(scalar_t);
    const bool by_channel = level.cell_stride == 1;
    const int64_t rows = by_channel ? depth : cells, length = by_channel ? cells : depth;
    const int64_t stride = by_channel ? level.channel_stride : level.cell_stride;
    for (int64_t row = 0; row < rows; ++row) {
      if (by_channel && cells == kTile && is_streamed(x + row * stride, level)) continue;
      for (int64_t at = 0; at < length; at += line) __builtin_prefetch(x + row * stride + at, 1);
    }
  }

  // One lane per cell: x becomes (x - mean) * scale + offset, where offset corrects the rounding error of the mean. v -
  // t is the difference of the large parts plus that of the offsets, which is exact where both sides are nearly equal.
  struct Normal {
    V mean[U], scale[U], offset[U];

    FASTKD_INLINE Normal(const acc* tile, int64_t depth, double eps) {
      V sum[U] = {};
      over_channels(depth, sum, [&](int64_t channel, int u, V (&part)[U]) {
        part[u] += load<V>(tile + channel * kTile + u * kLane);
      });
      const acc count = static_cast<acc>(depth);
      for (int u = 0; u < U; ++u) mean[u] = sum[u] / count;
      V left[2 * U] = {};  // sum of the deviations, then of the squares
      over_channels(depth, left, [&](int64_t channel, int u, V (&part)[2 * U]) {
        const V centred = load<V>(tile + channel * kTile + u * kLane) - mean[u];
        part[u] += centred;
        part[U + u] = multiply_add(centred, centred, part[U + u]);
      });
      for (int u = 0; u < U; ++u) {
        left[u] /= count;
        acc lanes[kLane];
        store(lanes, V(left[U + u] / count - left[u] * left[u]));
        for (int lane = 0; lane < kLane; ++lane)
          lanes[lane] = acc(1) / std::sqrt((lanes[lane] < 0 ? acc(0) : lanes[lane]) + static_cast<acc>(eps));
        scale[u] = load<V>(lanes);
        offset[u] = -left[u] * scale[u];
      }
    }

    FASTKD_INLINE V without_offset(V x, int u) const { return (x - mean[u]) * scale[u]; }
  };

  // total[u] += partial sums by add(channel, u, part), kChannels at a time, so that the error does not grow with depth.
  template <int sums, class Add>
  static FASTKD_INLINE void over_channels(int64_t depth, V (&total)[sums], const Add& add) {
    for (int64_t first = 0; first < depth; first += kChannels) {
      const int64_t last = first + kChannels < depth ? first + kChannels : depth;
      V part[sums] = {};
      for (int64_t channel = first; channel < last; ++channel)
        for (int u = 0; u < U; ++u) add(channel, u, part);
      for (int sum = 0; sum < sums; ++sum) total[sum] += part[sum];
    }
  }

  static FASTKD_INLINE void load_mass(const acc* mass, const Level& level, int64_t cells, acc (&out)[kTile]) {
    for (int at = 0; at < kTile; ++at) out[at] = at < cells ? mass[at * level.mass_cell_stride] : acc(0);
  }

  // Sums of error * mass, and of the mass, over the cells: errors[lane], masses[lane].
  static FASTKD_INLINE void add_errors(const Arguments& arguments, const acc* student, const acc* teacher,
                                       const acc* mass, double* errors, double* masses) {
    const Normal v(student, arguments.depth, arguments.eps), t(teacher, arguments.depth, arguments.eps);
    V square[U] = {};
    over_channels(arguments.depth, square, [&](int64_t channel, int u, V (&part)[U]) {
      const int64_t at = channel * kTile + u * kLane;
      const V e = v.without_offset(load<V>(student + at), u) - t.without_offset(load<V>(teacher + at), u);
      const V error = e + (v.offset[u] - t.offset[u]);
      part[u] = multiply_add(error, error, part[u]);
    });
    V weight[U];
    for (int u = 0; u < U; ++u) {
      weight[u] = load<V>(mass + u * kLane);
      square[u] = square[u] / static_cast<acc>(arguments.depth) * weight[u];
    }
    flush<V, U>(square, errors);
    flush<V, U>(weight, masses);
  }

  // Replaces the student's tile by its gradient and overwrites the teacher's.
  static FASTKD_INLINE void write_gradients(const Arguments& arguments, acc* student, acc* teacher, const acc* mass,
                                            acc factor) {
    const Normal v(student, arguments.depth, arguments.eps), t(teacher, arguments.depth, arguments.eps);
    V slope[U] = {};
    over_channels(arguments.depth, slope, [&](int64_t channel, int u, V (&part)[U]) {
      const int64_t at = channel * kTile + u * kLane;
      const V a = v.without_offset(load<V>(student + at), u), b = t.without_offset(load<V>(teacher + at), u);
      const V value = a + v.offset[u], error = (a - b) + (v.offset[u] - t.offset[u]);
      store(student + at, value);
      store(teacher + at, error);
      part[u] = multiply_add(error, value, part[u]);
    });
    V scale[U];
    for (int u = 0; u < U; ++u) {
      slope[u] /= static_cast<acc>(arguments.depth);
      scale[u] = load<V>(mass + u * kLane) * factor * v.scale[u];
    }
    for (int64_t channel = 0; channel < arguments.depth; ++channel)
      for (int u = 0; u < U; ++u) {
        const int64_t at = channel * kTile + u * kLane;
        const V value = load<V>(student + at), error = load<V>(teacher + at);
        store(student + at, V(multiply_add(-slope[u], value, error) * scale[u]));
      }
  }

  // Calls run(head of the part, offset of the tile in the values, mass, cells, tiles of student and teacher).
  template <class Run>
  static FASTKD_INLINE void tiles(const Arguments& arguments, const Part& part, void* buffer, const Run& run) {
    const Level& level = arguments.levels[part.level];
    acc* student = static_cast<acc*>(buffer);
    acc* teacher = student + arguments.depth * kTile;
    for (int64_t done = 0; done < part.cells; done += kTile)
      for (int64_t head = 0; head < part.heads; ++head) {
        const int64_t cell = part.cell + done, cells = done + kTile < part.cells ? kTile : part.cells - done;
        const int64_t channel = (part.head + head) * arguments.depth;
        const int64_t at = part.image * level.image_stride + channel * level.channel_stride + cell * level.cell_stride;
        load_tile(static_cast<const scalar_t*>(level.student) + at, level, arguments.depth, cells, student);
        load_tile(static_cast<const scalar_t*>(level.teacher) + at, level, arguments.depth, cells, teacher);
        acc mass[kTile];
        load_mass(static_cast<const acc*>(level.mass) + part.image * level.mass_image_stride +
                      (part.head + head) * level.mass_head_stride + cell * level.mass_cell_stride,
                  level, cells, mass);
        run(head, at, cells, mass, student, teacher);
      }
  }

  static void forward(const Arguments& arguments, const Part* part, const Part* end, void* buffer) {
    for (; part != end; ++part) {
      double *errors = arguments.errors + part->slot, *masses = arguments.masses + part->slot;
      for (int64_t head = 0; head < part->heads; ++head) errors[head] = masses[head] = 0;
      tiles(arguments, *part, buffer,
            [&](int64_t head, int64_t, int64_t, const acc* mass, const acc* student, const acc* teacher) {
              double error[U * kLane] = {}, weight[U * kLane] = {};
              for (int first = 0; first < kTile; first += U * kLane)
                add_errors(arguments, student + first, teacher + first, mass + first, error, weight);
              gather<U * kLane>(error);
              gather<U * kLane>(weight);
              errors[head] += error[0];
              masses[head] += weight[0];
            });
    }
  }

  static void backward(const Arguments& arguments, const Part* part, const Part* end, void* buffer) {
    for (; part != end; ++part) {
      const Level& level = arguments.levels[part->level];
      const double* factors = arguments.factors + part->image * arguments.heads + part->head;
      tiles(arguments, *part, buffer,
            [&](int64_t head, int64_t at, int64_t cells, const acc* mass, acc* student, acc* teacher) {
              scalar_t* gradient = static_cast<scalar_t*>(level.gradient) + at;
              prefetch_tile(gradient, level, arguments.depth, cells);
              for (int first = 0; first < kTile; first += U * kLane)
                write_gradients(arguments, student + first, teacher + first, mass + first,
                                static_cast<acc>(factors[head]));
              store_tile(gradient, level, arguments.depth, cells, student);
            });
    }
    end_stream();
  }

  static constexpr Table table() { return {forward, backward}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
