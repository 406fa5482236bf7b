// instance_norm_mse: mean over all elements of all levels of (IN(student) - IN(teacher))^2,
// IN(x) = (x - mean) / sqrt(var + eps) over a row: the cells of one channel of one image.
//
// forward   reads student and teacher once from memory: three sweeps over a row, the later two from the cache
//             1. the mean;  2. the variance about it, and what rounding left out of the mean;  3. e = IN(s) - IN(t)
//           e^2 is summed itself, not put together from five moments: where student and teacher are nearly equal, those
//           cancel. For the same reason mean and scale are kept to twice the precision.
//           writes 10 numbers a row: moments [10, rows], see Moment
// backward  reads student and teacher once, writes one gradient for each side that wants one:
//             d loss / d student = 2 grad / N * scale_s * (e - mean(e IN(s)) IN(s))
//             d loss / d teacher = 2 grad / N * scale_t * (mean(e IN(t)) IN(t) - e)
// Layouts   contiguous: whole vectors of a row, then single elements
//           channels-last: a lane is a row; a task is a block of channels at least one cache line wide
#include "pyramid.h"
#include "reduce.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastkd {
namespace instance_norm_mse {

// Of each side mean, scale, scale_low, offset (Normal); then mean(e IN(s)) and mean(e IN(t)).
enum Moment { kStudent = 0, kTeacher = 4, kSlopeS = 8, kSlopeT, kMoments };

struct Level {
  const void* student;
  const void* teacher;
  void* grad_student;  // null: not wanted
  void* grad_teacher;
  int64_t channels, cells;
  bool channels_last;
};

struct Arguments {
  const Level* levels;
  void* moments;       // [kMoments, rows] of acc_t
  double* row_errors;  // [rows]
  int64_t rows;
  double eps;
  double factor;  // 2 grad / N
};

using Kernel = void (*)(const Arguments&, const Task* begin, const Task* end);

struct Table {  // of float, double, BFloat16, Half
  Kernel forward[4], backward[4];
  int64_t channel_block[4];  // channels of a channels-last task
};

}  // namespace instance_norm_mse
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace instance_norm_mse;

// A strip of both pyramids (reduce.h) and `tail` elements behind it where it is one row.
template <class scalar_t>
struct Strip {
  const scalar_t *s, *t;
  scalar_t *grad_s, *grad_t;  // null: not wanted
  int64_t steps, stride, tail, row;

  FASTKD_INLINE Strip rest() const {  // the tail as a strip of single elements
    const int64_t body = steps * stride;
    scalar_t* rest_s = grad_s == nullptr ? nullptr : grad_s + body;
    scalar_t* rest_t = grad_t == nullptr ? nullptr : grad_t + body;
    return {s + body, t + body, rest_s, rest_t, tail, 1, 0, row};
  }
};

// What turns x into IN(x) = (x - mean) * scale + ((x - mean) * scale_low + offset): the parts in brackets are what
// rounding left out of scale and mean. Four arrays of a value a row, `stride` apart.
template <class acc>
struct Normal {
  acc* mean;
  int64_t stride;
};

template <class acc>
FASTKD_INLINE Normal<acc> normal_of(const Arguments& arguments, Moment side, int64_t row) {
  return {static_cast<acc*>(arguments.moments) + side * arguments.rows + row, arguments.rows};
}

template <class V, int U, bool one_row>
struct NormalVectors {
  V mean[U], scale[U], scale_low[U], offset[U];
  FASTKD_INLINE explicit NormalVectors(const Normal<Element<V>>& normal) {
    spread<V, U, one_row>(normal.mean, mean);
    spread<V, U, one_row>(normal.mean + normal.stride, scale);
    spread<V, U, one_row>(normal.mean + normal.stride * 2, scale_low);
    spread<V, U, one_row>(normal.mean + normal.stride * 3, offset);
  }
};

// a = IN(s), b = IN(t), e = a - b: the large parts are subtracted first, so that the rounding of a and b themselves
// is not in e, which is exactly 0 where s = t.
template <class V>
struct Errors {
  V a, b, e;
};

template <class V, int U, bool one_row>
FASTKD_INLINE Errors<V> errors(V s, V t, const NormalVectors<V, U, one_row>& student,
                               const NormalVectors<V, U, one_row>& teacher, int u) {
  const V centred_s = s - student.mean[u], centred_t = t - teacher.mean[u];
  const V a = centred_s * student.scale[u], b = centred_t * teacher.scale[u];
  const V a_low = multiply_add(centred_s, student.scale_low[u], student.offset[u]);
  const V b_low = multiply_add(centred_t, teacher.scale_low[u], teacher.offset[u]);
  return {a + a_low, b + b_low, (a - b) + (a_low - b_low)};
}

template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_errors(const Arguments& arguments, const Strip<scalar_t>& strip, double* total, double* total_s,
                              double* total_t) {
  const NormalVectors<V, U, one_row> student(normal_of<Element<V>>(arguments, kStudent, strip.row));
  const NormalVectors<V, U, one_row> teacher(normal_of<Element<V>>(arguments, kTeacher, strip.row));
  for (int64_t first = 0; first < strip.steps; first += kFlush) {
    const int64_t last = first + kFlush < strip.steps ? first + kFlush : strip.steps;
    V square[U] = {}, with_s[U] = {}, with_t[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const int64_t at = step * strip.stride + u * kLanes<V>;
        const auto [a, b, e] = errors(load<V>(strip.s + at), load<V>(strip.t + at), student, teacher, u);
        square[u] = multiply_add(e, e, square[u]);
        with_s[u] = multiply_add(e, a, with_s[u]);
        with_t[u] = multiply_add(e, b, with_t[u]);
      }
    flush<V, U>(square, total);
    flush<V, U>(with_s, total_s);
    flush<V, U>(with_t, total_t);
  }
}

// The normal of one side of a strip.
template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void normalise(const scalar_t* x, const Strip<scalar_t>& strip, double eps, Normal<Element<V>> normal) {
  using acc = Element<V>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  const double count = one_row ? strip.steps * width + strip.tail : strip.steps;
  const scalar_t* rest = x + strip.steps * strip.stride;

  double total[width] = {};
  add_sums<V, U>(x, strip.steps, strip.stride, total);
  if constexpr (one_row) {
    gather<width>(total);
    add_sums<acc, 1>(rest, strip.tail, 1, total);
  }
  for (int row = 0; row < rows; ++row) normal.mean[row] = static_cast<acc>(total[row] / count);

  double left[width] = {}, square[width] = {};
  add_centred<V, U, one_row>(x, strip.steps, strip.stride, normal.mean, left, square);
  if constexpr (one_row) {
    gather<width>(left);
    gather<width>(square);
    add_centred<acc, 1, true>(rest, strip.tail, 1, normal.mean, left, square);
  }
  for (int row = 0; row < rows; ++row) {
    const double left_out = left[row] / count;
    const double variance = square[row] / count - left_out * left_out;
    const double scale = 1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + eps);
    acc* out = normal.mean + row;
    out[normal.stride] = static_cast<acc>(scale);
    out[normal.stride * 2] = static_cast<acc>(scale - out[normal.stride]);
    out[normal.stride * 3] = static_cast<acc>(-left_out * scale);
  }
}

template <class V, int U, bool one_row, class scalar_t>
void forward_strip(const Arguments& arguments, const Strip<scalar_t>& strip) {
  using acc = Element<V>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  normalise<V, U, one_row>(strip.s, strip, arguments.eps, normal_of<acc>(arguments, kStudent, strip.row));
  normalise<V, U, one_row>(strip.t, strip, arguments.eps, normal_of<acc>(arguments, kTeacher, strip.row));

  double square[width] = {}, with_s[width] = {}, with_t[width] = {};
  add_errors<V, U, one_row>(arguments, strip, square, with_s, with_t);
  if constexpr (one_row) {
    gather<width>(square);
    gather<width>(with_s);
    gather<width>(with_t);
    add_errors<acc, 1, true>(arguments, strip.rest(), square, with_s, with_t);
  }
  const double count = one_row ? strip.steps * width + strip.tail : strip.steps;
  acc* moments = static_cast<acc*>(arguments.moments) + strip.row;
  for (int row = 0; row < rows; ++row) {
    moments[kSlopeS * arguments.rows + row] = static_cast<acc>(with_s[row] / count);
    moments[kSlopeT * arguments.rows + row] = static_cast<acc>(with_t[row] / count);
    arguments.row_errors[strip.row + row] = square[row];
  }
}

template <class V, int U, bool one_row, bool for_s, bool for_t, class scalar_t>
void write_gradients(const Arguments& arguments, const Strip<scalar_t>& strip) {
  using acc = Element<V>;
  const NormalVectors<V, U, one_row> student(normal_of<acc>(arguments, kStudent, strip.row));
  const NormalVectors<V, U, one_row> teacher(normal_of<acc>(arguments, kTeacher, strip.row));
  V slope_s[U], slope_t[U];
  spread<V, U, one_row>(static_cast<acc*>(arguments.moments) + kSlopeS * arguments.rows + strip.row, slope_s);
  spread<V, U, one_row>(static_cast<acc*>(arguments.moments) + kSlopeT * arguments.rows + strip.row, slope_t);
  const acc factor = static_cast<acc>(arguments.factor);
  for (int64_t step = 0; step < strip.steps; ++step)
    for (int u = 0; u < U; ++u) {
      const int64_t at = step * strip.stride + u * kLanes<V>;
      const auto [a, b, e] = errors(load<V>(strip.s + at), load<V>(strip.t + at), student, teacher, u);
      if constexpr (for_s) store(strip.grad_s + at, V((e - slope_s[u] * a) * (student.scale[u] * factor)));
      if constexpr (for_t) store(strip.grad_t + at, V((slope_t[u] * b - e) * (teacher.scale[u] * factor)));
    }
}

template <class V, int U, bool one_row, class scalar_t>
void backward_strip(const Arguments& arguments, const Strip<scalar_t>& strip) {
  if (strip.grad_s != nullptr && strip.grad_t != nullptr) {
    write_gradients<V, U, one_row, true, true>(arguments, strip);
  } else if (strip.grad_s != nullptr) {
    write_gradients<V, U, one_row, true, false>(arguments, strip);
  } else if (strip.grad_t != nullptr) {
    write_gradients<V, U, one_row, false, true>(arguments, strip);
  }
}

template <class scalar_t, bool is_backward>
struct Rows {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kRowVectors = 4;
  static constexpr int kLineVectors = 64 / static_cast<int>(kLanes<V> * sizeof(scalar_t));  // vectors in a cache line
  static constexpr int kBlockVectors = kLineVectors > 2 ? kLineVectors : 2;
  static constexpr int kBlock = kBlockVectors * kLanes<V>;

  template <class Lane, int U, bool one_row>
  static void run_strip(const Arguments& arguments, const Level& level, int64_t position, int64_t steps, int64_t stride,
                        int64_t tail, int64_t row) {
    const scalar_t* s = static_cast<const scalar_t*>(level.student) + position;
    const scalar_t* t = static_cast<const scalar_t*>(level.teacher) + position;
    Strip<scalar_t> strip{s, t, nullptr, nullptr, steps, stride, tail, row};
    if constexpr (is_backward) {
      if (level.grad_student != nullptr) strip.grad_s = static_cast<scalar_t*>(level.grad_student) + position;
      if (level.grad_teacher != nullptr) strip.grad_t = static_cast<scalar_t*>(level.grad_teacher) + position;
      backward_strip<Lane, U, one_row>(arguments, strip);
      if constexpr (one_row) backward_strip<acc, 1, true>(arguments, strip.rest());
    } else {
      forward_strip<Lane, U, one_row>(arguments, strip);
    }
  }

  static void contiguous(const Arguments& arguments, const Level& level, const Task& task) {
    constexpr int width = kRowVectors * kLanes<V>;
    for (int64_t channel = 0; channel < task.channels; ++channel) {
      const int64_t position = (task.image * level.channels + task.channel + channel) * level.cells;
      run_strip<V, kRowVectors, true>(arguments, level, position, level.cells / width, width, level.cells % width,
                                      task.row + channel);
    }
  }

  static void channels_last(const Arguments& arguments, const Level& level, const Task& task) {
    const int64_t position = task.image * level.channels * level.cells + task.channel, stride = level.channels;
    int64_t done = 0;
    for (; done + kBlock <= task.channels; done += kBlock)
      run_strip<V, kBlockVectors, false>(arguments, level, position + done, level.cells, stride, 0, task.row + done);
    for (; done + kLanes<V> <= task.channels; done += kLanes<V>)
      run_strip<V, 1, false>(arguments, level, position + done, level.cells, stride, 0, task.row + done);
    for (; done < task.channels; ++done)
      run_strip<acc, 1, false>(arguments, level, position + done, level.cells, stride, 0, task.row + done);
  }

  static void kernel(const Arguments& arguments, const Task* task, const Task* end) {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      level.channels_last ? channels_last(arguments, level, *task) : contiguous(arguments, level, *task);
    }
  }
};

template <class scalar_t>
using Forward = Rows<scalar_t, false>;
template <class scalar_t>
using Backward = Rows<scalar_t, true>;

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

namespace fastkd {
template <>
const instance_norm_mse::Table& kernels<instance_norm_mse::Table, FASTKD_CAPABILITY>() {
  static const instance_norm_mse::Table table = {
      {Forward<float>::kernel, Forward<double>::kernel, Forward<BFloat16>::kernel, Forward<Half>::kernel},
      {Backward<float>::kernel, Backward<double>::kernel, Backward<BFloat16>::kernel, Backward<Half>::kernel},
      {Forward<float>::kBlock, Forward<double>::kBlock, Forward<BFloat16>::kBlock, Forward<Half>::kBlock}};
  return table;
}
}  // namespace fastkd
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher;
  std::vector<Level> levels;
  Arguments arguments{};
  std::vector<Task> tasks;
  const Table& table = active_kernels<Table>();
  int type = 0;
  int64_t elements = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size(),
                    "instance_norm_mse: student and teacher must have as many levels, at least one");
    type = type_index(students[0]);
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index]);
  }

  void add_level(const Tensor& s, const Tensor& t) {
    STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4, "instance_norm_mse: levels must be [B, C, H, W]");
    for (int64_t dim = 0; dim < 4; ++dim)
      STD_TORCH_CHECK(s.size(dim) == t.size(dim), "instance_norm_mse: student and teacher must have the same shape");
    STD_TORCH_CHECK(type_index(s) == type && type_index(t) == type,
                    "instance_norm_mse: levels must have one dtype");
    STD_TORCH_CHECK(s.is_cpu() && t.is_cpu(), "instance_norm_mse: levels must be on the CPU");
    const bool channels_last = is_channels_last(s);
    student.push_back(dense(s, channels_last));
    teacher.push_back(dense(t, channels_last));
    const int64_t images = s.size(0), channels = s.size(1), cells = s.size(2) * s.size(3);
    const int64_t index = levels.size(), block = channels_last ? table.channel_block[type] : 1;
    const void *student_data = student.back().const_data_ptr(), *teacher_data = teacher.back().const_data_ptr();
    levels.push_back({student_data, teacher_data, nullptr, nullptr, channels, cells, channels_last});
    elements += images * channels * cells;
    if (cells == 0) return;  // nothing to normalise, no rows
    for (int64_t image = 0; image < images; ++image)
      for (int64_t channel = 0; channel < channels; channel += block) {
        const int64_t count = std::min(block, channels - channel);
        tasks.push_back({index, image, channel, count, arguments.rows});
        arguments.rows += count;
      }
  }

  double mean_over_elements(double sum) const { return sum / static_cast<double>(std::max<int64_t>(elements, 1)); }

  void run(Kernel kernel) {
    arguments.levels = levels.data();
    const auto cost = [&](const Task& task) { return task.channels * levels[task.level].cells; };
    run_balanced(tasks, cost, [&](const Task* begin, const Task* end) { kernel(arguments, begin, end); });
  }
};

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps) {
  Call call(student, teacher);
  const ScalarType type = widened(student[0]);
  const int64_t shape[] = {kMoments, call.arguments.rows};
  Tensor moments = torch::stable::new_empty(student[0], IntHeaderOnlyArrayRef(shape, 2), type);
  Tensor loss = torch::stable::new_empty(student[0], IntHeaderOnlyArrayRef(shape, size_t{0}), type);
  std::vector<double> row_errors(call.arguments.rows);
  call.arguments.eps = eps;
  call.arguments.moments = moments.mutable_data_ptr();
  call.arguments.row_errors = row_errors.data();
  call.run(call.table.forward[call.type]);

  double total = 0;
  for (const double error : row_errors) total += error;
  torch::stable::fill_(loss, call.mean_over_elements(total));
  return {loss, moments};
}

// Gradients of the student's levels where for_student, followed by those of the teacher's where for_teacher.
std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher, Tensor moments,
                             bool for_student, bool for_teacher) {
  Call call(student, teacher);
  const ScalarType type = widened(student[0]);
  STD_TORCH_CHECK(moments.is_contiguous() && moments.dim() == 2 && moments.size(0) == kMoments &&
                      moments.size(1) == call.arguments.rows && moments.scalar_type() == type && moments.is_cpu(),
                  "instance_norm_mse_backward: moments must be those of the forward call");
  STD_TORCH_CHECK(grad.numel() == 1 && grad.is_cpu() && grad.scalar_type() == type,
                  "instance_norm_mse_backward: grad must be one number of the loss's dtype");
  const double value = type == ScalarType::Double ? *grad.const_data_ptr<double>() : *grad.const_data_ptr<float>();
  call.arguments.factor = call.mean_over_elements(2.0 * value);
  call.arguments.moments = const_cast<void*>(moments.const_data_ptr());  // the backward kernel only reads them

  std::vector<Tensor> gradients;
  for (size_t index = 0; for_student && index < student.size(); ++index) {
    gradients.push_back(torch::stable::empty_like(call.student[index]));
    call.levels[index].grad_student = gradients.back().mutable_data_ptr();
  }
  for (size_t index = 0; for_teacher && index < teacher.size(); ++index) {
    gradients.push_back(torch::stable::empty_like(call.teacher[index]));
    call.levels[index].grad_teacher = gradients.back().mutable_data_ptr();
  }
  call.run(call.table.backward[call.type]);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, library) {
  library.def("instance_norm_mse(Tensor[] student, Tensor[] teacher, float eps) -> (Tensor, Tensor)");
  library.def(
      "instance_norm_mse_backward(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor moments, bool for_student, "
      "bool for_teacher) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, library) {
  library.impl("instance_norm_mse", TORCH_BOX(&forward));
  library.impl("instance_norm_mse_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
