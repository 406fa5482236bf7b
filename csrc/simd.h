// Vectors of the capability being compiled: load<V>(pointer) widens to float (double for double), store(pointer, v)
// rounds. V is Vector<acc_t> or acc_t itself: the same kernel text serves whole vectors and the single elements at
// the end of a row.
#pragma once

#include "capability.h"

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

// The type sums are kept in: half types widen to float.
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
// (-ffp-contract=off): the kernel decides where a product is rounded, and x * y - x * y is 0.
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

FASTKD_INLINE FloatVector widen(HalfBitsVector bits, BFloat16) {
  return (FloatVector)(__builtin_convertvector(bits, BitsVector) << 16);
}

FASTKD_INLINE HalfBitsVector narrow(FloatVector value, BFloat16) {  // to nearest, ties to even; NaN stays NaN
  const BitsVector bits = (BitsVector)value;
  const BitsVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsVector quiet = BitsVector{} + 0x7fc0;
  return __builtin_convertvector(value == value ? rounded : quiet, HalfBitsVector);
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

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END
