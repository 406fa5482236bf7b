// Cells as sums of the values of the objects that cover them, on the GPU.
//
// A block processes a tile of 256 cells of one image and 64 channels. The covering objects of each cell are kept as
// bits; a run of neighbouring cells with the same bits has the same sum, which is computed once.
//   reads   [L, K, C] values: from the caches, once per run in a tile
//   writes  every cell once, in 16-byte stores if the layout allows; nothing else
// Sums are in float (double for float64), with objects in the order of a list that depends only on the geometry:
// deterministic.
//
// With taps, values are [L, K, 9, C]: an object has one value for each of the nine shifts of device_pool.h, and a bias
// is added to every cell.
#pragma once

#include "cover/device_cover.h"

namespace fastkd {

constexpr int kPaintChannels = 64;  // of a block
constexpr int kMostListed = 512;    // objects kept as bits by a block; further ones are tested again for every cell

// A block's shared memory.
template <class V, bool taps>
struct PaintMemory {
  using Sum = sum_t<V>;
  static constexpr int kRows = taps ? 9 : 1;  // values of an object
  static constexpr int kFixedBytes = kTile * 4;
  static constexpr int kChunkBytes = kWarpSize * (static_cast<int>(sizeof(Sum)) + 20) + kRows * kTile * 4;
  Shared<Sum> scale;          // [object]
  Shared<uint32_t> bits;      // [chunk of 32 objects][row][cell]
  Shared<uint32_t> changed;   // [cell] 0: same bits as the previous cell
  Shared<int> area, list;     // [object][4], [object]

  static constexpr int bytes(int chunks) { return kFixedBytes + chunks * kChunkBytes; }

  FASTKD_DEVICE PaintMemory(Shared<unsigned char> memory, int chunks) {
    int used = chunks * kWarpSize * static_cast<int>(sizeof(Sum));
    scale = shared_at<Sum>(memory, 0);
    bits = shared_at<uint32_t>(memory, used);
    used += chunks * kRows * kTile * 4;
    changed = shared_at<uint32_t>(memory, used);
    used += kFixedBytes;
    area = shared_at<int>(memory, used);
    list = shared_at<int>(memory, used + chunks * kWarpSize * 16);
  }
  FASTKD_DEVICE Area area_of(int object) const {
    return {area[4 * object], area[4 * object + 1], area[4 * object + 2], area[4 * object + 3]};
  }
};

// The rows of values of object k that contribute to a cell, as bits.
template <bool taps, class P>
FASTKD_DEVICE uint32_t rows_at(const Objects& objects, [[maybe_unused]] const Level<P>& level, int k, const Area& area,
                               int cell, int y, int x) {
  if constexpr (taps) {
    const uint32_t rows = area.empty() ? 0 : reaching(y, area.y0, area.y1), columns = reaching(x, area.x0, area.x1);
    return (rows & 1 ? columns : 0) | (rows & 2 ? columns << 3 : 0) | (rows & 4 ? columns << 6 : 0);
  } else {
    if (objects.masks) return objects.mask_word(level, k, cell) >> cell % kWarpSize & 1;
    return y >= area.y0 && y < area.y1 && x >= area.x0 && x < area.x1;
  }
}

// 1, or 1 / (number of cells the object covers) if mean.
template <class Sum>
FASTKD_DEVICE Sum scale_of(const Objects& objects, int index, int k, const Area& area, bool mean) {
  if (!mean) return 1;
  const int cells = objects.masks ? int(objects.cells[int64_t{index} * objects.count + k]) : area.cells();
  return Sum(1) / static_cast<Sum>(cells > 1 ? cells : 1);
}

// The values that a block paints.
template <class V, bool taps>
struct Palette {
  Objects objects;
  Global<const V> values;  // [L, K, rows, C]
  Global<const V> bias;    // [C], null: none
  int capacity;            // maximum number of listed objects; a multiple of 32
  bool mean;
};

// Computes the data of the listed objects and the tile's cells.
template <class T, class V, bool taps, class index_t>
FASTKD_DEVICE void find_bits(const Palette<V, taps>& palette, const Place<T, index_t>& place, int count,
                             const PaintMemory<V, taps>& memory) {
  constexpr int kRows = PaintMemory<V, taps>::kRows;
  for (int object = threadIdx.x; object < count; object += kBlock) {
    const int k = memory.list[object];
    const Area area = palette.objects.area(place.level, k);
    memory.area[4 * object] = area.y0;
    memory.area[4 * object + 1] = area.y1;
    memory.area[4 * object + 2] = area.x0;
    memory.area[4 * object + 3] = area.x1;
    memory.scale[object] = scale_of<sum_t<V>>(palette.objects, place.index, k, area, palette.mean);
  }
  __syncthreads();
  const int cell = place.begin + threadIdx.x;
  if (cell < place.end) {
    const int y = cell / place.level.columns, x = cell % place.level.columns;
    for (int first = 0; first < count; first += kWarpSize) {
      const int end = first + kWarpSize < count ? first + kWarpSize : count;
      uint32_t bits[kRows] = {};
      for (int object = first; object < end; ++object) {
        const Area area = memory.area_of(object);
        const uint32_t rows = rows_at<taps>(palette.objects, place.level, memory.list[object], area, cell, y, x);
#pragma unroll
        for (int row = 0; row < kRows; ++row) bits[row] |= (rows >> row & 1) << (object - first);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        memory.bits[(first / kWarpSize * kRows + row) * kTile + threadIdx.x] = bits[row];
    }
  }
  __syncthreads();
  bool changed = threadIdx.x == 0;
  for (int row = 0; !changed && cell < place.end && row < (count + kWarpSize - 1) / kWarpSize * kRows; ++row)
    changed = memory.bits[row * kTile + threadIdx.x] != memory.bits[row * kTile + threadIdx.x - 1];
  memory.changed[threadIdx.x] = changed;
  __syncthreads();
}

// sum += scale * the values of `width` channels.
template <int width, class V>
FASTKD_DEVICE void add_values(Global<const V> values, sum_t<V> scale, sum_t<V> (&sum)[width]) {
  if constexpr (width % kPack<V> == 0) {
#pragma unroll
    for (int first = 0; first < width; first += kPack<V>) {
      const Pack<V> pack = load_pack(values + first);
#pragma unroll
      for (int i = 0; i < kPack<V>; ++i) sum[first + i] += scale * widened<V>(pack.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += scale * widened<V>(values[i]);
  }
}

// The sum of `width` channels from `channel` on in a cell of the tile, 32 objects at a time; `rest` is the first object
// that is not listed.
template <int width, class T, class V, bool taps, class index_t>
FASTKD_DEVICE void sum_cell(const Levels<T>& levels, const Palette<V, taps>& palette, const Place<T, index_t>& place,
                            int count, int rest, const PaintMemory<V, taps>& memory, int cell, int channel,
                            sum_t<V> (&sum)[width]) {
  constexpr int kRows = PaintMemory<V, taps>::kRows;
  const int64_t row_size = levels.channels;
  const Objects& objects = palette.objects;
  const Global<const V> values = palette.values + (int64_t{place.index} * objects.count * kRows * row_size + channel);
  sum_t<V> part[width] = {};
  const auto close = [&] {
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += part[i], part[i] = 0;
  };
#pragma unroll
  for (int i = 0; i < width; ++i) sum[i] = 0;
  if (taps && palette.bias) add_values<width, V>(palette.bias + channel, 1, sum);
  for (int first = 0; first < count; first += kWarpSize) {
    for (int row = 0; row < kRows; ++row) {
      for (uint32_t bits = memory.bits[(first / kWarpSize * kRows + row) * kTile + cell]; bits != 0; bits &= bits - 1) {
        const int object = first + lowest_bit(bits);
        const int64_t value = int64_t{memory.list[object]} * kRows + row;
        add_values<width, V>(values + value * row_size, memory.scale[object], part);
      }
    }
    close();
  }
  for (int k = rest; k < objects.count; ++k) {
    if (objects.image[k] == place.image) {
      const Area area = objects.area(place.level, k);
      const int at = place.begin + cell, y = at / place.level.columns, x = at % place.level.columns;
      for (uint32_t rows = rows_at<taps>(objects, place.level, k, area, at, y, x); rows != 0; rows &= rows - 1)
        add_values<width, V>(values + (int64_t{k} * kRows + lowest_bit(rows)) * row_size,
                             scale_of<sum_t<V>>(objects, place.index, k, area, palette.mean), part);
    }
    if (k % kWarpSize == 0 || k + 1 == objects.count) close();
  }
}

// A thread processes `width` channels of a run of cells.
template <int width, class T, class V, bool taps, class index_t>
FASTKD_DEVICE void paint_channels_last(const Levels<T>& levels, const Palette<V, taps>& palette,
                                       const Place<T, index_t>& place, int count, int rest,
                                       const PaintMemory<V, taps>& memory) {
  const int cells = place.end - place.begin, packs = place.channels / width, teams = kBlock / packs;
  const int team = threadIdx.x / packs, channel = threadIdx.x % packs * width, run = (cells + teams - 1) / teams;
  if (team >= teams) return;
  const Global<T> out = place.level.data + (place.offset(levels, place.begin) + static_cast<index_t>(channel));
  const index_t step = place.step(levels);
  const int begin = team * run, end = begin + run < cells ? begin + run : cells;
  sum_t<V> sum[width];
  for (int cell = begin; cell < end; ++cell) {
    if (cell == begin || memory.changed[cell])
      sum_cell<width>(levels, palette, place, count, rest, memory, cell, place.channel + channel, sum);
    if constexpr (width == kPack<T>) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) pack.value[i] = static_cast<T>(sum[i]);
      store_pack(out + static_cast<index_t>(cell) * step, pack);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) out[static_cast<index_t>(cell) * step + i] = static_cast<T>(sum[i]);
    }
  }
}

// A warp processes one channel of the tile's cells at a time.
template <class T, class V, bool taps, class index_t>
FASTKD_DEVICE void paint_contiguous(const Levels<T>& levels, const Palette<V, taps>& palette,
                                    const Place<T, index_t>& place, int count, int rest,
                                    const PaintMemory<V, taps>& memory) {
  const Global<T> out = place.level.data + place.offset(levels, place.begin);
  for (int channel = threadIdx.x / kWarpSize; channel < place.channels; channel += kWarps) {
    sum_t<V> sum[1];
    int last = -2;
    store_row<T>(out + static_cast<index_t>(channel) * place.step(levels), place.end - place.begin, [&](int cell) {
      if (cell != last + 1 || memory.changed[cell])
        sum_cell<1>(levels, palette, place, count, rest, memory, cell, place.channel + channel, sum);
      last = cell;
      return sum[0];
    });
  }
}

template <class T, class V, class index_t, bool taps>
FASTKD_KERNEL FASTKD_LAUNCH_BOUNDS(kBlock, sizeof(index_t) == 8 ? 2 : 3) void paint_kernel(Levels<T> levels,
                                                                              Palette<V, taps> palette) {
  FASTKD_DYNAMIC_SHARED(unsigned char, dynamic);
  const PaintMemory<V, taps> memory(dynamic, palette.capacity / kWarpSize);
  const Place<T, index_t> place(levels);
  int rest = 0;
  const int count = list_objects(palette.objects, place, taps, 0, palette.capacity, memory.list, rest);
  find_bits(palette, place, count, memory);
  if (rest < palette.objects.count && threadIdx.x < kTile) memory.changed[threadIdx.x] = 1;  // unlisted objects
  __syncthreads();
  if (!taps && !place.level.channels_last) paint_contiguous(levels, palette, place, count, rest, memory);
  else if (place.level.packed) paint_channels_last<kPack<T>>(levels, palette, place, count, rest, memory);
  else paint_channels_last<1>(levels, palette, place, count, rest, memory);
}

// The host's side: fills planes from values [L, K, rows, C], and a bias [C] with taps.
template <class T, class V, bool taps>
void paint_levels(const std::vector<Plane>& planes, int64_t images, const Cover& cover, const Tensor& values,
                  const Tensor* bias, int64_t channels, bool mean) {
  using Memory = PaintMemory<V, taps>;
  constexpr int64_t kMost = kSharedWithoutPermission - kStaticShared;
  if (planes.empty()) return;
  int64_t blocks = 0;
  Levels<T> levels = levels_of<T>(sizes_of(planes), images, channels, kTile, kPaintChannels, blocks);
  add_data(levels, planes, is_aligned({values}) && (bias == nullptr || is_aligned({*bias})));
  const int64_t room = std::min<int64_t>(shared_limit(), kMost) - Memory::kFixedBytes;
  const int64_t wanted = (std::min<int64_t>(cover.count(), kMostListed) + kWarpSize - 1) / kWarpSize;
  const int64_t chunks = std::min(wanted, room > 0 ? room / Memory::kChunkBytes : 0);
  Palette<V, taps> palette{cover.objects, global<const V>(values), Global<const V>(nullptr),
                           static_cast<int>(chunks * kWarpSize), mean};
  if (bias != nullptr) palette.bias = global<const V>(*bias);
  const auto kernel =
      is_narrow(data_of(planes)) ? &paint_kernel<T, V, narrow_index, taps> : &paint_kernel<T, V, int64_t, taps>;
  launch(planes[0].data, Grid(blocks), Grid(kBlock), Memory::bytes(static_cast<int>(chunks)), kernel, levels, palette);
}

}  // namespace fastkd
