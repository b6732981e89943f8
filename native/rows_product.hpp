#pragma once
// The leaf of every kernel that multiplies by a dense block: out = x rowsᵀ + bias.

#include <cstdint>

namespace weft {

struct RowsProduct {
    const float *x;           // (batch, columns), rows x_stride apart
    std::int64_t x_stride;
    const float *rows;        // (count, columns), contiguous
    const float *bias;        // (count,), or null
    float *out;               // (batch, count), rows out_stride apart
    std::int64_t out_stride;
    std::int64_t batch;
    std::int64_t count;
    std::int64_t columns;
    const float *then;        // what will be read after the last rows, or null
};

using RowsProductKernel = void (*)(const RowsProduct &);

// The copy for this processor, and what its instruction set is called.
RowsProductKernel rows_product_kernel();

namespace portable {
void rows_product(const RowsProduct &);
}
namespace avx2 {
void rows_product(const RowsProduct &);
}
namespace avx512 {
void rows_product(const RowsProduct &);
}
namespace neon {
void rows_product(const RowsProduct &);
}

}  // namespace weft
