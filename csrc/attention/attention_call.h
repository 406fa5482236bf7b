// Builds an attention::Call from tensors: checks for memory safety, dense copies of unsupported layouts, the partition
// into splits, and the threads.
#pragma once

#include "attention/attention.h"
#include "common/call.h"

#if FASTKD_GENERIC_PASS
#include <atomic>
#include <optional>

namespace fastkd {
namespace attention {

constexpr int64_t kSplitCells = 2048;  // per split, at least: enough splits for many threads, few partial sums
constexpr int64_t kMostSplits = 6;     // per image: the memory of partial sums must not grow with the cells

// Arguments of an op, kept alive while its kernels run.
struct Arguments {
  Call call{};
  std::vector<Level> levels;
  std::vector<Split> splits;
  std::vector<int64_t> image_splits, open_columns;
  std::vector<uint8_t> row_open;
  std::vector<Tensor> held;
  const char* op;
  ScalarType type;

  Arguments(const char* op, const Tensor& queries, const std::vector<Tensor>& cells,
            const std::optional<Tensor>& key_weight, const std::vector<Tensor>& row_bias,
            const std::vector<Tensor>& column_bias, const std::vector<Tensor>* values)
      : op(op), type(queries.scalar_type()) {
    STD_TORCH_CHECK(queries.dim() == 4 && queries.is_cpu() && (type == ScalarType::Float || type == ScalarType::Double),
                    op, ": queries must be [B, G, N, d] float32 or float64 on the CPU");
    const size_t count = cells.size();
    STD_TORCH_CHECK(count > 0 && row_bias.size() == count && column_bias.size() == count &&
                        (values == nullptr || values->size() == count),
                    op, ": levels, values and biases must be of as many levels, at least one");
    call.images = queries.size(0), call.heads = queries.size(1), call.queries = queries.size(2);
    call.depth = queries.size(3), call.projected = key_weight.has_value(), call.scale = 1;
    call.level_count = count;
    STD_TORCH_CHECK(cells[0].dim() == 4, op, ": levels must be [B, C, H, W]");
    call.channels = cells[0].size(1);
    call.cells_type = type_index(cells[0]);
    if (values != nullptr) {
      STD_TORCH_CHECK((*values)[0].dim() == 4 && call.heads > 0 && (*values)[0].size(1) % call.heads == 0, op,
                      ": values must be [B, G * d_v, H, W]");
      call.value_depth = (*values)[0].size(1) / call.heads;
      call.values_type = type_index((*values)[0]);
    }
    call.query_data = small(queries, {call.images, call.heads, call.queries, call.depth}, "queries");
    if (call.projected)
      call.weight_data = small(*key_weight, {call.heads * call.depth, call.channels}, "key_weight");
    STD_TORCH_CHECK(call.projected || call.depth == call.channels, op,
                    ": queries must have the channels of the levels where there is no key_weight");
    for (size_t index = 0; index < count; ++index)
      add_level(cells[index], row_bias[index], column_bias[index], values == nullptr ? nullptr : &(*values)[index]);
    if (type == ScalarType::Double) {
      cut<double>();
    } else {
      cut<float>();
    }
    call.levels = levels.data();
  }

  int64_t element_size() const { return type == ScalarType::Double ? 8 : 4; }
  int64_t line() const { return 64 / element_size(); }
  // Elements of a row of sums, a multiple of the vector length of every capability.
  int64_t padded(int64_t length) const { return (length + line() - 1) / line() * line(); }

  // The data of a contiguous tensor of the queries' dtype and this shape.
  const void* small(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.scalar_type() == type && tensor.is_cpu();
    for (size_t dim = 0; same && dim < shape.size(); ++dim) same = tensor.size(dim) == shape.begin()[dim];
    STD_TORCH_CHECK(same, op, ": ", name, " must fit the queries in shape, dtype and device");
    held.push_back(torch::stable::contiguous(tensor));
    return held.back().const_data_ptr();
  }

  Tensor make(const std::vector<int64_t>& shape) const { return new_tensor(held[0], shape, type); }

  // Allocates memory for this many elements, kept alive with the call.
  void* allocate(int64_t elements) {
    held.push_back(make({elements}));
    return held.back().mutable_data_ptr();
  }

  Map map(const Tensor& level, int64_t channels, int64_t rows, int64_t columns, int dtype, const char* name) {
    STD_TORCH_CHECK(level.dim() == 4 && level.size(0) == call.images && level.size(1) == channels &&
                        level.size(2) == rows && level.size(3) == columns && level.is_cpu(),
                    op, ": ", name, " must be [B, C, H, W] of the same images, channels and cells on the CPU");
    STD_TORCH_CHECK(type_index(level) == dtype && (dtype == 1) == (type == ScalarType::Double), op, ": ", name,
                    " must have one dtype, float64 if and only if the queries have it");
    const bool last = is_channels_last(level);
    held.push_back(dense(level, last));
    return {held.back().const_data_ptr(), last};
  }

  void add_level(const Tensor& cells, const Tensor& row_bias, const Tensor& column_bias, const Tensor* values) {
    STD_TORCH_CHECK(cells.dim() == 4, op, ": levels must be [B, C, H, W]");
    Level level{};
    level.rows = cells.size(2), level.columns = cells.size(3);
    level.first_row = call.all_rows, level.first_column = call.all_columns;
    level.cells = map(cells, call.channels, level.rows, level.columns, call.cells_type, "levels");
    if (values != nullptr)
      level.values =
          map(*values, call.heads * call.value_depth, level.rows, level.columns, call.values_type, "values");
    level.row_bias = small(row_bias, {call.images, call.heads, call.queries, level.rows}, "row_bias");
    level.column_bias = small(column_bias, {call.images, call.heads, call.queries, level.columns}, "column_bias");
    level.column_end = static_cast<const char*>(level.column_bias) + column_bias.numel() * element_size();
    call.all_rows += level.rows;
    call.all_columns += level.columns;
    levels.push_back(level);
  }

  // Which of `length` rows or columns some query may attend to: not -inf in all tables [count, length].
  template <class acc>
  static void find_open(const void* table, int64_t count, int64_t length, uint8_t* open) {
    std::fill(open, open + length, 0);
    const acc* bias = static_cast<const acc*>(table);
    for (int64_t row = 0; row < count && std::find(open, open + length, 0) != open + length; ++row)
      for (int64_t place = 0; place < length; ++place)
        open[place] |= !(bias[row * length + place] == -std::numeric_limits<acc>::infinity());
  }

  // Open rows and columns, and the splits: runs of rows with about kSplitCells open cells.
  template <class acc>
  void cut() {
    const int64_t tables = call.heads * call.queries;
    row_open.resize(call.images * call.all_rows);
    std::vector<uint8_t> columns(call.all_columns);
    image_splits.push_back(0);
    for (int64_t image = 0; image < call.images; ++image) {
      std::vector<int64_t> row_cells;  // open ones
      for (const Level& level : levels) {
        uint8_t* rows = row_open.data() + image * call.all_rows + level.first_row;
        const size_t bytes = image * tables * sizeof(acc);
        find_open<acc>(static_cast<const char*>(level.row_bias) + bytes * level.rows, tables, level.rows, rows);
        find_open<acc>(static_cast<const char*>(level.column_bias) + bytes * level.columns, tables, level.columns,
                       columns.data());
        const auto end = columns.begin() + level.columns, first = std::find(columns.begin(), end, 1);
        int64_t last = level.columns;
        while (last > 0 && !columns[last - 1]) --last;
        open_columns.push_back(first == end ? 0 : first - columns.begin());
        open_columns.push_back(last);
        for (int64_t y = 0; y < level.rows; ++y)
          row_cells.push_back(rows[y] ? open_columns.back() - *(open_columns.end() - 2) : 0);
      }
      add_splits(image, row_cells);
      image_splits.push_back(splits.size());
    }
    call.row_open = row_open.data(), call.open_columns = open_columns.data();
    call.splits = splits.data(), call.image_splits = image_splits.data(), call.split_count = splits.size();
  }

  void add_splits(int64_t image, const std::vector<int64_t>& row_cells) {
    int64_t total = 0, done = 0, first = 0, part = 1;
    for (const int64_t cells : row_cells) total += cells;
    const int64_t parts = std::clamp<int64_t>((total + kSplitCells - 1) / kSplitCells, 1, kMostSplits);
    for (int64_t row = 0; row < call.all_rows; ++row) {
      done += row_cells[row];
      const bool last = row + 1 == call.all_rows;
      if (!last && (part == parts || done * parts < part * total)) continue;
      Split split{image, first, row + 1, 0, 0, 0, 0, 0};
      while (levels[split.first_level].first_row + levels[split.first_level].rows <= first) ++split.first_level;
      split.end_level = split.first_level;
      split.first_column = levels[split.first_level].first_column;
      while (split.end_level < call.level_count && levels[split.end_level].first_row <= row)
        split.columns += levels[split.end_level++].columns;
      splits.push_back(split);
      first = row + 1;
      part = total > 0 ? done * parts / total + 1 : 1;
    }
  }

  int64_t groups() const { return call.images * call.heads / std::max<int64_t>(call.group(), 1); }

  // The operands of the logits, filled by Forward::prepare.
  void prepare(Step step) {
    call.query_panels = allocate(call.images * call.heads * call.queries * call.depth);
    if (call.projected) call.weight_panels = allocate(call.heads * call.depth * call.channels);
    run(step, groups(), call.group(), 0);
  }

  // Allocates sums of this many elements, and as many per column, for each split.
  void allocate_sums(int64_t elements, int64_t elements_a_column) {
    int64_t size = 0;
    for (Split& split : splits) {
      split.partial = size;
      size += padded(elements + elements_a_column * split.columns);
    }
    call.partial = allocate(size);
  }

  // Calls step(call, index, scratch) for all indices, scheduled dynamically over threads; one scratch per thread.
  void run(Step step, int64_t count, int64_t stride, int64_t scratch_elements) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
    if (count == 0) return;
    const int64_t bytes = (scratch_elements * element_size() + 4095) / 4096 * 4096 + 64;
    const Tensor memory = new_tensor(held[0], {scratch_elements > 0 ? threads * bytes : 0}, ScalarType::Byte);
    char* scratch = static_cast<char*>(memory.mutable_data_ptr());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t index; (index = next++) < count;) step(call, index * stride, scratch + thread * bytes);
    });
  }
};

}  // namespace attention
}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
