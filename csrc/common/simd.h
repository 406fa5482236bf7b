// Vectors of the capability being compiled: load<V>(pointer) widens to float (double for double), store(pointer, v)
// rounds. V is Vector<acc_t> or acc_t itself: the same kernel text serves whole vectors and the single elements at
// the end of a row.
#pragma once

#include "common/capability.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY > 0
#include <immintrin.h>
#endif

#define FASTKD_INLINE inline __attribute__((always_inline))

FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kVectorBytes = FASTKD_CAPABILITY >= 2 ? 64 : FASTKD_CAPABILITY == 1 ? 32 : 16;
constexpr int kFloats = kVectorBytes / sizeof(float);

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(kVectorBytes / 2)));

// The accumulation type: half types widen to float.
template <class scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <class acc>
using Vector = std::conditional_t<std::is_same_v<acc, double>, DoubleVector, FloatVector>;

template <class V>
using Element = std::conditional_t<std::is_same_v<V, FloatVector> || std::is_same_v<V, float>, float, double>;

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(Element<V>);

template <class V>
FASTKD_INLINE V broadcast(Element<V> value) {
  return V{} + value;
}

// a * b + c in one rounding where the CPU can. The build switches off the compiler's own contraction
// (-ffp-contract=off), so that kernels control rounding and x * y - x * y is 0.
template <class V>
FASTKD_INLINE V multiply_add(V a, V b, V c) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  if constexpr (std::is_same_v<V, FloatVector>) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (std::is_same_v<V, DoubleVector>) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  if constexpr (std::is_same_v<V, FloatVector>) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (std::is_same_v<V, DoubleVector>) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

// Widens 16 bits to 32, and takes the low 16 of 32 bits. __builtin_convertvector compiles to a dozen instructions.
FASTKD_INLINE BitsVector extend(HalfBitsVector bits) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  return (BitsVector)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  return (BitsVector)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, BitsVector);
#endif
}

FASTKD_INLINE HalfBitsVector truncate(BitsVector bits) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  return (HalfBitsVector)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  const __m256i low = (__m256i)(bits & 0xffff);
  return (HalfBitsVector)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
#else
  return __builtin_convertvector(bits, HalfBitsVector);
#endif
}

FASTKD_INLINE FloatVector widen(HalfBitsVector bits, BFloat16) { return (FloatVector)(extend(bits) << 16); }

FASTKD_INLINE HalfBitsVector narrow(FloatVector value, BFloat16) {  // to nearest, ties to even; NaN stays NaN
  const BitsVector bits = (BitsVector)value;
  const BitsVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsVector quiet = BitsVector{} + 0x7fc0;
  return truncate(value == value ? rounded : quiet);
}

#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
FASTKD_INLINE FloatVector widen(HalfBitsVector bits, Half) {
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
FASTKD_INLINE HalfBitsVector narrow(FloatVector value, Half) {
  return (HalfBitsVector)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
FASTKD_INLINE FloatVector widen(HalfBitsVector bits, Half) {
  return (FloatVector)_mm256_cvtph_ps((__m128i)bits);
}
FASTKD_INLINE HalfBitsVector narrow(FloatVector value, Half) {
  return (HalfBitsVector)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FASTKD_INLINE FloatVector widen(HalfBitsVector bits, Half) {
  FloatVector value;
  for (int i = 0; i < kFloats; ++i) value[i] = static_cast<float>(Half(bits[i], Half::from_bits()));
  return value;
}
FASTKD_INLINE HalfBitsVector narrow(FloatVector value, Half) {
  HalfBitsVector bits;
  for (int i = 0; i < kFloats; ++i) bits[i] = Half(value[i]).x;
  return bits;
}
#endif

template <class V, class scalar_t>
FASTKD_INLINE V load(const scalar_t* pointer) {
  if constexpr (kLanes<V> == 1) {
    return static_cast<V>(*pointer);
  } else if constexpr (sizeof(scalar_t) == sizeof(Element<V>)) {
    V value;
    std::memcpy(&value, pointer, sizeof(V));
    return value;
  } else {
    HalfBitsVector bits;
    std::memcpy(&bits, pointer, sizeof(bits));
    return widen(bits, scalar_t{});
  }
}

template <class V, class scalar_t>
FASTKD_INLINE void store(scalar_t* pointer, V value) {
  if constexpr (kLanes<V> == 1) {
    *pointer = static_cast<scalar_t>(value);
  } else if constexpr (sizeof(scalar_t) == sizeof(Element<V>)) {
    std::memcpy(pointer, &value, sizeof(V));
  } else {
    const HalfBitsVector bits = narrow(value, scalar_t{});
    std::memcpy(pointer, &bits, sizeof(bits));
  }
}

constexpr int64_t kLineBytes = 64;  // size of a cache line

// Whether a tensor exceeds the caches of a core: it is then written with streaming stores, as fetching a line only to
// overwrite it costs as much as writing it.
constexpr bool is_large(int64_t bytes) { return bytes >= (1 << 20); }

// Number of elements before the next cache line.
template <class scalar_t>
FASTKD_INLINE int64_t elements_to_line(const scalar_t* pointer) {
  return (kLineBytes - reinterpret_cast<uintptr_t>(pointer) % kLineBytes) % kLineBytes / sizeof(scalar_t);
}

// Streaming store: pointer is aligned to the size of the store, and stores fill whole consecutive cache lines.
template <class V, class scalar_t>
FASTKD_INLINE void stream(scalar_t* pointer, V value) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 1
  static_assert(kLanes<V> > 1);
  if constexpr (sizeof(scalar_t) == sizeof(Element<V>)) {
#if FASTKD_CAPABILITY >= 2
    _mm512_stream_si512((__m512i*)pointer, (__m512i)value);
#else
    _mm256_stream_si256((__m256i*)pointer, (__m256i)value);
#endif
  } else {
#if FASTKD_CAPABILITY >= 2
    _mm256_stream_si256((__m256i*)pointer, (__m256i)narrow(value, scalar_t{}));
#else
    _mm_stream_si128((__m128i*)pointer, (__m128i)narrow(value, scalar_t{}));
#endif
  }
#else
  store(pointer, value);
#endif
}

template <bool past_caches, class V, class scalar_t>
FASTKD_INLINE void put(scalar_t* pointer, V value) {
  if constexpr (past_caches && kLanes<V> > 1) {
    stream(pointer, value);
  } else {
    store(pointer, value);
  }
}

// Fence between streaming stores of a thread and accesses of other threads.
FASTKD_INLINE void end_stream() {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 1
  _mm_sfence();
#endif
}

// Prefetches [begin, end), which need not be valid memory: for ranges too short or too many for the hardware
// prefetcher.
template <class scalar_t>
FASTKD_INLINE void fetch(const scalar_t* begin, const scalar_t* end) {
  for (; begin < end; begin += kLineBytes / sizeof(scalar_t)) __builtin_prefetch(begin, 0, 2);
}

// Copies elements that do not overlap, whole vectors first.
template <class scalar_t>
FASTKD_INLINE void copy(scalar_t* out, const scalar_t* in, int64_t count) {
  constexpr int64_t step = kVectorBytes / sizeof(scalar_t);
  int64_t at = 0;
  for (; at + step <= count; at += step) std::memcpy(out + at, in + at, kVectorBytes);
  for (; at < count; ++at) out[at] = in[at];
}

// The same, with streaming stores for whole cache lines.
template <class scalar_t>
FASTKD_INLINE void stream_copy(scalar_t* out, const scalar_t* in, int64_t count) {
  constexpr int64_t step = kVectorBytes / sizeof(scalar_t), line = kLineBytes / sizeof(scalar_t);
  const int64_t head = elements_to_line(out) < count ? elements_to_line(out) : count;
  const int64_t end = head + (count - head) / line * line;
  copy(out, in, head);
  for (int64_t at = head; at < end; at += step) {
    FloatVector bytes;
    std::memcpy(&bytes, in + at, kVectorBytes);
    stream(reinterpret_cast<float*>(out + at), bytes);
  }
  copy(out + end, in + end, count - end);
}

// The lanes of value whose byte is not 0, 0 elsewhere.
template <class V>
FASTKD_INLINE V select(V value, const unsigned char* bytes) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  if constexpr (std::is_same_v<V, FloatVector>) {
    const __m128i mask = _mm_loadu_si128((const __m128i*)bytes);
    return (V)_mm512_maskz_mov_ps(_mm_test_epi8_mask(mask, mask), (__m512)value);
  } else {
    const __m128i mask = _mm_loadl_epi64((const __m128i*)bytes);
    return (V)_mm512_maskz_mov_pd(static_cast<__mmask8>(_mm_test_epi8_mask(mask, mask)), (__m512d)value);
  }
#else
  typedef std::conditional_t<sizeof(Element<V>) == 8, int64_t, int32_t> Index;
  typedef Index Bits __attribute__((vector_size(kVectorBytes)));
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  Bits mask;
  if constexpr (std::is_same_v<V, FloatVector>) {
    mask = (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  } else {
    mask = (Bits)_mm256_cvtepu8_epi64(_mm_loadu_si32(bytes));
  }
#else
  typedef unsigned char Bytes __attribute__((vector_size(kLanes<V>)));
  Bytes loaded;
  std::memcpy(&loaded, bytes, sizeof(loaded));
  const Bits mask = __builtin_convertvector(loaded, Bits);
#endif
  return (V)((Bits)value & (mask != 0));
#endif
}

// Permutation: lane i of the result is lane at[i] of value, at[i] in [0, lanes).
template <class V>
using Places = std::conditional_t<sizeof(Element<V>) == 8, int64_t, int32_t>;

template <class V>
FASTKD_INLINE V permute(V value, const Places<V>* at) {
#if FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY >= 2
  const __m512i places = _mm512_loadu_si512(at);
  if constexpr (std::is_same_v<V, FloatVector>) return (V)_mm512_maskz_permutexvar_ps(0xffff, places, (__m512)value);
  if constexpr (std::is_same_v<V, DoubleVector>) return (V)_mm512_maskz_permutexvar_pd(0xff, places, (__m512d)value);
#elif FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY == 1
  if constexpr (std::is_same_v<V, FloatVector>)
    return (V)_mm256_permutevar8x32_ps((__m256)value, _mm256_loadu_si256((const __m256i*)at));
#endif
  V result;
  for (int lane = 0; lane < kLanes<V>; ++lane) result[lane] = value[at[lane]];
  return result;
}

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
