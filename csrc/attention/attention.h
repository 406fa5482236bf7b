// Shared by instance_attention and attention_mass: a call as plain numbers and pointers (`Call`), the partition of a
// pyramid into tiles of cells, and the copies of keys and values of a tile.
//
// Work is partitioned into splits, runs of whole rows of one image. Splits depend on the shape and the masked rows
// only, not on the number of threads; their partial sums are added in a fixed order. Rows and columns that are masked
// for all queries (bias -inf) are left out of the tiles. A tile has at most kTile cells, from any rows and levels.
#pragma once

#include "common/tile.h"

namespace fastkd {
namespace attention {

// Queries of a head per step if keys are projected, so that their logits and slopes stay in the L1 cache.
constexpr int64_t kChunk = 48;

// Rows of logits per step: enough distance between a store and the next load of shifted data.
constexpr int64_t kRowsTogether = 8;

// One level [images, channels, rows, columns], dense in either memory order.
struct Map {
  const void* data;
  bool channels_last;
};

struct Level {
  Map cells, values;                                // values.data is null in attention_mass
  void* out;                                        // gradient of the values, or the mass; null: not computed
  const void *row_bias, *column_bias, *column_end;  // [images, heads, queries, rows] or columns; end of the latter
  void *grad_row, *grad_column;
  int64_t rows, columns;
  int64_t first_row, first_column;  // rows and columns of the preceding levels
};

struct Split {
  int64_t image, first_row, end_row;  // row indices over all levels
  int64_t first_level, end_level, first_column, columns;
  int64_t partial;  // offset of its sums
};

// void pointers are to acc: float, or double for double.
struct Call {
  const Level* levels;
  const Split* splits;
  const int64_t* image_splits;   // [images + 1]: first split of each image
  const uint8_t* row_open;       // [images, all rows]: whether some query may attend to the row
  const int64_t* open_columns;   // [images, levels, 2]: first and end of the unmasked columns
  const int64_t* chosen;         // [images, heads * queries]: rows head * queries + query in use; null: all
  const int64_t* chosen_count;   // [images]: number of chosen queries
  int64_t level_count, split_count, images, heads, queries, depth, channels, value_depth, all_rows, all_columns;
  bool projected;                // keys are key_weight x, else the cells, the same for all heads
  bool for_keys, for_values;     // backward: gradients of queries, weight and biases; of values
  int cells_type, values_type;   // common/call.h, type_index
  double scale;                  // factor on the logits
  const void *query_data, *weight_data, *grad_data, *output_data;
  void *query_panels, *query_columns, *weight_panels, *grad_panels, *grad_columns;  // operands of the products
  void* partial;
  void *output, *logsumexp, *normal, *delta, *grad_queries, *grad_weight;

  int64_t group() const { return projected ? 1 : heads; }  // heads that share keys and one product
  int64_t most_at_a_time() const { return projected ? kChunk : queries; }
  int64_t count(int64_t image) const { return chosen == nullptr ? queries : chosen_count[image]; }
  // Row of the tables [images * heads * queries, ...] of the n-th query in use.
  int64_t row(int64_t image, int64_t head, int64_t n) const {
    const int64_t place = image * heads * queries + head * queries + n;
    return chosen == nullptr ? place : image * heads * queries + chosen[place];
  }
};

using Step = void (*)(const Call&, int64_t index, void* scratch);

}  // namespace attention
}  // namespace fastkd

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

// Part of a row of a level in a tile.
struct Segment {
  const attention::Level* level;
  int64_t y, x, length, offset;
};

// Consecutive cells in memory.
struct Run {
  const attention::Level* level;
  int64_t cell, length, offset;
};

struct Tile {
  Segment segments[kTile];
  Run runs[kTile];
  int64_t segment_count = 0, run_count = 0, cells = 0;

  void add(const attention::Level* level, int64_t y, int64_t x, int64_t length) {
    const int64_t cell = y * level->columns + x;
    segments[segment_count++] = {level, y, x, length, cells};
    Run* last = runs + run_count - 1;
    if (run_count > 0 && last->level == level && last->cell + last->length == cell) {
      last->length += length;
    } else {
      runs[run_count++] = {level, cell, length, cells};
    }
    cells += length;
  }
  void clear() { segment_count = run_count = cells = 0; }
};

// visit(tile) for the open cells of a split; skip(level, cell, length) for the others.
template <class Visit, class Skip>
FASTKD_INLINE void each_tile(const attention::Call& call, const attention::Split& split, Tile& tile, const Visit& visit,
                             const Skip& skip) {
  tile.clear();
  for (int64_t index = split.first_level; index < split.end_level; ++index) {
    const attention::Level& level = call.levels[index];
    const int64_t* open = call.open_columns + (split.image * call.level_count + index) * 2;
    const int64_t first = split.first_row > level.first_row ? split.first_row - level.first_row : 0;
    const int64_t last = split.end_row - level.first_row < level.rows ? split.end_row - level.first_row : level.rows;
    for (int64_t y = first; y < last; ++y) {
      const bool row_open = call.row_open[split.image * call.all_rows + level.first_row + y] && open[0] < open[1];
      const int64_t begin = row_open ? open[0] : level.columns, end = row_open ? open[1] : level.columns;
      skip(level, y * level.columns, begin);
      skip(level, y * level.columns + end, level.columns - end);
      for (int64_t x = begin; x < end;) {
        const int64_t room = kTile - tile.cells, length = end - x < room ? end - x : room;
        tile.add(&level, y, x, length);
        x += length;
        if (tile.cells == kTile) {
          visit(tile);
          tile.clear();
        }
      }
    }
  }
  if (tile.cells > 0) visit(tile);
}

// Calls f(scalar_t{}) for the type with this index (common/call.h).
template <class acc, class F>
FASTKD_INLINE void with_type(int type, const F& f) {
  if constexpr (std::is_same_v<acc, double>) {
    f(double{});
  } else {
    if (type == 0) f(float{});
    if (type == 2) f(BFloat16{});
    if (type == 3) f(Half{});
  }
}

template <class acc, class scalar_t>
FASTKD_INLINE void widen_row(const scalar_t* in, int64_t length, acc* out) {
  using V = Vector<acc>;
  int64_t i = 0;
  for (; i + kLanes<V> <= length; i += kLanes<V>) store(out + i, load<V>(in + i));
  for (; i < length; ++i) out[i] = load<acc>(in + i);
}

template <class acc, class scalar_t>
FASTKD_INLINE void narrow_row(const acc* in, int64_t length, scalar_t* out) {
  using V = Vector<acc>;
  int64_t i = 0;
  for (; i + kLanes<V> <= length; i += kLanes<V>) store(out + i, load<V>(in + i));
  for (; i < length; ++i) store(out + i, in[i]);
}

// Copies channels first .. first + count of a tile, from a pyramid with `channels`, to by_channel [count, kTile],
// padded with zeros, and by_cell [cells, stride]. Both are always written; callers use one or both.
template <class acc, class scalar_t>
void load_tile(const Tile& tile, attention::Map attention::Level::* side, int64_t image, int64_t channels,
               int64_t first, int64_t count, acc* by_channel, bool want_channel, acc* by_cell, int64_t stride,
               bool want_cell) {
  using V = Vector<acc>;
  for (int64_t index = 0; index < tile.run_count; ++index) {
    const Run& run = tile.runs[index];
    const attention::Map& map = run.level->*side;
    const int64_t cells = run.level->rows * run.level->columns;
    const scalar_t* data = static_cast<const scalar_t*>(map.data) + image * channels * cells;
    acc *rows = by_channel + run.offset, *columns = by_cell + run.offset * stride;
    if (map.channels_last) {
      for (int64_t i = 0; i < run.length; ++i)
        widen_row(data + (run.cell + i) * channels + first, count, columns + i * stride);
      if (want_channel) transpose<V>(columns, stride, run.length, count, rows, kTile);
    } else {
      for (int64_t c = 0; c < count; ++c)
        widen_row(data + (first + c) * cells + run.cell, run.length, rows + c * kTile);
      if (want_cell) transpose<V>(rows, kTile, count, run.length, columns, stride);
    }
  }
  const int64_t padded = round_up(tile.cells, kLanes<V>);
  for (int64_t c = 0; want_channel && c < count; ++c)
    for (int64_t i = tile.cells; i < padded; ++i) by_channel[c * kTile + i] = 0;
}

// Writes by_channel [count, kTile] to channels first .. of `out`; spare: scratch [kTile, stride].
template <class acc, class scalar_t>
void store_tile(const Tile& tile, int64_t image, int64_t channels, int64_t first, int64_t count, const acc* by_channel,
                acc* spare, int64_t stride) {
  for (int64_t index = 0; index < tile.run_count; ++index) {
    const Run& run = tile.runs[index];
    const int64_t cells = run.level->rows * run.level->columns;
    scalar_t* out = static_cast<scalar_t*>(run.level->out) + image * channels * cells;
    const acc* rows = by_channel + run.offset;
    if (run.level->values.channels_last) {
      transpose<Vector<acc>>(rows, kTile, count, run.length, spare, stride);
      for (int64_t i = 0; i < run.length; ++i)
        narrow_row(spare + i * stride, count, out + (run.cell + i) * channels + first);
    } else {
      for (int64_t c = 0; c < count; ++c)
        narrow_row(rows + c * kTile, run.length, out + (first + c) * cells + run.cell);
    }
  }
}

// Writes zeros to `out`, all channels, at cells of a level that no query attends to.
template <class scalar_t>
void store_zeros(const attention::Level& level, int64_t image, int64_t channels, int64_t cell, int64_t length) {
  const int64_t cells = level.rows * level.columns;
  scalar_t* out = static_cast<scalar_t*>(level.out) + image * channels * cells;
  if (level.values.channels_last) {
    set_zero(out + cell * channels, length * channels);
  } else {
    for (int64_t c = 0; c < channels && length > 0; ++c)
      set_zero(out + c * cells + cell, length);
  }
}

// Number of queries whose table rows are prefetched: rows of different queries are not contiguous.
constexpr int64_t kAhead = 4;

// Row bias + column bias of one query at the cells of the tile, padded with -inf to a whole vector. May write up to one
// vector past that, and read as far past the column bias as the table extends.
template <class acc>
FASTKD_INLINE void bias_row(const Tile& tile, int64_t table_row, acc* out) {
  using V = Vector<acc>;
  for (int64_t index = 0; index < tile.segment_count; ++index) {
    const Segment& part = tile.segments[index];
    const attention::Level& level = *part.level;
    const acc* row_bias = static_cast<const acc*>(level.row_bias) + table_row * level.rows + part.y;
    __builtin_prefetch(row_bias + kAhead * level.rows);
    const V row = splat<V>(*row_bias);
    const acc* column = static_cast<const acc*>(level.column_bias) + table_row * level.columns + part.x;
    const int64_t readable = static_cast<const acc*>(level.column_end) - column;
    int64_t i = 0;
    for (; i < part.length && i + kLanes<V> <= readable; i += kLanes<V>) {
      __builtin_prefetch(column + kAhead * level.columns + i);
      store(out + part.offset + i, row + load<V>(column + i));
    }
    for (; i < part.length; ++i) out[part.offset + i] = *row_bias + column[i];
  }
  const int64_t padded = round_up(tile.cells, kLanes<V>);
  for (int64_t i = tile.cells; i < padded; i += kLanes<V>) store(out + i, splat<V>(-__builtin_inf()));
}

// Cache lines to prefetch, a few with each block of the products. The hardware prefetcher predicts neither the stride
// to the next channel of a contiguous map nor the address of a gradient; many prefetches at once would delay other
// loads.
class Lines {
 public:
  void clear() { part_ = count_ = row_ = byte_ = 0; }

  // Adds `length` cells from `cell` on, of channels `first` .. of a contiguous map with `cells` cells.
  void add(const attention::Map& map, int64_t size, int64_t channel, int64_t count, int64_t cells, int64_t cell,
           int64_t length) {
    if (map.channels_last || length <= 0) return;
    parts_[count_++] = {static_cast<const char*>(map.data) + (channel * cells + cell) * size, cells * size, count,
                        length * size};
  }

  // Prefetches the next few lines.
  FASTKD_INLINE void operator()() {
    for (int64_t left = kLines; left > 0 && part_ < count_; --left) {
      const Rows& rows = parts_[part_];
      __builtin_prefetch(rows.data + row_ * rows.stride + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < rows.bytes) continue;
      byte_ = 0;
      if (++row_ < rows.count) continue;
      row_ = 0;
      ++part_;
    }
  }

 private:
  static constexpr int64_t kLines = 9;  // below a core's outstanding loads; a head's products cover its share
  struct Rows {
    const char* data;
    int64_t stride, count, bytes;
  };
  Rows parts_[3];  // cells, values and the values' gradient
  int64_t part_ = 0, count_ = 0, row_ = 0, byte_ = 0;
};

// Buffers of a thread for a tile.
template <class acc>
struct Buffers {
  static constexpr int64_t kLine = 64 / sizeof(acc), kSlack = kLine;
  int64_t cell_stride, key_stride, value_stride;
  acc *cells, *cells_by_cell, *keys, *keys_by_cell, *values, *values_by_cell, *logits, *slopes, *grad_keys,
      *grad_values, *bias;
  int64_t size = 0;

  Buffers(const attention::Call& call, void* memory) {
    const int64_t lines = round_up(call.channels, kLine) / kLine;
    cell_stride = (lines + 1 - lines % 2) * kLine;  // odd: tile.h, kTile
    key_stride = round_up(call.depth, kLine);
    value_stride = round_up(call.value_depth, kLine);
    const int64_t most = call.most_at_a_time() < call.queries ? call.most_at_a_time() : call.queries;
    const int64_t rows = call.group() * most, keys_rows = call.projected ? call.depth : 0;
    acc** const buffers[] = {&cells,          &cells_by_cell, &keys,   &keys_by_cell, &values,
                             &values_by_cell, &logits,        &slopes, &grad_keys,    &grad_values, &bias};
    const int64_t sizes[] = {call.channels * kTile,    kTile * cell_stride,  keys_rows * kTile,
                             keys_rows * key_stride > 0 ? kTile * key_stride : 0,
                             call.value_depth * kTile, kTile * value_stride, rows * kTile,
                             rows * kTile,             keys_rows * kTile,    call.value_depth * kTile,
                             attention::kRowsTogether * kTile};
    for (int i = 0; i < 11; ++i) {
      *buffers[i] = static_cast<acc*>(memory) + size;
      size += round_up(sizes[i] + kSlack, kLine);
    }
  }
};

// Projected keys [depth, kTile] of a head, from the cells in the buffers.
template <class acc>
void tile_keys(const attention::Call& call, const Buffers<acc>& buffers, const Tile& tile, int64_t head, Lines& next) {
  using V = Vector<acc>;
  const acc* panels = static_cast<const acc*>(call.weight_panels) + head * call.depth * call.channels;
  multiply<V, Panels>(panels, call.depth, call.channels, buffers.cells, kTile,
                      round_up(tile.cells, kLanes<V>) / kLanes<V>, buffers.keys, kTile, false, kDepth, next);
}

// Logits without bias, [rows, kTile]: of `rows` queries of a head from `first` on if keys are projected, else of all
// heads. The bias is added to the finished product: a sum starting at the bias would be rounded to its size at each
// step.
template <class acc>
void tile_logits(const attention::Call& call, const Buffers<acc>& buffers, const Tile& tile, int64_t image,
                 int64_t head, int64_t first, int64_t rows, Lines& next) {
  using V = Vector<acc>;
  const int64_t row = (image * call.heads + head) * call.queries + first;
  multiply<V, Panels>(static_cast<const acc*>(call.query_panels) + row * call.depth, rows, call.depth,
                      call.projected ? buffers.keys : buffers.cells, kTile, round_up(tile.cells, kLanes<V>) / kLanes<V>,
                      buffers.logits, kTile, false, kDepth, next);
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
