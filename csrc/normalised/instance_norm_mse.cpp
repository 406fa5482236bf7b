// instance_norm_mse: mean over all elements of all levels of (IN(student) - IN(teacher))^2,
// IN(x) = (x - mean) / sqrt(var + eps) over a row: the cells of one channel of one image.
//
// forward   reads student and teacher once from memory; writes 10 numbers a row: moments [10, rows], see Moment
// backward  reads student and teacher once, writes one gradient for each side that wants one:
//             d loss / d student = 2 grad / N * scale_s * (e - mean(e IN(s)) IN(s))
//             d loss / d teacher = 2 grad / N * scale_t * (mean(e IN(t)) IN(t) - e)
#include "normalised/instance_norm_mse_kernels.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#if FASTKD_COMPILES_KERNELS
namespace fastkd {
template <>
const instance_norm_mse::Table& kernels<instance_norm_mse::Table, FASTKD_CAPABILITY>() {
  using F = Kernels<float>;
  using D = Kernels<double>;
  using B = Kernels<BFloat16>;
  using H = Kernels<Half>;
  static const instance_norm_mse::Table table = {
      {F::forward, D::forward, B::forward, H::forward},
      {F::backward, D::backward, B::backward, H::backward},
      {F::guess_rows, D::guess_rows, B::guess_rows, H::guess_rows},
      {F::sum_parts, D::sum_parts, B::sum_parts, H::sum_parts},
      {F::finish_rows, D::finish_rows, B::finish_rows, H::finish_rows},
      {F::careful_rows, D::careful_rows, B::careful_rows, H::careful_rows},
      {F::backward_parts, D::backward_parts, B::backward_parts, H::backward_parts},
      {F::kBlock, D::kBlock, B::kBlock, H::kBlock}};
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

constexpr int64_t kPartElements = 1 << 18;  // of a channels-last task: enough to hide what a task costs beside them

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher;
  std::vector<Level> levels;
  Arguments arguments{};
  std::vector<Task> rows;    // of contiguous levels
  std::vector<Task> images;  // of channels-last levels
  std::vector<Part> parts;
  const Table& table = active_kernels<Table>();
  int type = 0;
  int64_t elements = 0, sums = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
    STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size(),
                    "instance_norm_mse: student and teacher must have as many levels, at least one");
    type = type_index(students[0]);
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index]);
    arguments.levels = levels.data();
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
    const int64_t channels = s.size(1), cells = s.size(2) * s.size(3);
    levels.push_back({student.back().const_data_ptr(), teacher.back().const_data_ptr(), nullptr, nullptr, channels,
                      cells, nullptr, 0, is_large(s.numel() * s.element_size())});
    elements += s.size(0) * channels * cells;
    if (cells == 0 || channels == 0) return;  // nothing to normalise, no rows
    for (int64_t image = 0; image < s.size(0); ++image) channels_last ? add_parts(image) : add_rows(image);
  }

  void add_rows(int64_t image) {
    for (int64_t channel = 0; channel < levels.back().channels; ++channel)
      rows.push_back({static_cast<int64_t>(levels.size()) - 1, image, channel, 1, arguments.rows++});
  }

  void add_parts(int64_t image) {
    Level& level = levels.back();
    const int64_t index = levels.size() - 1, step = std::max<int64_t>(64, kPartElements / level.channels);
    images.push_back({index, image, 0, level.channels, arguments.rows});
    level.parts = 0;
    for (int64_t cell = 0; cell < level.cells; cell += step)
      parts.push_back({index, image, cell, std::min(step, level.cells - cell), level.parts++, arguments.rows});
    arguments.rows += level.channels;
    sums += level.parts * kSums * level.channels;
  }

  double mean_over_elements(double sum) const { return sum / static_cast<double>(std::max<int64_t>(elements, 1)); }

  // The cost of a task is the number of elements it reads.
  void run(Table::OnRows kernel, const std::vector<Task>& tasks) {
    const auto cost = [&](const Task& task) { return task.channels * levels[task.level].cells; };
    run_balanced(tasks, cost, [&](const Task* begin, const Task* end) { kernel(arguments, begin, end); });
  }

  void run(Table::OnParts kernel) {
    const auto cost = [&](const Part& part) { return part.cells * levels[part.level].channels; };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) { kernel(arguments, begin, end); });
  }

  void forward_channels_last() {
    if (parts.empty()) return;
    const std::unique_ptr<double[]> memory(new double[sums]);
    double* next = memory.get();
    for (const Task& image : images) {
      Level& level = levels[image.level];
      if (image.image == 0) level.sums = next;
      next += level.parts * kSums * level.channels;
    }
    run(table.guess_rows[type], images);
    run(table.sum_parts[type]);
    run(table.finish_rows[type], images);
    run(table.careful_rows[type], blocks_to_do_again());
  }

  std::vector<Task> blocks_to_do_again() const {
    std::vector<Task> blocks;
    for (const Task& image : images)
      for (int64_t channel = 0; channel < image.channels; channel += table.block[type]) {
        const int64_t count = std::min(table.block[type], image.channels - channel), row = image.row + channel;
        const double* errors = arguments.row_errors + row;
        if (std::any_of(errors, errors + count, [](double error) { return error == -1; }))
          blocks.push_back({image.level, image.image, channel, count, row});
      }
    return blocks;
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
  call.run(call.table.forward[call.type], call.rows);
  call.forward_channels_last();

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
  call.run(call.table.backward[call.type], call.rows);
  call.run(call.table.backward_parts[call.type]);
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
