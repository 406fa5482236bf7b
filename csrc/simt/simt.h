// CUDA's execution model on the CPU, for tests: the .cu sources compile against this file (through
// csrc/common/device.h) and run with every access checked. Never shipped.
//
// Threads are fibers; the fibers of a block run one at a time in a random order, each until it waits at a barrier,
// waits in a warp operation, or ends. Blocks run one after another in a random order. Reported findings:
//   bounds          access outside its buffer, or to shared memory of another size       misaligned     vector access
//   uninitialised   reading unwritten bytes (filled with NaN or huge numbers)             read-only      write to input
//   race            two threads, one of them writing, without barrier between, not both atomic
//   barrier         __syncthreads that some thread of the block never reaches, or reaches elsewhere
//   lane            a warp operation whose mask includes an absent lane or omits the caller
//   launch          more shared memory than the card has, or above 48 KB without permission; grid or block too large
//   overflow        index arithmetic beyond the index type (kernels take it as a template parameter)
// Not detected: weaker memory ordering, asynchronous copies, compiler bugs.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace simt {

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
  Dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  int64_t count() const { return x * y * z; }
};

// A finding of a run; `kind` is one of the words above.
struct Finding {
  std::string kind, message;
};
[[noreturn]] void fail(const char* kind, const std::string& message);

// Shared memory of a launch: dynamic bytes, the bytes allowed by cudaFuncSetAttribute (0: the default), and the limit
// of static arrays in kernels with dynamic memory.
struct SharedMemory {
  int64_t dynamic_bytes = 0, allowed = 0, most_static = 0;
};

// Settings of the following launches.
struct Settings {
  uint64_t seed = 0;            // orders of blocks and fibers
  unsigned char poison = 0xff;  // bytes of uninitialised memory: 0xff is NaN and -1, 0x7f is 3e38 and the largest int
  int64_t shared_bytes = 99 * 1024;  // a block's limit, static and dynamic together: of the smallest card, sm_86
};
Settings& settings();

// Error of the following launches, as if reported by the CUDA runtime.
struct Failure {
  bool has_code = true;
  std::optional<std::string> reason;
};
Failure& failure();

// The history of a byte: its last readers and writer.
struct Access {
  int32_t block = -1, thread = -1;
  int64_t epoch = 0, warp_epoch = 0;  // barriers passed by the block, by the warp
  bool atomic = false;
};
struct Cell {
  Access write, read, other_read;  // the last two readers, of different threads
  bool initialised = false;
};

// Launches and their global memory traffic in bytes: in total, and with each byte counted once per launch (an infinite
// cache).
struct Traffic {
  int64_t launches = 0, asked = 0, read = 0, written = 0;
};
Traffic& traffic();

struct Buffer {
  std::byte* data;
  int64_t size;  // bytes
  bool writable;
  bool shared;
  std::vector<Cell> cells;
  std::vector<std::byte> own;  // storage of shared memory
};

// Checks and records an access.
void touch(Buffer* buffer, int64_t offset, int64_t bytes, bool write, bool atomic);

template <class T>
class Reference;

// A pointer with its buffer.
template <class T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(Buffer* buffer, int64_t offset) : buffer_(buffer), offset_(offset) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Pointer(const Pointer<U>& other) : buffer_(other.buffer()), offset_(other.offset()) {}

  template <class Index>
  Reference<T> operator[](Index index) const {
    return Reference<T>(buffer_, offset_ + static_cast<int64_t>(index) * static_cast<int64_t>(sizeof(T)));
  }
  Reference<T> operator*() const { return (*this)[0]; }
  template <class Index>
  Pointer operator+(Index index) const {
    return Pointer(buffer_, offset_ + static_cast<int64_t>(index) * static_cast<int64_t>(sizeof(T)));
  }
  explicit operator bool() const { return buffer_ != nullptr; }
  bool operator==(std::nullptr_t) const { return buffer_ == nullptr; }
  Buffer* buffer() const { return buffer_; }
  int64_t offset() const { return offset_; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(buffer_->data) + offset_; }

 private:
  Buffer* buffer_ = nullptr;
  int64_t offset_ = 0;
};

template <class T>
class Reference {
 public:
  using Value = std::remove_const_t<T>;
  Reference(Buffer* buffer, int64_t offset) : buffer_(buffer), offset_(offset) {}
  Reference(const Reference&) = default;
  operator Value() const { return read(false); }
  Value operator=(Value value) const {
    write(value, false);
    return value;
  }
  Value operator=(const Reference& other) const { return *this = static_cast<Value>(other); }
  template <class Other>
  Value operator+=(Other value) const {
    return *this = static_cast<Value>(static_cast<Value>(*this) + value);
  }
  template <class Function>
  Value atomic(Function change) const {
    const Value before = read(true);
    write(change(before), true);
    return before;
  }

 private:
  Value read(bool atomic) const {
    touch(buffer_, offset_, sizeof(Value), false, atomic);
    Value value;
    std::memcpy(static_cast<void*>(&value), buffer_->data + offset_, sizeof(Value));
    return value;
  }
  void write(Value value, bool atomic) const {
    static_assert(!std::is_const_v<T>, "write through a pointer to const");
    touch(buffer_, offset_, sizeof(Value), true, atomic);
    std::memcpy(buffer_->data + offset_, static_cast<const void*>(&value), sizeof(Value));
  }
  Buffer* buffer_;
  int64_t offset_;
};

// An index type that reports overflow; Bits = 16 lets small shapes test the limit of 2^31 elements.
template <int Bits>
class Index {
 public:
  Index() : value_(0) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  Index(Integer value) : value_(static_cast<int64_t>(value)) {
    constexpr int64_t limit = int64_t{1} << (Bits - 1);
    if (value_ < -limit || value_ >= limit)
      fail("overflow", std::to_string(value_) + " in an index of " + std::to_string(Bits) + " bits");
  }
  operator int64_t() const { return value_; }
#define SIMT_OPERATOR(op)                                                                            \
  friend Index operator op(Index a, Index b) { return Index(a.value_ op b.value_); }                 \
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>                    \
  friend Index operator op(Index a, Integer b) { return Index(a.value_ op static_cast<int64_t>(b)); } \
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>                    \
  friend Index operator op(Integer a, Index b) { return Index(static_cast<int64_t>(a) op b.value_); } \
  Index& operator op##=(Index b) { return *this = *this op b; }
  SIMT_OPERATOR(+)
  SIMT_OPERATOR(-)
  SIMT_OPERATOR(*)
  SIMT_OPERATOR(/)
  SIMT_OPERATOR(%)
#undef SIMT_OPERATOR
  Index& operator++() { return *this += Index(1); }

 private:
  int64_t value_;
};

// The running thread.
struct Thread {
  Dim3 thread_index, block_index, block_size, grid_size;
  int32_t thread, lane, warp;
};
const Thread& current();

// Barrier and warp operations; `site` identifies the call in the source.
void sync_threads(int site);
uint64_t exchange(uint32_t mask, uint64_t bits, int source_lane, int site);  // bits of source_lane; the caller's if -1
uint32_t ballot(uint32_t mask, bool predicate, int site);

template <class T>
T shuffle(uint32_t mask, T value, int source_lane, int site) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, site);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

// Shared memory of the block: one array per declaration in the source, and the dynamic array of the launch.
Buffer* shared_buffer(int site, int64_t bytes);
Buffer* dynamic_shared_buffer();

// The buffer of a tensor's memory; the same one for the same memory until `forget`.
Buffer* buffer_of(void* data, int64_t bytes, bool writable, bool initialised);
void forget();

// Runs body for every thread; throws std::runtime_error("kind: message") with the first finding.
void launch(Dim3 grid, Dim3 block, SharedMemory shared, const std::function<void()>& body);

// a * b, rounded; cannot be contracted with a later addition.
template <class T>
T rounded_product(T a, T b) {
  const volatile T product = a * b;
  return product;
}

}  // namespace simt
