// The forward pass over the tiles of a split: running maximum m, sum l and output O of every query, and their merging.
// attention_mass runs it without values if no logsumexp is given.
#pragma once

#include "attention/attention.h"

#include <cmath>

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using attention::Call;
using attention::Split;

template <class acc, bool with_values = true>
struct Forward {
  using V = Vector<acc>;
  using B = Buffers<acc>;
  static constexpr int64_t lanes = kLanes<V>;

  static int64_t scratch(const Call& call) { return B(call, nullptr).size; }

  static int64_t vectors(int64_t length) { return round_up(length, lanes) / lanes; }

  // The operands of a group of heads for the products with tiles, chunk by chunk of queries.
  static void prepare(const Call& call, int64_t index, void*) {
    const int64_t image = index / call.heads, head = index % call.heads, d = call.depth;
    const acc* queries = static_cast<const acc*>(call.query_data);
    const int64_t count = call.count(image);
    acc* out = static_cast<acc*>(call.query_panels) + index * call.queries * d;
    if (call.projected) {
      each_chunk(call, count, [&](int64_t first, int64_t size) {
        pack(call, queries, image, head, first, size, out + first * d);
      });
      if (image == 0)
        pack_panels(static_cast<const acc*>(call.weight_data) + head * d * call.channels, call.channels, 1, d,
                    call.channels, static_cast<acc*>(call.weight_panels) + head * d * call.channels);
    } else {
      pack(call, queries, image, head, 0, call.heads * count, out);
    }
  }

  // Calls use(first query, number of queries) for each chunk.
  template <class Use>
  FASTKD_INLINE static void each_chunk(const Call& call, int64_t count, const Use& use) {
    const Parts chunks(count, call.most_at_a_time());
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
      use(chunks.first(chunk), chunks.first(chunk + 1) - chunks.first(chunk));
  }

  // Panels of `rows` queries in use from `first` of a head on; they may extend into the next heads.
  static void pack(const Call& call, const acc* queries, int64_t image, int64_t head, int64_t first, int64_t rows,
                   acc* out) {
    const Parts panels(rows, Panels::kRows);
    const int64_t count = call.count(image);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t begin = first + panels.first(panel), end = first + panels.first(panel + 1);
      for (int64_t step = 0; step < call.depth; ++step)
        for (int64_t m = begin; m < end; ++m)
          *out++ = queries[call.row(image, head + m / count, m % count) * call.depth + step];
    }
  }

  // Prefetches the next tile and the lines of this tile's value gradient: the part of one head, or all of it with the
  // first head if all heads share one product.
  static void foresee(const Call& call, const Tile& tile, int64_t image, int64_t head, Lines& lines) {
    lines.clear();
    if (!call.projected && head > 0) return;
    const Run& run = tile.runs[tile.run_count - 1];
    const int64_t cells = run.level->rows * run.level->columns, next = run.cell + run.length;
    const int64_t length = cells - next < kTile ? cells - next : kTile, heads = call.projected ? 1 : call.heads;
    const auto add = [&](const attention::Map& map, int type, int64_t channels, int64_t cell, int64_t count) {
      const int64_t size = type == 1 ? 8 : type == 0 ? 4 : 2, share = channels * heads / call.heads;
      lines.add(map, size, image * channels + head * share, share, cells, cell, count);
    };
    const int64_t value_channels = call.heads * call.value_depth;
    if (call.for_values)
      add({run.level->out, run.level->values.channels_last}, call.values_type, value_channels, run.cell, run.length);
    add(run.level->cells, call.cells_type, call.channels, next, length);
    if constexpr (with_values) add(run.level->values, call.values_type, value_channels, next, length);
  }

  // Running maximum and sum of a head's queries, and their output with row stride `stride`.
  struct State {
    acc *maximum, *sum, *output;
    int64_t stride;
  };

  static void forward(const Call& call, int64_t index, void* scratch) {
    const Split& split = call.splits[index];
    const B buffers(call, scratch);
    const int64_t rows = call.heads * call.queries, stride = round_up(call.value_depth, lanes);
    acc* maximum = static_cast<acc*>(call.partial) + split.partial;
    acc *sum = maximum + rows, *output = sum + rows;
    for (int64_t row = 0; row < rows; ++row) maximum[row] = -__builtin_inf(), sum[row] = 0;
    set_zero(output, rows * stride);
    Tile tile;
    Lines next;
    const auto visit = [&](const Tile&) __attribute__((always_inline)) {
      load_cells(call, buffers, tile, split.image, false);
      for (int64_t head = 0; head < call.heads; ++head) {
        foresee(call, tile, split.image, head, next);
        if (call.projected) tile_keys(call, buffers, tile, head, next);
        if constexpr (with_values) load_values(call, buffers, tile, split.image, head, false);
        each_chunk(call, call.count(split.image), [&](int64_t first, int64_t count) __attribute__((always_inline)) {
          acc* logits = logits_of(call, buffers, tile, split.image, head, first, count, next);
          const int64_t row = head * call.queries + first;
          const State state{maximum + row, sum + row, output + row * stride, stride};
          soften(call, buffers, tile, split.image, head, first, count, logits, state);
          if constexpr (with_values)
            multiply<V, TileRows>(logits, count, tile.cells, buffers.values_by_cell, buffers.value_stride,
                                  stride / lanes, state.output, stride, true, kShortDepth, next);
        });
      }
    };
    each_tile(call, split, tile, visit, [](const attention::Level&, int64_t, int64_t) {});
  }

  // Logits of `count` queries of a head from `first` on; if all heads share keys, the first head computes all logits.
  FASTKD_INLINE static acc* logits_of(const Call& call, const B& buffers, const Tile& tile, int64_t image, int64_t head,
                                      int64_t first, int64_t count, Lines& next) {
    if (call.projected || head == 0)
      tile_logits(call, buffers, tile, image, head, first, call.projected ? count : call.heads * count, next);
    return buffers.logits + (call.projected ? 0 : head * count * kTile);
  }

  static void load_cells(const Call& call, const B& buffers, const Tile& tile, int64_t image, bool by_cell) {
    with_type<acc>(call.cells_type, [&](auto type) {
      load_tile<acc, decltype(type)>(tile, &attention::Level::cells, image, call.channels, 0, call.channels,
                                     buffers.cells, true, buffers.cells_by_cell, buffers.cell_stride, by_cell);
    });
  }

  static void load_values(const Call& call, const B& buffers, const Tile& tile, int64_t image, int64_t head,
                          bool by_channel) {
    const int64_t dv = call.value_depth;
    with_type<acc>(call.values_type, [&](auto type) {
      load_tile<acc, decltype(type)>(tile, &attention::Level::values, image, call.heads * dv, head * dv, dv,
                                     buffers.values, by_channel, buffers.values_by_cell, buffers.value_stride,
                                     !by_channel);
    });
  }

  // Calls use(first row, number of rows) for kRowsTogether rows at a time, with their biases in the buffer.
  template <class Table, class Use>
  FASTKD_INLINE static void each_rows(const Tile& tile, const B& buffers, int64_t count, const Table& table_row,
                                      const Use& use) {
    for (int64_t first = 0; first < count; first += attention::kRowsTogether) {
      const int64_t rows = count - first < attention::kRowsTogether ? count - first : attention::kRowsTogether;
      for (int64_t n = 0; n < rows; ++n) bias_row(tile, table_row(first + n), buffers.bias + n * kTile);
      use(first, rows);
    }
  }

  // Logits -> exp(logits * scale - new maximum); previous sums are rescaled to the new maximum.
  static void soften(const Call& call, const B& buffers, const Tile& tile, int64_t image, int64_t head,
                     int64_t first, int64_t count, acc* logits, const State& state) {
    const int64_t length = round_up(tile.cells, lanes);
    const V scale = splat<V>(static_cast<acc>(call.scale));
    const auto table_row = [&](int64_t n) { return call.row(image, head, first + n); };
    each_rows(tile, buffers, count, table_row, [&](int64_t begin, int64_t rows) __attribute__((always_inline)) {
      for (int64_t n = 0; n < rows; ++n) {
        acc* row = logits + (begin + n) * kTile;
        const acc* bias = buffers.bias + n * kTile;
        V high = splat<V>(-__builtin_inf());
        for (int64_t i = 0; i < length; i += lanes) {
          const V scaled = (load<V>(row + i) + load<V>(bias + i)) * scale;
          high = larger(scaled, high);
          store(row + i, scaled);
        }
        raise_maximum(state, begin + n, largest_lane(high));
      }
      for (int64_t n = begin; n < begin + rows; ++n) {
        // If all cells were masked so far: exp(-inf - 0) = 0.
        const V base = splat<V>(state.maximum[n] == -__builtin_inf() ? 0 : state.maximum[n]);
        acc* row = logits + n * kTile;
        V total{};
        for (int64_t i = 0; i < length; i += lanes) {
          const V power = exponential(load<V>(row + i) - base);
          total += power;
          store(row + i, power);
        }
        state.sum[n] += sum_lanes(total);
      }
    });
  }

  FASTKD_INLINE static void raise_maximum(const State& state, int64_t n, acc highest) {
    if (!(highest > state.maximum[n])) return;
    const acc factor = lane_exponential(state.maximum[n] - highest);
    acc* output = state.output + n * state.stride;
    state.sum[n] *= factor;
    for (int64_t c = 0; c < state.stride; c += lanes) store(output + c, load<V>(output + c) * factor);
    state.maximum[n] = highest;
  }

  static acc lane_exponential(acc value) { return exponential(splat<V>(value))[0]; }

  // Merges the splits' sums of a head: output and logsumexp.
  static void merge(const Call& call, int64_t index, void*) {
    const int64_t image = index / call.heads, dv = call.value_depth, rows = call.heads * call.queries;
    const int64_t stride = round_up(dv, lanes);
    for (int64_t n = 0; n < call.count(image); ++n) {
      const int64_t row = index % call.heads * call.queries + n;
      acc highest = -__builtin_inf(), total = 0;
      acc* output = call.output == nullptr ? nullptr : static_cast<acc*>(call.output) + (index * call.queries + n) * dv;
      for (int64_t c = 0; c < dv; ++c) output[c] = 0;
      const auto each_split = [&](const auto& use) __attribute__((always_inline)) {
        for (int64_t split = call.image_splits[image]; split < call.image_splits[image + 1]; ++split)
          use(static_cast<const acc*>(call.partial) + call.splits[split].partial);
      };
      each_split([&](const acc* part) { highest = part[row] > highest ? part[row] : highest; });
      const acc base = highest == -__builtin_inf() ? 0 : highest;
      each_split([&](const acc* part) {
        const acc factor = lane_exponential(part[row] - base);
        total += part[rows + row] * factor;
        for (int64_t c = 0; c < dv; ++c) output[c] += part[2 * rows + row * stride + c] * factor;
      });
      bool cells = false;  // without cells the output is 0
      for (int64_t level = 0; level < call.level_count; ++level)
        cells |= call.levels[level].rows * call.levels[level].columns > 0;
      for (int64_t c = 0; cells && c < dv; ++c) output[c] /= total;
      const int64_t table_row = call.row(image, index % call.heads, n);
      static_cast<acc*>(call.logsumexp)[table_row] = static_cast<acc>(base + std::log(static_cast<double>(total)));
      if constexpr (with_values) {
        static_cast<acc*>(call.normal)[2 * table_row] = base;
        static_cast<acc*>(call.normal)[2 * table_row + 1] = 1 / total;
      }
    }
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
