// imitation_mask on the GPU: the cells of csrc/imitation_mask/imitation_mask.cpp, with anchors
// generated in the kernel and no matrix of boxes by anchors.
//
//   best       one block per (box, anchor of a level): its largest IoU over the cells where they can overlap
//   threshold  one warp per box: psi times the largest of these
//   mark       one block per tile of 8 x 32 cells of all levels and images: lists the boxes near the tile in order; a
//              thread tests whether an anchor of its cell exceeds the threshold of one of them; every flag is written
//              once
//   traffic    boxes and anchors, K sum A values between the kernels, one byte per cell: bound by arithmetic
// The IoU repeats the reference's float32 operations without fusing, so that the same cells exceed the threshold. Boxes
// with an image_index out of range are never listed: any image_index is safe. Deterministic.
#include "common/device_call.h"

namespace fastkd {
namespace {

constexpr int kPairThreads = 128, kTileRows = 8, kTileColumns = kWarpSize, kThreads = kTileRows * kTileColumns;

struct Level {
  Global<const float> anchors;  // [count, 4] xyxy at the origin
  Global<unsigned char> mask;   // [B, rows, columns]
  int count, rows, columns;
  float stride_y, stride_x;
  int64_t first_pair, first_block;
  int tiles_down, tiles_across;
};

struct Levels {
  Level level[kMaxLevels];
  int count;
  int64_t pairs, boxes;
};

struct Box {
  float x0, y0, x1, y1;
  FASTKD_DEVICE Box(Global<const float> sides) : x0(sides[0]), y0(sides[1]), x1(sides[2]), y1(sides[3]) {}
};

FASTKD_DEVICE float smaller(float a, float b) { return a < b ? a : b; }
FASTKD_DEVICE float larger(float a, float b) { return a > b ? a : b; }

FASTKD_DEVICE float iou(const Box& box, const Box& anchor, const Level& level, int y, int x) {
  const float down = __fmul_rn(static_cast<float>(y), level.stride_y);
  const float across = __fmul_rn(static_cast<float>(x), level.stride_x);
  const float low_y = down + anchor.y0, high_y = down + anchor.y1;
  const float low_x = across + anchor.x0, high_x = across + anchor.x1;
  const float height = larger(smaller(box.y1, high_y) - larger(box.y0, low_y), 0.0f);
  const float width = larger(smaller(box.x1, high_x) - larger(box.x0, low_x), 0.0f);
  const float inter = __fmul_rn(width, height), area = __fmul_rn(high_x - low_x, high_y - low_y);
  const float box_area = __fmul_rn(box.x1 - box.x0, box.y1 - box.y0);
  return __fdiv_rn(inter, larger(box_area + area - inter, 1e-12f));
}

// The cells i in [0, cells) with i * stride between the bounds, and one more on each side because of rounding.
struct Range {
  int first, last;
  FASTKD_DEVICE Range(float low, float high, float stride, int cells) : first(0), last(0) {
    const double from = floor(static_cast<double>(low) / stride) - 1, end = cells;
    const double to = ceil(static_cast<double>(high) / stride) + 2;
    if (!(from < to)) return;  // NaN too
    first = static_cast<int>(from < 0 ? 0 : from < end ? from : end);
    last = static_cast<int>(to < 0 ? 0 : to < end ? to : end);
  }
};

// best [boxes, pairs]
FASTKD_KERNEL void best_kernel(Levels levels, Global<const float> boxes, Global<float> best) {
  FASTKD_SHARED(float, scratch, kWarpSize);
  const int64_t k = blockIdx.x / levels.pairs, pair = blockIdx.x % levels.pairs;
  int index = 0;
  while (index + 1 < levels.count && pair >= levels.level[index + 1].first_pair) ++index;
  const Level& level = levels.level[index];
  const Box box(boxes + 4 * k), anchor(level.anchors + 4 * (pair - level.first_pair));
  const Range down(box.y0 - anchor.y1, box.y1 - anchor.y0, level.stride_y, level.rows);
  const Range across(box.x0 - anchor.x1, box.x1 - anchor.x0, level.stride_x, level.columns);
  const unsigned width = across.last - across.first, cells = width * (down.last - down.first);
  float most = 0;
  for (unsigned cell = threadIdx.x; cell < cells; cell += kPairThreads)
    most = larger(iou(box, anchor, level, down.first + cell / width, across.first + cell % width), most);
  for (int step = kWarpSize / 2; step > 0; step /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, step));
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kPairThreads / kWarpSize; ++warp) most = larger(most, scratch[warp]);
  best[blockIdx.x] = most;
}

FASTKD_KERNEL void threshold_kernel(Levels levels, Global<const float> best, float psi, Global<float> threshold) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * (kPairThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (k >= levels.boxes) return;
  float most = 0;
  for (int64_t pair = threadIdx.x % kWarpSize; pair < levels.pairs; pair += kWarpSize)
    most = larger(best[k * levels.pairs + pair], most);
  for (int step = kWarpSize / 2; step > 0; step /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, step));
  if (threadIdx.x % kWarpSize == 0) threshold[k] = __fmul_rn(psi, most);
}

// A tile of cells and the extent of the level's anchors.
struct Tile {
  int y, x;  // first cell
  float low_y = 0, high_y = 0, low_x = 0, high_x = 0;
  FASTKD_DEVICE Tile(const Level& level, int y, int x) : y(y), x(x) {
    for (int a = 0; a < level.count; ++a) {
      const Box anchor(level.anchors + 4 * static_cast<int64_t>(a));
      low_y = a == 0 ? anchor.y0 : smaller(low_y, anchor.y0);
      high_y = a == 0 ? anchor.y1 : larger(high_y, anchor.y1);
      low_x = a == 0 ? anchor.x0 : smaller(low_x, anchor.x0);
      high_x = a == 0 ? anchor.x1 : larger(high_x, anchor.x1);
    }
  }
  // False only if no anchor of any cell of the tile overlaps the box.
  FASTKD_DEVICE bool is_near(const Level& level, const Box& box) const {
    const Range down(box.y0 - high_y, box.y1 - low_y, level.stride_y, level.rows);
    const Range across(box.x0 - high_x, box.x1 - low_x, level.stride_x, level.columns);
    return down.first < y + kTileRows && down.last > y && across.first < x + kTileColumns && across.last > x;
  }
};

// True if an anchor of the cell exceeds the box's threshold; `best` are the box's anchors of this level.
FASTKD_DEVICE bool imitates(const Level& level, const Box& box, float threshold, Global<const float> best, int y,
                            int x) {
  for (int a = 0; a < level.count; ++a) {
    if (!(best[a] > threshold)) continue;
    if (iou(box, Box(level.anchors + 4 * static_cast<int64_t>(a)), level, y, x) > threshold) return true;
  }
  return false;
}

FASTKD_KERNEL void mark_kernel(Levels levels, Global<const float> boxes, Global<const int64_t> image_index,
                               Global<const float> best, Global<const float> threshold) {
  FASTKD_SHARED(int, list, kThreads);
  FASTKD_SHARED(int, counts, kWarpSize);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int index = 0;
  while (index + 1 < levels.count && blockIdx.x >= levels.level[index + 1].first_block) ++index;
  const Level& level = levels.level[index];
  const int64_t inner = blockIdx.x - level.first_block, outer = inner / level.tiles_across;
  const int64_t image = outer / level.tiles_down;
  const Tile tile(level, static_cast<int>(outer % level.tiles_down) * kTileRows,
                  static_cast<int>(inner % level.tiles_across) * kTileColumns);
  const int y = tile.y + warp, x = tile.x + lane;
  const bool inside = y < level.rows && x < level.columns;
  bool marked = false;
  for (int64_t first = 0; first < levels.boxes; first += kThreads) {
    const int64_t mine = first + threadIdx.x;
    const bool own = mine < levels.boxes && image_index[mine] == image;
    const bool near_it = own && tile.is_near(level, Box(boxes + 4 * mine));
    int before;
    const int total = list_threads(near_it, list, counts, before);
    for (int i = 0; inside && !marked && i < total; ++i) {
      const int64_t k = first + list[i];
      marked = imitates(level, Box(boxes + 4 * k), threshold[k], best + (k * levels.pairs + level.first_pair), y, x);
    }
  }
  if (inside) level.mask[(image * level.rows + y) * level.columns + x] = marked;
}

Tensor floats(const Tensor& tensor, const Tensor& on) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == 4 && is_beside(tensor, on),
                  "imitation_mask: boxes and anchors must be [N, 4] on one device");
  return torch::stable::contiguous(torch::stable::to(tensor, torch::headeronly::ScalarType::Float));
}

// The table of a call; `anchors` own the data it points to, `masks` are the results.
Levels make_levels(const std::vector<Tensor>& anchors, const std::vector<int64_t>& strides,
                   const std::vector<int64_t>& sizes, const std::vector<Tensor>& masks, int64_t& blocks) {
  Levels levels{};
  blocks = 0;
  for (size_t index = 0; index < anchors.size(); ++index) {
    Level& level = levels.level[levels.count++];
    const int64_t rows = sizes[2 * index], columns = sizes[2 * index + 1];
    level.anchors = global<const float>(anchors[index]);
    level.mask = output<unsigned char>(masks[index]);
    level.count = static_cast<int>(anchors[index].size(0));
    level.rows = static_cast<int>(rows);
    level.columns = static_cast<int>(columns);
    level.stride_y = static_cast<float>(strides[2 * index]);
    level.stride_x = static_cast<float>(strides[2 * index + 1]);
    level.tiles_down = static_cast<int>((rows + kTileRows - 1) / kTileRows);
    level.tiles_across = static_cast<int>((columns + kTileColumns - 1) / kTileColumns);
    level.first_pair = levels.pairs;
    level.first_block = blocks;
    levels.pairs += level.count;
    blocks += masks[index].size(0) * level.tiles_down * level.tiles_across;
  }
  return levels;
}

std::vector<Tensor> forward(Tensor boxes, Tensor image_index, std::vector<Tensor> anchors, std::vector<int64_t> strides,
                            int64_t batch_size, std::vector<int64_t> level_sizes, double psi) {
  using torch::headeronly::ScalarType;
  const DeviceScope scope(boxes);
  STD_TORCH_CHECK(!anchors.empty() && anchors.size() <= kMaxLevels && strides.size() == 2 * anchors.size() &&
                      level_sizes.size() == 2 * anchors.size(),
                  "imitation_mask: strides and level_sizes must have a pair for each of 1 to ", kMaxLevels, " levels");
  STD_TORCH_CHECK(batch_size >= 0, "imitation_mask: batch_size must not be negative");
  const Tensor plain = floats(boxes, boxes);
  STD_TORCH_CHECK(image_index.dim() == 1 && image_index.size(0) == boxes.size(0) && is_beside(image_index, boxes) &&
                      image_index.scalar_type() == ScalarType::Long,
                  "imitation_mask: image_index must be [K] int64 on the boxes' device");
  const Tensor images = torch::stable::contiguous(image_index);
  std::vector<Tensor> masks, bases;
  for (size_t index = 0; index < anchors.size(); ++index) {
    const int64_t *stride = &strides[2 * index], *size = &level_sizes[2 * index];
    constexpr int64_t kLargest = 2147483647;
    STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && size[0] >= 0 && size[1] >= 0 && size[0] <= kLargest - kTileRows &&
                        size[1] <= kLargest - kTileColumns && (size[0] == 0 || size[1] <= kLargest / size[0]),
                    "imitation_mask: strides must be positive, level_sizes in [0, 2^31) and their products too");
    bases.push_back(floats(anchors[index], boxes));
    STD_TORCH_CHECK(bases.back().size(0) <= kLargest, "imitation_mask: a level has at most 2^31 - 1 anchors a cell");
    masks.push_back(new_tensor(plain, {batch_size, size[0], size[1]}, ScalarType::Bool));
  }
  int64_t blocks = 0;
  Levels levels = make_levels(bases, strides, level_sizes, masks, blocks);
  levels.boxes = boxes.size(0);
  const Tensor overlaps = new_tensor(plain, {levels.boxes, levels.pairs}, ScalarType::Float);
  const Tensor thresholds = new_tensor(plain, {levels.boxes}, ScalarType::Float);
  const auto box = global<const float>(plain);
  const auto best = output<float>(overlaps), threshold = output<float>(thresholds);
  constexpr int64_t kBoxes = kPairThreads / kWarpSize;
  launch(plain, Grid(levels.boxes * levels.pairs), Grid(kPairThreads), 0, &best_kernel, levels, box, best);
  launch(plain, Grid((levels.boxes + kBoxes - 1) / kBoxes), Grid(kPairThreads), 0, &threshold_kernel, levels, best,
         static_cast<float>(psi), threshold);
  launch(plain, Grid(blocks), Grid(kThreads), 0, &mark_kernel, levels, box, global<const int64_t>(images), best,
         threshold);
  return masks;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) { library.impl("imitation_mask", TORCH_BOX(&forward)); }

}  // namespace fastkd
