// conv3x3_taps: the nine products of every embedding e [N, C] with a weight w [O, C, 3, 3], taps [N, 9, O]:
// taps[n, t, o] = sum_c e[n, c] w[o, c, t]. A library's matrix product needs a permuted copy of the weight, which costs
// more than the product. Here the weight is read in place, its elements are broadcast, and lanes are embeddings.
//
// forward    for each output o: the nine rows w[o, :, t] times e^T, a tile [9, embeddings], then transposed
// backward   g^T [O, 9, N] is transposed on demand; for w: the rows g^T[o, t, :] of a task times e; for e: the rows
//            w[o, c, :] of all inputs of a thread times a few outputs of g^T, which stay in L1
// e^T and g^T are stored in blocks of as many embeddings as a product processes at a time, row by row of a block.
// Sums are in registers over at most kDepth products (backward for e: kChain), then in memory, in an order that depends
// only on the shape.
#pragma once

#include "common/tile.h"

namespace fastkd {
namespace conv3x3_taps {

constexpr int64_t kTaps = 9;

struct Arguments {
  int64_t count, inputs, outputs;  // N, C, O
  int64_t padded;                  // N rounded up to whole vectors
  const void* weight;              // [O, C, 9]
  const void *rows, *columns;      // embeddings [N, C rounded up to whole vectors], and their blocks [C, embeddings]
  void* taps;                      // forward: result [N, 9, O]; backward: its gradient
  void *for_rows, *for_weight;     // gradients
};

// A task: at most `lanes` outputs, or `lanes` inputs, from `first` on. Tasks of inputs are consecutive.
struct Part {
  int64_t first, count;
  bool inputs;
};

// scratch: of backward, as much as scratch_length says
using Kernel = void (*)(const Arguments&, const Part* begin, const Part* end, void* scratch);

struct Table {  // per dtype
  Kernel forward, backward;
  void (*pack)(const Arguments&, const void* embeddings, void* rows, void* columns);
  int64_t (*scratch_length)(const Arguments&);
  int64_t lanes;
};

}  // namespace conv3x3_taps
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace conv3x3_taps;

constexpr int64_t kChain = 36;  // for e: longer sums in a row are less exact than plain torch's
constexpr int kMostVectors = kWide ? 3 : 1;  // with nine rows they fill the registers

// c [M, U vectors] (+)= the sum over groups and steps of a[m * row + group * group_stride + step * step_stride] times
// the rows of b, U vectors each with stride ldb; at most `chain` consecutive products in registers.
template <class V, int M, int U, int row, int step_stride, int64_t chain = kDepth>
__attribute__((noinline)) void multiply_strided(const Element<V>* a, int64_t group_stride, int64_t groups,
                                                int64_t steps, const Element<V>* b, int64_t ldb, Element<V>* c,
                                                int64_t ldc, bool first) {
  constexpr int64_t lanes = kLanes<V>;
  V sum[M][U];
  const auto clear = [&]() __attribute__((always_inline)) {
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<U>([&](auto u) __attribute__((always_inline)) { sum[m][u] = V{}; });
    });
  };
  const auto add = [&]() __attribute__((always_inline)) {
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<U>([&](auto u) __attribute__((always_inline)) {
        Element<V>* out = c + m * ldc + u * lanes;
        store(out, first ? sum[m][u] : V(load<V>(out) + sum[m][u]));
      });
    });
    first = false;
  };
  clear();
  int64_t room = chain;
  for (int64_t group = 0; group < groups; ++group) {
    const Element<V>* left = a + group * group_stride;
    for (int64_t rest = steps; rest > 0;) {
      const int64_t count = rest < room ? rest : room;
      for (int64_t step = 0; step < count; ++step) {
        V right[U];
        unroll<U>([&](auto u) __attribute__((always_inline)) { right[u] = load<V>(b + u * lanes); });
        unroll<M>([&](auto m) __attribute__((always_inline)) {
          const V value = splat<V>(left[m * row]);
          unroll<U>([&](auto u)
                        __attribute__((always_inline)) { sum[m][u] = multiply_add(value, right[u], sum[m][u]); });
        });
        left += step_stride;
        b += ldb;
      }
      rest -= count;
      room -= count;
      if (room == 0) {
        add();
        clear();
        room = chain;
      }
    }
  }
  if (first || room < chain) add();
}

template <class acc>
struct Taps {
  using V = Vector<acc>;
  static constexpr int lanes = kLanes<V>;
  static constexpr int64_t kWidth = kMostVectors * lanes;  // of a tile
  static constexpr int kRows = lanes < 8 ? lanes : 8;      // inputs at a time
  static constexpr int64_t kOutputs = kDepth / kTaps;      // outputs per step: gradients stay in L1 for all inputs
  static_assert(kOutputs % lanes == 0);

  // Calls f(first, constant number of vectors) for the blocks of n elements, starting at multiples of kWidth.
  template <class F>
  static FASTKD_INLINE void for_blocks(int64_t n, const F& f, int64_t first = 0) {
    for (; first + (kMostVectors - 1) * lanes < n; first += kWidth) f(first, std::integral_constant<int, kMostVectors>{});
    if constexpr (kMostVectors >= 3)
      if (first + lanes < n) return f(first, std::integral_constant<int, 2>{});
    if (first < n) f(first, std::integral_constant<int, 1>{});
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
      for_blocks(n, [&](int64_t first, auto vectors) {
        constexpr int64_t block = vectors * lanes;
        const int64_t left = n - first < block ? n - first : block;
        acc* to = out + first * c;
        transpose<V>(in + first * c, c, left, c, to, block);
        for (int64_t at = 0; at < c; ++at)
          for (int64_t row = left; row < block; ++row) to[at * block + row] = 0;
      });
    }
  }

  static void forward(const Arguments& arguments, const Part* part, const Part* end, void*) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
    const acc* columns = static_cast<const acc*>(arguments.columns);
    acc tile[lanes * kTaps * kWidth];  // a row of embeddings per output and tap
    for (; part != end; ++part)
      for_blocks(arguments.count, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        for (int64_t at = 0; at < part->count; ++at) {
          const acc* weight = static_cast<const acc*>(arguments.weight) + (part->first + at) * inputs * kTaps;
          multiply_strided<V, kTaps, vectors, 1, kTaps>(weight, 0, 1, inputs, columns + first * inputs,
                                                        vectors * lanes, tile + at * kTaps * kWidth, kWidth, true);
        }
        for (int64_t u = 0; u < vectors; ++u) {
          const int64_t n0 = first + u * lanes, left = arguments.count - n0;
          acc* out = static_cast<acc*>(arguments.taps) + n0 * kTaps * outputs + part->first;
          for (int64_t tap = 0; tap < kTaps; ++tap)
            turn_block(tile + tap * kWidth + u * lanes, kTaps * kWidth, part->count, left < lanes ? left : lanes,
                       out + tap * outputs, kTaps * outputs);
        }
      });
  }

  // turned [count, 9, block] = the gradients of the taps of `count` outputs and a block of embeddings, then zeros
  static FASTKD_INLINE void turn(const Arguments& arguments, int64_t output, int64_t count, int64_t first,
                                 int64_t block, acc* turned) {
    for (int64_t at = 0; at < count; at += lanes)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t n = 0; n < block; n += lanes) {
          const acc* in =
              static_cast<const acc*>(arguments.taps) + ((first + n) * kTaps + tap) * arguments.outputs + output + at;
          acc* out = turned + (at * kTaps + tap) * block + n;
          const int64_t some = count - at < lanes ? count - at : lanes, behind = arguments.count - first - n;
          const int64_t left = behind < lanes ? behind : lanes;
          turn_block(in, kTaps * arguments.outputs, left, some, out, kTaps * block);
          for (int64_t row = 0; left < lanes && row < some; ++row)
            for (int64_t lane = left; lane < lanes; ++lane) out[row * kTaps * block + lane] = 0;
        }
  }

  // Of a task of outputs. turned: [count, 9, N rounded up] in blocks; row: [inputs rounded up, 9] and a vector.
  static void for_weight(const Arguments& arguments, const Part& part, acc* row, acc* turned) {
    const int64_t inputs = arguments.inputs, width = round_up(inputs, lanes), row_of_output = part.count * kTaps;
    const acc* embeddings = static_cast<const acc*>(arguments.rows);
    for_blocks(arguments.count, [&](int64_t first, auto vectors) {
      turn(arguments, part.first, part.count, first, vectors * lanes, turned + first * row_of_output);
    });
    acc tile[lanes * kWidth > kTaps * kWidth ? lanes * kWidth : kTaps * kWidth] = {};
    for (int64_t output = 0; output < part.count; ++output) {
      for_blocks(inputs, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        const int64_t blocks = arguments.count / kWidth;
        if (blocks > 0)
          multiply_strided<V, kTaps, vectors, kWidth, 1>(turned + output * kTaps * kWidth, kWidth * row_of_output,
                                                         blocks, kWidth, embeddings + first, width, tile, kWidth, true);
        const auto add_rest = [&](int64_t n, auto others) __attribute__((always_inline)) {
          constexpr int64_t block = others * lanes;
          const acc* rest = turned + n * row_of_output + output * kTaps * block;
          multiply_strided<V, kTaps, vectors, block, 1>(rest, 0, 1, arguments.count - n, embeddings + n * width + first,
                                                        width, tile, kWidth, n == 0);
        };
        for_blocks(arguments.count, add_rest, blocks * kWidth);
        for (int64_t u = 0; u < vectors; ++u) {
          acc* out = row + (first + u * lanes) * kTaps;
          if constexpr (lanes > kTaps)  // elements past the nine are overwritten by the next input
            transpose_block<V>(tile + u * lanes, kWidth, out, kTaps);
          else
            for (int lane = 0; lane < lanes; ++lane)
              for (int tap = 0; tap < kTaps; ++tap) out[lane * kTaps + tap] = tile[tap * kWidth + u * lanes + lane];
        }
      });
      copy(static_cast<acc*>(arguments.for_weight) + (part.first + output) * inputs * kTaps, row, inputs * kTaps);
    }
  }

  // Of the inputs [begin, end). panel: [kOutputs, 9, kWidth]; sums: [end - begin rounded up, kWidth].
  static void for_rows(const Arguments& arguments, int64_t begin, int64_t end, acc* panel, acc* sums) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
    const acc* weight = static_cast<const acc*>(arguments.weight);
    for_blocks(arguments.count, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
      for (int64_t output = 0; output < outputs; output += kOutputs) {
        const int64_t some = outputs - output < kOutputs ? outputs - output : kOutputs;
        turn(arguments, output, some, first, vectors * lanes, panel);
        for (int64_t input = begin; input < end;) {
          const auto multiply_rows = [&](auto rows) __attribute__((always_inline)) {
            const acc* left = weight + (output * inputs + input) * kTaps;
            for (int64_t next = some; next < 2 * some && output + next < outputs; ++next)
              fetch(left + next * inputs * kTaps, left + (next * inputs + rows) * kTaps);
            multiply_strided<V, rows, vectors, kTaps, 1, kChain>(left, inputs * kTaps, some, kTaps, panel,
                                                                 vectors * lanes, sums + (input - begin) * kWidth,
                                                                 kWidth, output == 0);
            input += rows;
          };
          if (input + kRows <= end)
            multiply_rows(std::integral_constant<int, kRows>{});
          else
            multiply_rows(std::integral_constant<int, 1>{});
        }
      }
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t n0 = first + u * lanes, left = arguments.count - n0;
        acc* out = static_cast<acc*>(arguments.for_rows) + n0 * inputs;
        for (int64_t input = begin; input < end; input += lanes)
          turn_block(sums + (input - begin) * kWidth + u * lanes, kWidth, end - input < lanes ? end - input : lanes,
                     left < lanes ? left : lanes, out + input, inputs);
      }
    });
  }

  static int64_t scratch_length(const Arguments& arguments) {
    const int64_t width = round_up(arguments.inputs, lanes);
    const int64_t weight = width * kTaps + lanes + lanes * kTaps * arguments.padded;
    const int64_t rows = kOutputs * kTaps * kWidth + width * kWidth;
    return weight > rows ? weight : rows;
  }

  static void backward(const Arguments& arguments, const Part* part, const Part* end, void* scratch) {
    acc* room = static_cast<acc*>(scratch);
    for (; part != end && !part->inputs; ++part)
      for_weight(arguments, *part, room, room + round_up(arguments.inputs, lanes) * kTaps + lanes);
    if (part != end)
      for_rows(arguments, part->first, end[-1].first + end[-1].count, room, room + kOutputs * kTaps * kWidth);
  }

  static constexpr Table table() { return {forward, backward, pack, scratch_length, lanes}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
