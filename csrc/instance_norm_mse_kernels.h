// The kernels of instance_norm_mse (instance_norm_mse.cpp says what they compute), compiled once per capability.
//
// forward   one sweep over student and teacher gives five sums of x = s - guess, y = t - guess: x, y, x^2, y^2, xy, and
//           with them everything. Where they cancel - the guess far from the mean, or student and teacher nearly equal -
//           a row is done again in three sweeps over the cache (`normalise`, `add_errors`): the mean, the variance about
//           it, and e = IN(s) - IN(t) itself. Rows choose by their own values: deterministic.
// backward  one sweep.
// Layouts   contiguous: a task is some rows; whole vectors of a row, then single elements.
//           channels-last: a lane is a row; a task is some cells with all their channels, worked on in tiles of a few
//           cells, so that memory is read in order; the sums of the tasks are added up afterwards; gradients cell by cell.
#pragma once

#include "instance_norm_mse_strips.h"

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace instance_norm_mse;

template <class scalar_t>
struct Kernels {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kLineVectors = 64 / static_cast<int>(kLanes<V> * sizeof(scalar_t));  // vectors in a cache line
  static constexpr int kVectors = kLineVectors > 2 ? kLineVectors : 2;
  static constexpr int kBlock = kVectors * kLanes<V>;

  static Strip<scalar_t> strip_at(const Level& level, int64_t position) {
    Strip<scalar_t> strip{static_cast<const scalar_t*>(level.student) + position,
                          static_cast<const scalar_t*>(level.teacher) + position, nullptr, nullptr, 0, 0, 0, 0};
    if (level.grad_student != nullptr) strip.grad_s = static_cast<scalar_t*>(level.grad_student) + position;
    if (level.grad_teacher != nullptr) strip.grad_t = static_cast<scalar_t*>(level.grad_teacher) + position;
    return strip;
  }

  // run(block, channel) for all channels: kVectors vectors, single vectors, single channels at a time.
  template <int vectors, class Run>
  static FASTKD_INLINE void channel_blocks(int64_t channels, const Run& run) {
    int64_t channel = 0;
    for (; channel + vectors * kLanes<V> <= channels; channel += vectors * kLanes<V>)
      run(Block<V, vectors>{}, channel);
    for (; channel + kLanes<V> <= channels; channel += kLanes<V>) run(Block<V, 1>{}, channel);
    for (; channel < channels; ++channel) run(Block<acc, 1>{}, channel);
  }

  template <class Lane, int vectors>
  struct Block {
    using V = Lane;
    static constexpr int U = vectors, width = vectors * kLanes<Lane>;
  };

  static void forward(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      const int64_t position = (task->image * level.channels + task->channel) * level.cells;
      const Strip<scalar_t> strip = strip_at(level, position);
      forward_row<V, kVectors>(arguments, strip.s, strip.t, level.cells, task->row);
    }
  }

  static void backward(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      Strip<scalar_t> strip = strip_at(level, (task->image * level.channels + task->channel) * level.cells);
      strip.steps = level.cells / kBlock, strip.stride = kBlock, strip.tail = level.cells % kBlock, strip.row = task->row;
      const Strip<scalar_t> vectors = strip.rest(kLanes<V>);
      backward_strip<V, kVectors, true>(arguments, strip);
      backward_strip<V, 1, true>(arguments, vectors);
      backward_strip<acc, 1, true>(arguments, vectors.rest(1));
    }
  }

  // run(block, strip, channel) for the tiles of a part.
  template <class Run>
  static FASTKD_INLINE void tiles(const Level& level, const Part& part, const Run& run) {
    for (int64_t cell = 0; cell < part.cells; cell += kTile) {
      const int64_t cells = cell + kTile < part.cells ? kTile : part.cells - cell;
      const Strip<scalar_t> tile = strip_at(level, (part.image * level.cells + part.cell + cell) * level.channels);
      channel_blocks<kVectors>(level.channels, [&](auto block, int64_t channel) {
        const int64_t row = part.row + channel;
        run(block, Strip<scalar_t>{tile.s + channel, tile.t + channel, nullptr, nullptr, cells, level.channels, 0, row},
            channel);
      });
    }
  }

  // Before sum_parts: the guesses, where the means will be. A task is an image of a channels-last level.
  static void guess_rows(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      const Strip<scalar_t> image = strip_at(level, task->image * level.cells * level.channels);
      acc* guess_s = normal_of<acc>(arguments, kStudent, task->row).mean;
      acc* guess_t = normal_of<acc>(arguments, kTeacher, task->row).mean;
      for (int64_t channel = 0; channel < level.channels; ++channel) {
        guess_s[channel] = guess_mean<acc>(image.s + channel, level.cells, level.channels);
        guess_t[channel] = guess_mean<acc>(image.t + channel, level.cells, level.channels);
      }
    }
  }

  static void sum_parts(const Arguments& arguments, const Part* part, const Part* end) {
    for (; part != end; ++part) {
      const Level& level = arguments.levels[part->level];
      double* sums = level.sums + (part->image * level.parts + part->number) * kSums * level.channels;
      std::memset(sums, 0, kSums * level.channels * sizeof(double));
      const acc* guess_s = normal_of<acc>(arguments, kStudent, part->row).mean;
      const acc* guess_t = normal_of<acc>(arguments, kTeacher, part->row).mean;
      tiles(level, *part, [&](auto block, const Strip<scalar_t>& strip, int64_t channel) {
        using B = decltype(block);
        add_products<typename B::V, B::U, false>(strip, guess_s + channel, guess_t + channel, sums + channel,
                                                 level.channels);
      });
    }
  }

  // After sum_parts: a task is an image of a channels-last level.
  static void finish_rows(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      const int64_t count = kSums * level.channels;
      double* sums = level.sums + task->image * level.parts * count;
      for (int64_t part = 1; part < level.parts; ++part)
        for (int64_t at = 0; at < count; ++at) sums[at] += sums[part * count + at];
      for (int64_t channel = 0; channel < level.channels; ++channel) {
        const int64_t row = task->row + channel;
        const acc guess_s = *normal_of<acc>(arguments, kStudent, row).mean;
        const acc guess_t = *normal_of<acc>(arguments, kTeacher, row).mean;
        if (!finish_row(arguments, row, sums + channel, level.channels, static_cast<double>(level.cells), guess_s,
                        guess_t))
          arguments.row_errors[row] = -1;
      }
    }
  }

  // Some channels of an image of a channels-last level.
  static void careful_rows(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      Strip<scalar_t> image = strip_at(level, task->image * level.cells * level.channels + task->channel);
      image.steps = level.cells, image.stride = level.channels;
      channel_blocks<kVectors>(task->channels, [&](auto block, int64_t channel) {
        using B = decltype(block);
        Strip<scalar_t> strip = image;
        strip.s += channel, strip.t += channel, strip.row = task->row + channel;
        careful_strip<typename B::V, B::U, false>(arguments, strip);
      });
    }
  }

  // The cells in order, so that memory is read in order; what a row needs comes from the cache again for every cell.
  template <bool for_s, bool for_t>
  static void write_parts(const Arguments& arguments, const Part& part) {
    const Level& level = arguments.levels[part.level];
    const Strip<scalar_t> first = strip_at(level, (part.image * level.cells + part.cell) * level.channels);
    for (int64_t cell = 0; cell < part.cells; ++cell)
      channel_blocks<1>(level.channels, [&](auto block, int64_t channel) {
        using B = decltype(block);
        const int64_t at = cell * level.channels + channel;
        Strip<scalar_t> strip{first.s + at, first.t + at, nullptr, nullptr, 1, 0, 0, part.row + channel};
        if constexpr (for_s) strip.grad_s = first.grad_s + at;
        if constexpr (for_t) strip.grad_t = first.grad_t + at;
        write_gradients<typename B::V, B::U, false, for_s, for_t>(arguments, strip);
      });
  }

  static void backward_parts(const Arguments& arguments, const Part* part, const Part* end) {
    for (; part != end; ++part) {
      const Level& level = arguments.levels[part->level];
      if (level.grad_student != nullptr && level.grad_teacher != nullptr) {
        write_parts<true, true>(arguments, *part);
      } else if (level.grad_student != nullptr) {
        write_parts<true, false>(arguments, *part);
      } else if (level.grad_teacher != nullptr) {
        write_parts<false, true>(arguments, *part);
      }
    }
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
