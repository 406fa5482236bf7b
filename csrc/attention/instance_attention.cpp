// instance_attention: N queries attend to all cells of a pyramid, tile by tile; no buffer has size N x S.
//
//   logits = Q K + row bias + column bias, K = key_weight x or x itself; O = softmax(logits) V
// forward   per split: tiles with a running maximum m, sum l and output O, rescaled when m grows; the (m, l, O) of
//           the splits are then merged
// backward  per tile: P = exp(logits - m) / l (not from logsumexp, whose rounding error is common to all P of a query),
//           dV = P^T dO, dP = dO V, dS = P (dP - D), D = dO . O;
//           sums over the tiles: dQ = dS K^T, row and column biases' gradients = dS over columns and rows,
//           dK = dS^T Q of the tile, d key_weight = dK x^T
// Products  per cell, multiply-adds, keys projected: C G d + 2 G d N forward, 2 C G d + 5 G d N backward;
//           keys the cells themselves: G C N + G d N forward, 2 G C N + 2 G d N backward
#include "attention/attention_call.h"
#include "attention/attention_forward.h"

#include <tuple>

namespace fastkd {
namespace instance_attention {

using attention::Step;

struct Table {  // for float, double
  Step prepare, forward, merge;  // attention_forward.h
  Step prepare_backward;         // index: image * heads + head, a multiple of group()
  Step backward;                 // index: split
  Step merge_gradients;          // index: image * heads + head
  Step merge_weight;             // index: row of key_weight
  int64_t (*scratch)(const attention::Call&);
};

}  // namespace instance_attention
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace instance_attention;

template <class acc>
struct Backward {
  using V = Vector<acc>;
  using B = Buffers<acc>;
  using F = Forward<acc>;
  static constexpr int64_t lanes = kLanes<V>;

  static int64_t vectors(int64_t length) { return round_up(length, lanes) / lanes; }

  // The operands of the products with the gradient of the output, and D, of a group of heads, chunk by chunk of
  // queries.
  static void prepare(const Call& call, int64_t index, void*) {
    const int64_t n = call.queries, d = call.depth, dv = call.value_depth;
    for (int64_t head = index; head < index + call.group(); ++head) {
      const acc* grad = static_cast<const acc*>(call.grad_data) + head * n * dv;
      const acc* output = static_cast<const acc*>(call.output_data) + head * n * dv;
      F::each_chunk(call, n, [&](int64_t first, int64_t count) {
        const int64_t row = head * n + first;
        if (call.projected)
          pack_panels(static_cast<const acc*>(call.query_data) + row * d, 1, d, d, count,
                      static_cast<acc*>(call.query_columns) + row * d);
        pack_panels(grad + first * dv, dv, 1, count, dv, static_cast<acc*>(call.grad_panels) + row * dv);
        pack_panels(grad + first * dv, 1, dv, dv, count, static_cast<acc*>(call.grad_columns) + row * dv);
      });
      for (int64_t row = 0; row < n; ++row) {
        // Rounded like the tile's product of grad and values: if one cell has probability 1, the two cancel exactly.
        V sum{};
        for (int64_t c = 0; c < dv; ++c)
          sum = multiply_add(splat<V>(grad[row * dv + c]), splat<V>(output[row * dv + c]), sum);
        static_cast<acc*>(call.delta)[head * n + row] = sum[0];
      }
    }
  }

  // The partial sums of gradients of a split.
  struct Sums {
    acc *queries, *weight, *columns;
    int64_t query_stride, weight_stride, column_count;
    Sums(const Call& call, const Split& split)
        : queries(static_cast<acc*>(call.partial) + split.partial),
          query_stride(round_up(call.depth, lanes)),
          weight_stride(round_up(call.channels, lanes)),
          column_count(split.columns) {
      weight = queries + call.heads * call.queries * query_stride;
      columns = weight + (call.projected ? call.heads * call.depth * weight_stride : 0);
    }
    int64_t size(const Call& call) const { return columns - queries + call.heads * call.queries * column_count; }
  };

  static void backward(const Call& call, int64_t index, void* scratch) {
    const Split& split = call.splits[index];
    const B buffers(call, scratch);
    const Sums sums(call, split);
    if (call.for_keys) {
      set_zero(sums.queries, sums.size(call));
      clear_row_gradients(call, split);
    }
    Tile tile;
    Lines next;
    const auto visit = [&](const Tile&) __attribute__((always_inline)) {
      F::load_cells(call, buffers, tile, split.image, call.for_keys);
      for (int64_t head = 0; head < call.heads; ++head) {
        F::foresee(call, tile, split.image, head, next);
        if (call.projected) tile_keys(call, buffers, tile, head, next);
        if (call.for_keys) F::load_values(call, buffers, tile, split.image, head, true);
        if (call.for_keys && call.projected)
          transpose<V>(buffers.keys, kTile, call.depth, round_up(tile.cells, lanes), buffers.keys_by_cell,
                       buffers.key_stride);
        F::each_chunk(call, call.queries, [&](int64_t first, int64_t count) {
          chunk(call, split, buffers, sums, tile, head, first, count, next);
        });
        if (call.for_values) store_value_gradient(call, buffers, tile, split.image, head);
        if (call.for_keys && call.projected)
          multiply<V, TileRows>(buffers.grad_keys, call.depth, tile.cells, buffers.cells_by_cell, buffers.cell_stride,
                                vectors(call.channels), sums.weight + head * call.depth * sums.weight_stride,
                                sums.weight_stride, true, kDepth, next);
      }
      if (call.for_keys && !call.projected)
        multiply<V, TileRows>(buffers.slopes, call.heads * call.queries, tile.cells, buffers.cells_by_cell,
                              buffers.cell_stride, vectors(call.depth), sums.queries, sums.query_stride, true, kDepth,
                              next);
    };
    each_tile(call, split, tile, visit, [&](const attention::Level& level, int64_t cell, int64_t length) {
      if (!call.for_values) return;
      with_type<acc>(call.values_type, [&](auto type) {
        store_zeros<decltype(type)>(level, split.image, call.heads * call.value_depth, cell, length);
      });
    });
  }

  static void clear_row_gradients(const Call& call, const Split& split) {
    for (int64_t index = split.first_level; index < split.end_level; ++index) {
      const attention::Level& level = call.levels[index];
      const int64_t first = split.first_row > level.first_row ? split.first_row - level.first_row : 0;
      const int64_t last = split.end_row - level.first_row < level.rows ? split.end_row - level.first_row : level.rows;
      for (int64_t row = 0; row < call.heads * call.queries; ++row)
        for (int64_t y = first; y < last; ++y)
          static_cast<acc*>(level.grad_row)[(split.image * call.heads * call.queries + row) * level.rows + y] = 0;
    }
  }

  // Adds the contribution of `count` queries of a head from `first` on to the gradients.
  static void chunk(const Call& call, const Split& split, const B& buffers, const Sums& sums, const Tile& tile,
                    int64_t head, int64_t first, int64_t count, Lines& next) {
    const int64_t d = call.depth, dv = call.value_depth, row = (split.image * call.heads + head) * call.queries + first;
    acc* logits = F::logits_of(call, buffers, tile, split.image, head, first, count, next);
    acc* slopes = buffers.slopes + (logits - buffers.logits);
    probabilities(call, buffers, tile, row, count, logits);
    if (call.for_values)
      multiply<V, Panels>(static_cast<const acc*>(call.grad_columns) + row * dv, dv, count, logits, kTile,
                          vectors(tile.cells), buffers.grad_values, kTile, first > 0, kDepth, next);
    if (!call.for_keys) return;
    multiply<V, Panels>(static_cast<const acc*>(call.grad_panels) + row * dv, count, dv, buffers.values, kTile,
                        vectors(tile.cells), slopes, kTile, false, kDepth, next);
    logit_gradient(call, tile, row, count, logits, slopes);
    bias_gradient(call, split, sums, tile, head, first, count, slopes);
    if (!call.projected) return;
    multiply<V, TileRows>(slopes, count, tile.cells, buffers.keys_by_cell, buffers.key_stride, vectors(d),
                          sums.queries + (head * call.queries + first) * sums.query_stride, sums.query_stride, true);
    multiply<V, Panels>(static_cast<const acc*>(call.query_columns) + row * d, d, count, slopes, kTile,
                        vectors(tile.cells), buffers.grad_keys, kTile, first > 0, kDepth, next);
  }

  static void probabilities(const Call& call, const B& buffers, const Tile& tile, int64_t table_row, int64_t count,
                            acc* logits) {
    const auto row_of = [&](int64_t n) { return table_row + n; };
    F::each_rows(tile, buffers, count, row_of, [&](int64_t first, int64_t rows) __attribute__((always_inline)) {
      for (int64_t n = 0; n < rows; ++n) {
        const acc* normal = static_cast<const acc*>(call.normal) + 2 * row_of(first + n);
        const V maximum = splat<V>(normal[0]), factor = splat<V>(normal[1]);
        acc* row = logits + (first + n) * kTile;
        const acc* bias = buffers.bias + n * kTile;
        for (int64_t i = 0; i < tile.cells; i += lanes)
          store(row + i, exponential(load<V>(row + i) + load<V>(bias + i) - maximum) * factor);
      }
    });
  }

  static void store_value_gradient(const Call& call, const B& buffers, const Tile& tile, int64_t image, int64_t head) {
    const int64_t dv = call.value_depth;
    with_type<acc>(call.values_type, [&](auto type) {
      store_tile<acc, decltype(type)>(tile, image, call.heads * dv, head * dv, dv, buffers.grad_values,
                                      buffers.values_by_cell, buffers.value_stride);
    });
  }

  // slopes: dO V -> P (dO V - D)
  static void logit_gradient(const Call& call, const Tile& tile, int64_t table_row, int64_t count, const acc* logits,
                             acc* slopes) {
    for (int64_t n = 0; n < count; ++n) {
      const V delta = splat<V>(static_cast<const acc*>(call.delta)[table_row + n]);
      for (int64_t i = n * kTile; i < n * kTile + tile.cells; i += lanes)
        store(slopes + i, load<V>(logits + i) * (load<V>(slopes + i) - delta));
    }
  }

  static void bias_gradient(const Call& call, const Split& split, const Sums& sums, const Tile& tile, int64_t head,
                            int64_t first, int64_t count, const acc* slopes) {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t index = 0; index < tile.segment_count; ++index) {
        const Segment& part = tile.segments[index];
        const attention::Level& level = *part.level;
        const acc* slope = slopes + n * kTile + part.offset;
        const int64_t place = head * call.queries + first + n;
        acc* column = sums.columns + place * sums.column_count + level.first_column - split.first_column + part.x;
        acc* row = static_cast<acc*>(level.grad_row) +
                   (split.image * call.heads * call.queries + place) * level.rows + part.y;
        __builtin_prefetch(row + kAhead * level.rows, 1);
        V total{};
        for (int64_t i = 0; i < part.length; i += lanes) {
          V value = load<V>(slope + i);
          // Adding zeros past the segment, possibly to columns of a later query, changes nothing.
          if (i + lanes > part.length) value = first_lanes(value, part.length - i);
          __builtin_prefetch(column + kAhead * sums.column_count + i, 1);
          total += value;
          store(column + i, load<V>(column + i) + value);
        }
        *row += sum_lanes(total);
      }
  }

  // Merges the splits' sums of a head: gradients of queries and column biases.
  static void merge_gradients(const Call& call, int64_t index, void*) {
    const int64_t image = index / call.heads, first = index % call.heads * call.queries;
    for (int64_t n = 0; n < call.queries; ++n) {
      const int64_t row = first + n, table_row = index * call.queries + n;
      acc* queries = static_cast<acc*>(call.grad_queries) + table_row * call.depth;
      for (int64_t c = 0; c < call.depth; ++c) queries[c] = 0;
      for (int64_t l = 0; l < call.level_count; ++l)
        for (int64_t x = 0; x < call.levels[l].columns; ++x)
          static_cast<acc*>(call.levels[l].grad_column)[table_row * call.levels[l].columns + x] = 0;
      for (int64_t s = call.image_splits[image]; s < call.image_splits[image + 1]; ++s) {
        const Split& split = call.splits[s];
        const Sums sums(call, split);
        for (int64_t c = 0; c < call.depth; ++c) queries[c] += sums.queries[row * sums.query_stride + c];
        for (int64_t l = split.first_level; l < split.end_level; ++l) {
          const attention::Level& level = call.levels[l];
          const acc* part = sums.columns + row * sums.column_count + level.first_column - split.first_column;
          acc* columns = static_cast<acc*>(level.grad_column) + table_row * level.columns;
          for (int64_t x = 0; x < level.columns; ++x) columns[x] += part[x];
        }
      }
    }
  }

  static void merge_weight(const Call& call, int64_t row, void*) {
    acc* out = static_cast<acc*>(call.grad_weight) + row * call.channels;
    for (int64_t c = 0; c < call.channels; ++c) out[c] = 0;
    for (int64_t s = 0; s < call.split_count; ++s) {
      const Sums sums(call, call.splits[s]);
      for (int64_t c = 0; c < call.channels; ++c) out[c] += sums.weight[row * sums.weight_stride + c];
    }
  }

  static constexpr Table table() {
    return {F::prepare, F::forward, F::merge, prepare, backward, merge_gradients, merge_weight, F::scratch};
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

FASTKD_KERNEL_TABLES(instance_attention::Table, Backward, float, double)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {
using attention::Arguments;

std::tuple<Tensor, Tensor, Tensor> forward(Tensor queries, std::vector<Tensor> levels, std::optional<Tensor> key_weight,
                                   std::vector<Tensor> row_bias, std::vector<Tensor> column_bias,
                                   std::vector<Tensor> values) {
  Arguments arguments("instance_attention", queries, levels, key_weight, row_bias, column_bias, &values);
  const Table& table = kernels_for<Table>(queries);
  attention::Call& call = arguments.call;
  Tensor output = arguments.make({call.images, call.heads, call.queries, call.value_depth});
  Tensor logsumexp = arguments.make({call.images, call.heads, call.queries});
  Tensor normal = arguments.make({call.images, call.heads, call.queries, 2});
  call.output = output.mutable_data_ptr();
  call.logsumexp = logsumexp.mutable_data_ptr();
  call.normal = normal.mutable_data_ptr();
  arguments.prepare(table.prepare);
  arguments.allocate_sums(call.heads * call.queries * (2 + arguments.padded(call.value_depth)), 0);
  arguments.run(table.forward, call.split_count, 1, table.scratch(call));
  arguments.run(table.merge, call.images * call.heads, 1, 0);
  return {output, logsumexp, normal};
}

// Allocates the gradients of queries, key_weight and biases in this order.
void make_key_gradients(Arguments& arguments, std::vector<Tensor>& gradients) {
  attention::Call& call = arguments.call;
  const auto make = [&](std::initializer_list<int64_t> shape) {
    gradients.push_back(arguments.make(shape));
    return gradients.back().mutable_data_ptr();
  };
  call.grad_queries = make({call.images, call.heads, call.queries, call.depth});
  if (call.projected) call.grad_weight = make({call.heads * call.depth, call.channels});
  for (attention::Level& level : arguments.levels)
    level.grad_row = make({call.images, call.heads, call.queries, level.rows});
  for (attention::Level& level : arguments.levels)
    level.grad_column = make({call.images, call.heads, call.queries, level.columns});
}

// Gradients of queries, key_weight (if given), row and column biases if for_keys; then of the values if for_values.
std::vector<Tensor> backward(Tensor grad, Tensor output, Tensor normal, Tensor queries,
                             std::vector<Tensor> levels, std::optional<Tensor> key_weight,
                             std::vector<Tensor> row_bias, std::vector<Tensor> column_bias,
                             std::vector<Tensor> values, bool for_keys, bool for_values) {
  Arguments arguments("instance_attention_backward", queries, levels, key_weight, row_bias, column_bias, &values);
  const Table& table = kernels_for<Table>(queries);
  attention::Call& call = arguments.call;
  const int64_t rows = call.images * call.heads * call.queries;
  call.for_keys = for_keys, call.for_values = for_values;
  call.grad_data = arguments.small(grad, {call.images, call.heads, call.queries, call.value_depth}, "grad");
  call.output_data = arguments.small(output, {call.images, call.heads, call.queries, call.value_depth}, "output");
  // Written by the forward pass, only read by the backward pass.
  call.normal = const_cast<void*>(arguments.small(normal, {call.images, call.heads, call.queries, 2}, "normal"));
  call.query_columns = arguments.allocate(rows * call.depth);
  call.grad_panels = arguments.allocate(rows * call.value_depth);
  call.grad_columns = arguments.allocate(rows * call.value_depth);
  call.delta = arguments.allocate(rows);
  std::vector<Tensor> gradients;
  if (for_keys) make_key_gradients(arguments, gradients);
  for (size_t index = 0; for_values && index < values.size(); ++index) {
    const bool last = arguments.levels[index].values.channels_last;
    gradients.push_back(torch::stable::empty_like(dense(values[index], last)));
    arguments.levels[index].out = gradients.back().mutable_data_ptr();
  }
  arguments.prepare(table.prepare);
  arguments.run(table.prepare_backward, arguments.groups(), call.group(), 0);
  const int64_t heads = call.heads;
  const int64_t weight_rows = call.projected ? heads * call.depth : 0;
  // One more line after the column sums, to which zeros are added.
  const int64_t sums = heads * call.queries * arguments.padded(call.depth) +
                       weight_rows * arguments.padded(call.channels) + arguments.line();
  arguments.allocate_sums(for_keys ? sums : 0, for_keys ? heads * call.queries : 0);
  arguments.run(table.backward, call.split_count, 1, table.scratch(call));
  if (for_keys) arguments.run(table.merge_gradients, call.images * heads, 1, 0);
  if (for_keys && call.projected) arguments.run(table.merge_weight, heads * call.depth, 1, 0);
  return gradients;
}

}  // namespace

FASTKD_OP("instance_attention",
          "(Tensor queries, Tensor[] levels, Tensor? key_weight, Tensor[] row_bias, Tensor[] column_bias, Tensor[] "
          "values) -> (Tensor, Tensor, Tensor)",
          forward)
FASTKD_OP("instance_attention_backward",
          "(Tensor grad, Tensor output, Tensor normal, Tensor queries, Tensor[] levels, Tensor? key_weight, Tensor[] "
          "row_bias, Tensor[] column_bias, Tensor[] values, bool for_keys, bool for_values) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
