// Shared by the host side of all CPU ops: kernel selection by dtype, checks, tensors, scalars, registration.
#pragma once

#include "common/pyramid.h"

#if FASTKD_GENERIC_PASS
#include <torch/csrc/stable/library.h>

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Registers an op and its CPU kernel: FASTKD_OP("box_pool", "(Tensor[] levels, ...) -> Tensor", forward).
#define FASTKD_OP(name, arguments, function)                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, library) { library.def(name arguments); } \
  STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, library) { library.impl(name, TORCH_BOX(&function)); }

// The dtype of sums: float for half types.
inline ScalarType widened(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The index of a tensor's dtype in ByType.
inline int type_index(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: break;
  }
  STD_TORCH_CHECK(false, "fastkd: levels must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// The kernels of a tensor's dtype, in the instruction set in use.
template <class Table>
const Table& kernels_for(const Tensor& tensor) {
  return active_kernels<ByType<Table>>().of[type_index(tensor)];
}

// The kernels of a pyramid's dtype.
template <class Table>
const Table& kernels_for(const char* op, const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), op, ": levels must be at least one");
  return kernels_for<Table>(levels[0]);
}

// Checks student and teacher of a level against the student's first level.
inline void check_level(const char* op, const Tensor& s, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4, op, ": levels must be [B, C, H, W]");
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(s.size(dim) == t.size(dim), op, ": student and teacher must have the same shape");
  STD_TORCH_CHECK(s.scalar_type() == first.scalar_type() && t.scalar_type() == first.scalar_type(), op,
                  ": levels must have one dtype");
  STD_TORCH_CHECK(s.is_cpu() && t.is_cpu(), op, ": levels must be on the CPU");
}

// True for a dense CPU tensor with this shape and dtype.
inline bool is_dense(const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type) {
  bool same = tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous() &&
      tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t dim = 0; same && dim < shape.size(); ++dim) same = tensor.size(dim) == shape[dim];
  return same;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), type);
}
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return new_tensor(like, shape, like.scalar_type());
}

// Allocates gradients of tensors in their memory format; levels[i].*place is set to the i-th.
template <class Level>
std::vector<Tensor> new_gradients(const std::vector<Tensor>& tensors, std::vector<Level>& levels, void* Level::*place) {
  std::vector<Tensor> gradients;
  for (size_t index = 0; index < tensors.size(); ++index) {
    gradients.push_back(torch::stable::empty_like(tensors[index]));
    levels[index].*place = gradients.back().mutable_data_ptr();
  }
  return gradients;
}

// The value of a scalar gradient, which must have the dtype of the op's result.
inline double number_of(const char* op, const Tensor& grad, ScalarType type) {
  STD_TORCH_CHECK(grad.numel() == 1 && grad.is_cpu() && grad.scalar_type() == type, op,
                  ": grad must be one number of the result's dtype");
  return type == ScalarType::Double ? *grad.const_data_ptr<double>() : *grad.const_data_ptr<float>();
}

// A new float32 or float64 tensor with these values.
inline Tensor tensor_of(const std::vector<double>& numbers, const Tensor& like, const std::vector<int64_t>& shape,
                        ScalarType type) {
  Tensor tensor = new_tensor(like, shape, type);
  if (type == ScalarType::Double) std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<double>());
  else std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<float>());
  return tensor;
}

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
