// The two sums over bands (bands.h): pool_bands sums cells for each object, paint_nodes sums objects for each segment.
// Lanes are channels in both; rows of contiguous levels are converted by `transpose`. An op that transforms the cells
// before summing passes its own leaves to pool_bands.
#pragma once

#include "cover/bands.h"
#include "common/reduce.h"

#include <utility>

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

template <int half, class V, int... lane>
FASTKD_INLINE V interleave(V a, V b, std::integer_sequence<int, lane...>) {  // a0 b0 a1 b1 ... of one half
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane / 2 + half * lanes / 2 + lane % 2 * lanes)...);
}

// Element j of vector i becomes element i of vector j.
template <class V>
FASTKD_INLINE void transpose(V (&rows)[kLanes<V>]) {
  constexpr int lanes = kLanes<V>;
  constexpr std::make_integer_sequence<int, lanes> sequence{};
  for (int stage = 1; stage < lanes; stage *= 2) {
    V next[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + lanes / 2], sequence);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + lanes / 2], sequence);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// Leaves of a channels-last image: U vectors of channels, read in place.
template <class V, int U, class scalar_t>
struct ChannelsLastLeaves {
  const scalar_t* cells;  // the first channel of cell (0, 0)
  int64_t channels, columns;

  // leaf[s] = sum over the cells of segment s
  FASTKD_INLINE void operator()(const Band& band, const Segment* segment, Element<V>* leaf) const {
    constexpr int width = U * kLanes<V>;
    for (int64_t y = band.y0; y < band.y1; ++y) {
      const scalar_t* row = cells + y * columns * channels;
      for (int64_t s = 0; s < band.segments; ++s) {
        V sum[U] = {};
        if (segment[s].covered)
          for (int64_t x = segment[s].x0; x < segment[s].x1; ++x)
            for (int u = 0; u < U; ++u) sum[u] += load<V>(row + x * channels + u * kLanes<V>);
        for (int u = 0; u < U; ++u) {
          Element<V>* out = leaf + s * width + u * kLanes<V>;
          store(out, y == band.y0 ? sum[u] : V(load<V>(out) + sum[u]));
        }
      }
    }
  }
};

// Length of a buffer for a row with whole-vector loads and stores at any index.
template <class V>
FASTKD_INLINE int64_t padded(int64_t columns) {
  return (columns + 2 * kLanes<V>) / kLanes<V> * kLanes<V>;
}

// Leaves of a contiguous image: U vectors of channels. `sums` [channels, padded] holds the sum of the rows of a
// band, `cells` [padded, channels] the same with channels in lanes.
template <class V, int U, class scalar_t>
struct ContiguousLeaves {
  using acc = Element<V>;
  const scalar_t* planes;  // the first of the channels
  int64_t channels, rows, columns;  // actual numbers, channels at most U * kLanes<V>; missing channels sum to 0
  acc *sums, *cells;

  FASTKD_INLINE void operator()(const Band& band, const Segment* segment, acc* leaf) const {
    constexpr int lanes = kLanes<V>, width = U * lanes;
    int64_t first = 0, last = band.segments - 1;
    while (!segment[first].covered) ++first;
    while (!segment[last].covered) --last;
    const int64_t x0 = segment[first].x0, x1 = segment[last].x1, length = padded<V>(columns);
    for (int64_t channel = 0; channel < channels; ++channel)
      add_plane(planes + channel * rows * columns, band, x0, x1, sums + channel * length);
    for (int64_t x = x0; x < x1; x += lanes)
      for (int u = 0; u < U; ++u) {
        V tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load<V>(sums + (u * lanes + i) * length + x);
        transpose(tile);
        for (int i = 0; i < lanes; ++i) store(cells + (x + i) * width + u * lanes, tile[i]);
      }
    for (int64_t s = 0; s < band.segments; ++s) {
      V sum[U] = {};
      if (segment[s].covered)
        for (int64_t x = segment[s].x0; x < segment[s].x1; ++x)
          for (int u = 0; u < U; ++u) sum[u] += load<V>(cells + x * width + u * lanes);
      for (int u = 0; u < U; ++u) store(leaf + s * width + u * lanes, sum[u]);
    }
  }

  // out[x] = sum over the rows of the band
  FASTKD_INLINE void add_plane(const scalar_t* plane, const Band& band, int64_t x0, int64_t x1, acc* out) const {
    constexpr int lanes = kLanes<V>;
    for (int64_t y = band.y0; y < band.y1; ++y) {
      const scalar_t* row = plane + y * columns;
      const int64_t ahead = (band.y1 - band.y0) * columns;
      if (band.y1 - band.y0 < 4) fetch(row + x0 + ahead, row + x1 + ahead);  // next band
      int64_t x = x0;
      for (; x + lanes <= x1; x += lanes) {
        const V value = load<V>(row + x);
        store(out + x, y == band.y0 ? value : V(load<V>(out + x) + value));
      }
      for (; x < x1; ++x) {
        const acc value = load<acc>(row + x);
        out[x] = y == band.y0 ? value : out[x] + value;
      }
    }
  }
};

// totals[object] += sum over the cells it covers; U vectors of channels. nodes has room for the tree of the largest
// band, 2 n nodes of U vectors. leaves(band, segments, leaf) writes the sums over the cells of each segment, 0 where it
// is not covered.
template <class V, int U, class Leaves>
FASTKD_INLINE void pool_bands(const Bands& bands, const Leaves& leaves, Element<V>* nodes, double* totals) {
  constexpr int width = U * kLanes<V>;
  for (const Band* band = bands.band; band != bands.band + bands.count; ++band) {
    if (band->spans == 0) continue;
    leaves(*band, bands.segment + band->segment, nodes + band->segments * width);
    for (int64_t i = band->segments - 1; i > 0; --i)
      for (int at = 0; at < width; at += kLanes<V>)
        store(nodes + i * width + at,
              V(load<V>(nodes + 2 * i * width + at) + load<V>(nodes + (2 * i + 1) * width + at)));
    const int32_t* node = bands.node + band->node;
    const Span* span = bands.span + band->span;
    for (const Span* end = span + band->spans; span != end; ++span) {
      V sum[U] = {};
      for (const int32_t* last = node + span->nodes; node != last; ++node)
        for (int u = 0; u < U; ++u) sum[u] += load<V>(nodes + *node * width + u * kLanes<V>);
      flush<V, U>(sum, totals + span->object * width);
    }
  }
}

template <class V>
FASTKD_INLINE void clear(Element<V>* values, int64_t count) {
  for (int64_t at = 0; at < count; at += kLanes<V>) store(values + at, V{});
}

// out [width] += in, whole vectors
template <class V>
FASTKD_INLINE void add_row(Element<V>* out, const Element<V>* in, int64_t width) {
  for (int64_t at = 0; at < width; at += kLanes<V>) store(out + at, V(load<V>(out + at) + load<V>(in + at)));
}

// nodes[n + s] = sum over the objects that cover segment s of their rows of values: `width` numbers, a multiple of the
// lanes, `stride` apart. nodes has room for painted_nodes.
template <class V>
FASTKD_INLINE void paint_nodes(const Bands& bands, const Band& band, const Element<V>* values, int64_t stride,
                               int64_t width, Element<V>* nodes) {
  const int64_t size = 2 * band.segments * width, most = kPile > band.segments ? kPile : band.segments;
  const int32_t* node = bands.node + band.node;
  const Span* span = bands.span + band.span;
  const Span* last = span + band.spans;
  clear<V>(nodes, size);
  for (bool piled = band.spans > most; span != last;) {
    Element<V>* pile = piled ? nodes + size : nodes;
    if (piled) clear<V>(pile, size);
    for (const Span* end = last - span > most ? span + most : last; span != end; ++span)
      for (const int32_t* behind = node + span->nodes; node != behind; ++node)
        add_row<V>(pile + *node * width, values + span->object * stride, width);
    if (piled) add_row<V>(nodes, pile, size);
  }
  for (int64_t i = 1; i < band.segments; ++i)
    for (int64_t child = 2 * i; child < 2 * i + 2; ++child) add_row<V>(nodes + child * width, nodes + i * width, width);
}

// Writes the rows of a band of a channels-last image: leaf [n, width] are the values of its segments, `narrowed` a
// buffer of the same shape for half types. past_caches: streaming stores, see is_large.
template <class V, class scalar_t>
FASTKD_INLINE void write_channels_last(const Band& band, const Segment* segment, const Element<V>* leaf, int64_t width,
                                       int64_t channels, int64_t columns, bool past_caches, scalar_t* narrowed,
                                       scalar_t* image) {
  const scalar_t* values = narrowed;
  if constexpr (sizeof(scalar_t) == sizeof(Element<V>)) {
    values = leaf;
  } else {
    for (int64_t at = 0; at < band.segments * width; at += kLanes<V>) store(narrowed + at, load<V>(leaf + at));
  }
  scalar_t* out = image + band.y0 * columns * channels;
  const bool lines =
      past_caches && elements_to_line(out) == 0 && channels * static_cast<int64_t>(sizeof(scalar_t)) % kLineBytes == 0;
  for (int64_t y = band.y0; y < band.y1; ++y)
    for (int64_t s = 0; s < band.segments; ++s)
      for (int64_t x = segment[s].x0; x < segment[s].x1; ++x, out += channels)
        lines ? stream_copy(out, values + s * width, channels) : copy(out, values + s * width, channels);
  if (lines) end_stream();
}

// Takes a part of scratch for this many elements, rounded up to whole cache lines.
template <class T>
FASTKD_INLINE T* take(char*& scratch, int64_t count) {
  T* piece = reinterpret_cast<T*>(scratch);
  scratch += (count * static_cast<int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
  return piece;
}

// Writes a row repeatedly, `total` elements, with streaming stores for whole cache lines. The row is padded by one
// line.
template <class scalar_t>
FASTKD_INLINE void stream_rows(scalar_t* out, scalar_t* row, int64_t columns, int64_t total) {
  constexpr int64_t line = kLineBytes / sizeof(scalar_t), step = kVectorBytes / sizeof(scalar_t);
  for (int64_t x = 0; x < line; ++x) row[columns + x] = row[x];
  int64_t at = 0, x = 0;
  const auto write_to = [&](int64_t end) {
    for (; at < end; ++at) {
      out[at] = row[x++];
      if (x == columns) x = 0;
    }
  };
  write_to(elements_to_line(out) < total ? elements_to_line(out) : total);
  for (; at + line <= total; at += line) {
    for (int64_t part = 0; part < line; part += step) {
      FloatVector bytes;
      std::memcpy(&bytes, row + x + part, kVectorBytes);
      stream(reinterpret_cast<float*>(out + at + part), bytes);
    }
    for (x += line; x >= columns;) x -= columns;
  }
  write_to(total);
}

// Paints the planes of contiguous channels. The segment values of several bands are computed for all channels first;
// then a stretch of consecutive rows is painted in L1 and written, channel by channel. Row-wise writes would share
// cache lines with other writes; painting all channels at once would evict the rows from L1 before they are written.
template <class V, class T>
struct Stretch {
  static constexpr int lanes = kLanes<V>, kBytes = 8192;  // of the rows
  static constexpr int64_t kLayoutBytes = 1 << 17, kMostBands = 16;  // of the leaves of a stretch

  int64_t width, columns, most_rows, most_bands, most_segments;
  T* rows;            // [most_rows, columns] of a channel, and what whole vectors write beyond
  Element<V>* nodes;  // of a band
  Element<V>* leaf;   // [bands, width, padded segments]: the values of the segments
  Places<V>* places;  // [bands, padded columns]: the segment of a cell relative to that of the first cell of its vector
  Places<V>* starts;  // [bands, padded columns]: the segment of the first cell of each vector

  // take: allocates elements of the type of its first argument, aligned to a cache line
  template <class Take>
  FASTKD_INLINE Stretch(int64_t width, int64_t columns, int64_t most_segments, const Take& take)
      : width(width), columns(columns), most_segments(most_segments) {
    constexpr int64_t cells = kBytes / sizeof(T), leaves = kLayoutBytes / sizeof(Element<V>);
    most_rows = cells / columns > kBandRows ? cells / columns : kBandRows;
    const int64_t fitting = leaves / leaf_length();
    most_bands = fitting < 1 ? 1 : fitting < kMostBands ? fitting : kMostBands;
    // The size is monotonic in the arguments, so that the size for the largest level suffices for all.
    rows = take(T{}, (cells > kBandRows * columns ? cells : kBandRows * columns) + 2 * lanes);
    nodes = take(Element<V>{}, (painted_nodes(most_segments) + lanes) * width);
    leaf = take(Element<V>{}, leaves > leaf_length() ? leaves : leaf_length());
    places = take(Places<V>{}, kMostBands * padded<V>(columns));
    starts = take(Places<V>{}, kMostBands * padded<V>(columns));
  }

  // Required bytes; see the constructor.
  static FASTKD_INLINE int64_t bytes(int64_t width, int64_t columns, int64_t most_segments) {
    int64_t total = 0;
    const auto count = [&](auto element, int64_t elements) {
      total += elements * static_cast<int64_t>(sizeof(element)) + kLineBytes;
      return static_cast<decltype(element)*>(nullptr);
    };
    Stretch(width, columns, most_segments, count);
    return total;
  }

  // Calls write(channel, first, count, false) when `count` rows of a channel from `first` on are painted, for the first
  // `channels` channels, stretch by stretch.
  // one_row: of bands that are long in memory only one row is painted, then write(channel, first, count, true).
  template <bool one_row, class Write>
  FASTKD_INLINE void paint(const Bands& bands, const Element<V>* values, int64_t stride, int64_t channels,
                           const Write& write) {
    const Band *band = bands.band, *last = bands.band + bands.count;
    while (band != last) {
      const Band* begin = band;
      const int64_t first = band->y0;
      const bool alone = one_row && is_long(*band);
      do {
        lay_out(bands, *band, values, stride, band - begin);
        ++band;
      } while (!alone && band != last && band->y1 - first <= most_rows && band - begin < most_bands &&
               !(one_row && is_long(*band)));
      for (int64_t channel = 0; channel < channels; ++channel) {
        for (const Band* each = begin; each != band; ++each)
          paint_rows(channel, each - begin, each->y0 - first, alone ? 1 : each->y1 - each->y0);
        write(channel, first, band[-1].y1 - first, alone);
      }
    }
  }

 private:
  FASTKD_INLINE int64_t leaf_length() const { return padded<V>(most_segments) * width; }

  FASTKD_INLINE int64_t first_cell(int64_t x) const {  // of a vector; the last is shifted into the row
    if (x + lanes <= columns) return x;
    return columns > lanes ? columns - lanes : 0;
  }

  FASTKD_INLINE bool is_long(const Band& band) const {
    return (band.y1 - band.y0) * columns * static_cast<int64_t>(sizeof(T)) >= kBytes / 2;
  }

  // Segment indices of a band, the slot-th of the stretch.
  FASTKD_INLINE void lay_out(const Bands& bands, const Band& band, const Element<V>* values, int64_t stride,
                             int64_t slot) {
    paint_nodes<V>(bands, band, values, stride, width, nodes);
    const int64_t length = padded<V>(most_segments);
    const Element<V>* painted = nodes + band.segments * width;
    for (int64_t s = 0; s < band.segments; s += lanes)
      for (int64_t at = 0; at < width; at += lanes) {
        V tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load<V>(painted + (s + i) * width + at);
        transpose(tile);
        for (int i = 0; i < lanes; ++i) store(leaf + slot * leaf_length() + (at + i) * length + s, tile[i]);
      }
    find_places(band, bands.segment + band.segment, slot);
  }

  FASTKD_INLINE void find_places(const Band& band, const Segment* segment, int64_t slot) {
    typedef Places<V> PlaceVector __attribute__((vector_size(kVectorBytes)));
    Places<V>*at = places + slot * padded<V>(columns), *start = starts + slot * padded<V>(columns);
    Places<V>* all = start;  // first per cell; starts of vectors overwrite only entries already read
    for (int64_t s = 0; s < band.segments; ++s) {  // overwritten by the next segment
      const PlaceVector place = PlaceVector{} + static_cast<Places<V>>(s);
      for (int64_t x = segment[s].x0; x < segment[s].x1; x += lanes) std::memcpy(all + x, &place, sizeof(place));
    }
    for (int64_t next = 0; next < columns; next += lanes) {
      PlaceVector place;
      std::memcpy(&place, all + first_cell(next), sizeof(place));
      start[next / lanes] = place[0];
      place -= place[0];
      std::memcpy(at + next, &place, sizeof(place));
    }
  }

  // Paints `count` equal rows of a channel, the first of them `row`.
  FASTKD_INLINE void paint_rows(int64_t channel, int64_t slot, int64_t row, int64_t count) {
    const Element<V>* values = leaf + slot * leaf_length() + channel * padded<V>(most_segments);
    const Places<V>*at = places + slot * padded<V>(columns), *start = starts + slot * padded<V>(columns);
    for (int64_t next = 0; next < columns; next += lanes) {
      const V value = permute(load<V>(values + start[next / lanes]), at + next);
      T* out = rows + row * columns + first_cell(next);
      for (int64_t y = 0; y < count; ++y) store(out + y * columns, value);
    }
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
