#include "simt.h"

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 512 * 1024;  // for the larger frames of AddressSanitizer
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr int kWarp = 32;
constexpr int kDynamic = -1;  // the site of dynamic shared memory
constexpr int kVotes = -2;  // instead of a source lane: the lowest bits of all lanes
enum class State { ready, barrier, warp, done };

struct Fiber {
  ucontext_t context;
  Thread identity;
  State state = State::ready;
  int64_t warp_epoch = 0;
  char* stack_start = nullptr;
  void* sanitizer_frames = nullptr;
  // of the operation it waits in
  int site = 0, source_lane = -1;
  uint32_t mask = 0;
  uint64_t bits = 0, result = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  int32_t number = 0;
  int64_t epoch = 0, static_bytes = 0;
  SharedMemory memory;
  std::unordered_map<int, std::unique_ptr<Buffer>> shared;
  std::unique_ptr<Finding> finding;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
};
thread_local Block* block = nullptr;

std::string where(const Thread& t) {
  return "block (" + std::to_string(t.block_index.x) + ", " + std::to_string(t.block_index.y) + ", " +
      std::to_string(t.block_index.z) + ") thread " + std::to_string(t.thread);
}

// Tells AddressSanitizer about stack switches: before a switch the target stack, after it the origin.
void leaves_for(void** own_frames, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(own_frames, stack, bytes);
#else
  (void)own_frames, (void)stack, (void)bytes;
#endif
}
void arrived(void* own_frames, const void** stack, size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own_frames, stack, bytes);
#else
  (void)own_frames, (void)stack, (void)bytes;
#endif
}
void forget_frames([[maybe_unused]] char* stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

void enter(Fiber& fiber) {
  void* frames = nullptr;
  block->running = &fiber;
  leaves_for(&frames, fiber.stack_start, kStackBytes);
  swapcontext(&block->scheduler, &fiber.context);
  arrived(frames, nullptr, nullptr);
}

void wait(State state) {
  Fiber* self = block->running;
  self->state = state;
  leaves_for(&self->sanitizer_frames, block->scheduler_stack, block->scheduler_bytes);
  swapcontext(&self->context, &block->scheduler);
  arrived(self->sanitizer_frames, &block->scheduler_stack, &block->scheduler_bytes);
}

void run_fiber() {
  arrived(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
  try {
    (*block->body)();
  } catch (const Finding& finding) {
    if (!block->finding) block->finding = std::make_unique<Finding>(finding);
  }
  block->running->state = State::done;
  leaves_for(nullptr, block->scheduler_stack, block->scheduler_bytes);
  swapcontext(&block->running->context, &block->scheduler);
}

// Resumes lanes of a warp that wait in one operation and are complete. True if any was resumed.
bool release_warp(Fiber* lanes, int count) {
  for (int lane = 0; lane < count; ++lane) {
    Fiber& first = lanes[lane];
    if (first.state != State::warp) continue;
    bool complete = true;
    for (int other = 0; other < kWarp; ++other) {
      if (!(first.mask >> other & 1)) continue;
      complete = complete && other < count && lanes[other].state == State::warp && lanes[other].mask == first.mask &&
          lanes[other].site == first.site;
    }
    if (!complete) continue;
    const uint32_t mask = first.mask;
    const bool whole = mask == (count == kWarp ? ~0u : (1u << count) - 1);
    uint64_t votes = 0;
    for (int other = 0; other < count; ++other)
      if (mask >> other & 1) votes |= (lanes[other].bits & 1) << other;
    for (int other = 0; other < count; ++other) {
      if (!(mask >> other & 1)) continue;
      Fiber& fiber = lanes[other];
      fiber.result = votes;
      if (fiber.source_lane == kVotes) continue;
      const int source = fiber.source_lane < 0 ? other : fiber.source_lane;
      if (source >= kWarp || !(mask >> source & 1))
        throw Finding{"lane", where(fiber.identity) + " reads lane " + std::to_string(source) + ", which is not there"};
      fiber.result = lanes[source].bits;
    }
    for (int other = 0; other < count; ++other)
      if (mask >> other & 1) {
        lanes[other].state = State::ready;
        if (whole) ++lanes[other].warp_epoch;
      }
    return true;
  }
  return false;
}

// Called when no fiber can run: resumes warps or the whole block, or reports the deadlock.
void release(std::vector<Fiber>& fibers) {
  const int count = static_cast<int>(fibers.size());
  bool some = false;
  for (int first = 0; first < count; first += kWarp)
    while (release_warp(&fibers[first], std::min(kWarp, count - first))) some = true;
  if (some) return;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::warp)
      throw Finding{"lane", where(fiber.identity) + " waits in a warp operation for lanes that do not come"};
  const Fiber* waiting = nullptr;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::barrier) waiting = &fiber;
  for (Fiber& fiber : fibers)
    if (fiber.state != State::barrier || fiber.site != waiting->site)
      throw Finding{"barrier",
                    where(fiber.identity) + " does not reach the barrier where " + where(waiting->identity) + " waits"};
  ++block->epoch;
  for (Fiber& fiber : fibers) fiber.state = State::ready;
}

void run_block(Block& current_block, std::mt19937_64& random) {
  block = &current_block;
  std::vector<int> order(current_block.fibers.size());
  for (;;) {
    order.clear();
    bool finished = true;
    for (size_t index = 0; index < current_block.fibers.size(); ++index) {
      finished = finished && current_block.fibers[index].state == State::done;
      if (current_block.fibers[index].state == State::ready) order.push_back(static_cast<int>(index));
    }
    if (finished) return;
    if (order.empty()) {
      release(current_block.fibers);
      continue;
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const int index : order) {
      enter(current_block.fibers[index]);
      if (current_block.finding) throw *current_block.finding;
    }
  }
}

// True if the access `before` is ordered before the current access of `self`.
bool ordered(const Access& before, const Fiber& self, bool shared) {
  if (before.block < 0) return true;
  if (before.block != block->number) return shared;  // shared memory of an earlier block
  if (before.thread == self.identity.thread || before.epoch < block->epoch) return true;
  return before.thread / kWarp == self.identity.warp && before.warp_epoch < self.warp_epoch;
}

std::vector<std::unique_ptr<Buffer>>& buffers() {
  static std::vector<std::unique_ptr<Buffer>> all;
  return all;
}

// Checks static plus dynamic bytes against the limit of the card, and against 48 KB without permission.
void check_shared(const SharedMemory& memory, int64_t static_bytes) {
  constexpr int64_t kWithoutPermission = 48 * 1024;
  const auto check = [&](int64_t bytes, int64_t limit, const char* what) {
    if (bytes > limit) fail("launch", std::to_string(bytes) + what + std::to_string(limit));
  };
  check(memory.dynamic_bytes + static_bytes, settings().shared_bytes, " bytes of shared memory, the card has ");
  check(memory.allowed + static_bytes, settings().shared_bytes, " bytes of shared memory allowed, the card has ");
  if (memory.allowed > 0) check(memory.dynamic_bytes, memory.allowed, " dynamic bytes, allowed are ");
  else check(memory.dynamic_bytes + static_bytes, kWithoutPermission, " bytes of shared memory, without permission ");
  if (memory.dynamic_bytes > 0) check(static_bytes, memory.most_static, " static bytes beside dynamic ones, not ");
}

std::unique_ptr<Buffer> new_shared(int64_t bytes) {
  auto buffer = std::make_unique<Buffer>();
  buffer->own.assign(bytes + 16, std::byte{settings().poison});
  const auto start = reinterpret_cast<uintptr_t>(buffer->own.data());
  buffer->data = buffer->own.data() + (16 - start % 16) % 16;
  buffer->size = bytes;
  buffer->writable = buffer->shared = true;
  buffer->cells.resize(bytes);
  return buffer;
}

}  // namespace

void fail(const char* kind, const std::string& message) {
  throw Finding{kind, (block && block->running ? where(block->running->identity) + ": " : "") + message};
}

Settings& settings() {
  static Settings values;
  return values;
}

Failure& failure() {
  static Failure next;
  return next;
}

Traffic& traffic() {
  static Traffic counted;
  return counted;
}

const Thread& current() { return block->running->identity; }

void touch(Buffer* buffer, int64_t offset, int64_t bytes, bool write, bool atomic) {
  if (buffer == nullptr) fail("bounds", "access through a null pointer");
  const auto place = [&] {
    return std::string(buffer->shared ? "shared" : "global") + " memory, byte " + std::to_string(offset) + " of " +
        std::to_string(buffer->size);
  };
  if (offset < 0 || offset + bytes > buffer->size) fail("bounds", place());
  if ((reinterpret_cast<uintptr_t>(buffer->data) + offset) % bytes != 0) fail("misaligned", place());
  if (write && !buffer->writable) fail("read-only", place());
  const Fiber& self = *block->running;
  if (!buffer->shared) traffic().asked += bytes;
  const Access now{block->number, self.identity.thread, block->epoch, self.warp_epoch, atomic};
  for (int64_t at = offset; at < offset + bytes; ++at) {
    Cell& cell = buffer->cells[at];
    if (!write && !cell.initialised) fail("uninitialised", place());
    const auto conflicts = [&](const Access& before) {
      return !(before.atomic && atomic) && !ordered(before, self, buffer->shared);
    };
    if (conflicts(cell.write)) fail("race", place() + " was written by thread " + std::to_string(cell.write.thread));
    if (write && (conflicts(cell.read) || conflicts(cell.other_read)))
      fail("race", place() + " was read by another thread");
    if (!buffer->shared && write && cell.write.block < 0) ++traffic().written;
    if (!buffer->shared && !write && cell.write.block < 0 && cell.read.block < 0) ++traffic().read;
    if (write) {
      cell.write = now;
      cell.initialised = true;
    } else {
      if (cell.read.thread != now.thread || cell.read.block != now.block) cell.other_read = cell.read;
      cell.read = now;
    }
  }
}

void sync_threads(int site) {
  block->running->site = site;
  wait(State::barrier);
}

uint64_t exchange(uint32_t mask, uint64_t bits, int source_lane, int site) {
  Fiber* self = block->running;
  if (!(mask >> self->identity.lane & 1)) fail("lane", "the mask leaves out the calling lane");
  self->mask = mask;
  self->bits = bits;
  self->source_lane = source_lane;
  self->site = site;
  wait(State::warp);
  return self->result;
}

uint32_t ballot(uint32_t mask, bool predicate, int site) {
  return static_cast<uint32_t>(exchange(mask, predicate, kVotes, site));
}

Buffer* shared_buffer(int site, int64_t bytes) {
  auto& buffer = block->shared[site];
  if (!buffer) {
    buffer = new_shared(bytes);
    if (site != kDynamic) check_shared(block->memory, block->static_bytes += (bytes + 15) / 16 * 16);
  }
  return buffer.get();
}

Buffer* dynamic_shared_buffer() { return shared_buffer(kDynamic, block->memory.dynamic_bytes); }

Buffer* buffer_of(void* data, int64_t bytes, bool writable, bool initialised) {
  for (const auto& buffer : buffers())
    if (buffer->data == data && buffer->size == bytes) {
      buffer->writable = buffer->writable || writable;
      return buffer.get();
    }
  auto buffer = std::make_unique<Buffer>();
  buffer->data = static_cast<std::byte*>(data);
  buffer->size = bytes;
  buffer->writable = writable;
  buffer->shared = false;
  buffer->cells.resize(bytes);
  for (Cell& cell : buffer->cells) cell.initialised = initialised;
  if (!initialised) std::memset(data, settings().poison, bytes);
  buffers().push_back(std::move(buffer));
  return buffers().back().get();
}

void forget() { buffers().clear(); }

namespace {

void prepare(Fiber& fiber, char* stack) {
  forget_frames(stack);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack_start = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

}  // namespace

void launch(Dim3 grid, Dim3 threads, SharedMemory shared, const std::function<void()>& body) {
  if (threads.count() < 1 || threads.count() > 1024 || grid.count() < 1 || grid.x > 2147483647 || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("launch: grid and block must be in CUDA's limits");
  ++traffic().launches;
  for (const auto& buffer : buffers())  // launches on one stream are ordered
    for (Cell& cell : buffer->cells) cell.write = cell.read = cell.other_read = Access{};
  std::mt19937_64 random(settings().seed);
  std::vector<int64_t> order(grid.count());
  for (size_t index = 0; index < order.size(); ++index) order[index] = static_cast<int64_t>(index);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::unique_ptr<char[]>> stacks(threads.count());
  for (auto& stack : stacks) stack = std::make_unique<char[]>(kStackBytes);
  for (const int64_t number : order) {
    Block one;
    one.body = &body;
    one.number = static_cast<int32_t>(number);
    one.memory = shared;
    one.fibers = std::vector<Fiber>(threads.count());
    for (int64_t index = 0; index < threads.count(); ++index) {
      Fiber& fiber = one.fibers[index];
      Thread& t = fiber.identity;
      t.thread_index = {index % threads.x, index / threads.x % threads.y, index / (threads.x * threads.y)};
      t.block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
      t.block_size = threads;
      t.grid_size = grid;
      t.thread = static_cast<int32_t>(index);
      t.lane = t.thread % kWarp;
      t.warp = t.thread / kWarp;
      prepare(fiber, stacks[index].get());
    }
    try {
      check_shared(shared, 0);
      run_block(one, random);
    } catch (const Finding& finding) {
      block = nullptr;
      throw std::runtime_error(finding.kind + ": " + finding.message);
    }
    block = nullptr;
  }
}

}  // namespace simt
