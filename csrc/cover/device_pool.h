// Sums of a pyramid over the cells that objects cover, on the GPU.
//
// A block processes a strip of cells of one image and 32 channels, tile by tile: the cells of a tile that some object
// covers are loaded to shared memory once, in either memory format, and every object that may overlap the strip adds
// its cells; 32 cells that are covered together are summed once for all objects. A second kernel adds the strips per
// object.
//   pool    reads   every 16 bytes with a cell that some object covers (with taps: everything), once for as many
//                   objects as shared memory holds
//           writes  one partial sum per strip, overlapping object and channel; at most as many as cells
//   merge   reads   these partial sums; writes [L, K, C] once
// Sums are in float (double for float64) over a strip and in double over strips, in an order that depends only on the
// geometry: deterministic.
//
// With taps, an object is summed nine times, shifted by one cell in every direction: tap (i, j) covers the cells
// (y, x) where (y + i - 1, x + j - 1) lies in the object. Rows fall into five classes by the taps that reach them,
// columns likewise: 25 disjoint regions are summed, and the sum of a region is added to the taps that reach it.
#pragma once

#include "cover/device_cover.h"

namespace fastkd {

constexpr int kPoolChannels = kWarpSize;  // of a block
constexpr int kMostStrip = 1 << 20, kLeastStrip = 512;  // cells

// Class c of five of a side [first, end) is [edge(c), edge(c + 1)).
FASTKD_DEVICE int edge(int c, int first, int end, int cells) {
  const bool thin = end - first == 1;
  const int middle = c == 2 ? (thin ? first : first + 1) : (thin ? end : end - 1);
  const int value = c == 0 ? first - 1 : c == 1 ? first : c == 4 ? end : c == 5 ? end + 1 : middle;
  return value < 0 ? 0 : value > cells ? cells : value;
}

template <bool taps>
struct Parts {
  static constexpr int kRegions = taps ? 25 : 1;
  static constexpr int kRows = taps ? 9 : 1;  // sums of an object
};

// A region of an object's area.
template <bool taps, class P>
FASTKD_DEVICE Area region_of(const Area& area, int region, const Level<P>& level) {
  if (!taps || area.empty()) return area;
  const int row = region / 5, column = region % 5;
  return {edge(row, area.y0, area.y1, level.rows), edge(row + 1, area.y0, area.y1, level.rows),
          edge(column, area.x0, area.x1, level.columns), edge(column + 1, area.x0, area.x1, level.columns)};
}

// A block's shared memory.
template <class T, bool taps>
struct PoolMemory {
  using Sum = sum_t<T>;
  static constexpr int kRegions = Parts<taps>::kRegions, kRows = Parts<taps>::kRows;
  static constexpr int kStride = kTile + (sizeof(T) == 2 ? 2 : 1);  // contiguous tiles: channels in different banks
  static constexpr int kTileBytes = kPoolChannels * kStride * static_cast<int>(sizeof(T));
  static constexpr int kTotalBytes = kWords * kWarpSize * static_cast<int>(sizeof(Sum));
  static constexpr int kFixedBytes = kTileBytes + kTotalBytes;
  Shared<T> tile;          // channels-last [cell][32], contiguous [32][kStride]
  Shared<Sum> total;       // [word][32] sums of 32 cells
  Shared<Sum> sum;         // [object][row][32]
  Shared<uint32_t> word;   // [object][region][kWords] bits of the tile's cells
  Shared<uint32_t> live;   // [object][region] words that are not 0
  Shared<int> area, list;  // [object][4], [object]

  static constexpr int bytes(int objects) { return kFixedBytes + objects * kObjectBytes; }
  static constexpr int kObjectBytes =
      kRows * kPoolChannels * static_cast<int>(sizeof(Sum)) + kRegions * 4 * (kWords + 1) + 20;

  FASTKD_DEVICE PoolMemory(Shared<unsigned char> memory, int objects) {
    int used = kFixedBytes;
    tile = shared_at<T>(memory, 0);
    total = shared_at<Sum>(memory, kTileBytes);
    sum = shared_at<Sum>(memory, used);
    used += objects * kRows * kPoolChannels * static_cast<int>(sizeof(Sum));
    word = shared_at<uint32_t>(memory, used);
    used += objects * kRegions * kWords * 4;
    live = shared_at<uint32_t>(memory, used);
    used += objects * kRegions * 4;
    area = shared_at<int>(memory, used);
    list = shared_at<int>(memory, used + objects * 16);
  }
  FASTKD_DEVICE Area area_of(int object) const {
    return {area[4 * object], area[4 * object + 1], area[4 * object + 2], area[4 * object + 3]};
  }
};

// The tile's cells that some object covers, as bits; all cells with `whole`. One word per warp.
template <class T, bool taps>
FASTKD_DEVICE void find_covered(bool whole, int count, const PoolMemory<T, taps>& memory, Shared<uint32_t> covered) {
  const int word = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint32_t bits = whole ? kAllLanes : 0;
  for (int at = lane; !whole && at < count * memory.kRegions; at += kWarpSize) bits |= memory.word[at * kWords + word];
  for (int step = kWarpSize / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
  if (lane == 0) covered[word] = bits;
}

// True if one of the `count` cells from `first` on is covered.
FASTKD_DEVICE bool is_covered(Shared<uint32_t> covered, int first, int count) {
  const int word = first / kWarpSize, shift = first % kWarpSize;
  uint32_t bits = covered[word] >> shift;
  if (shift + count > kWarpSize) bits |= covered[word + 1] << (kWarpSize - shift);
  return (bits & ((1u << count) - 1)) != 0;
}

// Loads the covered cells of [first, first + cells), for the channels of the block, to the tile.
template <class T, bool taps, class index_t>
FASTKD_DEVICE void load_tile(const Levels<const T>& levels, const Place<const T, index_t>& place, int first, int cells,
                             const PoolMemory<T, taps>& memory, Shared<uint32_t> covered) {
  constexpr int kBatch = 4;  // loads of a thread in flight
  const int thread = threadIdx.x;
  const Global<const T> x = place.level.data + place.offset(levels, first);
  const index_t step = place.step(levels);
  if (place.level.packed) {
    const int packs = place.channels / kPack<T>, teams = kBlock / packs, team = thread / packs;
    const int channel = thread % packs * kPack<T>;
    for (int base = team; team < teams && base < cells; base += kBatch * teams) {
      Pack<T> batch[kBatch];
      bool wanted[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int cell = base + i * teams;
        wanted[i] = cell < cells && is_covered(covered, cell, 1);
        if (wanted[i]) batch[i] = load_pack(x + (static_cast<index_t>(cell) * step + channel));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (wanted[i]) store_pack(memory.tile + ((base + i * teams) * kPoolChannels + channel), batch[i]);
    }
  } else if (place.level.channels_last) {
    const int lane = thread % kWarpSize;
    for (int cell = thread / kWarpSize; cell < cells; cell += kWarps)
      if (lane < place.channels && is_covered(covered, cell, 1))
        memory.tile[cell * kPoolChannels + lane] = T(x[static_cast<index_t>(cell) * step + lane]);
  } else {
    for (int channel = thread / kWarpSize; channel < place.channels; channel += kWarps) {
      const Global<const T> row = x + static_cast<index_t>(channel) * step;
      const Shared<T> to = memory.tile + channel * memory.kStride;
      const auto whole = [&](int cell) {
        if (!is_covered(covered, cell, kPack<T>)) return;
        const Pack<T> pack = load_pack(row + cell);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) to[cell + j] = pack.value[j];
      };
      const auto single = [&](int cell) {
        if (is_covered(covered, cell, 1)) to[cell] = T(row[cell]);
      };
      over_row<T>(row, true, cells, whole, single);
    }
  }
}

// The cells of the tile at `first` that the listed objects cover. True if a thread of the warp found any.
template <class T, bool taps, class index_t>
FASTKD_DEVICE bool find_words(const Objects& objects, const Place<const T, index_t>& place, int first, int count,
                              const PoolMemory<T, taps>& memory) {
  uint32_t found = 0;
  for (int at = threadIdx.x; at < count * memory.kRegions; at += kBlock) {
    const int object = at / memory.kRegions;
    const Area area = region_of<taps>(memory.area_of(object), at % memory.kRegions, place.level);
    uint32_t live = 0;
#pragma unroll 1  // saves registers
    for (int word = 0; word < kWords; ++word) {
      const int cell = first + word * kWarpSize;
      uint32_t bits = 0;
      if (cell < place.end)
        bits = !taps && objects.masks ? objects.mask_word(place.level, memory.list[object], cell)
                                      : area_word(area, place.level.columns, cell);
      memory.word[at * kWords + word] = bits;
      live |= static_cast<uint32_t>(bits != 0) << word;
    }
    memory.live[at] = live;
    found |= live;
  }
  return __ballot_sync(kAllLanes, found != 0) != 0;
}

// The sum of the cells with set bits, among 32 from `cell` on.
template <int step, class T>
FASTKD_DEVICE sum_t<T> sum_bits(Shared<T> cell, uint32_t bits) {
  sum_t<T> sums[4] = {};
#pragma unroll
  for (int four = 0; four < kWarpSize; four += 4) {
    if ((bits >> four & 15) == 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bits >> (four + i) & 1) sums[i] += widened<T>(cell[(four + i) * step]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same of a word of the tile, for the lane's channel.
template <class T, bool taps>
FASTKD_DEVICE sum_t<T> sum_word(const PoolMemory<T, taps>& memory, bool channels_last, int word, uint32_t bits) {
  const int lane = threadIdx.x % kWarpSize, first = word * kWarpSize;
  if (channels_last) return sum_bits<kPoolChannels, T>(memory.tile + (first * kPoolChannels + lane), bits);
  return sum_bits<1, T>(memory.tile + (lane * memory.kStride + first), bits);
}

// Adds the tile to the sums of the objects; a warp processes every kWarps-th object, a lane one channel.
template <class T, bool taps, class index_t>
FASTKD_DEVICE void add_tile(const Place<const T, index_t>& place, int count, const PoolMemory<T, taps>& memory) {
  using Sum = sum_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  if (lane >= place.channels) return;
  for (int object = threadIdx.x / kWarpSize; object < count; object += kWarps) {
#pragma unroll 1
    for (int region = 0; region < memory.kRegions; ++region) {
      const int at = object * memory.kRegions + region;
      uint32_t live = memory.live[at];
      if (live == 0) continue;
      Sum sum = 0;
      for (; live != 0; live &= live - 1) {
        const int word = lowest_bit(live);
        const uint32_t bits = memory.word[at * kWords + word];
        if (bits == kAllLanes) sum += memory.total[word * kWarpSize + lane];
        else sum += sum_word(memory, place.level.channels_last, word, bits);
      }
      const Shared<Sum> out = memory.sum + (object * memory.kRows * kPoolChannels + lane);
      if constexpr (taps) {
        const Area area = memory.area_of(object), part = region_of<taps>(area, region, place.level);
        const uint32_t rows = reaching(part.y0, area.y0, area.y1), columns = reaching(part.x0, area.x0, area.x1);
#pragma unroll 1
        for (int tap = 0; tap < 9; ++tap)
          if ((rows >> tap / 3 & 1) && (columns >> tap % 3 & 1)) out[tap * kPoolChannels] += sum;
      } else {
        out[0] += sum;
      }
    }
  }
}

// Computes the areas of the listed objects and zeroes their sums.
template <class T, bool taps, class index_t>
FASTKD_DEVICE void begin_sums(const Objects& objects, const Place<const T, index_t>& place, int count,
                              const PoolMemory<T, taps>& memory) {
  for (int at = threadIdx.x; at < count * memory.kRows * kPoolChannels; at += kBlock) memory.sum[at] = 0;
  for (int object = threadIdx.x; object < count; object += kBlock) {
    const Area area = objects.area(place.level, memory.list[object]);
    memory.area[4 * object] = area.y0;
    memory.area[4 * object + 1] = area.y1;
    memory.area[4 * object + 2] = area.x0;
    memory.area[4 * object + 3] = area.x1;
  }
}

// The sum of the tile's cells, using the sums of 32 cells where all are covered.
template <class T, bool taps, class index_t>
FASTKD_DEVICE void sum_tile(const Place<const T, index_t>& place, int cells, const PoolMemory<T, taps>& memory,
                            Shared<uint32_t> covered) {
  const int lane = threadIdx.x % kWarpSize, word = threadIdx.x / kWarpSize, left = cells - word * kWarpSize;
  if (left <= 0 || lane >= place.channels || covered[word] != kAllLanes) return;
  const uint32_t bits = left < kWarpSize ? (1u << left) - 1 : kAllLanes;
  memory.total[threadIdx.x] = sum_word(memory, place.level.channels_last, word, bits);
}

// partial [strips of all levels, K, rows, C] is written only for objects that may overlap a strip; with taps, whole
// [images, strips of all levels, C] are the sums of all cells.
template <class T, class index_t, bool taps>
FASTKD_KERNEL FASTKD_LAUNCH_BOUNDS(kBlock, sizeof(T) + sizeof(index_t) == 16 ? 1 : 2) void pool_kernel(
    Levels<const T> levels, Objects objects, int capacity, Global<sum_t<T>> partial, Global<sum_t<T>> whole) {
  using Sum = sum_t<T>;
  FASTKD_DYNAMIC_SHARED(unsigned char, dynamic);
  FASTKD_SHARED(uint32_t, seen, kWarps);
  FASTKD_SHARED(uint32_t, covered, kWords);
  const PoolMemory<T, taps> memory(dynamic, capacity);
  const Place<const T, index_t> place(levels);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t strip = place.level.first_strip + place.strip;
  bool for_whole = taps;  // the first pass
  int from = 0;
  do {
    int next = 0;
    const int count = list_objects(objects, place, taps, from, capacity, memory.list, next);
    begin_sums(objects, place, count, memory);
    Sum all = 0;
    for (int first = place.begin; (count > 0 || for_whole) && first < place.end; first += kTile) {
      const int cells = place.end - first < kTile ? place.end - first : kTile;
      __syncthreads();
      const bool found = find_words(objects, place, first, count, memory);
      if (lane == 0) seen[warp] = found;
      __syncthreads();
      bool wanted = for_whole;
      for (int other = 0; other < kWarps; ++other) wanted = wanted || seen[other] != 0;
      if (!wanted) continue;
      find_covered(for_whole, count, memory, covered);
      __syncthreads();
      load_tile(levels, place, first, cells, memory, covered);
      __syncthreads();
      sum_tile(place, cells, memory, covered);
      __syncthreads();
      if (for_whole && warp == 0 && lane < place.channels)
        for (int word = 0; word * kWarpSize < cells; ++word) all += memory.total[word * kWarpSize + lane];
      add_tile(place, count, memory);
    }
    if (lane < place.channels) {
      for (int object = warp; object < count; object += kWarps) {  // as in add_tile
        const int64_t first = (strip * objects.count + memory.list[object]) * memory.kRows;
        for (int row = 0; row < memory.kRows; ++row)
          partial[(first + row) * levels.channels + place.channel + lane] =
              memory.sum[(object * memory.kRows + row) * kPoolChannels + lane];
      }
      if (for_whole && warp == 0)
        whole[(place.image * levels.strips + strip) * levels.channels + place.channel + lane] = all;
    }
    from = next;
    for_whole = false;
  } while (from < objects.count);
}

// One block per level and object: adds its strips' sums in order, divides by its cells if mean. out is [L, K, rows, C].
template <class T, class Out, bool taps>
FASTKD_KERNEL void merge_kernel(Levels<const T> levels, Objects objects, bool mean, Global<const sum_t<T>> partial,
                                Global<Out> out) {
  const int index = static_cast<int>(blockIdx.x / objects.count), k = static_cast<int>(blockIdx.x % objects.count);
  const Level<const T> level = levels.level[index];
  const int64_t rows = Parts<taps>::kRows * levels.channels, image = objects.image[k];
  const Area area = objects.area(level, k), reach = grown(area, taps, level);
  const bool some = image >= 0 && image < levels.images && !reach.empty();
  const int first = some ? (reach.y0 * level.columns + reach.x0) / levels.strip : 0;
  const int last = some ? ((reach.y1 - 1) * level.columns + reach.x1 - 1) / levels.strip : -1;
  const int cells = !mean ? 1 : objects.masks ? int(objects.cells[int64_t{blockIdx.x}]) : area.cells();
  for (int64_t at = threadIdx.x; at < rows; at += kBlock) {
    double sum = 0;
#pragma unroll 4
    for (int strip = first; strip <= last; ++strip)
      sum += partial[((level.first_strip + strip) * objects.count + k) * rows + at];
    out[blockIdx.x * rows + at] = static_cast<Out>(static_cast<sum_t<Out>>(sum / (cells > 1 ? cells : 1)));
  }
}

// The host's side.

// Cells per strip: enough strips to fill a GPU, but no more partial sums than elements.
inline int strip_of(const Sizes& sizes, int64_t images, int64_t values_per_strip) {
  int64_t cells = 0;
  for (const auto& [rows, columns] : sizes) cells += rows * columns;
  int64_t strip = kLeastStrip;
  for (; strip < kMostStrip; strip *= 2) {
    int64_t strips = 0;
    for (const auto& [rows, columns] : sizes) strips += (rows * columns + strip - 1) / strip;
    if (strips * values_per_strip <= cells * images) break;
  }
  return static_cast<int>(strip);
}

// Objects whose sums a block keeps at once: all, or as many as fit beside a tile in shared memory of at most 96 KB, so
// that an H100 multiprocessor holds two blocks.
template <class T, bool taps>
int pool_capacity(const char* op, int objects) {
  using Memory = PoolMemory<T, taps>;
  constexpr int64_t kMost = 96 * 1024;
  const int64_t room = std::min<int64_t>(shared_limit(), kMost) - Memory::kFixedBytes;
  STD_TORCH_CHECK(room >= Memory::kObjectBytes, op, ": a block needs ", Memory::bytes(1),
                  " bytes of shared memory, this GPU has ", shared_limit(), "; use the reference");
  return static_cast<int>(std::min<int64_t>(objects, room / Memory::kObjectBytes));
}

// Fills out [L, K, rows, C] and, with taps, whole [images, strips, C] from levels of images and channels.
template <class T, class Out, bool taps>
void pool_levels(const char* op, const std::vector<Plane>& planes, int64_t images, int64_t channels, const Cover& cover,
                 bool mean, const Tensor& out, const Tensor* whole, int strip) {
  int64_t blocks = 0;
  Levels<const T> levels = levels_of<const T>(sizes_of(planes), images, channels, strip, kPoolChannels, blocks);
  add_data(levels, planes, true);
  constexpr int64_t kRows = Parts<taps>::kRows;
  const Tensor partial = new_tensor(out, {levels.strips, cover.count(), kRows, channels}, kSumType<T>);
  const int capacity = pool_capacity<T, taps>(op, cover.objects.count);
  const auto sums = output<sum_t<T>>(partial);
  const auto all = whole == nullptr ? Global<sum_t<T>>(nullptr) : output<sum_t<T>>(*whole);
  const auto kernel = is_narrow(data_of(planes)) ? &pool_kernel<T, narrow_index, taps> : &pool_kernel<T, int64_t, taps>;
  if (cover.count() == 0 && !taps) return;
  launch(out, Grid(blocks), Grid(kBlock), PoolMemory<T, taps>::bytes(capacity), kernel, levels, cover.objects, capacity,
         sums, all);
  launch(out, Grid(levels.count * cover.count()), Grid(kBlock), 0, &merge_kernel<T, Out, taps>, levels, cover.objects,
         mean, sums, output<Out>(out));
}

}  // namespace fastkd
