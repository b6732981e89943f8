#pragma once
// The leaves of products with codewords: tables of what every code would add, and sums of looked-up entries.

#include <cstdint>

namespace weft {

// A byte of codes looks up one of so many entries.
constexpr std::int64_t table_entries = 256;

struct TableSums {
    // table[k] = Σ_w words[w, k] x[w], k below `codewords`; the words of a codebook stand in the columns.
    void (*fill)(const float *words, const float *x, std::int64_t width, std::int64_t codewords, float *table);
    // table[low + 16 high] = lows[low] + highs[high]: two codes of four bits are looked up as one byte.
    void (*pair)(const float *lows, const float *highs, float *table);
    // sums[i] += Σ_c tables[c, codes[i · stride + c]], c below `columns`, i below `rows`.
    void (*add)(const float *tables, const std::uint8_t *codes, std::int64_t stride, std::int64_t columns,
                std::int64_t rows, float *sums);
};

// The copies for this processor.
const TableSums &table_sums_kernels();

namespace portable {
extern const TableSums table_sums;
}
namespace avx2 {
extern const TableSums table_sums;
}
namespace avx512 {
extern const TableSums table_sums;
}
namespace neon {
extern const TableSums table_sums;
}

}  // namespace weft
