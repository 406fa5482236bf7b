// conv3x3_taps: the nine products of every embedding e [N, C] with a weight w [O, C, 3, 3], taps [N, 9, O]:
// taps[n, t, o] = sum_c e[n, c] w[o, c, t]. The matrix of a library's product would be the weight turned, a copy that
// costs more than the product: here the weight is read as it lies, its numbers broadcast, and a lane is an embedding.
//
// forward    of each output o the nine rows w[o, :, t] times e^T, a tile [9, embeddings], then turned
// backward   g^T [O, 9, N] is turned once; for e: the rows w[o, c, :] times g^T; for w: the rows g^T[o, t, :] times e
// e^T and g^T lie in blocks of as many embeddings as a product takes at a time, one row of a block after the other.
// Sums in registers over at most kDepth products, then in memory, in an order that depends on the shape alone.
#pragma once

#include "tile.h"

namespace fastkd {
namespace conv3x3_taps {

constexpr int64_t kTaps = 9;

struct Arguments {
  int64_t count, inputs, outputs;  // N, C, O
  int64_t padded;                  // N rounded up to whole vectors
  const void* weight;              // [O, C, 9]
  const void *rows, *columns;      // embeddings [N, C rounded up to whole vectors], and their blocks [C, embeddings]
  void* taps;                      // forward: result [N, 9, O]; backward: its gradient
  void* turned;                    // the gradient in blocks [O, 9, embeddings]
  void *for_rows, *for_weight;     // gradients, null: not wanted
};

constexpr int64_t kManyEmbeddings = 192, kInputVectors = 4;

// A task: at most lanes outputs, or (inputs) lanes inputs, from `first` on; with many embeddings, whose gradients are
// read from afar for every task, kInputVectors times as many inputs.
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

// c [M, U vectors] (+)= the sum over groups and steps of a[m * row + group * group_stride + step * step_stride] times
// the rows of b, U vectors each, ldb apart; at most kDepth products in a row.
template <class V, int M, int U, int row, int step_stride>
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
  int64_t room = kDepth;
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
        room = kDepth;
      }
    }
  }
  if (first || room < kDepth) add();
}

template <class acc>
struct Taps {
  using V = Vector<acc>;
  static constexpr int lanes = kLanes<V>;
  static constexpr int64_t kWidth = kMostVectors * lanes;  // of a tile
  static constexpr int kRows = lanes < 8 ? lanes : 8;      // inputs at a time

  // f(first, constant number of vectors) for the blocks of n numbers, from a multiple of kWidth on
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

  static void forward(const Arguments& arguments, const Part* part, const Part* end) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs;
    const acc* columns = static_cast<const acc*>(arguments.columns);
    acc tile[lanes * kTaps * kWidth];  // of each output and tap a row of embeddings
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

  // turned = the gradient of the taps, zeros behind the embeddings
  static void turn(const Arguments& arguments, const Part* part, const Part* end) {
    const int64_t outputs = arguments.outputs;
    for (; part != end; ++part)
      for_blocks(arguments.count, [&](int64_t first, auto vectors) {
        constexpr int64_t block = vectors * lanes;
        for (int64_t tap = 0; tap < kTaps; ++tap)
          for (int64_t n = first; n < first + block; n += lanes) {
            const acc* in = static_cast<const acc*>(arguments.taps) + (n * kTaps + tap) * outputs + part->first;
            acc* out = static_cast<acc*>(arguments.turned) + first * outputs * kTaps +
                       (part->first * kTaps + tap) * block + n - first;
            const int64_t left = arguments.count - n < lanes ? arguments.count - n : lanes;
            turn_block(in, kTaps * outputs, left, part->count, out, kTaps * block);
            for (int64_t at = 0; left < lanes && at < part->count; ++at)
              for (int64_t lane = left; lane < lanes; ++lane) out[at * kTaps * block + lane] = 0;
          }
      });
  }

  static void for_weight(const Arguments& arguments, const Part& part, acc* row) {
    const int64_t inputs = arguments.inputs, width = round_up(inputs, lanes);
    const acc* embeddings = static_cast<const acc*>(arguments.rows);
    acc tile[lanes * kWidth > kTaps * kWidth ? lanes * kWidth : kTaps * kWidth] = {};
    for (int64_t output = part.first; output < part.first + part.count; ++output) {
      for_blocks(inputs, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        const acc* grad = static_cast<const acc*>(arguments.turned) + output * kTaps * kWidth;
        const int64_t blocks = arguments.count / kWidth, stride = kWidth * arguments.outputs * kTaps;
        if (blocks > 0)
          multiply_strided<V, kTaps, vectors, kWidth, 1>(grad, stride, blocks, kWidth, embeddings + first, width, tile,
                                                         kWidth, true);
        const auto add_rest = [&](int64_t n, auto others) __attribute__((always_inline)) {
          constexpr int64_t block = others * lanes;
          const acc* rest = static_cast<const acc*>(arguments.turned) + n * arguments.outputs * kTaps;
          multiply_strided<V, kTaps, vectors, block, 1>(rest + output * kTaps * block, 0, 1, arguments.count - n,
                                                        embeddings + n * width + first, width, tile, kWidth, n == 0);
        };
        for_blocks(arguments.count, add_rest, blocks * kWidth);
        for (int64_t u = 0; u < vectors; ++u) {
          acc* out = row + (first + u * lanes) * kTaps;
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

  // panel: room for the weights of a task, [outputs, inputs of the task, 9]
  static void for_rows(const Arguments& arguments, const Part& part, acc* panel) {
    const int64_t inputs = arguments.inputs, outputs = arguments.outputs, count = part.count * kTaps;
    for (int64_t output = 0; output < outputs; ++output)
      copy(panel + output * count,
           static_cast<const acc*>(arguments.weight) + (output * inputs + part.first) * kTaps, count);
    acc tile[kInputVectors * lanes * kWidth];
    for_blocks(arguments.count, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
      constexpr int64_t depth = kDepth / kTaps;  // outputs whose gradients stay in the first cache for all inputs
      for (int64_t output = 0; output < outputs; output += depth) {
        const int64_t some = outputs - output < depth ? outputs - output : depth;
        const acc* right =
            static_cast<const acc*>(arguments.turned) + (first * outputs + output * vectors * lanes) * kTaps;
        for (int64_t at = 0; at < part.count;) {
          const auto multiply_rows = [&](auto rows) __attribute__((always_inline)) {
            multiply_strided<V, rows, vectors, kTaps, 1>(panel + output * count + at * kTaps, count, some, kTaps,
                                                         right, vectors * lanes, tile + at * kWidth, kWidth,
                                                         output == 0);
            at += rows;
          };
          if (at + kRows <= part.count)
            multiply_rows(std::integral_constant<int, kRows>{});
          else
            multiply_rows(std::integral_constant<int, 1>{});
        }
      }
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t n0 = first + u * lanes, left = arguments.count - n0;
        acc* out = static_cast<acc*>(arguments.for_rows) + n0 * inputs + part.first;
        for (int64_t at = 0; at < part.count; at += lanes)
          turn_block(tile + at * kWidth + u * lanes, kWidth, part.count - at < lanes ? part.count - at : lanes,
                     left < lanes ? left : lanes, out + at, inputs);
      }
    });
  }

  static void backward(const Arguments& arguments, const Part* part, const Part* end) {
    acc* row = new acc[round_up(arguments.inputs, lanes) * kTaps + lanes];
    acc* panel = new acc[arguments.outputs * kInputVectors * lanes * kTaps];
    for (; part != end; ++part) {
      if (part->inputs)
        for_rows(arguments, *part, panel);
      else
        for_weight(arguments, *part, row);
    }
    delete[] panel;
    delete[] row;
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
#endif  // FASTKD_COMPILES_KERNELS
