// focal_loss: the sigmoid focal loss (alpha 0.25, gamma 2) of the class entries of all anchors, each anchor weighted.
//
// forward   reads the logits once: sum of the negative entries, 0.75 w p^2 softplus(x); positive ones are added apart, as
//           taking them out of a sum would cancel
// backward  reads them again and writes the gradient once: 1.5 w p^2 ((1 - p) softplus(x) + p / 2) for a negative
// No buffer has the size of the logits. Sums are in double, in an order that depends only on the shape.
#include <algorithm>

#include "common/call.h"
#include "common/reduce.h"
#include "common/tile.h"

namespace fastkd {
namespace focal_loss {

// Entries [begin, end) of a pyramid.
struct Part {
  int64_t pyramid, begin, end, slot;
};

struct Arguments {
  const void *logits, *weight, *grad;  // [R, B, A, C], [B, A], backward: [R]
  void* gradient;                      // backward: as logits
  double* sums;                        // forward: one per part
  int64_t pyramids, anchors, classes;  // R, B * A, C
  const int64_t* places;               // indices of the positive entries in a pyramid, ascending
  int64_t positives;
  bool large;  // see is_large
};

struct Table {  // of a dtype
  using Kernel = void (*)(const Arguments&, const Part* begin, const Part* end);
  Kernel forward, backward;
  double (*positives)(const Arguments&, int64_t pyramid);  // sum of the positive entries
  void (*write_positives)(const Arguments&, int64_t pyramid);
};

}  // namespace focal_loss
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace focal_loss;

// log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)), with an argument of at most 1/3.
template <class V>
FASTKD_INLINE V log_one_plus(V e) {
  constexpr int terms = sizeof(Element<V>) == 4 ? 8 : 17;
  const V s = e / (e + Element<V>(2)), square = s * s;
  V series = broadcast<V>(Element<V>(1) / (2 * terms - 1));
  for (int odd = 2 * terms - 3; odd > 0; odd -= 2)
    series = multiply_add(series, square, broadcast<V>(Element<V>(1) / Element<V>(odd)));
  return Element<V>(2) * s * series;
}

template <class V>
struct Terms {
  V p, other, softplus;  // sigmoid(x), 1 - p, log(1 + e^x)

  explicit FASTKD_INLINE Terms(V x) {
    const V zero{}, one = broadcast<V>(1);
    const V e = exponential(x > zero ? -x : x), large = one / (one + e), small = e * large;
    p = x > zero ? large : small;
    other = x > zero ? small : large;
    softplus = (x < zero ? zero : x) + log_one_plus(e);  // NaN stays NaN
  }
};

struct Exact {  // the same for one entry, in double
  double p, other, softplus_negative;  // the last of -x

  explicit Exact(double x) {
    const double e = __builtin_exp(-__builtin_fabs(x)), rest = __builtin_log1p(e);
    p = x > 0 ? 1 / (1 + e) : e / (1 + e);
    other = x > 0 ? e / (1 + e) : 1 / (1 + e);
    softplus_negative = (x > 0 ? 0 : -x) + rest;
  }
};

template <class scalar_t>
struct Entries {
  using acc = acc_t<scalar_t>;
  using V = Vector<acc>;
  static constexpr int kLane = kLanes<V>;
  static constexpr int64_t kBlock = kFlush * kLane;  // entries per block: weights are expanded, sums kept in acc

  // Calls block(entries, weights, count) on consecutive blocks of a part; kLane elements of each may be read.
  template <class Block>
  static FASTKD_INLINE void stretches(const Arguments& a, const Part& part, const Block& block) {
    const acc* weight = static_cast<const acc*>(a.weight);
    acc weights[kBlock];
    int64_t anchor = part.begin / a.classes, left = a.classes - part.begin % a.classes;
    for (int64_t first = part.begin; first < part.end; first += kBlock) {
      const int64_t count = part.end - first < kBlock ? part.end - first : kBlock;
      for (int64_t at = 0; at < count;) {
        const int64_t end = at + left < count ? at + left : count;
        left -= end - at;
        for (const acc value = weight[anchor]; at < end; ++at) weights[at] = value;
        if (left == 0) ++anchor, left = a.classes;
      }
      block(first, weights, count);
    }
  }

  // The last entries of a block, fewer than a vector, padded with zeros.
  static FASTKD_INLINE V load_some(const scalar_t* x, int64_t count) {
    scalar_t padded[kLane] = {};
    for (int64_t at = 0; at < count; ++at) padded[at] = x[at];
    return load<V>(padded);
  }

  static FASTKD_INLINE V negative(V x) {
    const Terms<V> terms(x);
    return terms.p * terms.p * terms.softplus;
  }

  static FASTKD_INLINE void leave_out_positives(const Arguments& a, int64_t first, acc* weights, int64_t count) {
    const int64_t* end = a.places + a.positives;
    for (const int64_t* place = std::lower_bound(a.places, end, first); place != end && *place < first + count; ++place)
      weights[*place - first] = 0;
  }

  static void forward(const Arguments& a, const Part* part, const Part* end) {
    for (; part != end; ++part) {
      const scalar_t* x = static_cast<const scalar_t*>(a.logits) + part->pyramid * a.anchors * a.classes;
      double total = 0;
      stretches(a, *part, [&](int64_t first, acc* weights, int64_t count) __attribute__((always_inline)) {
        leave_out_positives(a, first, weights, count);
        V sum[1] = {};
        int64_t at = 0;
        for (; at + kLane <= count; at += kLane)
          sum[0] = multiply_add(negative(load<V>(x + first + at)), load<V>(weights + at), sum[0]);
        double lanes[kLane] = {};
        flush<V, 1>(sum, lanes);
        if (at < count) {
          acc rest[kLane];
          store(rest, negative(load_some(x + first + at, count - at)));
          for (int64_t lane = 0; at + lane < count; ++lane) lanes[lane] += rest[lane] * weights[at + lane];
        }
        gather<kLane>(lanes);
        total += lanes[0];
      });
      a.sums[part->slot] = 0.75 * total;
    }
  }

  static FASTKD_INLINE V slope(V x) {
    const Terms<V> terms(x);
    return terms.p * terms.p * multiply_add(terms.other, terms.softplus, V(terms.p * acc(0.5)));
  }

  template <bool past_caches>
  static FASTKD_INLINE void write(const Arguments& a, const Part& part) {
    const int64_t offset = part.pyramid * a.anchors * a.classes;
    const scalar_t* x = static_cast<const scalar_t*>(a.logits) + offset;
    scalar_t* gradient = static_cast<scalar_t*>(a.gradient) + offset;
    const acc factor = acc(1.5) * static_cast<const acc*>(a.grad)[part.pyramid];
    stretches(a, part, [&](int64_t first, acc* weights, int64_t count) __attribute__((always_inline)) {
      int64_t at = 0;
      for (; at + kLane <= count; at += kLane)
        put<past_caches>(gradient + first + at, V(slope(load<V>(x + first + at)) * (load<V>(weights + at) * factor)));
      if (at < count) {
        acc rest[kLane];
        store(rest, slope(load_some(x + first + at, count - at)));
        for (int64_t lane = 0; at + lane < count; ++lane)
          store(gradient + first + at + lane, static_cast<acc>(rest[lane] * (weights[at + lane] * factor)));
      }
    });
  }

  static void backward(const Arguments& a, const Part* part, const Part* end) {
    for (; part != end; ++part) {
      const scalar_t* begin =
          static_cast<const scalar_t*>(a.gradient) + part->pyramid * a.anchors * a.classes + part->begin;
      a.large && elements_to_line(begin) == 0 ? write<true>(a, *part) : write<false>(a, *part);
    }
    end_stream();
  }

  static double positives(const Arguments& a, int64_t pyramid) {
    const scalar_t* x = static_cast<const scalar_t*>(a.logits) + pyramid * a.anchors * a.classes;
    double total = 0;
    for (const int64_t* place = a.places; place != a.places + a.positives; ++place) {
      const Exact terms(load<acc>(x + *place));
      const double cost = 0.25 * terms.other * terms.other * terms.softplus_negative;
      total += cost * static_cast<const acc*>(a.weight)[*place / a.classes];
    }
    return total;
  }

  static void write_positives(const Arguments& a, int64_t pyramid) {
    const int64_t offset = pyramid * a.anchors * a.classes;
    const scalar_t* x = static_cast<const scalar_t*>(a.logits) + offset;
    scalar_t* gradient = static_cast<scalar_t*>(a.gradient) + offset;
    for (const int64_t* place = a.places; place != a.places + a.positives; ++place) {
      const Exact terms(load<acc>(x + *place));
      const double factor = static_cast<const acc*>(a.grad)[pyramid] *
                            static_cast<double>(static_cast<const acc*>(a.weight)[*place / a.classes]);
      const double steep = 2 * terms.p * terms.softplus_negative + terms.other;
      store(gradient + *place, static_cast<acc>(-0.25 * factor * terms.other * terms.other * steep));
    }
  }

  static constexpr Table table() { return {forward, backward, positives, write_positives}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

FASTKD_KERNEL_TABLES(focal_loss::Table, Entries, float, double, BFloat16, Half)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

constexpr int64_t kPartEntries = 1 << 14;  // a multiple of the cache line size for every dtype

struct Call {
  Tensor logits, weight;
  std::vector<int64_t> places;
  std::vector<Part> parts;
  Arguments arguments{};
  const Table& table;

  Call(const Tensor& given, const Tensor& weights, const Tensor& image, const Tensor& anchor, const Tensor& label)
      : logits(given), weight(weights), table(kernels_for<Table>(given)) {
    STD_TORCH_CHECK(given.dim() == 4 && weights.dim() == 2 && weights.size(0) == given.size(1) &&
                        weights.size(1) == given.size(2) && given.is_cpu() && weights.is_cpu(),
                    "focal_loss: logits must be [R, B, A, C] and weight [B, A], both on the CPU");
    STD_TORCH_CHECK(weights.scalar_type() == widened(given),
                    "focal_loss: weight must be float32, float64 beside logits of that dtype");
    logits = torch::stable::contiguous(given);
    weight = torch::stable::contiguous(weights);
    arguments.logits = logits.const_data_ptr(), arguments.weight = weight.const_data_ptr();
    arguments.pyramids = given.size(0), arguments.anchors = given.size(1) * given.size(2);
    arguments.classes = given.size(3);
    arguments.large = is_large(given.numel() * given.element_size());
    find_places(image, anchor, label);
    const int64_t entries = arguments.anchors * arguments.classes;
    for (int64_t pyramid = 0; pyramid < arguments.pyramids; ++pyramid)
      for (int64_t begin = 0; begin < entries; begin += kPartEntries)
        parts.push_back({pyramid, begin, std::min(begin + kPartEntries, entries), static_cast<int64_t>(parts.size())});
  }

  void find_places(const Tensor& image, const Tensor& anchor, const Tensor& label) {
    const Tensor* given[] = {&image, &anchor, &label};
    const int64_t bounds[] = {logits.size(1), logits.size(2), arguments.classes};
    for (const Tensor* one : given)
      STD_TORCH_CHECK(one->dim() == 1 && one->size(0) == image.size(0) && one->is_cpu() &&
                          one->scalar_type() == ScalarType::Long,
                      "focal_loss: image, anchor and label must be [P] int64 on the CPU");
    places.assign(image.size(0), 0);
    for (int which = 0; which < 3; ++which) {
      const Tensor dense = torch::stable::contiguous(*given[which]);
      const int64_t* values = places.empty() ? nullptr : dense.const_data_ptr<int64_t>();
      for (size_t at = 0; at < places.size(); ++at) {
        STD_TORCH_CHECK(values[at] >= 0 && values[at] < bounds[which],
                        "focal_loss: image, anchor and label must be in range, got ", values[at], " where there are ",
                        bounds[which], "; pass entries of logits");
        places[at] = places[at] * bounds[which] + values[at];
      }
    }
    std::sort(places.begin(), places.end());
    arguments.places = places.data(), arguments.positives = static_cast<int64_t>(places.size());
  }

  void run(Table::Kernel kernel) {
    const auto cost = [](const Part& part) { return part.end - part.begin; };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) { kernel(arguments, begin, end); });
  }
};

Tensor forward(Tensor logits, Tensor weight, Tensor image, Tensor anchor, Tensor label) {
  Call call(logits, weight, image, anchor, label);
  std::vector<double> parts(call.parts.size()), totals(logits.size(0));
  call.arguments.sums = parts.data();
  call.run(call.table.forward);
  for (const Part& part : call.parts) totals[part.pyramid] += parts[part.slot];
  for (int64_t pyramid = 0; pyramid < logits.size(0); ++pyramid)
    totals[pyramid] += call.table.positives(call.arguments, pyramid);
  return tensor_of(totals, logits, {logits.size(0)}, widened(logits));
}

Tensor backward(Tensor grad, Tensor logits, Tensor weight, Tensor image, Tensor anchor, Tensor label) {
  Call call(logits, weight, image, anchor, label);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == logits.size(0) && grad.is_cpu() &&
                      grad.scalar_type() == widened(logits),
                  "focal_loss_backward: grad must be [R] of the result's dtype, on the CPU");
  const Tensor factors = torch::stable::contiguous(grad);
  Tensor gradient = torch::stable::empty_like(call.logits);
  call.arguments.grad = factors.const_data_ptr(), call.arguments.gradient = gradient.mutable_data_ptr();
  call.run(call.table.backward);
  for (int64_t pyramid = 0; pyramid < logits.size(0); ++pyramid)
    call.table.write_positives(call.arguments, pyramid);
  return gradient;
}

}  // namespace

FASTKD_OP("focal_loss", "(Tensor logits, Tensor weight, Tensor image, Tensor anchor, Tensor label) -> Tensor", forward)
FASTKD_OP("focal_loss_backward",
          "(Tensor grad, Tensor logits, Tensor weight, Tensor image, Tensor anchor, Tensor label) -> Tensor",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
