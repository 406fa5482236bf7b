// A pyramid partitioned into tasks of whole rows, balanced over threads. A row is one channel of one image of a level.
// Torch's tensors are of the host side: the passes that only compile kernels do not read torch's headers.
#pragma once

#include "common/capability.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#if FASTKD_GENERIC_PASS
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#endif

namespace fastkd {

// Channels [channel, channel + channels) of an image of a level; `row` counts rows over all levels, level by level.
struct Task {
  int64_t level, image, channel, channels, row;
};

#if FASTKD_GENERIC_PASS
// [B, C, H, W] dense with C fastest. Tensors that are contiguous as well (one channel, one cell) count as contiguous.
inline bool is_channels_last(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// The tensor if it is dense in the given memory format, else a dense copy.
inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Calls run(first task, end) on contiguous ranges of tasks, one per thread, with about equal numbers of elements: tasks
// of large levels cost more, so equal numbers of tasks would be unbalanced. Results do not depend on the thread.
template <class Work, class Cost, class Run>
void run_balanced(const std::vector<Work>& tasks, const Cost& cost, const Run& run) {
  constexpr int64_t kElementsPerThread = 16384;  // fewer are not worth waking a thread
  int64_t total = 0;
  for (const Work& task : tasks) total += cost(task);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min(threads, total / kElementsPerThread));
  std::vector<int64_t> first(parts + 1, static_cast<int64_t>(tasks.size()));
  int64_t done = 0, part = 0;
  for (size_t index = 0; index < tasks.size(); ++index) {
    while (part < parts && done * parts >= part * total) first[part++] = static_cast<int64_t>(index);
    done += cost(tasks[index]);
  }
  const auto run_parts = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(tasks.data() + first[part], tasks.data() + first[part + 1]);
  };
  torch::stable::parallel_for(0, parts, 1, run_parts);
}
#endif  // FASTKD_GENERIC_PASS

}  // namespace fastkd
