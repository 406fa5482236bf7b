// The language of the .cu sources: CUDA under nvcc, the emulation of csrc/simt under the host compiler. Kernels use
// Global<T> and Shared<T> for pointers, FASTKD_SHARED for arrays, load/store and packs of 16 bytes for memory, an index
// type as a template parameter (narrow_index or int64_t), and CUDA's own names for the rest.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#else
#include "simt/simt.h"
#endif

namespace fastkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPackBytes = 16;
template <class T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kPackBytes) Pack {
  T value[kPack<T>];
};

// Shared memory of a block is the sum of static arrays (FASTKD_SHARED) and dynamic memory (FASTKD_DYNAMIC_SHARED).
// Above 48 KB a kernel needs cudaFuncSetAttribute, up to the limit of the card (99 KB on sm_86, sm_89 and sm_120, 163
// KB on sm_80, 227 KB on sm_90 and sm_100). Static arrays of a kernel with dynamic memory must fit in kStaticShared
// bytes; the emulation rejects others.
constexpr int64_t kStaticShared = 1280;
constexpr int64_t kSharedWithoutPermission = 48 * 1024;

inline bool needs_permission(int64_t dynamic_bytes) { return kStaticShared + dynamic_bytes > kSharedWithoutPermission; }

// Memory is accessed by the dtype of the tensor: a kernel that reads floats as doubles would exceed its bounds.
inline void check_elements(size_t bytes, const Tensor& tensor) {
  STD_TORCH_CHECK(bytes == tensor.element_size(), "fastkd: a kernel takes elements of ", bytes,
                  " bytes, the tensor holds ", tensor.element_size(), "; pass tensors of the op's dtypes");
}

inline void check_grid(int64_t x, int64_t y, int64_t z) {
  STD_TORCH_CHECK(x <= 2147483647 && y <= 65535 && z <= 65535, "fastkd: a launch of ", x, " x ", y, " x ", z,
                  " blocks is more than a GPU takes; pass fewer images or objects at a time");
}

// Raises the error of a failed launch. Args: has_code: the library has machine code or PTX for this card.
[[noreturn]] inline void fail_launch(bool has_code, const char* reason) {
  STD_TORCH_CHECK(has_code, "fastkd: this GPU or its driver cannot run the compiled GPU kernels (", reason,
                  "); `fastkd info` names the cards they are built for: rebuild with TORCH_CUDA_ARCH_LIST, or update "
                  "the driver, or call the ops within fastkd.ops.use_backend(\"reference\")");
  STD_TORCH_CHECK(false, "fastkd: a kernel's launch failed (", reason,
                  "); an error of an earlier kernel shows up here too: run with CUDA_LAUNCH_BLOCKING=1 to see which");
  __builtin_unreachable();
}

#ifdef __CUDACC__

#define FASTKD_KERNEL __global__
#define FASTKD_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)  // blocks per multiprocessor
#define FASTKD_DEVICE __device__ __forceinline__
#define FASTKD_SHARED(T, name, count) __shared__ T name[count]
#define FASTKD_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char fastkd_dynamic[]; \
  T* name = reinterpret_cast<T*>(fastkd_dynamic)
#define FASTKD_DEVICE_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, library)

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
using narrow_index = int32_t;

struct Grid {
  int64_t x, y, z;
  explicit Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

// The memory of a tensor: const for inputs; `output` is uninitialised memory.
template <class T>
Global<T> global(const Tensor& tensor) {
  check_elements(sizeof(T), tensor);
  if constexpr (std::is_const_v<T>) return static_cast<T*>(tensor.const_data_ptr());
  else return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
Global<T> output(const Tensor& tensor) {
  check_elements(sizeof(T), tensor);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
FASTKD_DEVICE uintptr_t address_of(Global<T> pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}
template <class T>
FASTKD_DEVICE Pack<T> load_pack(const T* pointer) {
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(pointer));
  return pack;
}
template <class T>
FASTKD_DEVICE Pack<T> load_shared_pack(const T* pointer) {  // or memory that the kernel itself writes
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(pointer);
  return pack;
}
template <class T>
FASTKD_DEVICE void store_pack(T* pointer, const Pack<T>& pack) {
  const uint4 bits = *reinterpret_cast<const uint4*>(&pack);
  // explicit: the compiler sometimes splits an assignment into four stores; also for shared memory
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// Makes the tensor's device the current one.
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceScope(const Tensor& on) : guard(on.get_device()) {}
};

// Maximum dynamic shared memory of a launch on the current device.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kStaticShared;
}

// Raises the error of the CUDA runtime, with a clear message for a card without code in the library.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  const bool has_code = error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion &&
      error != cudaErrorInvalidKernelImage;
  fail_launch(has_code, cudaGetErrorString(error));
}

// Launches on the current stream of the tensor's device, which the caller's DeviceGuard has made current.
template <class... Parameters, class... Arguments>
void launch(const Tensor& on, Grid grid, Grid block, int64_t shared_bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a launch takes 4 KB of arguments");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_grid(grid.x, grid.y, grid.z);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  const dim3 threads(static_cast<unsigned>(block.x), static_cast<unsigned>(block.y), static_cast<unsigned>(block.z));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device(), &stream));
  if (needs_permission(shared_bytes))  // the maximum, so that another thread with a smaller launch does not lower it
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_limit())));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  check_cuda(cudaGetLastError());
}

#else  // emulation

#define FASTKD_KERNEL
#define FASTKD_LAUNCH_BOUNDS(threads, blocks)
#define FASTKD_DEVICE inline
#define FASTKD_SHARED(T, name, count) \
  const ::simt::Pointer<T> name(::simt::shared_buffer(__COUNTER__, (count) * sizeof(T)), 0)
#define FASTKD_DYNAMIC_SHARED(T, name) const ::simt::Pointer<T> name(::simt::dynamic_shared_buffer(), 0)
#define FASTKD_DEVICE_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(fastkd_simt, CPU, library)
#define threadIdx (::simt::current().thread_index)
#define blockIdx (::simt::current().block_index)
#define blockDim (::simt::current().block_size)
#define gridDim (::simt::current().grid_size)
#define __syncthreads() ::simt::sync_threads(__LINE__)
#define __syncwarp() ((void)::simt::exchange(kAllLanes, 0, -1, __LINE__))
#define __shfl_xor_sync(mask, value, lanes) ::simt::shuffle(mask, value, ::simt::current().lane ^ (lanes), __LINE__)
#define __shfl_sync(mask, value, lane) ::simt::shuffle(mask, value, lane, __LINE__)
#define __ballot_sync(mask, predicate) ::simt::ballot(mask, predicate, __LINE__)
#define __popc(word) __builtin_popcount(word)
#define __fmul_rn(a, b) ::simt::rounded_product<float>(a, b)
#define __dmul_rn(a, b) ::simt::rounded_product<double>(a, b)
#define __fdiv_rn(a, b) ((a) / (b))

template <class T>
using Global = ::simt::Pointer<T>;
template <class T>
using Shared = ::simt::Pointer<T>;
using narrow_index = ::simt::Index<16>;
using Grid = ::simt::Dim3;

inline int64_t held_bytes(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }
template <class T>
Global<T> global(const Tensor& tensor) {
  check_elements(sizeof(T), tensor);
  void* data = const_cast<void*>(tensor.const_data_ptr());
  return {::simt::buffer_of(data, held_bytes(tensor), !std::is_const_v<T>, true), 0};
}
template <class T>
Global<T> output(const Tensor& tensor) {
  check_elements(sizeof(T), tensor);
  return {::simt::buffer_of(tensor.mutable_data_ptr(), held_bytes(tensor), true, false), 0};
}

template <class T>
uintptr_t address_of(Global<T> pointer) {
  return pointer.address();
}
template <class T>
auto load_pack(Global<T> pointer) {
  using Value = std::remove_const_t<T>;
  ::simt::touch(pointer.buffer(), pointer.offset(), kPackBytes, false, false);
  Pack<Value> pack;
  std::memcpy(static_cast<void*>(&pack), pointer.buffer()->data + pointer.offset(), kPackBytes);
  return pack;
}
template <class T>
auto load_shared_pack(Shared<T> pointer) {
  return load_pack(pointer);
}
template <class T>
void store_pack(Global<T> pointer, const Pack<T>& pack) {
  ::simt::touch(pointer.buffer(), pointer.offset(), kPackBytes, true, false);
  std::memcpy(pointer.buffer()->data + pointer.offset(), static_cast<const void*>(&pack), kPackBytes);
}

struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};

inline int64_t shared_limit() { return ::simt::settings().shared_bytes - kStaticShared; }

template <class... Parameters, class... Arguments>
void launch(const Tensor&, Grid grid, Grid block, int64_t shared_bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  if (grid.count() == 0) return;
  check_grid(grid.x, grid.y, grid.z);
  if (const auto& failure = ::simt::failure(); failure.reason) fail_launch(failure.has_code, failure.reason->c_str());
  const ::simt::SharedMemory shared{shared_bytes, needs_permission(shared_bytes) ? shared_limit() : 0, kStaticShared};
  ::simt::launch(grid, block, shared, [=] { kernel(Parameters(arguments)...); });
}

#endif

// The largest number of elements that narrow_index addresses.
inline int64_t narrow_limit() {
#ifdef __CUDACC__
  return std::numeric_limits<int32_t>::max();
#else
  return std::numeric_limits<int16_t>::max();
#endif
}

// The accumulation type: half types widen to float.
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// a * b, rounded; not contracted with a following addition: where equal inputs must give exactly 0, both sides must be
// rounded alike.
FASTKD_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
FASTKD_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

template <class T>
FASTKD_DEVICE sum_t<T> widened(T value) {
  return static_cast<sum_t<T>>(value);
}

// Calls visit(i, value) for the elements of a short dense row, by the lanes of one warp: 16-byte loads between an
// unaligned head and a tail.
template <class T, class Visit>
FASTKD_DEVICE void load_row(Global<const T> row, int count, Visit visit) {
  const int lane = threadIdx.x % kWarpSize;
  const int unaligned = static_cast<int>((kPackBytes - address_of<const T>(row) % kPackBytes) % kPackBytes / sizeof(T));
  const int head = unaligned < count ? unaligned : count, packs = (count - head) / kPack<T>;
  for (int i = lane; i < head; i += kWarpSize) visit(i, widened<T>(row[i]));
  for (int pack = lane; pack < packs; pack += kWarpSize) {
    const Pack<T> values = load_pack(row + (head + pack * kPack<T>));
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) visit(head + pack * kPack<T> + j, widened<T>(values.value[j]));
  }
  for (int i = head + packs * kPack<T> + lane; i < count; i += kWarpSize) visit(i, widened<T>(row[i]));
}

// row[i] = value(i), likewise.
template <class T, class Value>
FASTKD_DEVICE void store_row(Global<T> row, int count, Value value) {
  const int lane = threadIdx.x % kWarpSize;
  const int unaligned = static_cast<int>((kPackBytes - address_of<T>(row) % kPackBytes) % kPackBytes / sizeof(T));
  const int head = unaligned < count ? unaligned : count, packs = (count - head) / kPack<T>;
  for (int i = lane; i < head; i += kWarpSize) row[i] = static_cast<T>(value(i));
  for (int pack = lane; pack < packs; pack += kWarpSize) {
    Pack<T> values;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) values.value[j] = static_cast<T>(value(head + pack * kPack<T> + j));
    store_pack(row + (head + pack * kPack<T>), values);
  }
  for (int i = head + packs * kPack<T> + lane; i < count; i += kWarpSize) row[i] = static_cast<T>(value(i));
}

// Visits the elements of a short dense row by the lanes of one warp: whole(first) for aligned packs of 16 bytes,
// single(i) for the elements before and after them, or for all elements if the other arrays have another alignment.
template <class T, class Whole, class Single>
FASTKD_DEVICE void over_row(Global<const T> row, bool aligned_alike, int count, Whole whole, Single single) {
  const int lane = threadIdx.x % kWarpSize;
  const int unaligned = static_cast<int>((kPackBytes - address_of<const T>(row) % kPackBytes) % kPackBytes / sizeof(T));
  const int head = aligned_alike && unaligned < count ? unaligned : count, packs = (count - head) / kPack<T>;
  for (int i = lane; i < head; i += kWarpSize) single(i);
  for (int pack = lane; pack < packs; pack += kWarpSize) whole(head + pack * kPack<T>);
  for (int i = head + packs * kPack<T> + lane; i < count; i += kWarpSize) single(i);
}

// The sum over the threads of a block, in every thread; the order is fixed. `scratch` holds kWarpSize values.
template <class Sum>
FASTKD_DEVICE Sum block_sum(Sum value, Shared<Sum> scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // until the scratch of an earlier sum has been read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? Sum(scratch[lane]) : Sum(0);
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Writes the threads of a block with a flag to `list` in ascending order and returns their number; `before` is the
// number of flagged threads before this one. `counts` has kWarpSize elements.
FASTKD_DEVICE int list_threads(bool flag, Shared<int> list, Shared<int> counts, int& before) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const unsigned word = __ballot_sync(kAllLanes, flag);
  __syncthreads();  // until an earlier list has been read
  if (lane == 0) counts[warp] = __popc(word);
  __syncthreads();
  before = __popc(word & ((1u << lane) - 1));
  int total = 0;
  for (int other = 0; other < warps; ++other) {
    if (other < warp) before += counts[other];
    total += counts[other];
  }
  if (flag) list[before] = threadIdx.x;
  __syncthreads();
  return total;
}

}  // namespace fastkd
