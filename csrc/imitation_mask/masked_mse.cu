// masked_mse on the GPU, as csrc/imitation_mask/masked_mse.cpp: all levels in one launch, both memory formats.
//
// An image of a level is a matrix of dense rows, [C, cells] or, channels-last, [cells, C]. A block processes a tile of
// it: flags are loaded to shared memory as bits, once for all rows (or columns), and each warp processes a row at a
// time.
//   forward   reads the 16-byte packs of student and teacher that contain a masked element, and no others
//   backward  reads those again, writes the gradient once: 2 grad (student - teacher), 0 outside the mask
//   traffic   2 n times the fraction of packs with a masked element, backward n more; a flag is read once per 32
//             channels (channels-last: 512)
// Values outside the mask are not used, so infinities there do not matter. A thread sums at most 128 squares in float;
// all other sums are in double, in a fixed order, without atomics: deterministic.
#include "common/device_call.h"

#include <tuple>

namespace fastkd {
namespace {

constexpr int kThreads = 256, kTileRows = 32, kTileColumns = 512;
constexpr int kWords = kTileColumns / 32;  // bits of a tile's flags

template <class T>
struct Level {
  Global<const T> student, teacher;
  Global<T> gradient;
  Global<const unsigned char> mask;  // [B, cells]
  int64_t cells, rows, columns;      // rows and columns of an image
  int64_t row_tiles, column_tiles, first_block;
  bool channels_last;
};

template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count;
};

// A block's tile.
template <class T, class index_t>
struct Tile {
  Level<T> level;
  int rows, columns;
  bool counts;  // whether this block counts the flags (one block per set of flags)
  int64_t first_flag;
  int flags;
  index_t offset;  // offset of the first element
  FASTKD_DEVICE explicit Tile(const Levels<T>& levels) {
    int index = 0;
    while (index + 1 < levels.count && blockIdx.x >= levels.level[index + 1].first_block) ++index;
    level = levels.level[index];
    const int64_t inner = blockIdx.x - level.first_block;
    const int64_t column = inner % level.column_tiles * kTileColumns, outer = inner / level.column_tiles;
    const int64_t row = outer % level.row_tiles * kTileRows, image = outer / level.row_tiles;
    rows = static_cast<int>(level.rows - row < kTileRows ? level.rows - row : kTileRows);
    columns = static_cast<int>(level.columns - column < kTileColumns ? level.columns - column : kTileColumns);
    counts = (level.channels_last ? column : row) == 0;
    first_flag = image * level.cells + (level.channels_last ? row : column);
    flags = level.channels_last ? rows : columns;
    offset = static_cast<index_t>((image * level.rows + row) * level.columns + column);
  }
};

// The tile's flags as bits; true if one is set. For all threads of the block.
template <class T, class index_t>
FASTKD_DEVICE bool load_flags(const Tile<T, index_t>& tile, Shared<unsigned> words) {
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < tile.flags; first += kThreads) {
    const int flag = first + threadIdx.x;
    const unsigned word = __ballot_sync(kAllLanes, flag < tile.flags && tile.level.mask[tile.first_flag + flag] != 0);
    if (lane == 0) words[flag / kWarpSize] = word;
  }
  __syncthreads();
  return __ballot_sync(kAllLanes, lane * kWarpSize < tile.flags && words[lane] != 0u) != 0u;
}

// The bits of `count` columns from `first` on, or, channels-last, whether the row is masked.
FASTKD_DEVICE unsigned bits_of(Shared<unsigned> words, int first, int count) {
  const int word = first / 32, shift = first % 32;
  unsigned bits = words[word] >> shift;
  if (shift + count > 32) bits |= words[word + 1] << (32 - shift);
  return bits & ((1u << count) - 1);
}
template <class T, class index_t>
FASTKD_DEVICE unsigned masked(const Tile<T, index_t>& tile, Shared<unsigned> words, int row, int first, int count) {
  if (!tile.level.channels_last) return bits_of(words, first, count);
  return words[0] >> row & 1u ? (1u << count) - 1 : 0u;
}

template <class T>
FASTKD_DEVICE bool aligned_alike(Global<const T> one, Global<const T> other) {
  return address_of<const T>(one) % kPackBytes == address_of<const T>(other) % kPackBytes;
}

// Sums and counts of the blocks: partial [2, blocks].
template <class T, class index_t>
FASTKD_KERNEL void forward_kernel(Levels<T> levels, Global<double> partial, int64_t blocks) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(double, scratch, kWarpSize);
  FASTKD_SHARED(unsigned, words, kWords);
  const Tile<T, index_t> tile(levels);
  double total = 0, count = 0;
  if (load_flags(tile, words)) {
    Sum sum = 0;
    for (int row = threadIdx.x / kWarpSize; row < tile.rows; row += kThreads / kWarpSize) {
      if (tile.level.channels_last && masked(tile, words, row, 0, 1) == 0) continue;
      const index_t start = tile.offset + static_cast<index_t>(row) * static_cast<index_t>(tile.level.columns);
      const Global<const T> s = tile.level.student + start, t = tile.level.teacher + start;
      const auto whole = [&](int first) {
        const unsigned bits = masked(tile, words, row, first, kPack<T>);
        if (bits == 0) return;
        const Pack<T> left = load_pack(s + first), right = load_pack(t + first);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) {
          const Sum e = bits >> j & 1u ? widened<T>(left.value[j]) - widened<T>(right.value[j]) : Sum(0);
          sum += e * e;
        }
      };
      const auto single = [&](int i) {
        if (masked(tile, words, row, i, 1) == 0) return;
        const Sum e = widened<T>(s[i]) - widened<T>(t[i]);
        sum += e * e;
      };
      over_row<T>(s, aligned_alike<T>(s, t), tile.columns, whole, single);
    }
    total = block_sum<double>(sum, scratch);
    if (tile.counts)
      for (int word = 0; word * kWarpSize < tile.flags; ++word) count += __popc(words[word]);
  }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    partial[blocks + blockIdx.x] = count;
  }
}

// One block: the blocks' sums and counts in a fixed order.
template <class Sum>
FASTKD_KERNEL void merge_kernel(Global<const double> partial, int64_t blocks, Global<Sum> error, Global<Sum> cells) {
  FASTKD_SHARED(double, scratch, kWarpSize);
  double total = 0, count = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    total += partial[block];
    count += partial[blocks + block];
  }
  total = block_sum<double>(total, scratch);
  count = block_sum<double>(count, scratch);
  if (threadIdx.x == 0) {
    error[0] = static_cast<Sum>(total);
    cells[0] = static_cast<Sum>(count);
  }
}

template <class T, class index_t>
FASTKD_KERNEL void backward_kernel(Levels<T> levels, Global<const sum_t<T>> grad) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(unsigned, words, kWords);
  const Tile<T, index_t> tile(levels);
  load_flags(tile, words);
  const Sum factor = 2 * grad[0];
  for (int row = threadIdx.x / kWarpSize; row < tile.rows; row += kThreads / kWarpSize) {
    const index_t start = tile.offset + static_cast<index_t>(row) * static_cast<index_t>(tile.level.columns);
    const Global<const T> s = tile.level.student + start, t = tile.level.teacher + start;
    const Global<T> gradient = tile.level.gradient + start;
    const auto whole = [&](int first) {
      const unsigned bits = masked(tile, words, row, first, kPack<T>);
      Pack<T> out;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out.value[j] = static_cast<T>(Sum(0));
      if (bits != 0) {
        const Pack<T> left = load_pack(s + first), right = load_pack(t + first);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          if (bits >> j & 1u)
            out.value[j] = static_cast<T>((widened<T>(left.value[j]) - widened<T>(right.value[j])) * factor);
      }
      store_pack(gradient + first, out);
    };
    const auto single = [&](int i) {
      const bool inside = masked(tile, words, row, i, 1) != 0;
      gradient[i] = static_cast<T>(inside ? (widened<T>(s[i]) - widened<T>(t[i])) * factor : Sum(0));
    };
    over_row<T>(gradient, aligned_alike<T>(gradient, s) && aligned_alike<T>(gradient, t), tile.columns, whole, single);
  }
}

// The tensors of a call, dense in the student's memory order, and their table.
struct Call {
  std::vector<Tensor> student, teacher, masks, gradient;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& mask) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size() && students.size() == mask.size() &&
                        students.size() <= kMaxLevels,
                    "masked_mse: student, teacher and masks must have as many levels, 1 to ", kMaxLevels);
    const Tensor& first = students[0];
    for (size_t index = 0; index < students.size(); ++index) {
      const Tensor &s = students[index], &t = teachers[index], &m = mask[index];
      STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4 && m.dim() == 3, "masked_mse: levels must be [B, C, H, W]");
      for (int64_t dim = 0; dim < 4; ++dim)
        STD_TORCH_CHECK(s.size(dim) == t.size(dim), "masked_mse: student and teacher must have the same shape");
      check_cells("masked_mse", s.size(2), s.size(3));
      STD_TORCH_CHECK(m.size(0) == s.size(0) && m.size(1) == s.size(2) && m.size(2) == s.size(3) &&
                          m.scalar_type() == torch::headeronly::ScalarType::Bool,
                      "masked_mse: masks must be [B, H, W] bool");
      STD_TORCH_CHECK(s.scalar_type() == first.scalar_type() && t.scalar_type() == first.scalar_type(),
                      "masked_mse: levels must have one dtype");
      STD_TORCH_CHECK(is_beside(s, first) && is_beside(t, first) && is_beside(m, first),
                      "masked_mse: levels and masks must be on one device");
      student.push_back(dense(s, is_channels_last(s)));
      teacher.push_back(dense(t, is_channels_last(s)));
      masks.push_back(torch::stable::contiguous(m));
    }
  }

  template <class T>
  Levels<T> levels(int64_t& blocks) const {
    Levels<T> result{};
    blocks = 0;
    for (size_t index = 0; index < student.size(); ++index) {
      const Tensor& s = student[index];
      const int64_t images = s.size(0), channels = s.size(1), cells = s.size(2) * s.size(3);
      if (images * cells == 0) continue;
      Level<T>& level = result.level[result.count++];
      level.student = global<const T>(s);
      level.teacher = global<const T>(teacher[index]);
      level.gradient = gradient.empty() ? Global<T>(nullptr) : output<T>(gradient[index]);
      level.mask = global<const unsigned char>(masks[index]);
      level.channels_last = is_channels_last(s);
      level.cells = cells;
      level.rows = level.channels_last ? cells : channels;
      level.columns = level.channels_last ? channels : cells;
      level.row_tiles = std::max<int64_t>(1, (level.rows + kTileRows - 1) / kTileRows);  // flags are counted without channels too
      level.column_tiles = (level.columns + kTileColumns - 1) / kTileColumns;
      level.first_block = blocks;
      blocks += images * level.row_tiles * level.column_tiles;
    }
    return result;
  }
};

template <class T, class index_t>
std::tuple<Tensor, Tensor> forward_typed(const Call& call) {
  const Tensor& on = call.student[0];
  int64_t blocks = 0;
  const Levels<T> levels = call.levels<T>(blocks);
  const Tensor error = new_tensor(on, {}, kSumType<T>), count = new_tensor(on, {}, kSumType<T>);
  const Tensor partial = new_tensor(on, {2, blocks}, torch::headeronly::ScalarType::Double);
  const Global<double> sums = output<double>(partial);
  launch(on, Grid(blocks), Grid(kThreads), 0, &forward_kernel<T, index_t>, levels, sums, blocks);
  launch(on, Grid(1), Grid(blocks > kThreads ? 1024 : kThreads), 0, &merge_kernel<sum_t<T>>, sums, blocks,
         output<sum_t<T>>(error), output<sum_t<T>>(count));
  return {error, count};
}

template <class T, class index_t>
void backward_typed(const Call& call, const Tensor& grad) {
  int64_t blocks = 0;
  const Levels<T> levels = call.levels<T>(blocks);
  launch(call.student[0], Grid(blocks), Grid(kThreads), 0, &backward_kernel<T, index_t>, levels,
         global<const sum_t<T>>(grad));
}

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                   std::vector<Tensor> masks) {
  const Call call(student, teacher, masks);
  const DeviceScope scope(call.student[0]);
  return by_type("masked_mse", call.student[0], [&](auto value) {
    using T = decltype(value);
    return is_narrow(call.student) ? forward_typed<T, narrow_index>(call) : forward_typed<T, int64_t>(call);
  });
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                             std::vector<Tensor> masks) {
  Call call(student, teacher, masks);
  const DeviceScope scope(call.student[0]);
  for (const Tensor& level : call.student) call.gradient.push_back(torch::stable::empty_like(level));
  by_type("masked_mse_backward", call.student[0], [&](auto value) {
    using T = decltype(value);
    STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == kSumType<T> && is_beside(grad, call.student[0]),
                    "masked_mse_backward: grad must be one number of the error's dtype, on the levels' device");
    is_narrow(call.student) ? backward_typed<T, narrow_index>(call, grad) : backward_typed<T, int64_t>(call, grad);
    return 0;
  });
  return call.gradient;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("masked_mse", TORCH_BOX(&forward));
  library.impl("masked_mse_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
