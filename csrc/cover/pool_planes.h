// The sums of a contiguous level's cells over the objects that cover them (bands.h), without transposing: lanes are
// columns. The rows of a band are summed; each object adds its spans of that sum by whole vectors, the last one masked;
// the lanes of an object are reduced after all bands. The cost is the number of vectors in all spans: if objects
// overlap heavily, pool_bands is faster (bands_kernels.h).
#pragma once

#include "cover/bands_kernels.h"

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

// All bits in the first lanes, then none: a load at + kLanes<V> - n gives a mask of the first n lanes.
template <class V>
struct LaneBits {
  Places<V> at[2 * kLanes<V>];
  constexpr LaneBits() : at{} {
    for (int lane = 0; lane < kLanes<V>; ++lane) at[lane] = -1;
  }
};

// For a vector of channels. Sums are in float over the rows of a band, the vectors of a span and kFlushBands bands.
template <class V, class scalar_t>
struct PlanesPool {
  using acc = Element<V>;
  static constexpr int lanes = kLanes<V>;
  static constexpr int64_t kFlushBands = 64;
  static constexpr LaneBits<V> kBits{};

  const scalar_t* planes;           // the first of the channels
  const scalar_t* end;              // end of the level; nothing past it is read
  int64_t channels, rows, columns;  // actual numbers, channels at most `lanes`
  int64_t objects;                  // of the image
  acc* sums;      // [channels, padded]: of a band's rows
  acc* partial;   // [objects, lanes of channels, lanes of columns]

  static FASTKD_INLINE int64_t partial_length(int64_t objects) { return objects * lanes * lanes; }

  // totals [objects, lanes] += the sums
  FASTKD_INLINE void operator()(const Bands& bands, double* totals) const {
    for (int64_t at = 0; at < partial_length(objects); at += lanes) store(partial + at, V{});
    int64_t added = 0;
    for (const Band* band = bands.band; band != bands.band + bands.count; ++band) {
      if (band->spans == 0) continue;
      add_rows(*band, bands.segment + band->segment);
      add_spans(bands.span + band->span, band->spans);
      if (++added % kFlushBands == 0) flush_lanes(totals);
    }
    flush_lanes(totals);
  }

 private:
  FASTKD_INLINE void add_rows(const Band& band, const Segment* segment) const {
    int64_t first = 0, last = band.segments - 1;
    while (!segment[first].covered) ++first;
    while (!segment[last].covered) --last;
    const int64_t x0 = segment[first].x0, x1 = segment[last].x1, count = band.y1 - band.y0;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const scalar_t* from = planes + (channel * rows + band.y0) * columns;
      acc* out = sums + channel * padded<V>(columns);
      if (count < 4) fetch(from + x0 + count * columns, from + x1 + count * columns);  // next band
      // A vector may extend past the row; those lanes are in no span.
      int64_t whole = x1;
      if (from + (count - 1) * columns + x1 + lanes > end) whole = x1 - lanes + 1;
      int64_t x = x0;
      for (; x + 3 * lanes < whole; x += 4 * lanes) add_vectors<4>(from + x, count, out + x);
      for (; x < whole; x += lanes) add_vectors<1>(from + x, count, out + x);
      for (; x < x1; ++x) {
        acc sum = 0;
        for (int64_t y = 0; y < count; ++y) sum += load<acc>(from + y * columns + x);
        out[x] = sum;
      }
    }
  }

  template <int U>
  FASTKD_INLINE void add_vectors(const scalar_t* from, int64_t count, acc* out) const {
    V sum[U];
    for (int u = 0; u < U; ++u) sum[u] = load<V>(from + u * lanes);
    for (int64_t y = 1; y < count; ++y)
      for (int u = 0; u < U; ++u) sum[u] += load<V>(from + y * columns + u * lanes);
    for (int u = 0; u < U; ++u) store(out + u * lanes, sum[u]);
  }

  FASTKD_INLINE void add_spans(const Span* span, int64_t count) const {
    typedef Places<V> Bits __attribute__((vector_size(kVectorBytes)));
    const int64_t length = padded<V>(columns);
    for (const Span* last = span + count; span != last; ++span) {
      const int64_t before = (span->x1 - span->x0 - 1) / lanes * lanes;  // cells in vectors before the last
      Bits mask;
      std::memcpy(&mask, kBits.at + lanes - (span->x1 - span->x0 - before), sizeof(mask));
      const acc* from = sums + span->x0;
      acc* out = partial + span->object * lanes * lanes;
      for (int64_t channel = 0; channel < channels; ++channel, from += length, out += lanes) {
        V sum = (V)((Bits)load<V>(from + before) & mask);
        for (int64_t x = 0; x < before; x += lanes) sum += load<V>(from + x);
        store(out, V(load<V>(out) + sum));
      }
    }
  }

  // Adds `partial` to totals and clears it.
  FASTKD_INLINE void flush_lanes(double* totals) const {
    for (int64_t object = 0; object < objects; ++object) {
      acc* from = partial + object * lanes * lanes;
      V tile[lanes];
      for (int i = 0; i < lanes; ++i) {
        tile[i] = load<V>(from + i * lanes);
        store(from + i * lanes, V{});
      }
      transpose(tile);
      for (int step = lanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) tile[i] += tile[i + step];
      const V sum[1] = {tile[0]};
      flush<V, 1>(sum, totals + object * lanes);
    }
  }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
