// Selects the instruction set; the ops fastkd::cpu_capability() and fastkd::cpu_build() -> str report it to Python.
#include "common/capability.h"

#if FASTKD_GENERIC_PASS
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#ifdef __clang__
#define FASTKD_COMPILER ""  // its __VERSION__ includes the name
#else
#define FASTKD_COMPILER "GCC "
#endif

namespace fastkd {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

Capability detect() {
#if FASTKD_X86_CAPABILITIES
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::avx512_bf16;
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::generic;
#else
  return Capability::generic;
#endif
}

std::string cpu_capability_name() {
  return kNames[static_cast<int>(cpu_capability())];
}

std::string cpu_build() {
  constexpr uint64_t target = TORCH_FEATURE_VERSION;
  const auto part = [](int shift) { return std::to_string((target >> shift) & 0xff); };
  std::string text = "stable ABI of torch " + part(56) + "." + part(48);
  text += ", headers of torch " TORCH_VERSION ", compiled by " FASTKD_COMPILER __VERSION__;
  return text + (FASTKD_X86_CAPABILITIES ? ", kernels generic avx2 avx512 avx512_bf16" : ", kernels generic");
}

}  // namespace

Capability cpu_capability() {
  static const Capability best = detect();
  const char* wanted = std::getenv("FASTKD_CPU_CAPABILITY");  // read at every call, so that tests can run every path
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int number = 0; number < 4; ++number) {
    if (std::string(wanted) != kNames[number]) continue;
    STD_TORCH_CHECK(number <= static_cast<int>(best), "FASTKD_CPU_CAPABILITY: this CPU or build has no ", wanted,
                    ", its best is ", kNames[static_cast<int>(best)], "; unset the variable to use that");
    return static_cast<Capability>(number);
  }
  STD_TORCH_CHECK(false, "FASTKD_CPU_CAPABILITY must be generic, avx2, avx512 or avx512_bf16, got ", wanted,
                  "; unset it to use the best this CPU has");
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, library) {
  library.def("cpu_capability() -> str");
  library.def("cpu_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
  library.impl("cpu_build", TORCH_BOX(&cpu_build));
}

}  // namespace fastkd
#endif
