#pragma once
// WEFT_UNROLLED stands before a short loop over an array of registers, whose length the compiler knows. Unrolled late,
// or not at all, such an array stays in memory, and every multiply-add with it loads and stores: gcc 12 does that to
// arrays of sums. Without registers of several numbers nothing is gained by it.

#if !(defined(__AVX2__) || defined(__AVX512F__) || (defined(__ARM_NEON) && defined(__aarch64__)))
#define WEFT_UNROLLED
#elif defined(__clang__)
#define WEFT_UNROLLED _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define WEFT_UNROLLED _Pragma("GCC unroll 32")
#else
#define WEFT_UNROLLED
#endif
