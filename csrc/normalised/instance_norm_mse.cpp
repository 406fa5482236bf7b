// instance_norm_mse: mean over all elements of all levels of (IN(student) - IN(teacher))^2,
// IN(x) = (x - mean) / sqrt(var + eps) over a row: the cells of one channel of one image.
//
// forward   reads student and teacher once from memory; writes 10 values per row: moments [10, rows], see Moment
// backward  reads student and teacher once, writes the gradient of each side that requires one:
//             d loss / d student = 2 grad / N * scale_s * (e - mean(e IN(s)) IN(s))
//             d loss / d teacher = 2 grad / N * scale_t * (mean(e IN(t)) IN(t) - e)
#include "normalised/instance_norm_mse_kernels.h"
#include "common/call.h"

#include <memory>
#include <tuple>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNEL_TABLES(instance_norm_mse::Table, Kernels, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

constexpr int64_t kPartElements = 1 << 18;  // of a channels-last task: enough to hide the overhead of a task

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher;
  std::vector<Level> levels;
  Arguments arguments{};
  std::vector<Task> rows;    // of contiguous levels
  std::vector<Task> images;  // of channels-last levels
  std::vector<Part> parts;
  const Table& table;
  int64_t elements = 0, sums = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers)
      : table(kernels_for<Table>("instance_norm_mse", students)) {
    STD_TORCH_CHECK(students.size() == teachers.size(),
                    "instance_norm_mse: student and teacher must have as many levels");
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index], students[0]);
    arguments.levels = levels.data();
  }

  void add_level(const Tensor& s, const Tensor& t, const Tensor& first) {
    check_level("instance_norm_mse", s, t, first);
    const bool channels_last = is_channels_last(s);
    student.push_back(dense(s, channels_last));
    teacher.push_back(dense(t, channels_last));
    const int64_t channels = s.size(1), cells = s.size(2) * s.size(3);
    levels.push_back({student.back().const_data_ptr(), teacher.back().const_data_ptr(), nullptr, nullptr, channels,
                      cells, nullptr, 0, is_large(s.numel() * s.element_size())});
    elements += s.size(0) * channels * cells;
    if (cells == 0 || channels == 0) return;  // no rows
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
    run(table.guess_rows, images);
    run(table.sum_parts);
    run(table.finish_rows, images);
    run(table.careful_rows, blocks_to_do_again());
  }

  std::vector<Task> blocks_to_do_again() const {
    std::vector<Task> blocks;
    for (const Task& image : images)
      for (int64_t channel = 0; channel < image.channels; channel += table.block) {
        const int64_t count = std::min(table.block, image.channels - channel), row = image.row + channel;
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
  Tensor moments = new_tensor(student[0], {kMoments, call.arguments.rows}, type);
  std::vector<double> row_errors(call.arguments.rows);
  call.arguments.eps = eps;
  call.arguments.moments = moments.mutable_data_ptr();
  call.arguments.row_errors = row_errors.data();
  call.run(call.table.forward, call.rows);
  call.forward_channels_last();

  double total = 0;
  for (const double error : row_errors) total += error;
  return {tensor_of({call.mean_over_elements(total)}, student[0], {}, type), moments};
}

// Gradients of the student's levels where for_student, followed by those of the teacher's where for_teacher.
std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher, Tensor moments,
                             bool for_student, bool for_teacher) {
  Call call(student, teacher);
  const ScalarType type = widened(student[0]);
  STD_TORCH_CHECK(is_dense(moments, {kMoments, call.arguments.rows}, type),
                  "instance_norm_mse_backward: moments must be those of the forward call");
  call.arguments.factor = call.mean_over_elements(2.0 * number_of("instance_norm_mse_backward", grad, type));
  call.arguments.moments = const_cast<void*>(moments.const_data_ptr());  // the backward kernel only reads them

  std::vector<Tensor> gradients, of_teacher;
  if (for_student) gradients = new_gradients(call.student, call.levels, &Level::grad_student);
  if (for_teacher) of_teacher = new_gradients(call.teacher, call.levels, &Level::grad_teacher);
  gradients.insert(gradients.end(), of_teacher.begin(), of_teacher.end());
  call.run(call.table.backward, call.rows);
  call.run(call.table.backward_parts);
  return gradients;
}

}  // namespace

FASTKD_OP("instance_norm_mse", "(Tensor[] student, Tensor[] teacher, float eps) -> (Tensor, Tensor)", forward)
FASTKD_OP("instance_norm_mse_backward",
          "(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor moments, bool for_student, bool for_teacher) -> "
          "Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
