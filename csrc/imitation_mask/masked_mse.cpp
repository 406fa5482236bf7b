// masked_mse: sum of (student - teacher)^2 over the masked cells and all channels, and the number of masked cells.
//
// forward   reads the masked cells (contiguous: vectors with at least one masked cell)
// backward  reads them again, writes the student's gradient once: 2 grad (student - teacher), 0 outside the mask
// Values outside the mask are not used, so infinities there do not matter. Sums are in double, in an order that depends
// only on shapes and mask.
#include "common/call.h"
#include "common/reduce.h"

#include <tuple>

namespace fastkd {
namespace masked_mse {

struct Level {
  const void* student;
  const void* teacher;
  void* gradient;             // null in forward
  const unsigned char* mask;  // [B, cells]
  int64_t channels, cells;
  bool channels_last, large;  // large: see is_large
};

// Contiguous: channels [first, first + count) of an image, and the first cells of the image's vectors with a masked
// cell. Channels-last: cells [first, first + count), and the masked ones among them.
struct Part {
  int64_t level, image, first, count, slot;
  const int64_t *active, *active_end;
};

struct Arguments {
  const Level* levels;
  double* errors;  // forward: one per part
  double factor;   // backward: 2 grad
};

struct Table {  // of a dtype
  using Kernel = void (*)(const Arguments&, const Part* begin, const Part* end);
  Kernel forward, backward;
  int64_t lanes;  // cells of a vector
};

}  // namespace masked_mse
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace masked_mse;

template <class scalar_t>
struct Cells {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kLane = kLanes<V>;
  static constexpr int64_t kSteps = 64;  // sums in acc

  static FASTKD_INLINE double row_error(const scalar_t* s, const scalar_t* t, const Level& level, const Part& part) {
    const unsigned char* mask = level.mask + part.image * level.cells;
    double total[kLane] = {};
    for (const int64_t* first = part.active; first < part.active_end; first += kSteps) {
      const int64_t* last = part.active_end - first < kSteps ? part.active_end : first + kSteps;
      V sum[1] = {};
      for (const int64_t* at = first; at < last; ++at) {
        const V e = select(load<V>(s + *at) - load<V>(t + *at), mask + *at);
        sum[0] = multiply_add(e, e, sum[0]);
      }
      flush<V, 1>(sum, total);
    }
    gather<kLane>(total);
    for (int64_t at = level.cells - level.cells % kLane; at < level.cells; ++at)
      if (mask[at] != 0) {
        const acc e = load<acc>(s + at) - load<acc>(t + at);
        total[0] += e * e;
      }
    return total[0];
  }

  static FASTKD_INLINE double cell_error(const scalar_t* s, const scalar_t* t, int64_t channels) {
    double total[kLane] = {};
    for (int64_t first = 0; first + kLane <= channels; first += kSteps * kLane) {
      V sum[1] = {};
      for (int64_t at = first; at + kLane <= channels && at < first + kSteps * kLane; at += kLane) {
        const V e = load<V>(s + at) - load<V>(t + at);
        sum[0] = multiply_add(e, e, sum[0]);
      }
      flush<V, 1>(sum, total);
    }
    gather<kLane>(total);
    for (int64_t at = channels - channels % kLane; at < channels; ++at) {
      const acc e = load<acc>(s + at) - load<acc>(t + at);
      total[0] += e * e;
    }
    return total[0];
  }

  static void forward(const Arguments& arguments, const Part* part, const Part* end) {
    for (; part != end; ++part) {
      const Level& level = arguments.levels[part->level];
      const int64_t image = part->image * level.channels * level.cells;
      const scalar_t* s = static_cast<const scalar_t*>(level.student) + image;
      const scalar_t* t = static_cast<const scalar_t*>(level.teacher) + image;
      double total = 0;
      if (level.channels_last) {
        for (const int64_t* cell = part->active; cell != part->active_end; ++cell)
          total += cell_error(s + *cell * level.channels, t + *cell * level.channels, level.channels);
      } else {
        for (int64_t channel = part->first; channel < part->first + part->count; ++channel)
          total += row_error(s + channel * level.cells, t + channel * level.cells, level, *part);
      }
      arguments.errors[part->slot] = total;
    }
  }

  static FASTKD_INLINE bool any(const unsigned char* mask) {  // of a vector
    unsigned char bytes[kLane], seen = 0;
    std::memcpy(bytes, mask, kLane);
    for (int lane = 0; lane < kLane; ++lane) seen |= bytes[lane];
    return seen != 0;
  }

  static FASTKD_INLINE void write_cells(const scalar_t* s, const scalar_t* t, scalar_t* gradient,
                                        const unsigned char* mask, int64_t begin, int64_t end, acc factor) {
    for (int64_t at = begin; at < end; ++at)
      store(gradient + at, mask[at] != 0 ? (load<acc>(s + at) - load<acc>(t + at)) * factor : acc(0));
  }

  // Streaming stores begin with the first cache line of the row.
  template <bool past_caches>
  static FASTKD_INLINE void write_row(const scalar_t* s, const scalar_t* t, scalar_t* gradient, const Level& level,
                                      const unsigned char* mask, acc factor) {
    constexpr int64_t line = kLineBytes / sizeof(scalar_t), block = past_caches && line > kLane ? line : kLane;
    const int64_t before = past_caches ? elements_to_line(gradient) : 0;
    const int64_t head = before < level.cells ? before : level.cells;
    const int64_t tail = level.cells - (level.cells - head) % block;
    write_cells(s, t, gradient, mask, 0, head, factor);
    for (int64_t at = head; at < tail; at += kLane) {
      V value{};
      if (any(mask + at)) value = select(V((load<V>(s + at) - load<V>(t + at)) * factor), mask + at);
      put<past_caches>(gradient + at, value);
    }
    write_cells(s, t, gradient, mask, tail, level.cells, factor);
  }

  // All channels of a cell, masked or not. past_caches: streaming stores; the channels are whole cache lines.
  template <bool past_caches>
  static FASTKD_INLINE void write_cell(const scalar_t* s, const scalar_t* t, scalar_t* gradient, int64_t channels,
                                       bool masked, acc factor) {
    int64_t at = 0;
    if (masked) {
      for (; at + kLane <= channels; at += kLane)
        put<past_caches>(gradient + at, V((load<V>(s + at) - load<V>(t + at)) * factor));
      for (; at < channels; ++at) store(gradient + at, (load<acc>(s + at) - load<acc>(t + at)) * factor);
    } else {
      for (; at + kLane <= channels; at += kLane) put<past_caches>(gradient + at, V{});
      for (; at < channels; ++at) store(gradient + at, acc(0));
    }
  }

  template <bool past_caches>
  static FASTKD_INLINE void write_part(const Level& level, const Part& part, acc factor) {
    const int64_t image = part.image * level.channels * level.cells, channels = level.channels;
    const scalar_t* s = static_cast<const scalar_t*>(level.student) + image;
    const scalar_t* t = static_cast<const scalar_t*>(level.teacher) + image;
    scalar_t* gradient = static_cast<scalar_t*>(level.gradient) + image;
    const unsigned char* mask = level.mask + part.image * level.cells;
    for (int64_t index = part.first; index < part.first + part.count; ++index) {
      const int64_t at = index * (level.channels_last ? channels : level.cells);
      if (level.channels_last)
        write_cell<past_caches>(s + at, t + at, gradient + at, channels, mask[index] != 0, factor);
      else
        write_row<past_caches>(s + at, t + at, gradient + at, level, mask, factor);
    }
  }

  // In reverse order: the data that forward read last is still in the caches.
  static void backward(const Arguments& arguments, const Part* begin, const Part* end) {
    const acc factor = static_cast<acc>(arguments.factor);
    for (const Part* part = end; part != begin;) {
      --part;
      const Level& level = arguments.levels[part->level];
      const bool lines =
          !level.channels_last || level.channels * static_cast<int64_t>(sizeof(scalar_t)) % kLineBytes == 0;
      level.large && lines ? write_part<true>(level, *part, factor) : write_part<false>(level, *part, factor);
    }
    end_stream();
  }

  static constexpr Table table() { return {forward, backward, kLane}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

FASTKD_KERNEL_TABLES(masked_mse::Table, Cells, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

constexpr int64_t kPartElements = 1 << 16;

// The tensors of a call, dense in the student's memory order, and the work on them.
struct Call {
  std::vector<Tensor> student, teacher, masks;
  std::vector<Level> levels;
  std::vector<Part> parts;
  std::vector<std::vector<int64_t>> active;  // by level and image: vectors or cells to process
  Arguments arguments{};
  const Table& table;
  int64_t count = 0;

  Call(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& mask)
      : table(kernels_for<Table>("masked_mse", students)) {
    STD_TORCH_CHECK(students.size() == teachers.size() && students.size() == mask.size(),
                    "masked_mse: student, teacher and masks must have as many levels");
    for (size_t index = 0; index < students.size(); ++index) add_level(students[index], teachers[index], mask[index], students[0]);
    arguments.levels = levels.data();
  }

  void add_level(const Tensor& s, const Tensor& t, const Tensor& m, const Tensor& first) {
    check_level("masked_mse", s, t, first);
    STD_TORCH_CHECK(m.dim() == 3 && m.size(0) == s.size(0) && m.size(1) == s.size(2) && m.size(2) == s.size(3) &&
                        m.scalar_type() == ScalarType::Bool && m.is_cpu(),
                    "masked_mse: masks must be [B, H, W] bool on the CPU");
    const bool channels_last = is_channels_last(s);
    student.push_back(dense(s, channels_last));
    teacher.push_back(dense(t, channels_last));
    masks.push_back(torch::stable::contiguous(m));
    levels.push_back({student.back().const_data_ptr(), teacher.back().const_data_ptr(), nullptr,
                      static_cast<const unsigned char*>(masks.back().const_data_ptr()), s.size(1),
                      s.size(2) * s.size(3), channels_last, is_large(s.numel() * s.element_size())});
    for (int64_t image = 0; image < s.size(0); ++image) add_parts(image);
  }

  void add_parts(int64_t image) {
    const Level& level = levels.back();
    const unsigned char* mask = level.mask + image * level.cells;
    for (int64_t cell = 0; cell < level.cells; ++cell) count += mask[cell] != 0;
    if (level.channels * level.cells == 0) return;
    const int64_t group = level.channels_last ? 1 : table.lanes;
    std::vector<int64_t> found;
    for (int64_t cell = 0; cell + group <= level.cells; cell += group)
      if (std::any_of(mask + cell, mask + cell + group, [](unsigned char one) { return one != 0; }))
        found.push_back(cell);
    active.push_back(std::move(found));  // moving keeps the addresses of its elements
    const int64_t *begin = active.back().data(), *end = begin + active.back().size();
    const int64_t all = level.channels_last ? level.cells : level.channels;
    const int64_t step = std::max<int64_t>(1, kPartElements * all / (level.channels * level.cells));
    for (int64_t first = 0; first < all; first += step) {
      Part part{static_cast<int64_t>(levels.size()) - 1, image, first, std::min(step, all - first),
                static_cast<int64_t>(parts.size()), begin, end};
      if (level.channels_last) {
        part.active = std::lower_bound(begin, end, first);
        part.active_end = std::lower_bound(part.active, end, first + part.count);
      }
      parts.push_back(part);
    }
  }

  void run(Table::Kernel kernel) {
    const auto cost = [&](const Part& part) {
      const Level& level = levels[part.level];
      return part.count * (level.channels_last ? level.channels : level.cells);
    };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) { kernel(arguments, begin, end); });
  }
};

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                   std::vector<Tensor> masks) {
  Call call(student, teacher, masks);
  std::vector<double> errors(call.parts.size());
  call.arguments.errors = errors.data();
  call.run(call.table.forward);
  double total = 0;
  for (const double one : errors) total += one;
  const ScalarType type = widened(student[0]);
  return {tensor_of({total}, student[0], {}, type), tensor_of({static_cast<double>(call.count)}, student[0], {}, type)};
}

std::vector<Tensor> backward(Tensor grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                             std::vector<Tensor> masks) {
  Call call(student, teacher, masks);
  call.arguments.factor = 2.0 * number_of("masked_mse_backward", grad, widened(student[0]));
  const std::vector<Tensor> gradients = new_gradients(call.student, call.levels, &Level::gradient);
  call.run(call.table.backward);
  return gradients;
}

}  // namespace

FASTKD_OP("masked_mse", "(Tensor[] student, Tensor[] teacher, Tensor[] masks) -> (Tensor, Tensor)", forward)
FASTKD_OP("masked_mse_backward",
          "(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor[] masks) -> Tensor[]",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
