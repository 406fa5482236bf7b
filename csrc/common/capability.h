// The instruction sets that kernels are compiled for, and their selection.
//
// The build compiles every source once per value of FASTKD_CAPABILITY (0 generic, 1 AVX2, 2 AVX-512, 3 AVX-512 with
// bf16 dot products: only for sources that define FASTKD_BF16_KERNELS before all includes). Kernels are placed between
// FASTKD_KERNELS_BEGIN and FASTKD_KERNELS_END in an anonymous namespace, after all includes: only this region is
// compiled for the instruction set, so that no inline function of the standard library compiled for AVX-512 can replace
// a generic one at link time. Kernels are exported as a table (FASTKD_KERNEL_TABLE), which the host side looks up for
// the instruction set in use; the host side is compiled in the generic pass only (common/call.h).
#pragma once

#ifndef FASTKD_CAPABILITY
#error "FASTKD_CAPABILITY must be 0 (generic), 1 (AVX2), 2 (AVX-512) or 3 (AVX512_BF16); the build defines it"
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTKD_X86_CAPABILITIES 1
#else
#define FASTKD_X86_CAPABILITIES 0  // one generic version: the compiler's baseline
#endif

#define FASTKD_GENERIC_PASS (FASTKD_CAPABILITY == 0)
#ifdef FASTKD_BF16_KERNELS
#define FASTKD_COMPILES_KERNELS (FASTKD_CAPABILITY == 0 || FASTKD_X86_CAPABILITIES)
#else
#define FASTKD_COMPILES_KERNELS (FASTKD_CAPABILITY == 0 || (FASTKD_X86_CAPABILITIES && FASTKD_CAPABILITY < 3))
#endif

#if FASTKD_CAPABILITY == 3 && FASTKD_X86_CAPABILITIES
#define FASTKD_KERNELS_BEGIN  \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512\")")
#define FASTKD_KERNELS_END _Pragma("GCC pop_options")
#elif FASTKD_CAPABILITY == 2 && FASTKD_X86_CAPABILITIES
#define FASTKD_KERNELS_BEGIN       \
  _Pragma("GCC push_options")      \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512\")")
#define FASTKD_KERNELS_END _Pragma("GCC pop_options")
#elif FASTKD_CAPABILITY == 1 && FASTKD_X86_CAPABILITIES
#define FASTKD_KERNELS_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define FASTKD_KERNELS_END _Pragma("GCC pop_options")
#else
#define FASTKD_KERNELS_BEGIN
#define FASTKD_KERNELS_END
#endif

namespace fastkd {

enum class Capability : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The capability in use: FASTKD_CPU_CAPABILITY (generic, avx2, avx512, avx512_bf16) if set, else the best one that this
// CPU supports.
// Throws if the variable has another value, or one that this CPU or build does not support.
Capability cpu_capability();

// Specialised by an op's source in each pass, by FASTKD_KERNEL_TABLE.
template <class Table, int capability>
const Table& kernels();

// A table for each dtype: float, double, BFloat16, Half, or only the first two.
template <class Table>
struct ByType {
  Table of[4];
};

// Placed after the kernels of an op; its tables are Kernels<T>::table() for each of these dtypes.
#define FASTKD_KERNEL_TABLES(Table, Kernels, ...)                          \
  namespace fastkd {                                                       \
  template <>                                                              \
  const ByType<Table>& kernels<ByType<Table>, FASTKD_CAPABILITY>() {       \
    static const ByType<Table> tables = tables_of<Table, Kernels, __VA_ARGS__>(); \
    return tables;                                                         \
  }                                                                        \
  }
template <class Table, template <class> class Kernels, class... Types>
ByType<Table> tables_of() {
  return {{Kernels<Types>::table()...}};
}

// Set to true by a source that defines FASTKD_BF16_KERNELS, before its first use of active_kernels.
template <class Table>
inline constexpr bool kHasBf16Kernels = false;

// The table of the capability in use.
template <class Table>
const Table& active_kernels() {
#if FASTKD_X86_CAPABILITIES
  switch (cpu_capability()) {
    case Capability::avx512_bf16:
      if constexpr (kHasBf16Kernels<Table>) return kernels<Table, 3>();
      [[fallthrough]];
    case Capability::avx512: return kernels<Table, 2>();
    case Capability::avx2: return kernels<Table, 1>();
    case Capability::generic: break;
  }
#endif
  return kernels<Table, 0>();
}

}  // namespace fastkd
