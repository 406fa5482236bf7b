// Peak memory rate: several threads read some arrays and write one, without computation. Compiled by
// benchmarks/ops/limits.py for the host CPU (-O3 -march=native).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {
constexpr long kLine = 64, kPiece = 1 << 14;  // bytes read of one array, then of the next

void write_lines(char* out, long bytes, bool past_caches) {
  long at = 0;
#if defined(__SSE2__)
  const __m128i value = _mm_set1_epi8(1);
  if (past_caches && reinterpret_cast<uintptr_t>(out) % kLine == 0)
    for (; at + kLine <= bytes; at += kLine)
      for (long part = 0; part < kLine; part += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + at + part), value);
#endif
  std::memset(out + at, 1, bytes - at);
}

long read_lines(const char* in, long bytes) {
  long sums[8] = {};
  for (long at = 0; at + kLine <= bytes; at += kLine)
    for (long word = 0; word < 8; ++word) {
      long value;
      std::memcpy(&value, in + at + word * 8, 8);
      sums[word] += value;
    }
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

// The work of one thread, in pieces that are read and written alternately, as in an op.
long share(const char* const* in, const long* bytes, long inputs, char* out, long written, bool past_caches, long thread,
           long threads) {
  long most = written, sum = 0;
  for (long i = 0; i < inputs; ++i) most = std::max(most, bytes[i]);
  const long pieces = (most + kPiece - 1) / kPiece;
  for (long piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; ++piece) {
    const auto part = [&](long total) {  // begin and end in an array of `total` bytes
      const long first = total / kLine * piece / pieces * kLine, last = total / kLine * (piece + 1) / pieces * kLine;
      return std::pair<long, long>(first, last - first);
    };
    for (long i = 0; i < inputs; ++i) sum += read_lines(in[i] + part(bytes[i]).first, part(bytes[i]).second);
    if (written > 0) write_lines(out + part(written).first, part(written).second, past_caches);
  }
  return sum;
}
}  // namespace

// Reads `inputs` arrays of `bytes` bytes and writes one; the result prevents the compiler from removing the reads.
extern "C" long move_bytes(const char* const* in, const long* bytes, long inputs, char* out, long written,
                           int past_caches, long threads) {
  std::vector<long> sums(threads);
  std::vector<std::thread> others;
  const auto run = [&](long thread) {
    sums[thread] = share(in, bytes, inputs, out, written, past_caches != 0, thread, threads);
  };
  for (long thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  long sum = 0;
  for (const long one : sums) sum += one;
  return sum;
}
