// instance_norm_mse: mean over all elements of all levels of (IN(student) - IN(teacher))^2, IN(x) = (x - mean) / sqrt(var + eps) a row.
//
// forward   reads student and teacher once from memory: three sweeps over a row, the later two from the cache
//             1. the mean;  2. the variance about it, and what rounding left out of the mean;  3. the error and its products
//           The error is summed itself, not put together from five moments: where student and teacher are nearly equal, those
//           cancel. Sums: float over kFlush steps, then double, in a fixed order whatever the threads: deterministic.
//           writes 10 numbers a row: moments [10, rows], see Moment. Mean and scale are kept to twice the precision: a rounded scale
//           is an error of every element at once, which shows where student and teacher are nearly equal
// backward  reads student and teacher once, writes one gradient for each side that wants one:
//             d loss / d student = 2 grad / N * scale_s * (e - mean(e IN(s)) IN(s)),  e = IN(s) - IN(t)
//             d loss / d teacher = 2 grad / N * scale_t * (mean(e IN(t)) IN(t) - e)
// Layouts   contiguous: a row is `cells` elements; whole vectors, then single elements
//           channels-last: a lane is a row; a task is a block of channels at least one cache line wide
#include "pyramid.h"
#include "simd.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastkd {
namespace instance_norm_mse {

enum Moment { kStudent, kTeacher = 4, kSlopeS = 8, kSlopeT, kMoments };  // mean, scale, scale_low, offset of each side; mean(e IN)

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
struct Table {
  Kernel forward[4], backward[4];  // float, double, BFloat16, Half
  int64_t channel_block[4];        // channels of a channels-last task
};

}  // namespace instance_norm_mse
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace instance_norm_mse;

constexpr int64_t kFlush = 64;

// total[lane] += sum[lane], in double.
template <class V, int U>
FASTKD_INLINE void flush(const V (&sum)[U], double* total) {
  Element<V> lanes[U * kLanes<V>];
  std::memcpy(lanes, sum, sizeof(lanes));
  for (int lane = 0; lane < U * kLanes<V>; ++lane) total[lane] += lanes[lane];
}

// One value a lane (channels-last), or one for all lanes (a contiguous row).
template <class V, int U, bool one_row>
FASTKD_INLINE void spread(const Element<V>* values, V (&out)[U]) {
  for (int u = 0; u < U; ++u) out[u] = one_row ? broadcast<V>(values[0]) : load<V>(values + u * kLanes<V>);
}

// A strip is `steps` groups of U vectors, `stride` elements apart.
template <class V, int U, class scalar_t>
FASTKD_INLINE void add_sums(const scalar_t* x, int64_t steps, int64_t stride, double* total) {
  for (int64_t first = 0; first < steps; first += kFlush) {
    const int64_t last = first + kFlush < steps ? first + kFlush : steps;
    V sum[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) sum[u] += load<V>(x + step * stride + u * kLanes<V>);
    flush<V, U>(sum, total);
  }
}

template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_centred(const scalar_t* x, int64_t steps, int64_t stride, const Element<V>* means, double* total, double* total_square) {
  V mean[U];
  spread<V, U, one_row>(means, mean);
  for (int64_t first = 0; first < steps; first += kFlush) {
    const int64_t last = first + kFlush < steps ? first + kFlush : steps;
    V sum[U] = {}, square[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const V centred = load<V>(x + step * stride + u * kLanes<V>) - mean[u];
        sum[u] += centred;
        square[u] = multiply_add(centred, centred, square[u]);
      }
    flush<V, U>(sum, total);
    flush<V, U>(square, total_square);
  }
}

// What turns x into IN(x) = (x - mean) * scale + ((x - mean) * scale_low + offset): the parts in brackets are what rounding left
// out of scale and mean. Four arrays of a value a row, `stride` apart.
template <class acc>
struct Normal {
  acc* mean;
  int64_t stride;
};

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

// a = IN(s), b = IN(t), error = a - b: the large parts are subtracted first, so that the rounding of a and b themselves is not in
// the error, which is exactly 0 where s = t.
template <class V>
struct Errors {
  V a, b, error;
};

template <class V, int U, bool one_row>
FASTKD_INLINE Errors<V> errors(V s, V t, const NormalVectors<V, U, one_row>& normal_s, const NormalVectors<V, U, one_row>& normal_t, int u) {
  const V centred_s = s - normal_s.mean[u], centred_t = t - normal_t.mean[u];
  const V a = centred_s * normal_s.scale[u], b = centred_t * normal_t.scale[u];
  const V a_low = multiply_add(centred_s, normal_s.scale_low[u], normal_s.offset[u]);
  const V b_low = multiply_add(centred_t, normal_t.scale_low[u], normal_t.offset[u]);
  return {a + a_low, b + b_low, (a - b) + (a_low - b_low)};
}

template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void add_errors(const scalar_t* s, const scalar_t* t, int64_t steps, int64_t stride,
                              const Normal<acc_t<scalar_t>>& student, const Normal<acc_t<scalar_t>>& teacher, double* total,
                              double* total_s, double* total_t) {
  const NormalVectors<V, U, one_row> normal_s(student), normal_t(teacher);
  for (int64_t first = 0; first < steps; first += kFlush) {
    const int64_t last = first + kFlush < steps ? first + kFlush : steps;
    V square[U] = {}, with_s[U] = {}, with_t[U] = {};
    for (int64_t step = first; step < last; ++step)
      for (int u = 0; u < U; ++u) {
        const int64_t position = step * stride + u * kLanes<V>;
        const auto [a, b, error] = errors(load<V>(s + position), load<V>(t + position), normal_s, normal_t, u);
        square[u] = multiply_add(error, error, square[u]);
        with_s[u] = multiply_add(error, a, with_s[u]);
        with_t[u] = multiply_add(error, b, with_t[u]);
      }
    flush<V, U>(square, total);
    flush<V, U>(with_s, total_s);
    flush<V, U>(with_t, total_t);
  }
}

template <int width>
FASTKD_INLINE void gather(double* total) {  // total[0] = sum over lanes
  for (int lane = 1; lane < width; ++lane) total[0] += total[lane];
}

// Mean and scale of the rows of a strip of `steps` steps, and of `tail` elements behind it where the strip is one row.
template <class V, int U, bool one_row, class scalar_t>
FASTKD_INLINE void normalise(const scalar_t* x, int64_t steps, int64_t stride, int64_t tail, double eps, const Normal<acc_t<scalar_t>>& normal) {
  using acc = acc_t<scalar_t>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  const double count = one_row ? steps * width + tail : steps;
  const scalar_t* rest = x + steps * stride;

  double total[width] = {};
  add_sums<V, U>(x, steps, stride, total);
  if constexpr (one_row) {
    gather<width>(total);
    add_sums<acc, 1>(rest, tail, 1, total);
  }
  for (int row = 0; row < rows; ++row) normal.mean[row] = static_cast<acc>(total[row] / count);

  double left[width] = {}, square[width] = {};
  add_centred<V, U, one_row>(x, steps, stride, normal.mean, left, square);
  if constexpr (one_row) {
    gather<width>(left);
    gather<width>(square);
    add_centred<acc, 1, true>(rest, tail, 1, normal.mean, left, square);
  }
  for (int row = 0; row < rows; ++row) {
    const double left_out = left[row] / count;
    const double variance = square[row] / count - left_out * left_out;
    const double scale = 1.0 / std::sqrt((variance > 0 || variance != variance ? variance : 0.0) + eps);
    acc* out = normal.mean + row;
    out[normal.stride] = static_cast<acc>(scale);
    out[normal.stride * 2] = static_cast<acc>(scale - out[normal.stride]);
    out[normal.stride * 3] = static_cast<acc>(-left_out * scale);
  }
}

template <class V, int U, bool one_row, class scalar_t>
void forward_strip(const Arguments& arguments, const scalar_t* s, const scalar_t* t, int64_t steps, int64_t stride, int64_t tail, int64_t first_row) {
  using acc = acc_t<scalar_t>;
  constexpr int width = U * kLanes<V>, rows = one_row ? 1 : width;
  acc* moments = static_cast<acc*>(arguments.moments) + first_row;
  const Normal<acc> student{moments + kStudent * arguments.rows, arguments.rows};
  const Normal<acc> teacher{moments + kTeacher * arguments.rows, arguments.rows};
  normalise<V, U, one_row>(s, steps, stride, tail, arguments.eps, student);
  normalise<V, U, one_row>(t, steps, stride, tail, arguments.eps, teacher);

  double error[width] = {}, with_s[width] = {}, with_t[width] = {};
  add_errors<V, U, one_row>(s, t, steps, stride, student, teacher, error, with_s, with_t);
  if constexpr (one_row) {
    gather<width>(error);
    gather<width>(with_s);
    gather<width>(with_t);
    const int64_t body = steps * stride;
    add_errors<acc, 1, true>(s + body, t + body, tail, 1, student, teacher, error, with_s, with_t);
  }
  const double count = one_row ? steps * width + tail : steps;
  for (int row = 0; row < rows; ++row) {
    moments[kSlopeS * arguments.rows + row] = static_cast<acc>(with_s[row] / count);
    moments[kSlopeT * arguments.rows + row] = static_cast<acc>(with_t[row] / count);
    arguments.row_errors[first_row + row] = error[row];
  }
}

template <class V, int U, bool one_row, bool for_s, bool for_t, class scalar_t>
void gradients(const Arguments& arguments, const scalar_t* s, const scalar_t* t, scalar_t* grad_s, scalar_t* grad_t, int64_t steps, int64_t stride,
               int64_t first_row) {
  using acc = acc_t<scalar_t>;
  acc* moments = static_cast<acc*>(arguments.moments) + first_row;
  const NormalVectors<V, U, one_row> normal_s(Normal<acc>{moments + kStudent * arguments.rows, arguments.rows});
  const NormalVectors<V, U, one_row> normal_t(Normal<acc>{moments + kTeacher * arguments.rows, arguments.rows});
  V slope_s[U], slope_t[U];
  spread<V, U, one_row>(moments + kSlopeS * arguments.rows, slope_s);
  spread<V, U, one_row>(moments + kSlopeT * arguments.rows, slope_t);
  const acc factor = static_cast<acc>(arguments.factor);
  for (int64_t step = 0; step < steps; ++step)
    for (int u = 0; u < U; ++u) {
      const int64_t position = step * stride + u * kLanes<V>;
      const auto [a, b, error] = errors(load<V>(s + position), load<V>(t + position), normal_s, normal_t, u);
      if constexpr (for_s) store(grad_s + position, V((error - slope_s[u] * a) * (normal_s.scale[u] * factor)));
      if constexpr (for_t) store(grad_t + position, V((slope_t[u] * b - error) * (normal_t.scale[u] * factor)));
    }
}

template <class V, int U, bool one_row, class scalar_t>
void backward_strip(const Arguments& arguments, const scalar_t* s, const scalar_t* t, scalar_t* grad_s, scalar_t* grad_t, int64_t steps,
                    int64_t stride, int64_t first_row) {
  if (grad_s != nullptr && grad_t != nullptr) {
    gradients<V, U, one_row, true, true>(arguments, s, t, grad_s, grad_t, steps, stride, first_row);
  } else if (grad_s != nullptr) {
    gradients<V, U, one_row, true, false>(arguments, s, t, grad_s, grad_t, steps, stride, first_row);
  } else if (grad_t != nullptr) {
    gradients<V, U, one_row, false, true>(arguments, s, t, grad_s, grad_t, steps, stride, first_row);
  }
}

template <class scalar_t>
constexpr int kBlockVectors = 64 / (kVectorBytes * sizeof(scalar_t) / sizeof(acc_t<scalar_t>)) > 2  // at least a cache line
    ? 64 / (kVectorBytes * sizeof(scalar_t) / sizeof(acc_t<scalar_t>))
    : 2;

template <class scalar_t>
struct Rows {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kRowVectors = 4;

  const Arguments& arguments;
  bool backward;

  template <class Lane, int U, bool one_row>
  void strip(const Level& level, int64_t position, int64_t steps, int64_t stride, int64_t tail, int64_t row) const {
    const scalar_t* s = static_cast<const scalar_t*>(level.student) + position;
    const scalar_t* t = static_cast<const scalar_t*>(level.teacher) + position;
    if (!backward) return forward_strip<Lane, U, one_row>(arguments, s, t, steps, stride, tail, row);
    scalar_t* grad_s = level.grad_student == nullptr ? nullptr : static_cast<scalar_t*>(level.grad_student) + position;
    scalar_t* grad_t = level.grad_teacher == nullptr ? nullptr : static_cast<scalar_t*>(level.grad_teacher) + position;
    backward_strip<Lane, U, one_row>(arguments, s, t, grad_s, grad_t, steps, stride, row);
    if constexpr (one_row) {
      const int64_t body = steps * stride;
      backward_strip<acc, 1, true>(arguments, s + body, t + body, grad_s == nullptr ? nullptr : grad_s + body,
                                   grad_t == nullptr ? nullptr : grad_t + body, tail, 1, row);
    }
  }

  void contiguous(const Level& level, const Task& task) const {
    constexpr int width = kRowVectors * kLanes<V>;
    for (int64_t channel = 0; channel < task.channels; ++channel) {
      const int64_t position = (task.image * level.channels + task.channel + channel) * level.cells;
      strip<V, kRowVectors, true>(level, position, level.cells / width, width, level.cells % width, task.row + channel);
    }
  }

  void channels_last(const Level& level, const Task& task) const {
    constexpr int width = kBlockVectors<scalar_t> * kLanes<V>;
    const int64_t position = task.image * level.channels * level.cells + task.channel;
    int64_t done = 0;
    for (; done + width <= task.channels; done += width)
      strip<V, kBlockVectors<scalar_t>, false>(level, position + done, level.cells, level.channels, 0, task.row + done);
    for (; done + kLanes<V> <= task.channels; done += kLanes<V>)
      strip<V, 1, false>(level, position + done, level.cells, level.channels, 0, task.row + done);
    for (; done < task.channels; ++done)
      strip<acc, 1, false>(level, position + done, level.cells, level.channels, 0, task.row + done);
  }

  void run(const Task* task, const Task* end) const {
    for (; task != end; ++task) {
      const Level& level = arguments.levels[task->level];
      level.channels_last ? channels_last(level, *task) : contiguous(level, *task);
    }
  }
};

template <class scalar_t>
void forward_kernel(const Arguments& arguments, const Task* begin, const Task* end) {
  Rows<scalar_t>{arguments, false}.run(begin, end);
}

template <class scalar_t>
void backward_kernel(const Arguments& arguments, const Task* begin, const Task* end) {
  Rows<scalar_t>{arguments, true}.run(begin, end);
}

template <class scalar_t>
constexpr int64_t kChannelBlock = kBlockVectors<scalar_t> * kLanes<Vector<acc_t<scalar_t>>>;

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

namespace fastkd {
template <>
const instance_norm_mse::Table& kernels<instance_norm_mse::Table, FASTKD_CAPABILITY>() {
  static const instance_norm_mse::Table table = {
      {forward_kernel<float>, forward_kernel<double>, forward_kernel<BFloat16>, forward_kernel<Half>},
      {backward_kernel<float>, backward_kernel<double>, backward_kernel<BFloat16>, backward_kernel<Half>},
      {kChannelBlock<float>, kChannelBlock<double>, kChannelBlock<BFloat16>, kChannelBlock<Half>}};
  return table;
}
}  // namespace fastkd
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int type_index(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: break;
  }
  STD_TORCH_CHECK(false, "instance_norm_mse: levels must be float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(type));
}

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher;
  std::vector<Level> levels;
  Arguments arguments;
  std::vector<Task> tasks;
  const Table& table;
  int type;
  int64_t elements = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers)
      : arguments{}, table(active_kernels<Table>()), type(students.empty() ? 0 : type_index(students[0].scalar_type())) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size(), "instance_norm_mse: student and teacher must have as many levels, at least one");
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index]);
  }

  void add_level(const Tensor& s, const Tensor& t) {
    STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4, "instance_norm_mse: levels must be [B, C, H, W]");
    for (int64_t dim = 0; dim < 4; ++dim)
      STD_TORCH_CHECK(s.size(dim) == t.size(dim), "instance_norm_mse: student and teacher must have the same shape");
    STD_TORCH_CHECK(type_index(s.scalar_type()) == type && type_index(t.scalar_type()) == type, "instance_norm_mse: levels must have one dtype");
    STD_TORCH_CHECK(s.is_cpu() && t.is_cpu(), "instance_norm_mse: levels must be on the CPU");
    const bool channels_last = is_channels_last(s);
    student.push_back(dense(s, channels_last));
    teacher.push_back(dense(t, channels_last));
    const int64_t images = s.size(0), channels = s.size(1), cells = s.size(2) * s.size(3), index = levels.size();
    levels.push_back(
        {student.back().const_data_ptr(), teacher.back().const_data_ptr(), nullptr, nullptr, channels, cells, channels_last});
    elements += images * channels * cells;
    if (cells == 0) return;  // nothing to normalise, no rows
    const int64_t block = channels_last ? table.channel_block[type] : 1;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t channel = 0; channel < channels; channel += block) {
        const int64_t count = std::min(block, channels - channel);
        tasks.push_back({index, image, channel, count, arguments.rows});
        arguments.rows += count;
      }
  }

  void run(Kernel kernel) {
    arguments.levels = levels.data();
    const auto cost = [&](const Task& task) { return task.channels * levels[task.level].cells; };
    run_balanced(tasks, cost, [&](const Task* begin, const Task* end) { kernel(arguments, begin, end); });
  }
};

ScalarType widened(const Tensor& level) {
  return level.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps) {
  Call call(student, teacher);
  const ScalarType type = widened(student[0]);
  const int64_t shape[] = {kMoments, call.arguments.rows};
  Tensor moments = torch::stable::new_empty(student[0], torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), type);
  Tensor loss = torch::stable::new_empty(student[0], torch::headeronly::IntHeaderOnlyArrayRef(shape, size_t{0}), type);
  std::vector<double> row_errors(call.arguments.rows);
  call.arguments.eps = eps;
  call.arguments.moments = moments.mutable_data_ptr();
  call.arguments.row_errors = row_errors.data();
  call.run(call.table.forward[call.type]);

  double total = 0;
  for (const double error : row_errors) total += error;
  total /= static_cast<double>(std::max<int64_t>(call.elements, 1));
  type == ScalarType::Double ? void(*loss.mutable_data_ptr<double>() = total)
                             : void(*loss.mutable_data_ptr<float>() = static_cast<float>(total));
  return {loss, moments};
}

// Gradients of the student's levels where for_student, followed by those of the teacher's where for_teacher.
std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher, Tensor moments, bool for_student, bool for_teacher) {
  Call call(student, teacher);
  const ScalarType type = widened(student[0]);
  STD_TORCH_CHECK(moments.is_contiguous() && moments.dim() == 2 && moments.size(0) == kMoments && moments.size(1) == call.arguments.rows &&
                      moments.scalar_type() == type, "instance_norm_mse_backward: moments must be those of the forward call");
  STD_TORCH_CHECK(grad.numel() == 1 && grad.is_cpu() && grad.scalar_type() == type, "instance_norm_mse_backward: grad must be one number of the loss's dtype");
  const double value = type == ScalarType::Double ? *grad.const_data_ptr<double>() : *grad.const_data_ptr<float>();
  call.arguments.factor = 2.0 * value / static_cast<double>(std::max<int64_t>(call.elements, 1));
  call.arguments.moments = const_cast<void*>(moments.const_data_ptr());

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
      "instance_norm_mse_backward(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor moments, bool for_student, bool for_teacher) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, library) {
  library.impl("instance_norm_mse", TORCH_BOX(&forward));
  library.impl("instance_norm_mse_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
