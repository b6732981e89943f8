#pragma once
// The leaf of every kernel that multiplies by a dense block: out = x rowsᵀ + bias.

#include <cstdint>

#include "bfloat16.hpp"

namespace weft {

template <typename Weight>
struct RowsProductOf {
    const float *x;           // (batch, columns), rows x_stride apart
    std::int64_t x_stride;
    const Weight *rows;       // (count, columns), contiguous
    const float *bias;        // (count,), or null
    float *out;               // (batch, count), rows out_stride apart
    std::int64_t out_stride;
    std::int64_t batch;
    std::int64_t count;
    std::int64_t columns;
    const Weight *then;       // what will be read after the last rows, or null
};

using RowsProduct = RowsProductOf<float>;

struct RowsProductKernels {
    void (*floats)(const RowsProduct &);
    void (*halves)(const RowsProductOf<Bfloat16> &);

    void operator()(const RowsProduct &product) const { floats(product); }
    void operator()(const RowsProductOf<Bfloat16> &product) const { halves(product); }
};

// The copies for this processor.
const RowsProductKernels &rows_product_kernels();

namespace portable {
extern const RowsProductKernels rows_product;
}
namespace avx2 {
extern const RowsProductKernels rows_product;
}
namespace avx512 {
extern const RowsProductKernels rows_product;
}
namespace neon {
extern const RowsProductKernels rows_product;
}

}  // namespace weft
