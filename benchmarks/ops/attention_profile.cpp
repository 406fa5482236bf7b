// Times each product of instance_attention on one tile in the cache. Prints per line: name, multiply-adds per cell over
// all heads, GFLOP/s. Compiled and run by benchmarks/ops/attention_profile.py: products QUERIES.
#include "attention/attention.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

constexpr int64_t kHeads = 8, kChannels = 256, kDepthOfHead = 32;

struct Matrix {
  std::vector<float> memory;
  float* data;
  explicit Matrix(int64_t size) : memory(size + 32, 0.5f), data(memory.data()) {
    while (reinterpret_cast<uintptr_t>(data) % 64) ++data;
  }
};

// C [rows, columns] = A [rows, k] B, repeated `times` per head.
template <class A>
void time_product(const char* name, int64_t rows, int64_t k, int64_t columns, double times, int64_t most = kDepth) {
  using V = FloatVector;
  const int64_t width = round_up(columns, 16);
  Matrix a(rows * (std::is_same_v<A, Panels> ? k : kTile) + kTile), b(k * width), c(rows * width);
  const double work = static_cast<double>(rows) * k * columns;
  const int64_t rounds = 1e8 / work + 1;
  double best = 1e9;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < rounds; ++round)
      multiply<V, A>(a.data, rows, k, b.data, width, width / kLanes<V>, c.data, width, false, most);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    best = taken.count() / rounds < best ? taken.count() / rounds : best;
  }
  std::printf("%s %.0f %.1f\n", name, work * times * kHeads / kTile, 2e-9 * work / best);
}

void time_products(int64_t queries) {
  const int64_t d = kDepthOfHead, chunks = Parts(queries, attention::kChunk).count;
  const int64_t n = (queries + chunks - 1) / chunks;
  const double times = static_cast<double>(queries) / n;
  time_product<Panels>("keys, forward and again backward", d, kChannels, kTile, 2);
  time_product<Panels>("logits, forward and again backward", n, d, kTile, 2 * times);
  time_product<TileRows>("output", n, kTile, d, times, kShortDepth);
  time_product<Panels>("gradient of the probabilities", n, d, kTile, times);
  time_product<Panels>("gradient of the values", d, n, kTile, times);
  time_product<TileRows>("gradient of the queries", n, kTile, d, times);
  time_product<Panels>("gradient of the keys", d, n, kTile, times);
  time_product<TileRows>("gradient of key_weight", d, kTile, kChannels, 1);
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

int main(int, char** arguments) { fastkd::time_products(std::atol(arguments[1])); }
