#pragma once
// y = (x Rᵀ) Lᵀ + bias: a matrix L R of low rank applied to a batch of vectors.

#include <cstdint>

namespace weft {

struct LowRankProduct {
    const float *x;      // (batch, inputs)
    const float *left;   // L: (outputs, rank)
    const float *right;  // R: (rank, inputs)
    const float *bias;   // (outputs,), or null
    float *out;          // (batch, outputs)
    std::int64_t batch;
    std::int64_t inputs;
    std::int64_t rank;
    std::int64_t outputs;
};

// All arrays contiguous and row-major, none overlapping `out`. Uses up to `threads` threads where that pays.
// Throws std::bad_alloc where its scratch memory cannot be had.
void low_rank_apply(const LowRankProduct &product, int threads);

}  // namespace weft
