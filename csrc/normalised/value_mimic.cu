// value_mimic on the GPU: the formulas of csrc/normalised/value_mimic.cpp, all levels in one launch.
//
// A block processes kTile cells of one head of one image: student and teacher are loaded to shared memory as
// [channel][cell] from either memory format, and each thread normalises one cell.
//   traffic forward: student, teacher, mass once; backward: the same and the gradient once. If rows are whole packs,
//   the
//           threads of the block are distributed over the packs of all rows
// The sums of the blocks are written to a table and added in a fixed order: deterministic.
#include "common/device_call.h"

#include <tuple>

namespace fastkd {
namespace {

constexpr int kTile = 128;  // cells and threads of a block
// Stride between channels in shared memory. Channels-last: neighbouring channels of a cell are in different banks.
// Contiguous: rows are aligned to 16 bytes, for 16-byte accesses.
constexpr int kContiguousStride = kTile + 4;

template <class T>
struct Level {
  Global<const T> student, teacher;
  Global<const sum_t<T>> mass;  // [B, G, H, W] contiguous
  Global<T> gradient;
  int64_t cells, tiles, first_block;
  bool channels_last;
};

template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count, heads, depth;
  double eps;
};

template <class T, class index_t>
struct Place {
  Level<T> level;
  int64_t row;  // image * heads + head
  int first, cells, stride;  // of the tile; stride between channels in shared memory
  index_t offset, step;      // of the first element; stride between dense rows
  FASTKD_DEVICE explicit Place(const Levels<T>& levels) {
    int index = 0;
    while (index + 1 < levels.count && blockIdx.x >= levels.level[index + 1].first_block) ++index;
    level = levels.level[index];
    const int64_t inner = blockIdx.x - level.first_block;
    row = inner / level.tiles;
    first = static_cast<int>(inner % level.tiles) * kTile;
    cells = static_cast<int>(level.cells - first < kTile ? level.cells - first : kTile);
    stride = level.channels_last ? kTile + 1 : kContiguousStride;
    const int64_t image = row / levels.heads, head = row % levels.heads;
    const int64_t channels = static_cast<int64_t>(levels.heads) * levels.depth;
    if (level.channels_last) {
      offset = static_cast<index_t>((image * level.cells + first) * channels + head * levels.depth);
      step = static_cast<index_t>(channels);
    } else {
      offset = static_cast<index_t>(row * levels.depth * level.cells + first);
      step = static_cast<index_t>(level.cells);
    }
  }
};

// The dense rows of a tile: one per channel, or one per cell if channels-last.
struct Rows {
  bool channels_last;
  int rows, count, stride;  // count: elements of a row
  template <class T, class index_t>
  FASTKD_DEVICE Rows(const Place<T, index_t>& place, int depth)
      : channels_last(place.level.channels_last),
        rows(channels_last ? place.cells : depth),
        count(channels_last ? depth : place.cells),
        stride(place.stride) {}
  FASTKD_DEVICE int at(int row, int i) const { return channels_last ? i * stride + row : row * stride + i; }
};

// True if every row of the tile is whole packs, so that the threads of the block can be distributed over the packs of
// all rows: rows are short, and one warp per row would have too few bytes in flight.
template <class T, class index_t>
FASTKD_DEVICE bool is_packed(const Place<T, index_t>& place, const Rows& rows, Global<const T> x) {
  const int step = static_cast<int>(place.step % static_cast<index_t>(kPack<T>));
  return rows.count % kPack<T> == 0 && step == 0 && address_of<const T>(x + place.offset) % kPackBytes == 0;
}

// Copies the elements of a row from i on to and from the tile.
template <class T>
FASTKD_DEVICE void unpack(const Rows& rows, int row, int i, const Pack<T>& pack, Shared<sum_t<T>> tile) {
  using Sum = sum_t<T>;
  if (rows.channels_last) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) tile[rows.at(row, i + j)] = widened<T>(pack.value[j]);
  } else {
#pragma unroll
    for (int first = 0; first < kPack<T>; first += kPack<Sum>) {
      Pack<Sum> part;
#pragma unroll
      for (int j = 0; j < kPack<Sum>; ++j) part.value[j] = widened<T>(pack.value[first + j]);
      store_pack(tile + rows.at(row, i + first), part);
    }
  }
}
template <class T>
FASTKD_DEVICE Pack<T> pack_of(const Rows& rows, int row, int i, Shared<sum_t<T>> tile) {
  using Sum = sum_t<T>;
  Pack<T> pack;
  if (rows.channels_last) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) pack.value[j] = static_cast<T>(Sum(tile[rows.at(row, i + j)]));
  } else {
#pragma unroll
    for (int first = 0; first < kPack<T>; first += kPack<Sum>) {
      const Pack<Sum> part = load_shared_pack<Sum>(tile + rows.at(row, i + first));
#pragma unroll
      for (int j = 0; j < kPack<Sum>; ++j) pack.value[first + j] = static_cast<T>(part.value[j]);
    }
  }
  return pack;
}

// tile[channel * stride + cell] = x
template <class T, class index_t>
FASTKD_DEVICE void load_tile(const Place<T, index_t>& place, int depth, Global<const T> x, Shared<sum_t<T>> tile) {
  constexpr int kBatch = 4;  // loads of a thread in flight
  const Rows rows(place, depth);
  if (is_packed<T, index_t>(place, rows, x)) {
    const int packs = rows.count / kPack<T>, all = rows.rows * packs;
    for (int first = threadIdx.x; first < all; first += kBatch * kTile) {
      Pack<T> batch[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = first + u * kTile, row = item / packs, i = item % packs * kPack<T>;
        if (item < all) batch[u] = load_pack(x + (place.offset + static_cast<index_t>(row) * place.step + i));
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = first + u * kTile, row = item / packs, i = item % packs * kPack<T>;
        if (item >= all) continue;
        unpack<T>(rows, row, i, batch[u], tile);
      }
    }
    return;
  }
  for (int row = threadIdx.x / kWarpSize; row < rows.rows; row += kTile / kWarpSize)
    load_row<T>(x + (place.offset + static_cast<index_t>(row) * place.step), rows.count,
                [&](int i, sum_t<T> value) { tile[rows.at(row, i)] = value; });
}

template <class T, class index_t>
FASTKD_DEVICE void store_tile(const Place<T, index_t>& place, int depth, Shared<sum_t<T>> tile, Global<T> x) {
  const Rows rows(place, depth);
  if (is_packed<T, index_t>(place, rows, x)) {
    const int packs = rows.count / kPack<T>, all = rows.rows * packs;
    for (int item = threadIdx.x; item < all; item += kTile) {
      const int row = item / packs, i = item % packs * kPack<T>;
      store_pack(x + (place.offset + static_cast<index_t>(row) * place.step + i), pack_of<T>(rows, row, i, tile));
    }
    return;
  }
  for (int row = threadIdx.x / kWarpSize; row < rows.rows; row += kTile / kWarpSize)
    store_row<T>(x + (place.offset + static_cast<index_t>(row) * place.step), rows.count,
                 [&](int i) { return sum_t<T>(tile[rows.at(row, i)]); });
}

// The sum of term(channel) over the channels of a cell, in eight partial sums: shorter dependency chains, more precise.
template <class Sum, class Term>
FASTKD_DEVICE Sum sum_channels(int depth, Term term) {
  constexpr int kSums = 8;
  Sum sums[kSums] = {};
  int channel = 0;
  for (; channel + kSums <= depth; channel += kSums) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] += term(channel + j);
  }
  for (; channel < depth; ++channel) sums[0] += term(channel);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// LayerNorm without affine over the channels of a cell: x -> (x - mean) * scale, rounded, so that the difference of
// equal sides is exactly 0.
template <class Sum>
struct Normal {
  Sum mean, scale;
  FASTKD_DEVICE Sum operator()(Sum x) const { return rounded_product(x - mean, scale); }
  FASTKD_DEVICE Normal(Shared<Sum> tile, int depth, int stride, int cell, double eps) {
    mean = sum_channels<Sum>(depth, [&](int channel) { return Sum(tile[channel * stride + cell]); }) / depth;
    const auto centred = [&](int channel) { return tile[channel * stride + cell] - mean; };
    const Sum rest = sum_channels<Sum>(depth, centred) / depth;
    const Sum square = sum_channels<Sum>(depth, [&](int channel) { return centred(channel) * centred(channel); });
    const Sum variance = square / depth - rest * rest;
    mean += rest;
    scale = Sum(1) / sqrt((variance > 0 ? variance : Sum(0)) + static_cast<Sum>(eps));
  }
};

template <class T, class index_t>
FASTKD_KERNEL void forward_kernel(Levels<T> levels, Global<double> partial, int64_t blocks) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(double, scratch, kWarpSize);
  FASTKD_DYNAMIC_SHARED(Sum, tile);
  const Place<T, index_t> place(levels);
  const int depth = levels.depth, stride = place.stride, cell = threadIdx.x;
  const Shared<Sum> student = tile, teacher = tile + depth * stride;
  load_tile<T, index_t>(place, depth, place.level.student, student);
  load_tile<T, index_t>(place, depth, place.level.teacher, teacher);
  __syncthreads();
  double error = 0, mass = 0;
  if (cell < place.cells) {
    mass = place.level.mass[place.row * place.level.cells + place.first + cell];
    const Normal<Sum> v(student, depth, stride, cell, levels.eps), t(teacher, depth, stride, cell, levels.eps);
    const Sum square = sum_channels<Sum>(depth, [&](int channel) {
      const Sum e = v(student[channel * stride + cell]) - t(teacher[channel * stride + cell]);
      return e * e;
    });
    error = mass * square / depth;
  }
  error = block_sum<double>(error, scratch);
  mass = block_sum<double>(mass, scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = error;
    partial[blocks + blockIdx.x] = mass;
  }
}

// One block per (image, head): sums the results of its blocks in order.
template <class T>
FASTKD_KERNEL void merge_kernel(Levels<T> levels, Global<const double> partial, int64_t blocks, Global<sum_t<T>> loss,
                                Global<sum_t<T>> total) {
  FASTKD_SHARED(double, scratch, kWarpSize);
  const int64_t row = blockIdx.x;
  double error = 0, mass = 0;
  for (int index = 0; index < levels.count; ++index) {
    const Level<T>& level = levels.level[index];
    for (int64_t tile = threadIdx.x; tile < level.tiles; tile += blockDim.x) {
      error += partial[level.first_block + row * level.tiles + tile];
      mass += partial[blocks + level.first_block + row * level.tiles + tile];
    }
  }
  error = block_sum<double>(error, scratch);
  mass = block_sum<double>(mass, scratch);
  if (threadIdx.x == 0) {
    loss[row] = static_cast<sum_t<T>>(error / (mass < 1e-6 ? 1e-6 : mass));
    total[row] = static_cast<sum_t<T>>(mass);
  }
}

template <class T, class index_t>
FASTKD_KERNEL void backward_kernel(Levels<T> levels, Global<const sum_t<T>> grad, Global<const sum_t<T>> total) {
  using Sum = sum_t<T>;
  FASTKD_DYNAMIC_SHARED(Sum, tile);
  const Place<T, index_t> place(levels);
  const int depth = levels.depth, stride = place.stride, cell = threadIdx.x;
  const Shared<Sum> student = tile, teacher = tile + depth * stride;
  load_tile<T, index_t>(place, depth, place.level.student, student);
  load_tile<T, index_t>(place, depth, place.level.teacher, teacher);
  __syncthreads();
  if (cell < place.cells) {
    const Normal<Sum> v(student, depth, stride, cell, levels.eps), t(teacher, depth, stride, cell, levels.eps);
    const double whole = total[place.row];
    const Sum mass = place.level.mass[place.row * place.level.cells + place.first + cell];
    const double share = 2.0 * grad[place.row] / (depth * (whole < 1e-6 ? 1e-6 : whole));
    const Sum factor = static_cast<Sum>(share) * mass * v.scale;
    const Sum slope = sum_channels<Sum>(depth, [&](int channel) {
      const Sum value = v(student[channel * stride + cell]);
      return (value - t(teacher[channel * stride + cell])) * value;
    }) / depth;
    for (int channel = 0; channel < depth; ++channel) {
      const Sum value = v(student[channel * stride + cell]), e = value - t(teacher[channel * stride + cell]);
      student[channel * stride + cell] = factor * (e - value * slope);
    }
  }
  __syncthreads();
  store_tile<T, index_t>(place, depth, student, place.level.gradient);
}

// The tensors of a call and their table.
struct Call {
  std::vector<Tensor> student, teacher, mass, gradient;
  int64_t images = 0, heads = 0, depth = 0;
  double eps;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masses,
       double eps)
      : eps(eps) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size() && students.size() == masses.size() &&
                        students.size() <= kMaxLevels && students[0].dim() == 4 && masses[0].dim() == 4,
                    "value_mimic: student, teacher and mass must have as many levels, 1 to ", kMaxLevels);
    images = students[0].size(0), heads = masses[0].size(1);
    STD_TORCH_CHECK(heads > 0 && students[0].size(1) % heads == 0, "value_mimic: heads must divide the channels");
    depth = students[0].size(1) / heads;
    for (size_t index = 0; index < students.size(); ++index) {
      const Tensor &s = students[index], &t = teachers[index], &m = masses[index];
      for (const Tensor* one : {&s, &t, &m})
        STD_TORCH_CHECK(one->dim() == 4 && one->size(0) == images && one->size(2) == s.size(2) &&
                            one->size(3) == s.size(3) && one->size(1) == (one == &m ? heads : heads * depth),
                        "value_mimic: levels must be [B, C, H, W], mass [B, G, H, W], of the same sizes");
      check_cells("value_mimic", s.size(2), s.size(3));
      STD_TORCH_CHECK(s.scalar_type() == students[0].scalar_type() && t.scalar_type() == s.scalar_type(),
                      "value_mimic: values must have one dtype");
      STD_TORCH_CHECK(is_beside(s, students[0]) && is_beside(t, students[0]) && is_beside(m, students[0]),
                      "value_mimic: student, teacher and mass must be on one device");
      student.push_back(dense(s, is_channels_last(s)));
      teacher.push_back(dense(t, is_channels_last(s)));
      mass.push_back(dense(m, false));
    }
  }

  int64_t shared_bytes(int64_t element) const {
    const int64_t bytes = 2 * depth * kContiguousStride * element;
    STD_TORCH_CHECK(bytes <= shared_limit(), "value_mimic: a head of ", depth, " channels needs ", bytes,
                    " bytes of shared memory, this GPU has ", shared_limit(), "; use more heads or the reference");
    return bytes;
  }

  template <class T>
  Levels<T> levels(int64_t& blocks) const {
    Levels<T> result{};
    result.heads = static_cast<int>(heads);
    result.depth = static_cast<int>(depth);
    result.eps = eps;
    blocks = 0;
    for (size_t index = 0; index < student.size(); ++index) {
      STD_TORCH_CHECK(mass[index].scalar_type() == kSumType<T>, "value_mimic: mass must have the dtype of the loss");
      const int64_t cells = student[index].size(2) * student[index].size(3);
      if (cells * images * depth == 0) continue;
      Level<T>& level = result.level[result.count++];
      level.student = global<const T>(student[index]);
      level.teacher = global<const T>(teacher[index]);
      level.mass = global<const sum_t<T>>(mass[index]);
      level.gradient = gradient.empty() ? Global<T>(nullptr) : output<T>(gradient[index]);
      level.cells = cells;
      level.tiles = (cells + kTile - 1) / kTile;
      level.first_block = blocks;
      level.channels_last = is_channels_last(student[index]);
      blocks += images * heads * level.tiles;
    }
    return result;
  }
};

template <class T, class index_t>
std::tuple<Tensor, Tensor> forward_typed(const Call& call) {
  const Tensor& on = call.student[0];
  int64_t blocks = 0;
  const Levels<T> levels = call.levels<T>(blocks);
  const Tensor loss = new_tensor(on, {call.images, call.heads}, kSumType<T>);
  const Tensor total = new_tensor(on, {call.images, call.heads}, kSumType<T>);
  const Tensor partial = new_tensor(on, {2, blocks}, torch::headeronly::ScalarType::Double);
  const Global<double> sums = output<double>(partial);
  launch(on, Grid(blocks), Grid(kTile), call.shared_bytes(sizeof(sum_t<T>)), &forward_kernel<T, index_t>, levels, sums,
         blocks);
  launch(on, Grid(call.images * call.heads), Grid(kTile), 0, &merge_kernel<T>, levels, sums, blocks,
         output<sum_t<T>>(loss), output<sum_t<T>>(total));
  return {loss, total};
}

template <class T, class index_t>
void backward_typed(const Call& call, const Tensor& grad, const Tensor& total) {
  int64_t blocks = 0;
  const Levels<T> levels = call.levels<T>(blocks);
  launch(call.student[0], Grid(blocks), Grid(kTile), call.shared_bytes(sizeof(sum_t<T>)), &backward_kernel<T, index_t>,
         levels, global<const sum_t<T>>(grad), global<const sum_t<T>>(total));
}

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> mass,
                                   double eps) {
  const Call call(student, teacher, mass, eps);
  const DeviceScope scope(call.student[0]);
  return by_type("value_mimic", call.student[0], [&](auto value) {
    using T = decltype(value);
    return is_narrow(call.student) ? forward_typed<T, narrow_index>(call) : forward_typed<T, int64_t>(call);
  });
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                             std::vector<Tensor> mass, Tensor total, double eps) {
  Call call(student, teacher, mass, eps);
  const DeviceScope scope(call.student[0]);
  for (const Tensor* one : {&grad, &total})
    STD_TORCH_CHECK(one->dim() == 2 && one->size(0) == call.images && one->size(1) == call.heads &&
                        one->scalar_type() == call.mass[0].scalar_type() && is_beside(*one, call.student[0]),
                    "value_mimic_backward: grad and total must be [B, G] of the forward call");
  for (const Tensor& level : call.student) call.gradient.push_back(torch::stable::empty_like(level));
  const Tensor grads = torch::stable::contiguous(grad), totals = torch::stable::contiguous(total);
  by_type("value_mimic_backward", call.student[0], [&](auto value) {
    using T = decltype(value);
    is_narrow(call.student) ? backward_typed<T, narrow_index>(call, grads, totals)
                            : backward_typed<T, int64_t>(call, grads, totals);
    return 0;
  });
  return call.gradient;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("value_mimic", TORCH_BOX(&forward));
  library.impl("value_mimic_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
