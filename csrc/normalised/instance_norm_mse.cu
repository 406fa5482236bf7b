// instance_norm_mse on the GPU: the formulas of csrc/normalised/instance_norm_mse.cpp, levels of a pyramid together in
// one launch.
//
// contiguous     one block per row; both rows are read once and, if they fit, stay in shared memory for the two later
//                passes, else they are read again (from L2). Levels with long rows have a launch of their own, so that
//                the blocks of short rows ask for little shared memory and fill a multiprocessor
//                traffic forward: 2 n reads, 10 values and an error per row; backward: 2 n reads, n writes per gradient
// channels-last  a block processes kChunk cells of up to 32 packs of channels, a thread one pack; means, centred
//                squares and products of chunks are merged in double (Chan et al.) to the row's moments; rows whose
//                error suffers from cancellation are read a second time to sum the errors directly
//                traffic forward: 2 n reads, seven values per chunk and channel written and read; backward as above
// Sums are in a fixed order, without atomics: deterministic.
#include "normalised/instance_norm_mse_channels_last.h"

#include <tuple>

namespace fastkd {
namespace {

// Calls visit(s, t) for the thread's elements of a row: single elements before and after the 16-byte packs, which
// read(number, first element, left, right) loads; only single elements if the alignments of the two sides differ.
template <class T, class Read, class Visit>
FASTKD_DEVICE void sweep(Global<const T> s, Global<const T> t, int cells, Read read, Visit visit) {
  const int threads = blockDim.x, thread = threadIdx.x;
  int head = cells, packs = 0;
  if (address_of<const T>(s) % kPackBytes == address_of<const T>(t) % kPackBytes) {
    const int unaligned = static_cast<int>((kPackBytes - address_of<const T>(s) % kPackBytes) % kPackBytes / sizeof(T));
    head = unaligned < cells ? unaligned : cells;
    packs = (cells - head) / kPack<T>;
  }
  for (int i = thread; i < head; i += threads) visit(widened<T>(s[i]), widened<T>(t[i]));
  for (int pack = thread; pack < packs; pack += threads) {
    Pack<T> left, right;
    read(pack, head + pack * kPack<T>, left, right);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) visit(widened<T>(left.value[j]), widened<T>(right.value[j]));
  }
  for (int i = head + packs * kPack<T> + thread; i < cells; i += threads) visit(widened<T>(s[i]), widened<T>(t[i]));
}

// staged: the packs of the row are kept in shared memory; each thread re-reads the packs it wrote.
template <class T, class index_t, bool staged>
FASTKD_KERNEL void forward_rows_kernel(Levels<T> levels, Global<sum_t<T>> moments, Global<double> row_errors,
                                       double eps) {
  using Sum = sum_t<T>;
  FASTKD_SHARED(Sum, scratch, kWarpSize);
  FASTKD_DYNAMIC_SHARED(T, staging);
  const Level<T> level = levels.level[level_of_own_row(levels, blockIdx.x)];
  const int64_t row = level.first_row + blockIdx.x - level.first_own;
  const int cells = static_cast<int>(level.cells), room = cells / kPack<T> * kPack<T>;
  const index_t start = static_cast<index_t>(row - level.first_row) * static_cast<index_t>(cells);
  const Global<const T> s = level.student + start, t = level.teacher + start;
  const auto from_memory = [&](int pack, int i, Pack<T>& left, Pack<T>& right) {
    left = load_pack(s + i);
    right = load_pack(t + i);
    if constexpr (staged) {
      store_pack(staging + pack * kPack<T>, left);
      store_pack(staging + (room + pack * kPack<T>), right);
    }
  };
  const auto again = [&](auto visit) {
    if constexpr (staged) {
      const auto from_staging = [&](int pack, int, Pack<T>& left, Pack<T>& right) {
        left = load_shared_pack<T>(staging + pack * kPack<T>);
        right = load_shared_pack<T>(staging + (room + pack * kPack<T>));
      };
      sweep<T>(s, t, cells, from_staging, visit);
    } else {
      sweep<T>(s, t, cells, from_memory, visit);
    }
  };

  Sum sum_s = 0, sum_t_ = 0;
  sweep<T>(s, t, cells, from_memory, [&](Sum x, Sum y) {
    sum_s += x;
    sum_t_ += y;
  });
  const Sum mean_s = block_sum<Sum>(sum_s, scratch) / cells;
  const Sum mean_t = block_sum<Sum>(sum_t_, scratch) / cells;

  Sum left_s = 0, left_t = 0, square_s = 0, square_t = 0;
  again([&](Sum x, Sum y) {
    left_s += x - mean_s;
    square_s += (x - mean_s) * (x - mean_s);
    left_t += y - mean_t;
    square_t += (y - mean_t) * (y - mean_t);
  });
  const double rest_s = static_cast<double>(block_sum<Sum>(left_s, scratch)) / cells;
  const double rest_t = static_cast<double>(block_sum<Sum>(left_t, scratch)) / cells;
  const double variance_s = static_cast<double>(block_sum<Sum>(square_s, scratch)) / cells - rest_s * rest_s;
  const double variance_t = static_cast<double>(block_sum<Sum>(square_t, scratch)) / cells - rest_t * rest_t;
  const Normal<Sum> student = make_normal<Sum>(mean_s, rest_s, variance_s, eps);
  const Normal<Sum> teacher = make_normal<Sum>(mean_t, rest_t, variance_t, eps);

  Sum square = 0, with_s = 0, with_t = 0;
  again([&](Sum x, Sum y) {
    const Pair<Sum> pair = normalised(x, y, student, teacher);
    square += pair.e * pair.e;
    with_s += pair.e * pair.a;
    with_t += pair.e * pair.b;
  });
  square = block_sum<Sum>(square, scratch);
  with_s = block_sum<Sum>(with_s, scratch);
  with_t = block_sum<Sum>(with_t, scratch);
  if (threadIdx.x == 0) {
    write_normal(moments, levels.rows, row, kStudent, student);
    write_normal(moments, levels.rows, row, kTeacher, teacher);
    moments[kSlopeS * levels.rows + row] = with_s / cells;
    moments[kSlopeT * levels.rows + row] = with_t / cells;
    row_errors[row] = square;
  }
}

// The loss: one block, rows in a fixed order. Bound by load latency: each thread has eight loads in flight, so that
// 20,480 rows (16 images of 256 channels on five levels) are three rounds of loads, about 2 us (PREDICTED) of the op's
// 270. Sums by several blocks would need another launch, which takes as long.
template <class Sum>
FASTKD_KERNEL void sum_rows_kernel(Global<const double> row_errors, int64_t rows, double elements, Global<Sum> loss) {
  FASTKD_SHARED(double, scratch, kWarpSize);
  double total = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) total += row_errors[row];
  total = block_sum<double>(total, scratch);
  if (threadIdx.x == 0) loss[0] = static_cast<Sum>(total / elements);
}

template <class T>
FASTKD_DEVICE bool aligned_alike(Global<const T> one, Global<T> other) {
  return !other || address_of<const T>(one) % kPackBytes == address_of<T>(other) % kPackBytes;
}

template <class T, class index_t>
FASTKD_KERNEL void backward_rows_kernel(Levels<T> levels, Global<const sum_t<T>> moments, Global<const sum_t<T>> grad,
                                        double elements) {
  using Sum = sum_t<T>;
  const Level<T> level = levels.level[level_of_own_row(levels, blockIdx.x)];
  const int64_t row = level.first_row + blockIdx.x - level.first_own;
  const int cells = static_cast<int>(level.cells), threads = blockDim.x, thread = threadIdx.x;
  const index_t start = static_cast<index_t>(row - level.first_row) * static_cast<index_t>(cells);
  const Global<const T> s = level.student + start, t = level.teacher + start;
  const Global<T> grad_s = level.grad_student ? level.grad_student + start : Global<T>(nullptr);
  const Global<T> grad_t = level.grad_teacher ? level.grad_teacher + start : Global<T>(nullptr);
  const Gradient<Sum> gradient(moments, levels.rows, row, static_cast<Sum>(2.0 * grad[0] / elements));
  int head = cells, packs = 0;
  if (aligned_alike<T>(s, grad_s) && aligned_alike<T>(s, grad_t) &&
      address_of<const T>(s) % kPackBytes == address_of<const T>(t) % kPackBytes) {
    const int unaligned = static_cast<int>((kPackBytes - address_of<const T>(s) % kPackBytes) % kPackBytes / sizeof(T));
    head = unaligned < cells ? unaligned : cells;
    packs = (cells - head) / kPack<T>;
  }
  const auto single = [&](int i) {
    const Pair<Sum> pair = normalised(widened<T>(s[i]), widened<T>(t[i]), gradient.student, gradient.teacher);
    if (grad_s) grad_s[i] = static_cast<T>(gradient.of_student(pair));
    if (grad_t) grad_t[i] = static_cast<T>(gradient.of_teacher(pair));
  };
  for (int i = thread; i < head; i += threads) single(i);
  for (int pack = thread; pack < packs; pack += threads) {
    const int i = head + pack * kPack<T>;
    const Pack<T> left = load_pack(s + i), right = load_pack(t + i);
    Pack<T> out_s, out_t;
    for (int j = 0; j < kPack<T>; ++j) {
      const Pair<Sum> pair =
          normalised(widened<T>(left.value[j]), widened<T>(right.value[j]), gradient.student, gradient.teacher);
      out_s.value[j] = static_cast<T>(gradient.of_student(pair));
      out_t.value[j] = static_cast<T>(gradient.of_teacher(pair));
    }
    if (grad_s) store_pack(grad_s + i, out_s);
    if (grad_t) store_pack(grad_t + i, out_t);
  }
  for (int i = head + packs * kPack<T> + thread; i < cells; i += threads) single(i);
}

int64_t cells_of(const Tensor& level) { return level.size(2) * level.size(3); }

// Levels of one launch.
template <class T>
struct Launch {
  Levels<T> levels{};
  int64_t blocks = 0, chunk_rows = 0;  // channels-last
  int64_t longest_row = 0;             // contiguous
};

// The tensors of a call, dense in the student's memory order.
struct Call {
  std::vector<Tensor> student, teacher;
  std::vector<Tensor> grad_student, grad_teacher;
  int64_t rows = 0, elements = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size() && students.size() <= kMaxLevels,
                    "instance_norm_mse: student and teacher must have as many levels, 1 to ", kMaxLevels);
    for (size_t index = 0; index < students.size(); ++index) {
      const Tensor &s = students[index], &t = teachers[index];
      STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4, "instance_norm_mse: levels must be [B, C, H, W]");
      for (int64_t dim = 0; dim < 4; ++dim)
        STD_TORCH_CHECK(s.size(dim) == t.size(dim) && (dim > 1 || s.size(dim) == students[0].size(dim)),
                        "instance_norm_mse: student and teacher must have the same shape, levels the same B and C");
      STD_TORCH_CHECK(s.scalar_type() == students[0].scalar_type() && t.scalar_type() == s.scalar_type() &&
                          is_beside(s, students[0]) && is_beside(t, students[0]),
                      "instance_norm_mse: levels must have one dtype and lie on one device");
      check_cells("instance_norm_mse", s.size(2), s.size(3));
      student.push_back(dense(s, is_channels_last(s)));
      teacher.push_back(dense(t, is_channels_last(s)));
      elements += s.numel();
      if (s.size(2) * s.size(3) > 0) rows += s.size(0) * s.size(1);
    }
  }

  // The levels for which `takes(level)` holds; `width`: channels per thread for channels-last.
  template <class T, class Takes>
  Launch<T> launch_of(int width, Takes takes) const {
    Launch<T> result;
    Levels<T>& levels = result.levels;
    levels.channels = student[0].size(1);
    levels.rows = rows;
    int64_t first_row = 0;
    for (size_t index = 0; index < student.size(); ++index) {
      const int64_t images = student[index].size(0), cells = cells_of(student[index]);
      if (cells == 0 || images * levels.channels == 0) continue;
      if (takes(student[index])) {
        Level<T>& level = levels.level[levels.count++];
        level.student = global<const T>(student[index]);
        level.teacher = global<const T>(teacher[index]);
        level.grad_student = grad_student.empty() ? Global<T>(nullptr) : output<T>(grad_student[index]);
        level.grad_teacher = grad_teacher.empty() ? Global<T>(nullptr) : output<T>(grad_teacher[index]);
        level.cells = cells;
        level.chunks = (cells + kChunk - 1) / kChunk;
        level.first_row = first_row;
        level.first_own = levels.own_rows;
        level.first_block = result.blocks;
        level.first_chunk_row = result.chunk_rows;
        const int64_t groups = (levels.channels + kWarpSize * width - 1) / (kWarpSize * width);
        result.blocks += images * groups * level.chunks;
        result.chunk_rows += images * levels.channels * level.chunks;
        result.longest_row = std::max(result.longest_row, cells);
        levels.own_rows += images * levels.channels;
      }
      first_row += images * levels.channels;
    }
    return result;
  }

  // Whether a thread may take a whole pack of channels everywhere.
  template <class T>
  bool has_packs() const {
    return student[0].size(1) % kPack<T> == 0 && is_aligned(student) && is_aligned(teacher);
  }
};

int threads_for(int64_t cells) {
  int threads = kWarpSize;
  while (threads < kThreads && threads * 4 < cells) threads *= 2;
  return threads;
}

// A block of a contiguous level stages a row of both sides. Eight blocks with kLongStaging bytes each fit a
// multiprocessor of every card with 164 KB, so that shorter rows are not held back by their staging.
constexpr int64_t kLongStaging = 20 * 1024;
template <class T>
int64_t staging_bytes(int64_t cells) {
  return 2 * cells * static_cast<int64_t>(sizeof(T));
}

template <class T, class index_t>
void forward_rows(const Tensor& on, const Launch<T>& rows, Global<sum_t<T>> moments, Global<double> row_errors,
                  double eps) {
  const Grid blocks(rows.levels.own_rows), threads(threads_for(rows.longest_row));
  const int64_t staging = staging_bytes<T>(rows.longest_row);
  if (staging <= shared_limit()) {
    launch(on, blocks, threads, staging, &forward_rows_kernel<T, index_t, true>, rows.levels, moments, row_errors, eps);
  } else {
    launch(on, blocks, threads, 0, &forward_rows_kernel<T, index_t, false>, rows.levels, moments, row_errors, eps);
  }
}

template <class T, class index_t, int width>
void forward_channels_last(const Call& call, Global<sum_t<T>> moments, Global<double> row_errors, double eps) {
  const auto [levels, blocks, chunk_rows, longest] = call.launch_of<T>(width, is_channels_last);
  if (blocks == 0) return;
  const Tensor& on = call.student[0];
  const Tensor partial = new_tensor(on, {kParts, chunk_rows}, kSumType<T>);
  const Global<sum_t<T>> sums = output<sum_t<T>>(partial);
  const Grid rows((levels.own_rows + kWarpSize - 1) / kWarpSize);
  launch(on, Grid(blocks), Grid(kThreads), 0, &chunk_moments_kernel<T, index_t, width>, levels, sums, chunk_rows);
  launch(on, rows, Grid(kThreads), 0, &merge_moments_kernel<T>, levels, sums, chunk_rows, moments, row_errors, eps);
  launch(on, Grid(blocks), Grid(kThreads), 0, &chunk_errors_kernel<T, index_t, width>, levels, moments,
         row_errors, sums, chunk_rows);
  launch(on, rows, Grid(kThreads), 0, &merge_errors_kernel<T>, levels, sums, chunk_rows, moments, row_errors);
}

template <class T, class index_t>
std::tuple<Tensor, Tensor> forward_typed(const Call& call, double eps) {
  using torch::headeronly::ScalarType;
  const Tensor& on = call.student[0];
  const Tensor moments = new_tensor(on, {kMoments, call.rows}, kSumType<T>);
  const Tensor loss = new_tensor(on, {}, kSumType<T>);
  const Tensor errors = new_tensor(on, {call.rows}, ScalarType::Double);
  const auto out = output<sum_t<T>>(moments);
  const auto row_errors = output<double>(errors);
  for (const bool is_long : {true, false})
    forward_rows<T, index_t>(on, call.launch_of<T>(1, [&](const Tensor& level) {
      return !is_channels_last(level) && (staging_bytes<T>(cells_of(level)) > kLongStaging) == is_long;
    }), out, row_errors, eps);
  if (call.has_packs<T>()) {
    forward_channels_last<T, index_t, kPack<T>>(call, out, row_errors, eps);
  } else {
    forward_channels_last<T, index_t, 1>(call, out, row_errors, eps);
  }
  launch(on, Grid(1), Grid(kSumThreads), 0, &sum_rows_kernel<sum_t<T>>, row_errors, call.rows,
         static_cast<double>(std::max<int64_t>(call.elements, 1)), output<sum_t<T>>(loss));
  return {loss, moments};
}

template <class T, class index_t, int width>
void backward_channels_last(const Call& call, Global<const sum_t<T>> moments, Global<const sum_t<T>> grad,
                            double elements) {
  const Launch<T> own = call.launch_of<T>(width, is_channels_last);
  launch(call.student[0], Grid(own.blocks), Grid(kThreads), 0, &backward_chunks_kernel<T, index_t, width>, own.levels,
         moments, grad, elements);
}

template <class T, class index_t>
void backward_typed(const Call& call, const Tensor& grad, const Tensor& moments) {
  const double elements = static_cast<double>(std::max<int64_t>(call.elements, 1));
  const auto numbers = global<const sum_t<T>>(moments);
  const auto factor = global<const sum_t<T>>(grad);
  const Launch<T> rows = call.launch_of<T>(1, [](const Tensor& level) { return !is_channels_last(level); });
  launch(call.student[0], Grid(rows.levels.own_rows), Grid(threads_for(rows.longest_row)), 0,
         &backward_rows_kernel<T, index_t>, rows.levels, numbers, factor, elements);
  if (call.has_packs<T>()) {
    backward_channels_last<T, index_t, kPack<T>>(call, numbers, factor, elements);
  } else {
    backward_channels_last<T, index_t, 1>(call, numbers, factor, elements);
  }
}

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps) {
  const Call call(student, teacher);
  const DeviceScope scope(call.student[0]);
  return by_type("instance_norm_mse", call.student[0], [&](auto value) {
    using T = decltype(value);
    return is_narrow(call.student) ? forward_typed<T, narrow_index>(call, eps) : forward_typed<T, int64_t>(call, eps);
  });
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher, Tensor moments,
                             bool for_student, bool for_teacher) {
  Call call(student, teacher);
  const DeviceScope scope(call.student[0]);
  STD_TORCH_CHECK(moments.is_contiguous() && moments.dim() == 2 && moments.size(0) == kMoments &&
                      moments.size(1) == call.rows && grad.numel() == 1 && grad.scalar_type() == moments.scalar_type(),
                  "instance_norm_mse_backward: grad and moments must be those of the forward call");
  if (for_student)
    for (const Tensor& level : call.student) call.grad_student.push_back(torch::stable::empty_like(level));
  if (for_teacher)
    for (const Tensor& level : call.teacher) call.grad_teacher.push_back(torch::stable::empty_like(level));
  by_type("instance_norm_mse", call.student[0], [&](auto value) {
    using T = decltype(value);
    STD_TORCH_CHECK(moments.scalar_type() == kSumType<T> && is_beside(moments, call.student[0]) &&
                        is_beside(grad, call.student[0]),
                    "instance_norm_mse_backward: grad and moments must be those of the forward call");
    is_narrow(call.student) ? backward_typed<T, narrow_index>(call, grad, moments)
                            : backward_typed<T, int64_t>(call, grad, moments);
    return 0;
  });
  std::vector<Tensor> gradients = call.grad_student;
  gradients.insert(gradients.end(), call.grad_teacher.begin(), call.grad_teacher.end());
  return gradients;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("instance_norm_mse", TORCH_BOX(&forward));
  library.impl("instance_norm_mse_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
