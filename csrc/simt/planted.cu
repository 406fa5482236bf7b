// Planted bugs, one kernel per class of bug, each with a correct form (bug = false): the emulation must report every
// bug by its name and nothing for the correct forms.
#include "planted.h"

#include "common/device.h"

namespace fastkd {
namespace {

constexpr int kBlock = 64;

// y[i] = x[i], but one element out of bounds is read.
FASTKD_KERNEL void read_outside(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[bug ? i + 1 : i];
}

FASTKD_KERNEL void write_outside(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (bug ? i <= n : i < n) y[i] = x[i < n ? i : 0];
}

FASTKD_KERNEL void outside_shared(bool bug, Global<const float>, Global<float> y, int n) {
  FASTKD_SHARED(float, values, kBlock);
  values[threadIdx.x + (bug ? 1 : 0)] = 1.0f;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = values[threadIdx.x];
}

FASTKD_KERNEL void null_pointer(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Global<const float> from = bug ? Global<const float>(nullptr) : x;
  if (i < n) y[i] = from[i];
}

FASTKD_KERNEL void uninitialised_shared(bool bug, Global<const float> x, Global<float> y, int n) {
  FASTKD_SHARED(float, values, kBlock);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!bug || threadIdx.x != 5) values[threadIdx.x] = i < n ? float(x[i]) : 0.0f;
  __syncthreads();
  if (i < n) y[i] = values[kBlock - 1 - threadIdx.x];
}

FASTKD_KERNEL void uninitialised_global(bool bug, Global<const float>, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = bug ? y[i] + 1.0f : 1.0f;
}

// Neighbours exchange values through shared memory without a barrier.
FASTKD_KERNEL void race_in_block(bool bug, Global<const float> x, Global<float> y, int n) {
  FASTKD_SHARED(float, values, kBlock);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  values[threadIdx.x] = 0.0f;
  __syncthreads();
  values[threadIdx.x] = i < n ? float(x[i]) : 0.0f;
  if (!bug) __syncthreads();
  if (i < n) y[i] = values[(threadIdx.x + 32) % kBlock];
}

// The next round overwrites what slower threads still read.
FASTKD_KERNEL void race_between_rounds(bool bug, Global<const float> x, Global<float> y, int n) {
  FASTKD_SHARED(float, value, 1);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float total = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) value[0] = x[round];
    __syncthreads();
    total += value[0];
    if (!bug) __syncthreads();
  }
  if (i < n) y[i] = total;
}

FASTKD_KERNEL void race_in_warp(bool bug, Global<const float>, Global<float> y, int n) {
  FASTKD_SHARED(float, values, kBlock);
  values[threadIdx.x] = 0.0f;
  __syncwarp();
  values[threadIdx.x] = threadIdx.x;
  if (!bug) __syncwarp();
  const float other = values[threadIdx.x ^ 1];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = other;
}

// All blocks write one cell.
FASTKD_KERNEL void race_between_blocks(bool bug, Global<const float>, Global<float> y, int) {
  if (threadIdx.x == 0) y[bug ? 0 : blockIdx.x] = 1.0f;
}

FASTKD_KERNEL void barrier_left_out(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (bug && i >= n) return;
  __syncthreads();
  if (i < n) y[i] = x[i];
}

FASTKD_KERNEL void barriers_apart(bool bug, Global<const float> x, Global<float> y, int n) {
  if (!bug || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

FASTKD_KERNEL void lane_not_there(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = i < n ? float(x[i]) : 0.0f;
  if (!bug || threadIdx.x % kWarpSize < 16) value += __shfl_xor_sync(kAllLanes, value, 16);
  if (i < n) y[i] = value;
}

FASTKD_KERNEL void caller_not_in_mask(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = i < n ? float(x[i]) : 0.0f;
  value += __shfl_xor_sync(bug ? 0x0000ffffu : kAllLanes, value, 1);
  if (i < n) y[i] = value;
}

FASTKD_KERNEL void index_overflow(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if (bug) {
    const narrow_index at = narrow_index(i) * narrow_index(1000);
    y[i] = x[at / narrow_index(1000)];
  } else {
    y[i] = x[int64_t(i) * 1000 / 1000];
  }
}

FASTKD_KERNEL void misaligned_pack(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * kPack<float>;
  if (i + kPack<float> + 1 > n) return;
  store_pack(y + i, load_pack(x + (bug ? i + 1 : i)));
}

FASTKD_KERNEL void write_to_input(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) (bug ? Global<float>(x.buffer(), x.offset()) : y)[i] = 1.0f;
}

// Bugs in local memory or through raw pointers, which the emulation does not see but AddressSanitizer must.
FASTKD_KERNEL void past_own_array(bool bug, Global<const float> x, Global<float> y, int n) {
  volatile float values[4] = {};
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  values[i % 4 + (bug ? 4 : 0)] = i < n ? float(x[i]) : 0.0f;
  if (i < n) y[i] = values[i % 4];
}

FASTKD_KERNEL void past_the_tensor(bool bug, Global<const float> x, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const auto* plain = reinterpret_cast<const float*>(address_of<const float>(x));
  if (i < n) y[i] = plain[bug ? i + 1 : i];
}

FASTKD_KERNEL void out_of_scope(bool bug, Global<const float>, Global<float> y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  volatile float* kept;
  volatile float other = 2;
  {
    volatile float value = 1;
    kept = bug ? &value : &other;
  }
  if (i < n) y[i] = *kept;
}

struct Planted {
  const char *name, *kind;
  void (*kernel)(bool, Global<const float>, Global<float>, int);
};

const Planted kPlanted[] = {
    {"read_outside", "bounds", &read_outside},
    {"write_outside", "bounds", &write_outside},
    {"outside_shared", "bounds", &outside_shared},
    {"null_pointer", "bounds", &null_pointer},
    {"uninitialised_shared", "uninitialised", &uninitialised_shared},
    {"uninitialised_global", "uninitialised", &uninitialised_global},
    {"race_in_block", "race", &race_in_block},
    {"race_between_rounds", "race", &race_between_rounds},
    {"race_in_warp", "race", &race_in_warp},
    {"race_between_blocks", "race", &race_between_blocks},
    {"barrier_left_out", "barrier", &barrier_left_out},
    {"barriers_apart", "barrier", &barriers_apart},
    {"lane_not_there", "lane", &lane_not_there},
    {"caller_not_in_mask", "lane", &caller_not_in_mask},
    {"index_overflow", "overflow", &index_overflow},
    {"misaligned_pack", "misaligned", &misaligned_pack},
    {"write_to_input", "read-only", &write_to_input},
};

const Planted kForSanitizer[] = {
    {"past_own_array", "stack-buffer-overflow", &past_own_array},
    {"past_the_tensor", "heap-buffer-overflow", &past_the_tensor},
    {"out_of_scope", "stack-use-after-scope", &out_of_scope},
};

// The memory of a float tensor read as doubles, which would extend to twice its size.
int64_t taken_for_doubles(Tensor tensor) { return output<double>(tensor).buffer()->size; }

FASTKD_KERNEL void nothing() {}

FASTKD_KERNEL void static_and_dynamic() {
  FASTKD_SHARED(float, fixed, 16);
  FASTKD_DYNAMIC_SHARED(float, dynamic);
  dynamic[0] = fixed[0] = 1.0f;
}
FASTKD_KERNEL void too_much_static() {
  FASTKD_SHARED(float, fixed, kStaticShared / sizeof(float) + 1);
  FASTKD_DYNAMIC_SHARED(float, dynamic);
  dynamic[0] = fixed[0] = 1.0f;
}

// A launch with 64 static and so many dynamic bytes of shared memory: as `launch` does it, or with permission for
// `allowed` bytes. Or one of a kernel with more static arrays than may be.
void launch_shared(Tensor on, int64_t dynamic_bytes, std::optional<int64_t> allowed, bool much_static) {
  if (allowed) simt::launch(Grid(1), Grid(1), {dynamic_bytes, *allowed, kStaticShared}, &static_and_dynamic);
  else launch(on, Grid(1), Grid(1), dynamic_bytes, much_static ? &too_much_static : &static_and_dynamic);
}

// A launch with this number of blocks.
int64_t launch_grid(Tensor on, int64_t x, int64_t y, int64_t z) {
  launch(on, Grid(x, y, z), Grid(1), 0, &nothing);
  return x * y * z;
}

}  // namespace

FASTKD_DEVICE_LIBRARY(library) {
  library.impl("planted_taken_for_doubles", TORCH_BOX(&taken_for_doubles));
  library.impl("planted_launch_grid", TORCH_BOX(&launch_grid));
  library.impl("planted_launch_shared", TORCH_BOX(&launch_shared));
}

std::map<std::string, std::string> planted_bugs(bool for_sanitizer) {
  std::map<std::string, std::string> found;
  const auto add = [&](const auto& all) {
    for (const Planted& planted : all) found[planted.name] = planted.kind;
  };
  if (for_sanitizer) add(kForSanitizer);
  else add(kPlanted);
  return found;
}

void run_planted(const std::string& name, bool bug) {
  const Planted* found = nullptr;
  for (const Planted& planted : kPlanted)
    if (planted.name == name) found = &planted;
  for (const Planted& planted : kForSanitizer)
    if (planted.name == name) found = &planted;
  if (found == nullptr) throw std::runtime_error("run_planted: name must be one of planted_bugs(), got " + name);
  constexpr int n = 200;  // no multiple of the block
  std::vector<float> x(n), y(n);
  simt::forget();
  const Global<const float> input(simt::buffer_of(x.data(), n * sizeof(float), false, true), 0);
  const Global<float> result(simt::buffer_of(y.data(), n * sizeof(float), true, false), 0);
  simt::launch(Grid((n + kBlock - 1) / kBlock), Grid(kBlock), {}, [&] { found->kernel(bug, input, result, n); });
  simt::forget();
}

}  // namespace fastkd
