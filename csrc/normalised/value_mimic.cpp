// value_mimic: loss[b, g] = sum over all cells of M (v - t)^2, mean over the head's d channels, over max(sum M, 1e-6);
// v, t = LayerNorm without affine of student and teacher over the d channels of a cell, M = mass [B, G, H, W].
//
// forward   reads student, teacher, mass once
// backward  reads them again, writes the student's gradient once:
//             d loss / d student = 2 grad M / (d max(sum M, 1e-6)) * scale * ((v - t) - v mean((v - t) v))
#include "normalised/value_mimic_kernels.h"
#include "common/call.h"

#include <memory>
#include <tuple>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNEL_TABLES(value_mimic::Table, Tiles, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

constexpr int64_t kPartElements = 1 << 17;

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher, mass;
  std::vector<Level> levels;
  std::vector<Part> parts;
  Arguments arguments{};
  const Table& table;
  int64_t images = 0, channels = 0, slots = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masses,
       double eps)
      : table(kernels_for<Table>("value_mimic", students)) {
    STD_TORCH_CHECK(students.size() == teachers.size() && students.size() == masses.size(),
                    "value_mimic: student, teacher and mass must have as many levels");
    STD_TORCH_CHECK(students[0].dim() == 4 && masses[0].dim() == 4, "value_mimic: levels must be [B, C, H, W]");
    images = students[0].size(0), channels = students[0].size(1), arguments.heads = masses[0].size(1);
    STD_TORCH_CHECK(arguments.heads > 0 && channels % arguments.heads == 0,
                    "value_mimic: mass must have a number of heads that divides the channels");
    arguments.depth = channels / arguments.heads;
    arguments.eps = eps;
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index], masses[index]);
    arguments.levels = levels.data();
  }

  void add_level(const Tensor& s, const Tensor& t, const Tensor& m) {
    for (const Tensor* one : {&s, &t, &m})
      STD_TORCH_CHECK(one->dim() == 4 && one->is_cpu() && one->size(0) == images && one->size(2) == s.size(2) &&
                          one->size(3) == s.size(3) && one->size(1) == (one == &m ? arguments.heads : channels),
                      "value_mimic: levels must be [B, C, H, W] on the CPU, mass [B, G, H, W], of the same sizes");
    const ScalarType type = student.empty() ? s.scalar_type() : student[0].scalar_type();
    STD_TORCH_CHECK(s.scalar_type() == type && t.scalar_type() == type,
                    "value_mimic: values must have one dtype");
    STD_TORCH_CHECK(m.scalar_type() == widened(s), "value_mimic: mass must have the dtype of the loss");
    const bool channels_last = is_channels_last(s), mass_last = is_channels_last(m);
    student.push_back(dense(s, channels_last));
    teacher.push_back(dense(t, channels_last));
    mass.push_back(dense(m, mass_last));
    const int64_t cells = s.size(2) * s.size(3), heads = arguments.heads, index = levels.size();
    levels.push_back({student.back().const_data_ptr(), teacher.back().const_data_ptr(), mass.back().const_data_ptr(),
                      nullptr, cells, channels * cells, channels_last ? 1 : cells, channels_last ? channels : 1,
                      heads * cells, mass_last ? 1 : cells, mass_last ? heads : 1});
    if (channels == 0) return;
    const int64_t together = channels_last ? heads : 1;  // heads per part
    const int64_t step = std::max<int64_t>(1, kPartElements / (together * arguments.depth * 32)) * 32;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t head = 0; head < heads; head += together)
        for (int64_t cell = 0; cell < cells; cell += step, slots += together)
          parts.push_back({index, image, head, together, cell, std::min(step, cells - cell), slots});
  }

  void run(Table::Kernel kernel) {
    const auto cost = [&](const Part& part) { return part.cells * part.heads * arguments.depth; };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) {
      const std::unique_ptr<double[]> buffer(new double[2 * arguments.depth * kTileBytes / sizeof(double)]);
      kernel(arguments, begin, end, buffer.get());
    });
  }

  // [B, G]: the values of all parts, summed in order.
  std::vector<double> over_parts(const std::vector<double>& values) const {
    std::vector<double> total(images * arguments.heads);
    for (const Part& part : parts)
      for (int64_t head = 0; head < part.heads; ++head)
        total[part.image * arguments.heads + part.head + head] += values[part.slot + head];
    return total;
  }
};

double least_mass(double mass) {
  return mass < 1e-6 ? 1e-6 : mass;  // NaN stays NaN
}

// loss and the sums of the mass, both [B, G]
std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> mass,
                                   double eps) {
  Call call(student, teacher, mass, eps);
  std::vector<double> errors(call.slots), masses(call.slots);
  call.arguments.errors = errors.data();
  call.arguments.masses = masses.data();
  call.run(call.table.forward);

  errors = call.over_parts(errors);
  masses = call.over_parts(masses);
  for (size_t row = 0; row < errors.size(); ++row) errors[row] /= least_mass(masses[row]);
  const std::vector<int64_t> shape = {call.images, call.arguments.heads};
  const ScalarType type = widened(student[0]);
  return {tensor_of(errors, student[0], shape, type), tensor_of(masses, student[0], shape, type)};
}

std::vector<double> numbers(const Tensor& tensor) {
  const Tensor plain = torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Double));
  const double* data = plain.const_data_ptr<double>();
  return std::vector<double>(data, data + plain.numel());
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                             std::vector<Tensor> mass, Tensor total, double eps) {
  Call call(student, teacher, mass, eps);
  const int64_t heads = call.arguments.heads;
  for (const Tensor* one : {&grad, &total})
    STD_TORCH_CHECK(one->dim() == 2 && one->size(0) == call.images && one->size(1) == heads && one->is_cpu(),
                    "value_mimic_backward: grad and total must be [B, G] on the CPU");
  std::vector<double> factors = numbers(grad);
  const std::vector<double> masses = numbers(total);
  const double depth = static_cast<double>(std::max<int64_t>(call.arguments.depth, 1));
  for (size_t row = 0; row < factors.size(); ++row) factors[row] *= 2 / (depth * least_mass(masses[row]));
  call.arguments.factors = factors.data();
  const std::vector<Tensor> gradients = new_gradients(call.student, call.levels, &Level::gradient);
  call.run(call.table.backward);
  return gradients;
}

}  // namespace

FASTKD_OP("value_mimic", "(Tensor[] student, Tensor[] teacher, Tensor[] mass, float eps) -> (Tensor, Tensor)", forward)
FASTKD_OP("value_mimic_backward",
          "(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor[] mass, Tensor total, float eps) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
