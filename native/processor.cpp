#include "processor.hpp"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "columns_product.hpp"
#include "rows_product.hpp"
#include "sparse_rows.hpp"
#include "table_sums.hpp"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace weft {

namespace {

#if defined(_MSC_VER) && defined(_M_X64)
bool has_bits(int leaf, int register_index, unsigned bits) {
    int registers[4];
    __cpuidex(registers, leaf, 0);
    return (static_cast<unsigned>(registers[register_index]) & bits) == bits;
}
// The operating system must save the wide registers too: XCR0 bits 1-2 (AVX), 5-7 (AVX-512).
bool saves(std::uint64_t state) { return has_bits(1, 2, 1u << 27) && (_xgetbv(0) & state) == state; }
[[maybe_unused]] bool has_avx2() { return saves(0x6) && has_bits(1, 2, 1u << 12) && has_bits(7, 1, 1u << 5 | 1u << 8); }
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && saves(0xE6) && has_bits(7, 1, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31);
}
#elif defined(__x86_64__)
// These builtins ask the operating system's part (XCR0) as well.
[[maybe_unused]] bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
}
#endif

const char *name_of(Instructions which) {
    switch (which) {
        case Instructions::neon: return "NEON";
        case Instructions::avx2: return "AVX2";
        case Instructions::avx512: return "AVX-512";
        case Instructions::portable: break;
    }
    return "portable";
}

Instructions detect() {
#if defined(WEFT_HAS_neon)
    return Instructions::neon;  // every 64-bit ARM processor has it
#endif
#if defined(WEFT_HAS_avx512)
    if (has_avx512()) return Instructions::avx512;
#endif
#if defined(WEFT_HAS_avx2)
    if (has_avx2()) return Instructions::avx2;
#endif
    return Instructions::portable;
}

bool can(Instructions wanted) {
    switch (wanted) {
#if defined(WEFT_HAS_neon)
        case Instructions::neon: return true;
#endif
#if defined(WEFT_HAS_avx2)
        case Instructions::avx2: return has_avx2();
#endif
#if defined(WEFT_HAS_avx512)
        case Instructions::avx512: return has_avx512();
#endif
        case Instructions::portable: return true;
        default: return false;
    }
}

std::atomic<Instructions> &in_use() {
    static std::atomic<Instructions> chosen{detect()};
    return chosen;
}

}  // namespace

Instructions instructions() { return in_use().load(std::memory_order_relaxed); }

bool use_instructions(const char *name) {
    for (Instructions wanted :
         {Instructions::portable, Instructions::neon, Instructions::avx2, Instructions::avx512})
        if (std::strcmp(name, name_of(wanted)) == 0 && can(wanted)) {
            in_use().store(wanted, std::memory_order_relaxed);
            return true;
        }
    return false;
}

const char *instructions_name() { return name_of(instructions()); }

bool has_avx512_integers() {
#if defined(__x86_64__) && !defined(_MSC_VER)
    return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// Returns this processor's copy of a leaf kernel: one line per kernel below.
#if defined(WEFT_HAS_neon)
#define WEFT_NEON_COPY(name) case Instructions::neon: return neon::name;
#else
#define WEFT_NEON_COPY(name)
#endif
#if defined(WEFT_HAS_avx2)
#define WEFT_AVX2_COPY(name) case Instructions::avx2: return avx2::name;
#else
#define WEFT_AVX2_COPY(name)
#endif
#if defined(WEFT_HAS_avx512)
#define WEFT_AVX512_COPY(name) case Instructions::avx512: return avx512::name;
#else
#define WEFT_AVX512_COPY(name)
#endif
#define WEFT_RETURN_COPY(name)            \
    switch (instructions()) {             \
        WEFT_NEON_COPY(name)              \
        WEFT_AVX2_COPY(name)              \
        WEFT_AVX512_COPY(name)            \
        default: return portable::name;   \
    }

const ColumnsProductKernels &columns_product_kernels() { WEFT_RETURN_COPY(columns_product) }

const RowsProductKernels &rows_product_kernels() { WEFT_RETURN_COPY(rows_product) }
const SparseKernels &sparse_kernels() { WEFT_RETURN_COPY(sparse_rows) }

const TableSums &table_sums_kernels() { WEFT_RETURN_COPY(table_sums) }

}  // namespace weft
