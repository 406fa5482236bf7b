// The kernels of instance_norm_mse (formulas in instance_norm_mse.cpp), compiled once per capability.
//
// forward   one pass over student and teacher computes five sums of x = s - guess, y = t - guess: x, y, x^2, y^2, xy,
//           from which all results follow. If they cancel (the guess is far from the mean, or student and teacher are
//           nearly equal), the row is recomputed in three passes over the cache (`normalise`, `add_errors`): the mean,
//           the variance about it, and e = IN(s) - IN(t). The choice depends only on the row's values: deterministic.
// backward  one pass.
// Layouts   contiguous: a task is some rows; whole vectors of a row, then single elements.
//           channels-last: a lane is a row; a task is some cells with all channels, processed in tiles of a few cells,
//           so that memory is read in order; the sums of the tasks are added afterwards.
#pragma once

#include "normalised/instance_norm_mse_strips.h"

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

  // Calls run(block, channel) for all channels: kVectors vectors, single vectors, then single channels.
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

  // Streaming stores of the gradients: single elements up to the first cache line.
  template <bool past_caches>
  static FASTKD_INLINE void write_row(const Arguments& arguments, Strip<scalar_t> row, int64_t head) {
    const int64_t cells = row.tail;
    row.steps = head, row.stride = 1, row.tail = cells - head;
    const Strip<scalar_t> blocks = row.rest(kBlock), vectors = blocks.rest(kLanes<V>);
    backward_strip<acc, 1, true, false>(arguments, row);
    backward_strip<V, kVectors, true, past_caches>(arguments, blocks);
    backward_strip<V, 1, true, false>(arguments, vectors);
    backward_strip<acc, 1, true, false>(arguments, vectors.rest(1));
  }

  // In reverse order: the data that forward read last is still in the caches.
  static void backward(const Arguments& arguments, const Task* begin, const Task* end) {
    for (const Task* task = end; task != begin;) {
      --task;
      const Level& level = arguments.levels[task->level];
      Strip<scalar_t> row = strip_at(level, (task->image * level.channels + task->channel) * level.cells);
      row.row = task->row, row.tail = level.cells;
      const scalar_t* grad = row.grad_s != nullptr ? row.grad_s : row.grad_t;
      const int64_t head = elements_to_line(grad);
      const bool alike = row.grad_s == nullptr || row.grad_t == nullptr || head == elements_to_line(row.grad_t);
      if (level.large && alike && level.cells > head)
        write_row<true>(arguments, row, head);
      else
        write_row<false>(arguments, row, 0);
    }
    end_stream();
  }

  // Calls run(block, strip, channel) for the tiles of a part.
  template <class Run>
  static FASTKD_INLINE void tiles(const Level& level, const Part& part, const Run& run) {
    for (int64_t cell = 0; cell < part.cells; cell += kTile) {
      const int64_t cells = cell + kTile < part.cells ? kTile : part.cells - cell;
      const Strip<scalar_t> tile = strip_at(level, (part.image * level.cells + part.cell + cell) * level.channels);
      channel_blocks<kVectors>(level.channels, [&](auto block, int64_t channel) {
        const int64_t row = part.row + channel;
        scalar_t* grad_s = tile.grad_s == nullptr ? nullptr : tile.grad_s + channel;
        scalar_t* grad_t = tile.grad_t == nullptr ? nullptr : tile.grad_t + channel;
        const Strip<scalar_t> strip{tile.s + channel, tile.t + channel, grad_s, grad_t, cells, level.channels, 0, row};
        run(block, strip, channel);
      });
    }
  }

  // Before sum_parts: writes the guesses to the memory of the means. A task is an image of a channels-last level.
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

  // After sum_parts. A task is an image of a channels-last level.
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

  template <bool past_caches>
  static void write_part(const Arguments& arguments, const Part& part) {
    tiles(arguments.levels[part.level], part, [&](auto block, const Strip<scalar_t>& strip, int64_t) {
      using B = decltype(block);
      backward_strip<typename B::V, B::U, false, past_caches>(arguments, strip);
    });
  }

  // In reverse order, as `backward`.
  static void backward_parts(const Arguments& arguments, const Part* begin, const Part* end) {
    for (const Part* part = end; part != begin;) {
      --part;
      const Level& level = arguments.levels[part->level];
      const bool lines = level.channels % kBlock == 0 &&
                         elements_to_line(static_cast<scalar_t*>(level.grad_student)) == 0 &&
                         elements_to_line(static_cast<scalar_t*>(level.grad_teacher)) == 0;
      level.large && lines ? write_part<true>(arguments, *part) : write_part<false>(arguments, *part);
    }
    end_stream();
  }

  static constexpr Table table() { return {forward, backward, guess_rows, sum_parts, finish_rows, careful_rows, backward_parts, kBlock}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
