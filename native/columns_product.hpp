#pragma once
// The leaf of kernels whose matrices are stored input by input: out = start + Σ source matrix over segments.
//
// Every matrix row that is read is scaled by one number of the source and added up, so no sums across a
// register are needed and short rows cost no more than long ones.

#include <cstdint>

#include "bfloat16.hpp"

namespace weft {

// One part of the sum: `count` rows of a row-major matrix, each met by one number of the source.
template <typename Weight>
struct ColumnsSegmentOf {
    const Weight *matrix;        // first row, first column that counts
    std::int64_t matrix_stride;  // from one row to the next
    const float *source;         // (batch, count), rows source_stride apart
    std::int64_t source_stride;
    std::int64_t count;
};

template <typename Weight>
struct ColumnsProductOf {
    const ColumnsSegmentOf<Weight> *segments;
    std::int64_t segment_count;  // none at all gives the start
    // The first that the next product will read, or null: for one input its rows are fetched while the last ones of
    // this product are computed, as no processor foresees the way from block to block.
    const ColumnsSegmentOf<Weight> *next;
    const float *start;          // (batch, outputs), rows start_stride apart, away from `out`; or null for zeros
    std::int64_t start_stride;   // 0 for a bias
    float *out;                  // (batch, outputs), rows out_stride apart
    std::int64_t out_stride;
    std::int64_t batch;
    std::int64_t outputs;
};

struct ColumnsProductKernels {
    void (*floats)(const ColumnsProductOf<float> &);
    void (*halves)(const ColumnsProductOf<Bfloat16> &);

    void operator()(const ColumnsProductOf<float> &product) const { floats(product); }
    void operator()(const ColumnsProductOf<Bfloat16> &product) const { halves(product); }
};

// The copies for this processor.
const ColumnsProductKernels &columns_product_kernels();

namespace portable {
extern const ColumnsProductKernels columns_product;
}
namespace avx2 {
extern const ColumnsProductKernels columns_product;
}
namespace avx512 {
extern const ColumnsProductKernels columns_product;
}
namespace neon {
extern const ColumnsProductKernels columns_product;
}

}  // namespace weft
