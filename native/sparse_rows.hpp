#pragma once
// The leaves of products with sparse matrices, whose entries lie row after row.

#include <cstdint>

namespace weft {

struct SparseMatrix {
    const float *values;         // of every entry
    const void *columns;         // of every entry: std::uint16_t where `narrow`, else std::int32_t
    const std::int64_t *starts;  // of every row, and where the last one ends
    bool narrow;
};

// Rows [begin, end) of out = S x + bias for one vector x.
struct SparseVectorProduct {
    SparseMatrix matrix;
    const float *x;
    const float *bias;  // one per row, or null
    float *out;         // one per row
    std::int64_t begin, end;
};

// The same for a batch held with one line of `tile` numbers per coordinate. Row r goes to line r - begin of out.
struct SparseTileProduct {
    SparseMatrix matrix;
    const float *x;     // (columns, tile)
    const float *bias;  // one per row, or null
    float *out;         // (end - begin, tile)
    std::int64_t begin, end;
    std::int64_t tile;  // 1, 2 or 4 times `lanes`
};

struct SparseKernels {
    void (*vector_product)(const SparseVectorProduct &);
    void (*tile_product)(const SparseTileProduct &);
    // to[c * to_stride + r] = from[r * from_stride + c]
    void (*transpose)(const float *from, std::int64_t from_stride, float *to, std::int64_t to_stride,
                      std::int64_t rows, std::int64_t columns);
    std::int64_t lanes;  // of one register
};

// The copy for this processor.
const SparseKernels &sparse_kernels();

namespace portable {
extern const SparseKernels sparse_rows;
}
namespace avx2 {
extern const SparseKernels sparse_rows;
}
namespace avx512 {
extern const SparseKernels sparse_rows;
}
namespace neon {
extern const SparseKernels sparse_rows;
}

}  // namespace weft
