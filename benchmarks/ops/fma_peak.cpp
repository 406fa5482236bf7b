// Peak multiply-add rate of a core: enough independent chains of fused multiply-adds in registers to hide the latency.
// Compiled by benchmarks/ops/limits.py for the host CPU (-O3 -march=native); one call per thread.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;
constexpr long kLanes = kBytes / sizeof(float);

// Runs `rounds` rounds and returns the number of multiply-adds; result prevents the compiler from removing them.
extern "C" long multiply_adds(long rounds, float* result) {
  Vector sums[kChains];
  float start = 0;
  for (Vector& sum : sums) sum = Vector{} + start++;  // the compiler would merge equal chains
  Vector factor = Vector{} + 0.9999f, term = Vector{} + 1e-4f;
  for (long round = 0; round < rounds; ++round) {
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * factor + term;
    asm volatile("" : "+x"(factor), "+x"(term));
  }
  for (int chain = 0; chain < kChains; ++chain) *result += sums[chain][0];
  return rounds * kChains * kLanes;
}
