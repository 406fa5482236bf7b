// Planted bugs, one per run: `planted NAME` must end in a sanitizer report, as evidence that the sanitizer build finds
// such bugs in kernels. tests/ops/test_planted_bugs.py checks the reports.
#include "common/simd.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

// Keeps the compiler from seeing through a value, and so from removing the bug.
template <class T>
__attribute__((noinline)) T opaque(T value) {
  asm volatile("" : "+g"(value) : : "memory");
  return value;
}

constexpr int kRow = 2 * kFloats + 3;  // a row that is no whole number of vectors
float global_row[kRow];
enum Layout { contiguous, channels_last };

// A kernel that ignores the tail of a row and reads one more whole vector.
FASTKD_INLINE float sum_of_whole_vectors(const float* row) {
  FloatVector sum{};
  for (int i = 0; i < opaque(kRow); i += kFloats) sum = sum + load<FloatVector>(row + i);
  return sum[0];
}

float run(std::string_view bug) {
  const int64_t past = opaque<int64_t>(kRow), zero = opaque<int64_t>(0);
  float* row = static_cast<float*>(std::calloc(kRow, sizeof(float)));
  float result = 0;
  if (bug == "read-past-the-end") result = row[past];
  if (bug == "read-before-the-start") result = row[opaque<int64_t>(-1)];
  if (bug == "vector-read-past-the-end") result = sum_of_whole_vectors(row);
  if (bug == "write-past-the-end") row[past] = 1;
  if (bug == "vector-write-past-the-end") store(row + opaque(kRow - 1), FloatVector{});
  if (bug == "half-write-past-the-end") store(reinterpret_cast<BFloat16*>(row + opaque(kRow - 1)), FloatVector{});
  if (bug == "stack-overflow") {
    float tile[kRow] = {};
    opaque(&tile[0])[past] = 1;
    result = tile[opaque(0)];
  }
  if (bug == "global-overflow") result = opaque(&global_row[0])[past];
  if (bug == "use-after-scope") {
    const float* kept = nullptr;
    {
      float tile[kRow] = {};
      kept = opaque(&tile[0]);
    }
    result = kept[opaque(1)];
  }
  if (bug == "use-after-free" || bug == "double-free") std::free(row);
  if (bug == "use-after-free") result = row[opaque(1)];
  if (bug == "signed-overflow") result = static_cast<float>(opaque<int32_t>(1 << 30) * opaque<int32_t>(4));
  if (bug == "misaligned") {
    const char* bytes = opaque(reinterpret_cast<const char*>(row) + 1);
    result = *reinterpret_cast<const float*>(bytes);
  }
  if (bug == "misaligned-vector") result = (*reinterpret_cast<const FloatVector*>(opaque(row + 1)))[0];
  if (bug == "null") result = *opaque<const float*>(nullptr);
  if (bug == "bool") {
    unsigned char byte = 7;
    result = *reinterpret_cast<const bool*>(opaque(&byte)) ? 1 : 2;
  }
  if (bug == "enum") {
    int number = 7;
    result = *reinterpret_cast<const Layout*>(opaque(&number)) == channels_last ? 1 : 2;
  }
  if (bug == "float-to-int") result = static_cast<float>(static_cast<int32_t>(opaque(__builtin_nanf(""))));
  if (bug == "shift") result = static_cast<float>(1 << opaque(33));
  if (bug == "division-by-zero") result = static_cast<float>(past / zero);
  std::free(row);
  return result;
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

int main(int count, char** arguments) {
  if (count != 2) return 2;
  std::printf("survived, result %g\n", fastkd::run(arguments[1]));
  return 0;
}
