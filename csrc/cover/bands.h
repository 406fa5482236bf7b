// Which cells objects cover, arranged for sums over them (pool) and for writing sums of objects (paint).
//
// The rows of an image of a level are divided into bands: at most kBandRows consecutive rows in which every object
// covers the same cells. The columns of a band are divided into n segments: at most kSegmentCells consecutive cells
// covered by the same objects. A maximal range of segments [first, last) that an object covers is a span of the object;
// a box has one span per band, a mask one per run of cells.
//
// The segments are the leaves of a binary tree (leaf s is node n + s, node i has the children 2 i and 2 i + 1), and a
// span is the sum of at most 2 log2(n) nodes: a hundred heavily overlapping boxes cost little more than the cells,
// there are no subtractions, and the order of every sum depends only on the geometry.
#pragma once

#include "common/capability.h"

#include <cstdint>

namespace fastkd {

constexpr int32_t kBandRows = 16, kSegmentCells = 16;  // cells that a kernel sums sequentially in float

struct Segment {
  int32_t x0, x1;  // cells x0 <= x < x1
  int32_t covered;  // 0: no object covers it
};

struct Span {
  int32_t object;  // index among the objects of the image
  int32_t nodes;  // number of its nodes, consecutive in Bands::node
  int32_t x0, x1;  // cells x0 <= x < x1
};

struct Band {
  int32_t y0, y1;  // rows y0 <= y < y1
  int32_t segments, spans;  // counts; without spans no object covers the band and one segment is the whole row
  int64_t segment, span, node;  // first indices in Bands
};

// Spans painted sequentially into the same sums; more are summed in piles of this size, as the error of a sum grows
// with its length.
constexpr int64_t kPile = 64;

// Number of nodes in the buffer for painting a band: two trees, the second one for a pile.
constexpr int64_t painted_nodes(int64_t segments) { return 4 * segments; }

// The bands of one image of one level, covering all its rows.
struct Bands {
  const Band* band;
  const Segment* segment;
  const Span* span;
  const int32_t* node;
  int64_t count;
  bool piled;  // spans have many times as many cells as the rows of the bands with spans
};

}  // namespace fastkd

#if FASTKD_GENERIC_PASS
#include "cover/cover.h"

#include <cstring>

namespace fastkd {

struct Run {  // cells x0 <= x < x1 of a row belong to the object
  int32_t object, x0, x1;
  bool operator==(const Run&) const = default;
};

class BandList {
 public:
  int64_t most_segments = 1;  // of a band

  Bands view() const {
    return {bands_.data(), segments_.data(), spans_.data(), nodes_.data(), count(), span_pieces_ > 3 * row_pieces_};
  }
  int64_t count() const { return static_cast<int64_t>(bands_.size()); }

  // add_runs(y, runs) appends the runs of row y, of disjoint cells for each object, none of them empty.
  template <class AddRuns>
  void build(int32_t rows, int32_t columns, const AddRuns& add_runs) {
    std::vector<Run> runs, next;
    int32_t first = 0;
    for (int32_t y = 0; y < rows; ++y) {
      next.clear();
      add_runs(y, next);
      if (y > first && (y - first == kBandRows || next != runs)) {
        add_band(first, y, columns, runs);
        first = y;
      }
      runs.swap(next);
    }
    if (rows > first) add_band(first, rows, columns, runs);
  }

 private:
  std::vector<Band> bands_;
  std::vector<Segment> segments_;
  std::vector<Span> spans_;
  std::vector<int32_t> nodes_;
  int64_t span_pieces_ = 0, row_pieces_ = 0;  // numbers of vectors: of all spans, of one row of each band with spans
  std::vector<int32_t> change_;  // [columns + 1]: objects that begin at a column minus those that end there
  std::vector<int32_t> at_;  // [columns + 1]: the segment that begins at a column, or -1

  void add_band(int32_t y0, int32_t y1, int32_t columns, const std::vector<Run>& runs) {
    Band band{y0, y1, 0, static_cast<int32_t>(runs.size()), size(segments_), size(spans_), size(nodes_)};
    band.segments = add_segments(columns, runs);
    if (!runs.empty()) row_pieces_ += 1 + columns / kSegmentCells;
    for (const Run& run : runs) {
      int32_t nodes[64], count = 0;  // branchless: whether a node belongs to a span is not predictable
      int32_t low = at_[run.x0] + band.segments, high = at_[run.x1] + band.segments;
      for (; low < high; low = (low + 1) / 2, high /= 2) {
        nodes[count] = low;
        count += low % 2;
        nodes[count] = high - 1;
        count += high % 2;
      }
      nodes_.insert(nodes_.end(), nodes, nodes + count);
      spans_.push_back({run.object, count, run.x0, run.x1});
      span_pieces_ += 1 + (run.x1 - run.x0) / kSegmentCells;
    }
    bands_.push_back(band);
    most_segments = std::max<int64_t>(most_segments, band.segments);
  }

  int32_t add_segments(int32_t columns, const std::vector<Run>& runs) {
    change_.assign(columns + 1, 0);
    at_.assign(columns + 1, -1);
    for (const Run& run : runs) {
      ++change_[run.x0];
      --change_[run.x1];
      at_[run.x0] = at_[run.x1] = 0;
    }
    const size_t before = segments_.size();
    int32_t first = 0, covering = 0;
    for (int32_t x = 0; x < columns; ++x) {
      if (x > first && (at_[x] == 0 || (covering > 0 && x - first == kSegmentCells))) {
        segments_.push_back({first, x, covering > 0});
        first = x;
      }
      if (at_[x] == 0) at_[x] = static_cast<int32_t>(segments_.size() - before);
      covering += change_[x];
    }
    segments_.push_back({first, columns, covering > 0});
    at_[columns] = static_cast<int32_t>(segments_.size() - before);
    return at_[columns];
  }

  template <class T>
  static int64_t size(const std::vector<T>& values) {
    return static_cast<int64_t>(values.size());
  }
};

// The cells that the objects cover, for every level of every image.
struct Cover {
  int64_t images, objects;
  std::vector<std::pair<int64_t, int64_t>> sizes;  // (H_l, W_l) of the levels
  ObjectsByImage by_image;
  std::vector<int64_t> cells;  // [L, K] number of cells that each object covers
  std::vector<BandList> lists;  // one per level without objects, then one per level of each image with objects
  std::vector<int64_t> place;  // [L, B] index in lists

  int64_t levels() const { return static_cast<int64_t>(sizes.size()); }
  const BandList& list(int64_t level, int64_t image) const { return lists[place[level * images + image]]; }
};

// Calls add_runs(level, object, slot, y, runs) for the objects of each image, in ascending order; slot is their index.
template <class AddRuns>
void fill_lists(Cover& cover, const AddRuns& add_runs) {
  const int64_t levels = cover.levels();
  const std::vector<int64_t>& first = cover.by_image.first;
  std::vector<int64_t> images;  // images with objects
  cover.place.resize(levels * cover.images);
  for (int64_t image = 0; image < cover.images; ++image) {
    const bool empty = first[image] == first[image + 1];
    const int64_t place = empty ? 0 : levels * (1 + static_cast<int64_t>(images.size()));
    for (int64_t level = 0; level < levels; ++level) cover.place[level * cover.images + image] = place + level;
    if (!empty) images.push_back(image);
  }
  const int64_t count = 1 + static_cast<int64_t>(images.size());
  cover.lists.resize(levels * count);
  const auto build = [&](int64_t level, int64_t group) {
    const auto [rows, columns] = cover.sizes[level];
    if (columns == 0) return;
    const auto row = [&](int32_t y, std::vector<Run>& runs) {
      if (group == 0) return;
      const int64_t begin = first[images[group - 1]], end = first[images[group - 1] + 1];
      for (int64_t at = begin; at < end; ++at)
        add_runs(level, cover.by_image.object[at], static_cast<int32_t>(at - begin), y, runs);
    };
    cover.lists[group * levels + level].build(static_cast<int32_t>(rows), static_cast<int32_t>(columns), row);
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      for (int64_t level = 0; level < levels; ++level) build(level, group);
  });
}

inline void check_sizes(const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  constexpr int64_t kLargest = int64_t{1} << 30;
  for (const auto& [rows, columns] : sizes)
    STD_TORCH_CHECK(rows >= 0 && columns >= 0 && rows < kLargest && columns < kLargest,
                    "fastkd: the sides of a level must be in [0, 2^30), got ", rows, " x ", columns);
}

inline Cover cover_by_boxes(const torch::stable::Tensor& boxes, const torch::stable::Tensor& image_index,
                            int64_t height, int64_t width, int64_t images,
                            const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  check_sizes(sizes);
  const std::vector<Rectangle> rectangles = cover_boxes(boxes, height, width, sizes);
  const int64_t objects = boxes.size(0);
  Cover cover{images, objects, sizes, objects_by_image(image_index, objects, images), {}, {}, {}};
  for (const Rectangle& rectangle : rectangles) cover.cells.push_back(rectangle.cells());
  fill_lists(cover, [&](int64_t level, int64_t object, int32_t slot, int32_t y, std::vector<Run>& runs) {
    const Rectangle& box = rectangles[level * objects + object];
    if (box.y0 <= y && y < box.y1 && box.x0 < box.x1)
      runs.push_back({slot, static_cast<int32_t>(box.x0), static_cast<int32_t>(box.x1)});
  });
  return cover;
}

// The cells whose nearest pixel of a mask [K, H, W] is set: cell (y, x) of a level of H_l x W_l reads the pixel
// (floor(y H / H_l), floor(x W / W_l)).
inline Cover cover_by_masks(const torch::stable::Tensor& masks, const torch::stable::Tensor& image_index,
                            int64_t images, const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  check_sizes(sizes);
  STD_TORCH_CHECK(masks.dim() == 3 && masks.is_cpu() &&
                      masks.scalar_type() == torch::headeronly::ScalarType::Bool && masks.size(1) > 0 &&
                      masks.size(2) > 0,
                  "fastkd: masks must be [K, H, W] bool on the CPU with H and W at least 1");
  const torch::stable::Tensor plain = torch::stable::contiguous(masks);
  const auto* mask = static_cast<const unsigned char*>(plain.const_data_ptr());
  const int64_t objects = masks.size(0), height = masks.size(1), width = masks.size(2);
  Cover cover{images, objects, sizes, objects_by_image(image_index, objects, images), {}, {}, {}};
  std::vector<std::vector<int64_t>> pixel;  // of each column of each level
  for (const auto& [rows, columns] : sizes) {
    pixel.emplace_back(columns);
    for (int64_t x = 0; x < columns; ++x) pixel.back()[x] = x * width / columns;
  }
  cover.cells.assign(sizes.size() * objects, 0);
  fill_lists(cover, [&](int64_t level, int64_t object, int32_t slot, int32_t y, std::vector<Run>& runs) {
    const auto [rows, columns] = sizes[level];
    const unsigned char* row = mask + (object * height + y * height / rows) * width;
    // Most rows of most masks are empty: a fast test, useful unless the level is much coarser than the mask.
    if (columns * 16 >= width && row[0] == 0 && std::memcmp(row, row + 1, width - 1) == 0) return;
    const int64_t* at = pixel[level].data();
    int64_t cells = 0;
    for (int32_t x = 0; x < columns; ++x) {
      if (row[at[x]] == 0) continue;
      const int32_t x0 = x;
      while (x < columns && row[at[x]] != 0) ++x;
      runs.push_back({slot, x0, x});
      cells += x - x0;
    }
    cover.cells[level * objects + object] += cells;
  });
  return cover;
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
