// The same in memory of torch's allocator, reached from Python like a kernel: fastkd_planted::read and write (tensor, place)
// touch one float of a tensor's storage without a check.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace {

double read_one(torch::stable::Tensor tensor, int64_t place) { return tensor.const_data_ptr<float>()[place]; }

double write_one(torch::stable::Tensor tensor, int64_t place) {
  tensor.mutable_data_ptr<float>()[place] = 1;
  return 1;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastkd_planted, library) {
  library.def("read(Tensor tensor, int place) -> float");
  library.def("write(Tensor(a!) tensor, int place) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_planted, CPU, library) {
  library.impl("read", TORCH_BOX(&read_one));
  library.impl("write", TORCH_BOX(&write_one));
}
