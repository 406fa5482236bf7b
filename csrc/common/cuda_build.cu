// Op cuda_build: how fastkd/_cuda.so was built, for `fastkd info` and to detect cards without code in it.
#include "common/device.h"

#ifdef __CUDACC__  // not needed in the emulation

#include <algorithm>
#include <string>

#define FASTKD_TEXT(value) #value
#define FASTKD_EXPANDED_TEXT(value) FASTKD_TEXT(value)

namespace fastkd {
namespace {

std::string cuda_build() {
  std::string targets = FASTKD_EXPANDED_TEXT(FASTKD_CUDA_TARGETS);  // sm_80.sm_90.compute_80
  std::replace(targets.begin(), targets.end(), '.', ' ');
  const auto release = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  return targets + ", headers of torch " TORCH_VERSION ", compiled by nvcc " + release;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, library) { library.def("cuda_build() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, library) {
  library.impl("cuda_build", TORCH_BOX(&cuda_build));
}

}  // namespace fastkd

#endif
