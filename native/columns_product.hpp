#pragma once
// The leaf of kernels whose matrices are stored input by input: out = Σ source matrix + bias over segments.
//
// Every matrix row that is read is scaled by one number of the source and added up, so no sums across a
// register are needed and short rows cost no more than long ones.

#include <cstdint>

namespace weft {

// One part of the sum: `count` rows of a row-major matrix, each met by one number of the source.
struct ColumnsSegment {
    const float *matrix;         // first row, first column that counts
    std::int64_t matrix_stride;  // from one row to the next
    const float *source;         // (batch, count), rows source_stride apart
    std::int64_t source_stride;
    std::int64_t count;
};

struct ColumnsProduct {
    const ColumnsSegment *segments;
    std::int64_t segment_count;  // none at all gives the bias, or zeros
    // The first that the next product will read, or null: for one input its rows are fetched while the last ones of
    // this product are computed, as no processor foresees the way from block to block.
    const ColumnsSegment *next;
    const float *bias;           // (outputs,), or null
    float *out;                  // (batch, outputs), rows out_stride apart
    std::int64_t out_stride;
    std::int64_t batch;
    std::int64_t outputs;
};

using ColumnsProductKernel = void (*)(const ColumnsProduct &);

// The copy for this processor.
ColumnsProductKernel columns_product_kernel();

namespace portable {
void columns_product(const ColumnsProduct &);
}
namespace avx2 {
void columns_product(const ColumnsProduct &);
}
namespace avx512 {
void columns_product(const ColumnsProduct &);
}
namespace neon {
void columns_product(const ColumnsProduct &);
}

}  // namespace weft
