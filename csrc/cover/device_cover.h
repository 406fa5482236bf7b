// Shared by box_pool, box_paint, mask_pool, mask_paint and box_paint_conv3x3 on the GPU: the partition of a pyramid
// into blocks, and the cells that the objects (boxes, masks) of an image cover, computed on the device. An image_index
// out of range matches no image, NaN covers nothing.
#pragma once

#include "cover/covered_range.h"
#include "common/device_call.h"

namespace fastkd {

constexpr int kBlock = 256;                   // threads
constexpr int kTile = 256;                    // consecutive cells of a level in row-major order
constexpr int kWords = kTile / kWarpSize;     // of a tile's cells as bits
constexpr int kWarps = kBlock / kWarpSize;

#ifdef __CUDACC__
FASTKD_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
FASTKD_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }
template <class U>
FASTKD_DEVICE U* shared_at(unsigned char* memory, int bytes) {
  return reinterpret_cast<U*>(memory + bytes);
}
#else
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
template <class U>
Shared<U> shared_at(Shared<unsigned char> memory, int bytes) {
  return {memory.buffer(), memory.offset() + bytes};
}
#endif

// One level of a pyramid [B, C, H, W] in strips of cells; P is const for inputs.
template <class P>
struct Level {
  Global<P> data;
  int rows, columns, cells;
  int strips, words;         // of an image, of an object's packed mask
  int64_t first_block;       // blocks of the preceding levels
  int64_t first_strip;       // strips of one image of the preceding levels
  int64_t first_word;        // words of one object of the preceding levels
  bool channels_last;
  bool packed;  // channels-last, and every group of channels of every cell is whole packs
};

template <class P>
struct Levels {
  Level<P> level[kMaxLevels];
  int count, strip;    // strip: cells
  int group, groups;   // channels per block, number of groups
  int64_t images, channels, strips;  // strips: of one image of all levels
};

// The work of a block: the cells [begin, end) of a strip of one image, and a group of channels. Blocks that differ only
// in the group are consecutive: together they access whole cells.
template <class P, class index_t>
struct Place {
  Level<P> level;
  int index, strip, begin, end, channel, channels;
  int64_t image;

  FASTKD_DEVICE explicit Place(const Levels<P>& levels) {
    const int64_t block = blockIdx.x;
    index = 0;
    while (index + 1 < levels.count && block >= levels.level[index + 1].first_block) ++index;
    level = levels.level[index];
    const int64_t inner = block - level.first_block;
    channel = static_cast<int>(inner % levels.groups) * levels.group;
    strip = static_cast<int>(inner / levels.groups % level.strips);
    image = inner / levels.groups / level.strips;
    begin = strip * levels.strip;
    end = level.cells - begin < levels.strip ? level.cells : begin + levels.strip;
    channels = static_cast<int>(levels.channels - channel < levels.group ? levels.channels - channel : levels.group);
  }

  // Offset of the group's first channel in a cell of this image; strides of channels and cells.
  FASTKD_DEVICE index_t offset(const Levels<P>& levels, int cell) const {
    if (level.channels_last) return static_cast<index_t>((image * level.cells + cell) * levels.channels + channel);
    return static_cast<index_t>((image * levels.channels + channel) * level.cells + cell);
  }
  FASTKD_DEVICE index_t step(const Levels<P>& levels) const {
    return static_cast<index_t>(level.channels_last ? levels.channels : level.cells);
  }
};

struct Area {  // cells of the rows [y0, y1) and columns [x0, x1)
  int y0, y1, x0, x1;
  FASTKD_DEVICE bool empty() const { return y0 >= y1 || x0 >= x1; }
  FASTKD_DEVICE int cells() const { return empty() ? 0 : (y1 - y0) * (x1 - x0); }
};

struct Objects {
  Global<const int64_t> image;  // [K]
  Global<const float> box;      // [K, 4] xyxy, pixels of the padded batch
  Global<const uint32_t> word;  // of masks: level by level [K, words], a bit a cell
  Global<const int> cells;      // of masks: [L, K] number of covered cells
  int count;
  int height, width;  // of the padded batch
  bool masks;

  // The cells of a level that box k covers; for masks the whole level.
  template <class P>
  FASTKD_DEVICE Area area(const Level<P>& level, int k) const {
    if (masks) return {0, level.rows, 0, level.columns};
    const CellRange rows = covered_range(box[4 * int64_t{k} + 1], box[4 * int64_t{k} + 3], height, level.rows);
    const CellRange columns = covered_range(box[4 * int64_t{k}], box[4 * int64_t{k} + 2], width, level.columns);
    return {static_cast<int>(rows.first), static_cast<int>(rows.end), static_cast<int>(columns.first),
            static_cast<int>(columns.end)};
  }

  // The bits of the 32 cells from cell `first` (a multiple of 32) on that mask k covers.
  template <class P>
  FASTKD_DEVICE uint32_t mask_word(const Level<P>& level, int k, int first) const {
    return word[level.first_word * count + int64_t{k} * level.words + first / kWarpSize];
  }
};

// The area grown by one cell on each side, clipped to the level.
template <class P>
FASTKD_DEVICE Area grown(const Area& area, int by, const Level<P>& level) {
  if (area.empty()) return area;
  return {area.y0 > by ? area.y0 - by : 0, area.y1 + by < level.rows ? area.y1 + by : level.rows,
          area.x0 > by ? area.x0 - by : 0, area.x1 + by < level.columns ? area.x1 + by : level.columns};
}

// The bits of the 32 cells from cell `first` on that lie in an area; cells count row by row.
FASTKD_DEVICE uint32_t area_word(const Area& area, int columns, int first) {
  uint32_t bits = 0;
  if (area.empty()) return bits;
  int y = first / columns;
  if (y < area.y0) y = area.y0;
  for (; y < area.y1 && y * columns < first + kWarpSize; ++y) {
    int low = y * columns + area.x0 - first, high = y * columns + area.x1 - first;
    low = low < 0 ? 0 : low;
    high = high > kWarpSize ? kWarpSize : high;
    if (low < high) bits |= (kAllLanes >> (kWarpSize - (high - low))) << low;
  }
  return bits;
}

// True if some of the cells [begin, end) may lie in an area, as the range overlaps that from its first to its last
// cell.
FASTKD_DEVICE bool may_touch(const Area& area, int columns, int begin, int end) {
  return !area.empty() && area.y0 * columns + area.x0 < end && (area.y1 - 1) * columns + area.x1 > begin;
}

// The taps i of three that reach row y (or column) from a side [first, end): bit i is set where y + i - 1 lies in it.
FASTKD_DEVICE uint32_t reaching(int y, int first, int end) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) bits |= static_cast<uint32_t>(y + i - 1 >= first && y + i - 1 < end) << i;
  return bits;
}

// Writes to `list`, in ascending order, the first objects from `from` on (at most `capacity`) whose area, grown by
// `grow`, may overlap the cells of the block. Called by all threads. Returns their number; `next` is the object to
// continue with.
template <class P, class index_t>
FASTKD_DEVICE int list_objects(const Objects& objects, const Place<P, index_t>& place, int grow, int from, int capacity,
                               Shared<int> list, int& next) {
  FASTKD_SHARED(uint32_t, member, kBlock);
  FASTKD_SHARED(int, rest, 1);
  const int thread = threadIdx.x, lane = thread % kWarpSize, left = objects.count - from;
  const int window = left < kWarpSize * kBlock ? left : kWarpSize * kBlock;
  const int chunks = (window + kWarpSize - 1) / kWarpSize;
  __syncthreads();  // until an earlier list has been read
  for (int chunk = thread / kWarpSize; chunk < chunks; chunk += kWarps) {
    const int k = from + chunk * kWarpSize + lane;
    const bool mine = k < objects.count && objects.image[k] == place.image &&
        may_touch(grown(objects.area(place.level, k), grow, place.level), place.level.columns, place.begin, place.end);
    const uint32_t bits = __ballot_sync(kAllLanes, mine);
    if (lane == 0) member[chunk] = bits;
  }
  if (thread == 0) rest[0] = from + window;
  __syncthreads();
  int before = 0, total = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int members = count_bits(member[chunk]);
    before += chunk < thread ? members : 0;
    total += members;
  }
  if (thread < chunks) {
    for (uint32_t bits = member[thread]; bits != 0 && before <= capacity; bits &= bits - 1, ++before) {
      const int k = from + thread * kWarpSize + lowest_bit(bits);
      if (before < capacity) list[before] = k;
      else rest[0] = k;
    }
  }
  __syncthreads();
  next = rest[0];
  return total < capacity ? total : capacity;
}

// The host's side.

struct Plane {  // a level [B, C, H, W] or, with C last, [B, H, W, C]
  Tensor data;
  int64_t rows, columns;
  bool channels_last;
};

using Sizes = std::vector<std::pair<int64_t, int64_t>>;  // (H_l, W_l)

inline Sizes sizes_of(const char* op, const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(sides.size() % 2 == 0, op, ": level_sizes must be pairs (H_l, W_l)");
  Sizes sizes;
  for (size_t at = 0; at < sides.size(); at += 2) sizes.emplace_back(sides[at], sides[at + 1]);
  return sizes;
}

inline Sizes sizes_of(const std::vector<Plane>& planes) {
  Sizes sizes;
  for (const Plane& plane : planes) sizes.emplace_back(plane.rows, plane.columns);
  return sizes;
}

inline void check_sizes(const char* op, const Sizes& sizes) {
  STD_TORCH_CHECK(sizes.size() <= kMaxLevels, op, ": at most ", kMaxLevels, " levels are possible, got ", sizes.size());
  for (const auto& [rows, columns] : sizes) check_cells(op, rows, columns);
}

// The levels without their data, for blocks of `strip` cells and `group` channels of an image.
template <class P>
Levels<P> levels_of(const Sizes& sizes, int64_t images, int64_t channels, int strip, int group, int64_t& blocks) {
  Levels<P> result{};
  result.count = static_cast<int>(sizes.size());
  result.strip = strip;
  result.group = group;
  result.groups = static_cast<int>((channels + group - 1) / group);
  result.images = images;
  result.channels = channels;
  int64_t strips = 0, words = 0;
  blocks = 0;
  for (size_t index = 0; index < sizes.size(); ++index) {
    Level<P>& level = result.level[index];
    level.rows = static_cast<int>(sizes[index].first);
    level.columns = static_cast<int>(sizes[index].second);
    level.cells = level.rows * level.columns;
    level.strips = (level.cells + strip - 1) / strip;
    level.words = (level.cells + kWarpSize - 1) / kWarpSize;
    level.first_block = blocks;
    level.first_strip = strips;
    level.first_word = words;
    blocks += images * level.strips * result.groups;
    strips += level.strips;
    words += level.words;
  }
  result.strips = strips;
  return result;
}

// Sets the data of the levels; packs of channels are possible if `aligned` is true for all other arrays.
template <class P>
void add_data(Levels<P>& levels, const std::vector<Plane>& planes, bool aligned) {
  using Value = std::remove_const_t<P>;
  for (size_t index = 0; index < planes.size(); ++index) {
    Level<P>& level = levels.level[index];
    if constexpr (std::is_const_v<P>) level.data = global<P>(planes[index].data);
    else level.data = output<P>(planes[index].data);
    level.channels_last = planes[index].channels_last;
    level.packed = aligned && level.channels_last && levels.channels % kPack<Value> == 0 &&
        is_aligned({planes[index].data});
  }
}

inline std::vector<Tensor> data_of(const std::vector<Plane>& planes) {
  std::vector<Tensor> data;
  for (const Plane& plane : planes) data.push_back(plane.data);
  return data;
}

// Objects of a call, and the tensors that own their data.
struct Cover {
  Objects objects{};
  std::vector<Tensor> kept;
  int64_t count() const { return objects.count; }
};

// Checks image_index [K] of the K objects, on the device of `on`, and keeps it alive.
inline Cover new_cover(const char* op, const Tensor& objects, const Tensor& image_index, const Tensor& on) {
  STD_TORCH_CHECK(image_index.dim() == 1 && image_index.size(0) == objects.size(0) &&
                      image_index.scalar_type() == torch::headeronly::ScalarType::Long &&
                      objects.size(0) < (int64_t{1} << 30),
                  op, ": image_index must be [K] int64, with an entry for each object");
  STD_TORCH_CHECK(image_index.get_device() == on.get_device() && objects.get_device() == on.get_device(), op,
                  ": objects and image_index must be on the device of the levels");
  Cover cover;
  cover.kept.push_back(torch::stable::contiguous(image_index));
  cover.objects.image = global<const int64_t>(cover.kept.back());
  cover.objects.count = static_cast<int>(objects.size(0));
  return cover;
}

inline Cover cover_by_boxes(const char* op, const Tensor& boxes, const Tensor& image_index, int64_t height,
                            int64_t width, const Tensor& on) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes must be [K, 4]");
  STD_TORCH_CHECK(height > 0 && width > 0 && height < (int64_t{1} << 31) && width < (int64_t{1} << 31), op,
                  ": image_size must be two positive numbers");
  Cover cover = new_cover(op, boxes, image_index, on);
  cover.kept.push_back(torch::stable::contiguous(torch::stable::to(boxes, torch::headeronly::ScalarType::Float)));
  cover.objects.box = global<const float>(cover.kept.back());
  cover.objects.height = static_cast<int>(height);
  cover.objects.width = static_cast<int>(width);
  return cover;
}

}  // namespace fastkd
