// The two sums over bands (bands.h): pool_bands adds cells up for each object, paint_nodes adds objects up for each
// segment. A lane is a channel in both; a channel's row of a contiguous level is turned into lanes and back by
// `transpose`. An op that transforms the cells it sums hands its own leaves to pool_bands.
#pragma once

#include "bands.h"
#include "reduce.h"

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

// Leaves of a channels-last image: U vectors of channels, read where they lie.
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

// Length of a buffer for a row that whole vectors are read from and written to at any place.
template <class V>
FASTKD_INLINE int64_t padded(int64_t columns) {
  return (columns + 2 * kLanes<V>) / kLanes<V> * kLanes<V>;
}

// Leaves of a contiguous image: U vectors of channels. `sums` [channels, padded] holds the rows of a band added up, a
// channel each, `cells` [padded, channels] the same with a channel a lane.
template <class V, int U, class scalar_t>
struct ContiguousLeaves {
  using acc = Element<V>;
  const scalar_t* planes;  // the first of the channels
  int64_t channels, rows, columns;  // those that exist, at most U * kLanes<V>; sums of others must be 0
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

// nodes[n + s] = sum over the objects that cover segment s of their rows of values: `width` numbers, a multiple of the
// lanes, `stride` apart.
template <class V>
FASTKD_INLINE void paint_nodes(const Bands& bands, const Band& band, const Element<V>* values, int64_t stride,
                               int64_t width, Element<V>* nodes) {
  for (int64_t at = 0; at < 2 * band.segments * width; at += kLanes<V>) store(nodes + at, V{});
  const int32_t* node = bands.node + band.node;
  const Span* span = bands.span + band.span;
  for (const Span* end = span + band.spans; span != end; ++span)
    for (const int32_t* last = node + span->nodes; node != last; ++node)
      for (int64_t at = 0; at < width; at += kLanes<V>) {
        Element<V>* out = nodes + *node * width + at;
        store(out, V(load<V>(out) + load<V>(values + span->object * stride + at)));
      }
  for (int64_t i = 1; i < band.segments; ++i)
    for (int64_t at = 0; at < width; at += kLanes<V>) {
      const V above = load<V>(nodes + i * width + at);
      for (int64_t child = 2 * i; child < 2 * i + 2; ++child) {
        Element<V>* out = nodes + child * width + at;
        store(out, V(load<V>(out) + above));
      }
    }
}

FASTKD_INLINE void copy_bytes(char* out, const char* in, int64_t bytes) {
  int64_t at = 0;
  for (; at + kVectorBytes <= bytes; at += kVectorBytes) std::memcpy(out + at, in + at, kVectorBytes);
  for (; at < bytes; ++at) out[at] = in[at];
}

// As copy_bytes, past the caches: out begins a cache line, bytes are whole lines. For levels larger than the caches near
// the core, where fetching a line only to overwrite it costs as much as writing it.
FASTKD_INLINE void stream_bytes(char* out, const char* in, int64_t bytes) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  for (int64_t at = 0; at < bytes; at += 64) _mm512_stream_si512((__m512i*)(out + at), _mm512_loadu_si512(in + at));
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  for (int64_t at = 0; at < bytes; at += 32)
    _mm256_stream_si256((__m256i*)(out + at), _mm256_loadu_si256((const __m256i*)(in + at)));
#else
  copy_bytes(out, in, bytes);
#endif
}

FASTKD_INLINE void end_stream() {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 1
  _mm_sfence();
#endif
}

// Writes the rows of a band of a channels-last image: leaf [n, width] are the values of its segments, `narrowed` has room
// for as many of half types. stream: past the caches.
template <class V, class scalar_t>
FASTKD_INLINE void write_channels_last(const Band& band, const Segment* segment, const Element<V>* leaf, int64_t width,
                                       int64_t channels, int64_t columns, bool stream, scalar_t* narrowed,
                                       scalar_t* image) {
  const char* values = reinterpret_cast<const char*>(leaf);
  if constexpr (sizeof(scalar_t) != sizeof(Element<V>)) {
    for (int64_t at = 0; at < band.segments * width; at += kLanes<V>) store(narrowed + at, load<V>(leaf + at));
    values = reinterpret_cast<const char*>(narrowed);
  }
  constexpr int64_t size = sizeof(scalar_t);
  char* out = reinterpret_cast<char*>(image + band.y0 * columns * channels);
  const bool lines = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0 && channels * size % 64 == 0;
  for (int64_t y = band.y0; y < band.y1; ++y)
    for (int64_t s = 0; s < band.segments; ++s)
      for (int64_t x = segment[s].x0; x < segment[s].x1; ++x, out += channels * size)
        if (lines)
          stream_bytes(out, values + s * width * size, channels * size);
        else
          copy_bytes(out, values + s * width * size, channels * size);
  if (lines) end_stream();
}

// Length of a buffer for a row that is read on beyond its end, as if it began again, by a cache line.
template <class V, class scalar_t>
FASTKD_INLINE int64_t repeated(int64_t columns) {
  return padded<V>(columns) + 64 / static_cast<int64_t>(sizeof(scalar_t));
}

// Writes a row of so many columns again and again, total elements; whole cache lines past the caches. row is a buffer of
// the length `repeated`.
template <class scalar_t>
FASTKD_INLINE void stream_rows(scalar_t* out, scalar_t* row, int64_t columns, int64_t total) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t x = 0; x < line; ++x) row[columns + x] = row[x];
  int64_t at = 0, x = 0;
  const auto one = [&] {
    out[at++] = row[x++];
    if (x == columns) x = 0;
  };
  while (at < total && reinterpret_cast<uintptr_t>(out + at) % 64 != 0) one();
  for (; at + line <= total; at += line) {
    stream_bytes(reinterpret_cast<char*>(out + at), reinterpret_cast<const char*>(row + x), 64);
    for (x += line; x >= columns;) x -= columns;
  }
  while (at < total) one();
}

// Writes the rows of a band of contiguous channels: leaf [n, width] with as many lanes as channels, or a few more; sums
// [width, repeated] and cells [padded, width] are room for a row. stream: past the caches.
template <class V, class scalar_t>
FASTKD_INLINE void write_contiguous(const Band& band, const Segment* segment, const Element<V>* leaf, int64_t width,
                                    int64_t channels, int64_t rows, int64_t columns, bool stream, Element<V>* cells,
                                    scalar_t* sums, scalar_t* planes) {
  constexpr int lanes = kLanes<V>;
  for (int64_t s = 0; s < band.segments; ++s)
    for (int64_t x = segment[s].x0; x < segment[s].x1; ++x)
      for (int64_t at = 0; at < width; at += lanes) store(cells + x * width + at, load<V>(leaf + s * width + at));
  const int64_t length = repeated<V, scalar_t>(columns);
  for (int64_t x = 0; x < columns; x += lanes)
    for (int64_t at = 0; at < width; at += lanes) {
      V tile[lanes];
      for (int i = 0; i < lanes; ++i) tile[i] = load<V>(cells + (x + i) * width + at);
      transpose(tile);
      for (int i = 0; i < lanes; ++i) store(sums + (at + i) * length + x, tile[i]);
    }
  const int64_t total = (band.y1 - band.y0) * columns;
  stream = stream && total * static_cast<int64_t>(sizeof(scalar_t)) >= 2048;  // few lines are shared with other bands
  for (int64_t channel = 0; channel < channels; ++channel) {
    scalar_t* row = sums + channel * length;
    scalar_t* out = planes + (channel * rows + band.y0) * columns;
    if (stream) {
      stream_rows(out, row, columns, total);
      continue;
    }
    for (int64_t y = band.y0; y < band.y1; ++y, out += columns)
      copy_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(row), columns * sizeof(scalar_t));
  }
  if (stream) end_stream();
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
