// Host-side helpers of all .cu sources: memory formats, dtypes, scratch tensors.
#pragma once

#include "common/device.h"

#include <algorithm>
#include <vector>

namespace fastkd {

constexpr int kMaxLevels = 16;  // per launch: the table of levels is a kernel argument

// Cell indices are int and may exceed the last cell by the number of threads of a block.
inline void check_cells(const char* op, int64_t rows, int64_t columns) {
  constexpr int64_t kEnd = int64_t{1} << 30;
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && rows < kEnd && columns < kEnd && rows * columns < kEnd, op,
                  ": a level must have fewer than 2^30 cells, got ", rows, " x ", columns);
}

// [B, C, H, W] dense with C fastest. Tensors that are contiguous as well count as contiguous.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// The tensor if it is dense in the given memory format, else a dense copy.
inline Tensor dense(const Tensor& tensor, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// True if narrow_index can address every element of every tensor.
inline bool is_narrow(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& one) { return one.numel() <= narrow_limit(); });
}

// True if every tensor is aligned to a pack.
inline bool is_aligned(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kPackBytes == 0;
  });
}

// True if a kernel on the device of `on` may read the tensor.
inline bool is_beside(const Tensor& tensor, const Tensor& on) { return tensor.device() == on.device(); }

// A new tensor of this shape and type on the device of another one.
inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, torch::headeronly::ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), type);
}

// The dtype of sum_t<T>.
template <class T>
constexpr auto kSumType = std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double
                                                    : torch::headeronly::ScalarType::Float;

// Calls run(T{}) with the element type of a tensor.
template <class Run>
auto by_type(const char* op, const Tensor& tensor, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Half: return run(Half{});
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": levels must be float32, float64, bfloat16 or float16");
}

}  // namespace fastkd
