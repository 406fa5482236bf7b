// conv3x3_taps: the nine products of every embedding e [N, C] with a weight w [O, C, 3, 3], taps [N, 9, O]:
// taps[n, t, o] = sum_c e[n, c] w[o, c, t]. The matrix of a library's product would be the weight turned, a copy that
// costs more than the product: here the weight is read as it lies, its numbers broadcast, and a lane is an embedding.
//
// forward    of each output o the nine rows w[o, :, t] times e^T, a tile [9, embeddings], then turned
// backward   g^T [O, 9, N] is turned once; for e: the rows w[o, c, :] times g^T; for w: the rows g^T[o, t, :] times e
// Sums in registers over at most kDepth products, then in memory, in an order that depends on the shape alone.
#include "pyramid.h"
#include "tile.h"

#include <torch/csrc/stable/library.h>

namespace fastkd {
namespace conv3x3_taps {

constexpr int64_t kTaps = 9;

struct Arguments {
  int64_t count, inputs, outputs;  // N, C, O
  int64_t padded;                  // N rounded up to whole vectors
  const void* weight;              // [O, C, 9]
  const void *rows, *columns;      // embeddings [N, C rounded up to whole vectors], [C, padded]
  void* taps;                      // forward: result [N, 9, O]; backward: its gradient
  void* turned;                    // [O, 9, padded]: the gradient
  void *for_rows, *for_weight;     // gradients, null: not wanted
};

// A task: lanes outputs, or (inputs) lanes inputs, from `first` on.
struct Part {
  int64_t first, count;
  bool inputs;
};

using Kernel = void (*)(const Arguments&, const Part* begin, const Part* end);

struct Table {  // of float, double
  Kernel forward[2], turn[2], backward[2];
  void (*pack[2])(const Arguments&, const void* embeddings, void* rows, void* columns);
  int64_t lanes[2];
};

}  // namespace conv3x3_taps
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace conv3x3_taps;

constexpr int kMostVectors = kWide ? 3 : 1;  // with nine rows they fill the registers

// c [M, U vectors] = the sum over groups and steps of a[m * row + group * group_stride + step * step_stride] times the
// rows of b, one after the other; at most about kDepth products in a row.
template <class V, int M, int U>
__attribute__((noinline)) void multiply_strided(const Element<V>* a, int64_t row, int64_t group_stride, int64_t groups,
                                                int64_t step_stride, int64_t steps, const Element<V>* b, int64_t ldb,
                                                Element<V>* c, int64_t ldc) {
  constexpr int64_t lanes = kLanes<V>;
  V sum[M][U];
  const auto clear = [&]() __attribute__((always_inline)) {
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<U>([&](auto u) __attribute__((always_inline)) { sum[m][u] = V{}; });
    });
  };
  const auto add = [&](bool first) __attribute__((always_inline)) {
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<U>([&](auto u) __attribute__((always_inline)) {
        Element<V>* out = c + m * ldc + u * lanes;
        store(out, first ? sum[m][u] : V(load<V>(out) + sum[m][u]));
      });
    });
  };
  clear();
  int64_t added = 0;
  bool first = true;
  for (int64_t group = 0; group < groups; ++group, a += group_stride) {
    const Element<V>* left = a;
    for (int64_t step = 0; step < steps; ++step, left += step_stride, b += ldb) {
      V right[U];
      unroll<U>([&](auto u) __attribute__((always_inline)) { right[u] = load<V>(b + u * lanes); });
      unroll<M>([&](auto m) __attribute__((always_inline)) {
        const V value = splat<V>(left[m * row]);
        unroll<U>([&](auto u) __attribute__((always_inline)) { sum[m][u] = multiply_add(value, right[u], sum[m][u]); });
      });
      if (++added == kDepth) {
        add(first);
        clear();
        first = false;
        added = 0;
      }
    }
  }
  if (first || added > 0) add(first);
}

template <class acc>
struct Taps {
  using V = Vector<acc>;
  static constexpr int lanes = kLanes<V>;
  static constexpr int64_t kWidth = kMostVectors * lanes;  // of a tile
  static constexpr int kRows = lanes < 8 ? lanes : 8;      // inputs at a time

  // f(first vector, constant number of vectors) for all vectors of n numbers
  template <class F>
  static FASTKD_INLINE void for_vectors(int64_t n, const F& f) {
    const Parts parts((n + lanes - 1) / lanes, kMostVectors);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t first = parts.first(part), count = parts.first(part + 1) - first;
      if constexpr (kMostVectors >= 3) {
        if (count == 3) f(first, std::integral_constant<int, 3>{});
        if (count == 2) f(first, std::integral_constant<int, 2>{});
      }
      if (count == 1) f(first, std::integral_constant<int, 1>{});
    }
  }

  // out[j * ld_out + i] = in[i * ld_in + j] of `rows` <= lanes rows, whose whole vectors may be read.
  static FASTKD_INLINE void turn_block(const acc* in, int64_t ld_in, int64_t rows, int64_t columns, acc* out,
                                       int64_t ld_out) {
    if (rows == lanes && columns == lanes) return transpose_block<V>(in, ld_in, out, ld_out);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) out[j * ld_out + i] = in[i * ld_in + j];
  }

  static void pack(const Arguments& arguments, const void* embeddings, void* rows, void* columns) {
    const acc* in = static_cast<const acc*>(embeddings);
    const int64_t n = arguments.count, c = arguments.inputs, width = round_up(c, lanes);
    if (rows != nullptr) {
      acc* out = static_cast<acc*>(rows);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t at = 0; at < width; ++at) out[row * width + at] = at < c ? in[row * c + at] : 0;
    }
    if (columns != nullptr) {
      acc* out = static_cast<acc*>(columns);
      transpose<V>(in, c, n, c, out, arguments.padded);
      for (int64_t at = 0; at < c; ++at)
        for (int64_t row = n; row < arguments.padded; ++row) out[at * arguments.padded + row] = 0;
    }
  }

  static void forward(const Arguments& arguments, const Part* part, const Part* end) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
    const acc* columns = static_cast<const acc*>(arguments.columns);
    acc tile[lanes * kTaps * kWidth];  // of each output and tap a row of embeddings
    for (; part != end; ++part)
      for_vectors(arguments.count, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        for (int64_t at = 0; at < part->count; ++at) {
          const acc* weight = static_cast<const acc*>(arguments.weight) + (part->first + at) * inputs * kTaps;
          multiply_strided<V, kTaps, vectors>(weight, 1, 0, 1, kTaps, inputs, columns + first * lanes, arguments.padded,
                                              tile + at * kTaps * kWidth, kWidth);
        }
        for (int64_t u = 0; u < vectors; ++u) {
          const int64_t n0 = (first + u) * lanes, left = arguments.count - n0;
          acc* out = static_cast<acc*>(arguments.taps) + n0 * kTaps * outputs + part->first;
          for (int64_t tap = 0; tap < kTaps; ++tap)
            turn_block(tile + tap * kWidth + u * lanes, kTaps * kWidth, part->count, left < lanes ? left : lanes,
                       out + tap * outputs, kTaps * outputs);
        }
      });
  }

  // turned [O, 9, padded] = the gradient of the taps, zeros behind the embeddings
  static void turn(const Arguments& arguments, const Part* part, const Part* end) {
    const int64_t outputs = arguments.outputs, padded = arguments.padded;
    for (; part != end; ++part)
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const acc* in = static_cast<const acc*>(arguments.taps) + tap * outputs + part->first;
        acc* out = static_cast<acc*>(arguments.turned) + (part->first * kTaps + tap) * padded;
        for (int64_t n = 0; n < padded; n += lanes) {
          const int64_t left = arguments.count - n < lanes ? arguments.count - n : lanes;
          turn_block(in + n * kTaps * outputs, kTaps * outputs, left, part->count, out + n, kTaps * padded);
          for (int64_t at = 0; left < lanes && at < part->count; ++at)
            for (int64_t lane = left; lane < lanes; ++lane) out[at * kTaps * padded + n + lane] = 0;
        }
      }
  }

  static void for_weight(const Arguments& arguments, const Part& part, acc* row) {
    const int64_t inputs = arguments.inputs, width = round_up(inputs, lanes);
    const acc* embeddings = static_cast<const acc*>(arguments.rows);
    acc tile[lanes * kWidth > kTaps * kWidth ? lanes * kWidth : kTaps * kWidth];
    for (int64_t output = part.first; output < part.first + part.count; ++output) {
      const acc* grad = static_cast<const acc*>(arguments.turned) + output * kTaps * arguments.padded;
      for_vectors(inputs, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        multiply_strided<V, kTaps, vectors>(grad, arguments.padded, 0, 1, 1, arguments.count,
                                            embeddings + first * lanes, width, tile, kWidth);
        for (int64_t u = 0; u < vectors; ++u) {
          acc* out = row + (first + u) * lanes * kTaps;
          if constexpr (lanes > kTaps)  // what is written beyond the nine is the next input's
            transpose_block<V>(tile + u * lanes, kWidth, out, kTaps);
          else
            for (int lane = 0; lane < lanes; ++lane)
              for (int tap = 0; tap < kTaps; ++tap) out[lane * kTaps + tap] = tile[tap * kWidth + u * lanes + lane];
        }
      });
      acc* out = static_cast<acc*>(arguments.for_weight) + output * inputs * kTaps;
      copy(out, row, inputs * kTaps);
    }
  }

  static void for_rows(const Arguments& arguments, const Part& part) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
    const acc* turned = static_cast<const acc*>(arguments.turned);
    acc tile[lanes * kWidth];
    for_vectors(arguments.count, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
      const acc* right = turned + first * lanes;
      for (int64_t at = 0; at < part.count;) {
        const acc* weight = static_cast<const acc*>(arguments.weight) + (part.first + at) * kTaps;
        const auto rows = [&](auto count) __attribute__((always_inline)) {
          multiply_strided<V, count, vectors>(weight, kTaps, inputs * kTaps, outputs, 1, kTaps, right,
                                              arguments.padded, tile + at * kWidth, kWidth);
          at += count;
        };
        if (at + kRows <= part.count)
          rows(std::integral_constant<int, kRows>{});
        else
          rows(std::integral_constant<int, 1>{});
      }
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t n0 = (first + u) * lanes, left = arguments.count - n0;
        turn_block(tile + u * lanes, kWidth, part.count, left < lanes ? left : lanes,
                   static_cast<acc*>(arguments.for_rows) + n0 * inputs + part.first, inputs);
      }
    });
  }

  static void backward(const Arguments& arguments, const Part* part, const Part* end) {
    acc* row = new acc[round_up(arguments.inputs, lanes) * kTaps + lanes];
    for (; part != end; ++part) {
      if (part->inputs)
        for_rows(arguments, *part);
      else
        for_weight(arguments, *part, row);
    }
    delete[] row;
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

namespace fastkd {
template <>
const conv3x3_taps::Table& kernels<conv3x3_taps::Table, FASTKD_CAPABILITY>() {
  using F = Taps<float>;
  using D = Taps<double>;
  static const conv3x3_taps::Table table = {{F::forward, D::forward},
                                            {F::turn, D::turn},
                                            {F::backward, D::backward},
                                            {F::pack, D::pack},
                                            {F::lanes, D::lanes}};
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

// A call: its dense arguments, the embeddings packed for the products, and the tasks.
struct Call {
  Tensor weight, embeddings;
  std::vector<Tensor> scratch;
  const Table& table = active_kernels<Table>();
  int type;
  Arguments arguments{};

  Call(const Tensor& given, const Tensor& given_weight) : weight(given_weight), embeddings(given) {
    STD_TORCH_CHECK(given.dim() == 2 && given_weight.dim() == 4 && given.is_cpu() && given_weight.is_cpu() &&
                        given_weight.size(1) == given.size(1) && given_weight.size(2) == 3 && given_weight.size(3) == 3,
                    "conv3x3_taps: embeddings must be [N, C] and weight [O, C, 3, 3], both on the CPU");
    STD_TORCH_CHECK(widened(given) == given.scalar_type() && given_weight.scalar_type() == given.scalar_type(),
                    "conv3x3_taps: embeddings and weight must both be float32 or float64");
    type = type_index(given);
    weight = torch::stable::contiguous(given_weight);
    embeddings = torch::stable::contiguous(given);
    const int64_t lanes = table.lanes[type];
    arguments.count = given.size(0), arguments.inputs = given.size(1), arguments.outputs = given_weight.size(0);
    arguments.padded = (arguments.count + lanes - 1) / lanes * lanes;
    arguments.weight = weight.const_data_ptr();
  }

  Tensor make(std::vector<int64_t> shape) const {
    return torch::stable::new_empty(embeddings, IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  }

  void* room(std::vector<int64_t> shape) {
    scratch.push_back(make(std::move(shape)));
    return scratch.back().mutable_data_ptr();
  }

  void pack(bool rows, bool columns) {
    const int64_t lanes = table.lanes[type], width = (arguments.inputs + lanes - 1) / lanes * lanes;
    void* by_rows = rows ? room({arguments.count, width}) : nullptr;
    void* by_columns = columns ? room({arguments.inputs, arguments.padded}) : nullptr;
    table.pack[type](arguments, embeddings.const_data_ptr(), by_rows, by_columns);
    arguments.rows = by_rows, arguments.columns = by_columns;
  }

  std::vector<Part> parts(bool outputs, bool inputs) const {
    const int64_t lanes = table.lanes[type];
    std::vector<Part> parts;
    const auto add = [&](int64_t count, bool of_inputs) {
      for (int64_t first = 0; first < count; first += lanes)
        parts.push_back({first, std::min(lanes, count - first), of_inputs});
    };
    if (outputs) add(arguments.outputs, false);
    if (inputs) add(arguments.inputs, true);
    return parts;
  }

  void run(Kernel kernel, const std::vector<Part>& parts, int64_t divisor) const {
    const int64_t others = arguments.count * kTaps;
    const auto cost = [&](const Part& part) {
      return part.count * others * (part.inputs ? arguments.outputs : arguments.inputs) / divisor;
    };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) { kernel(arguments, begin, end); });
  }
};

Tensor forward(Tensor embeddings, Tensor weight) {
  Call call(embeddings, weight);
  Tensor taps = call.make({call.arguments.count, kTaps, call.arguments.outputs});
  if (taps.numel() == 0) return taps;
  call.pack(false, true);
  call.arguments.taps = taps.mutable_data_ptr();
  call.run(call.table.forward[call.type], call.parts(true, false), 16);
  return taps;
}

// The gradients of embeddings and weight, empty where not wanted.
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor embeddings, Tensor weight, bool for_embeddings,
                                    bool for_weight) {
  Call call(embeddings, weight);
  Arguments& arguments = call.arguments;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.is_cpu() && grad.size(0) == arguments.count && grad.size(1) == kTaps &&
                      grad.size(2) == arguments.outputs && grad.scalar_type() == embeddings.scalar_type(),
                  "conv3x3_taps_backward: grad must be [N, 9, O] on the CPU, of the dtype of the embeddings");
  Tensor rows = call.make({for_embeddings ? arguments.count : 0, arguments.inputs});
  Tensor matrix = call.make({for_weight ? arguments.outputs : 0, arguments.inputs, 3, 3});
  if (arguments.count * arguments.inputs * arguments.outputs == 0) {
    torch::stable::zero_(rows);
    torch::stable::zero_(matrix);
    return {rows, matrix};
  }
  const Tensor plain = torch::stable::contiguous(grad);
  arguments.taps = const_cast<void*>(plain.const_data_ptr());
  arguments.turned = call.room({arguments.outputs, kTaps, arguments.padded});
  arguments.for_rows = rows.mutable_data_ptr();
  arguments.for_weight = matrix.mutable_data_ptr();
  call.pack(for_weight, false);
  call.run(call.table.turn[call.type], call.parts(true, false), arguments.inputs);
  call.run(call.table.backward[call.type], call.parts(for_weight, for_embeddings), 16);
  return {rows, matrix};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, library) {
  library.def("conv3x3_taps(Tensor embeddings, Tensor weight) -> Tensor");
  library.def(
      "conv3x3_taps_backward(Tensor grad, Tensor embeddings, Tensor weight, bool for_embeddings, bool for_weight) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, library) {
  library.impl("conv3x3_taps", TORCH_BOX(&forward));
  library.impl("conv3x3_taps_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
