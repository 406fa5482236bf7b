// imitation_mask: the cells with an anchor whose IoU with some box exceeds psi times that box's best IoU with any
// anchor.
//
// Two passes over the cells where an anchor can overlap a box: the best IoU of every (box, anchor), then the cells
// above the threshold, for anchors whose best IoU exceeds it. No matrix of boxes by anchors; K * sum A values are kept
// between the passes. The IoU repeats the reference's float32 operations exactly, so that the same cells exceed the
// threshold.
#include "common/call.h"
#include "common/simd.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace fastkd {
namespace imitation_mask {

struct Level {
  const float* anchors;  // [anchors, 4] xyxy at the origin
  int64_t count, rows, columns;
  float stride_y, stride_x;
};

// A rectangle of cells outside of which the anchor cannot overlap the box.
struct Window {
  int64_t y0, y1, x0, x1;
};

// One box and one anchor on the cells of a window.
struct Pair {
  const float* box;     // xyxy
  const float* anchor;  // xyxy
  float stride_y, stride_x;
  Window window;
};

struct Table {
  float (*best)(const Pair&);  // the largest IoU
  void (*mark)(const Pair&, float threshold, bool* cells, int64_t columns);
};

}  // namespace imitation_mask
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace imitation_mask;

template <class V>
FASTKD_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
FASTKD_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// 0, 1, 2, ...
FASTKD_INLINE FloatVector count_up() {
  float lanes[kFloats];
  for (int lane = 0; lane < kFloats; ++lane) lanes[lane] = static_cast<float>(lane);
  return load<FloatVector>(lanes);
}

// The terms of the IoU that depend only on the row.
struct Row {
  float height, anchor_height;

  FASTKD_INLINE Row(const Pair& pair, int64_t y) {
    const float shift = static_cast<float>(y) * pair.stride_y;
    const float low = shift + pair.anchor[1], high = shift + pair.anchor[3];
    height = larger(smaller(pair.box[3], high) - larger(pair.box[1], low), 0.0f);
    anchor_height = high - low;
  }
};

// The IoU of the cells x, x + 1, ... of a row.
FASTKD_INLINE FloatVector overlap(const Pair& pair, const Row& row, int64_t x) {
  using V = FloatVector;
  const V none{}, shift = (count_up() + static_cast<float>(x)) * pair.stride_x;
  const V low = shift + pair.anchor[0], high = shift + pair.anchor[2];
  const V width = larger<V>(smaller<V>(none + pair.box[2], high) - larger<V>(none + pair.box[0], low), none);
  const V inter = width * row.height, area = (high - low) * row.anchor_height;
  const float box_area = (pair.box[2] - pair.box[0]) * (pair.box[3] - pair.box[1]);
  return inter / larger<V>(box_area + area - inter, none + 1e-12f);
}

// Calls run(IoU of some cells, 0 past the window, y, x, count) for all cells of the window.
template <class Run>
FASTKD_INLINE void over_window(const Pair& pair, const Run& run) {
  for (int64_t y = pair.window.y0; y < pair.window.y1; ++y) {
    const Row row(pair, y);
    int64_t x = pair.window.x0;
    for (; x + kFloats <= pair.window.x1; x += kFloats) run(overlap(pair, row, x), y, x, int64_t{kFloats});
    const int64_t rest = pair.window.x1 - x;
    if (rest > 0) {
      const FloatVector value = overlap(pair, row, x), none{};
      run(count_up() < none + static_cast<float>(rest) ? value : none, y, x, rest);
    }
  }
}

float best(const Pair& pair) {
  FloatVector most{};
  over_window(pair, [&](FloatVector value, int64_t, int64_t, int64_t) { most = larger(value, most); });
  float lanes[kFloats], best = 0;
  store(lanes, most);
  for (const float lane : lanes) best = larger(lane, best);
  return best;
}

void mark(const Pair& pair, float threshold, bool* cells, int64_t columns) {
  over_window(pair, [&](FloatVector value, int64_t y, int64_t x, int64_t count) {
    float lanes[kFloats];
    store(lanes, value);
    for (int64_t lane = 0; lane < count; ++lane) cells[y * columns + x + lane] |= lanes[lane] > threshold;
  });
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

namespace fastkd {
template <>
const imitation_mask::Table& kernels<imitation_mask::Table, FASTKD_CAPABILITY>() {
  static const imitation_mask::Table table = {best, mark};
  return table;
}
}  // namespace fastkd
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {

// The cells i in [0, cells) with i * stride between the bounds, and one more on each side because of rounding.
std::pair<int64_t, int64_t> touched(float low, float high, float stride, int64_t cells) {
  const double first = std::floor(static_cast<double>(low) / stride) - 1;
  const double last = std::ceil(static_cast<double>(high) / stride) + 2, end = static_cast<double>(cells);
  if (!(first < last)) return {0, 0};
  return {static_cast<int64_t>(std::clamp(first, 0.0, end)), static_cast<int64_t>(std::clamp(last, 0.0, end))};
}

Pair pair_of(const float* box, const Level& level, int64_t anchor) {
  const float* sides = level.anchors + 4 * anchor;
  const auto [y0, y1] = touched(box[1] - sides[3], box[3] - sides[1], level.stride_y, level.rows);
  const auto [x0, x1] = touched(box[0] - sides[2], box[2] - sides[0], level.stride_x, level.columns);
  return {box, sides, level.stride_y, level.stride_x, {y0, y1, x0, x1}};
}

constexpr int64_t kBoxesPerThread = 8;  // fewer are not worth waking a thread

struct Call {
  Tensor boxes;
  std::vector<Tensor> anchors;  // owners of the data that levels point to
  std::vector<Level> levels;
  int64_t pairs = 0;  // anchors of all levels
  const Table& table = active_kernels<Table>();

  Call(const Tensor& unconverted, const std::vector<Tensor>& bases, const std::vector<int64_t>& strides,
       const std::vector<int64_t>& sizes)
      : boxes(floats(unconverted)) {
    STD_TORCH_CHECK(strides.size() == 2 * bases.size() && sizes.size() == 2 * bases.size(),
                    "imitation_mask: strides and level_sizes must have a pair for every level of anchors");
    for (size_t index = 0; index < bases.size(); ++index) {
      anchors.push_back(floats(bases[index]));
      const int64_t *stride = strides.data() + 2 * index, *size = sizes.data() + 2 * index;
      STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && size[0] >= 0 && size[1] >= 0,
                      "imitation_mask: strides must be positive, level_sizes not negative");
      levels.push_back({anchors.back().const_data_ptr<float>(), anchors.back().size(0), size[0], size[1],
                        static_cast<float>(stride[0]), static_cast<float>(stride[1])});
      pairs += levels.back().count;
    }
  }

  static Tensor floats(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == 4 && tensor.is_cpu(),
                    "imitation_mask: boxes and anchors must be [N, 4] on the CPU");
    return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
  }

  // The best IoU of every box with every anchor: [K, pairs].
  std::vector<float> best() const {
    const int64_t count = boxes.size(0);
    const float* box = boxes.const_data_ptr<float>();
    std::vector<float> values(count * pairs);
    torch::stable::parallel_for(0, count, kBoxesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        float* out = values.data() + k * pairs;
        for (const Level& level : levels)
          for (int64_t anchor = 0; anchor < level.count; ++anchor)
            *out++ = table.best(pair_of(box + 4 * k, level, anchor));
      }
    });
    return values;
  }

  // Marks the cells of one box in an image's masks.
  void mark(int64_t k, const float* best, float psi, const std::vector<bool*>& cells) const {
    const float* box = boxes.const_data_ptr<float>() + 4 * k;
    const float threshold = psi * *std::max_element(best, best + pairs);
    for (size_t index = 0; index < levels.size(); ++index)
      for (int64_t anchor = 0; anchor < levels[index].count; ++anchor)
        if (*best++ > threshold)
          table.mark(pair_of(box, levels[index], anchor), threshold, cells[index], levels[index].columns);
  }
};

// The boxes image by image, in ascending order: pairs of image and box.
std::vector<std::pair<int64_t, int64_t>> by_image(const Tensor& image_index, int64_t count, int64_t images) {
  STD_TORCH_CHECK(image_index.dim() == 1 && image_index.size(0) == count && image_index.is_cpu() &&
                      image_index.scalar_type() == ScalarType::Long,
                  "imitation_mask: image_index must be [K] int64 on the CPU");
  const Tensor plain = torch::stable::contiguous(image_index);
  const int64_t* image = plain.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t k = 0; k < count; ++k) {
    STD_TORCH_CHECK(image[k] >= 0 && image[k] < images, "imitation_mask: image_index must be in [0, ", images,
                    "), got ", image[k]);
    order.push_back({image[k], k});
  }
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<Tensor> forward(Tensor boxes, Tensor image_index, std::vector<Tensor> anchors, std::vector<int64_t> strides,
                            int64_t batch_size, std::vector<int64_t> level_sizes, double psi) {
  const Call call(boxes, anchors, strides, level_sizes);
  STD_TORCH_CHECK(batch_size >= 0, "imitation_mask: batch_size must not be negative");
  const std::vector<std::pair<int64_t, int64_t>> order = by_image(image_index, boxes.size(0), batch_size);
  std::vector<Tensor> masks;
  for (const Level& level : call.levels) {
    masks.push_back(new_tensor(boxes, {batch_size, level.rows, level.columns}, ScalarType::Bool));
    torch::stable::zero_(masks.back());
  }
  if (call.pairs == 0 || order.empty()) return masks;
  const std::vector<float> best = call.best();
  const int64_t count = order.size(), grain = count > kBoxesPerThread ? kBoxesPerThread : count;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    // Whole images: those that begin in this range.
    const auto same_as_before = [&](int64_t at) { return at > 0 && order[at].first == order[at - 1].first; };
    while (begin < end && same_as_before(begin)) ++begin;
    if (begin == end) return;
    for (int64_t at = begin; at < count && (at < end || same_as_before(at)); ++at) {
      const auto [image, k] = order[at];
      std::vector<bool*> cells;
      for (size_t index = 0; index < masks.size(); ++index)
        cells.push_back(masks[index].mutable_data_ptr<bool>() +
                        image * call.levels[index].rows * call.levels[index].columns);
      call.mark(k, best.data() + k * call.pairs, static_cast<float>(psi), cells);
    }
  });
  return masks;
}

}  // namespace

FASTKD_OP("imitation_mask",
          "(Tensor boxes, Tensor image_index, Tensor[] anchors, SymInt[] strides, SymInt batch_size, SymInt[] "
          "level_sizes, float psi) -> Tensor[]",
          forward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
