#pragma once
// A chain of sparse matrices applied to a batch of vectors.

#include <cstdint>

#include "sparse_rows.hpp"

namespace weft {

// One matrix of the chain without its values. Every column must be below `columns_count`, `starts` must not
// decrease, begin with 0 and end with the number of entries: the caller has checked it.
struct SparseSupport {
    std::int64_t rows, columns_count;
    const void *columns;         // std::uint16_t where `narrow`, else std::int32_t
    const std::int64_t *starts;  // rows + 1
    bool narrow;
};

// out = x (S_1 S_2 … S_count)ᵀ + bias; the values of S_1 come first, then those of S_2, and so on.
struct SparseChainProduct {
    const float *x;                 // (batch, columns of S_count)
    const float *values;            // of all entries
    const SparseSupport *supports;  // S_1, …, S_count
    std::int64_t count;             // at least 1
    const float *bias;              // (rows of S_1,), or null
    float *out;                     // (batch, rows of S_1)
    std::int64_t batch;
};

void sparse_chain_apply(const SparseChainProduct &product, int threads);

}  // namespace weft
