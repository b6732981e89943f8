#pragma once
// y = (x Rᵀ) Lᵀ + bias: a matrix L R of low rank applied to a batch of vectors.

#include <cstdint>

#include "bfloat16.hpp"

namespace weft {

template <typename Weight>
struct LowRankProductOf {
    const float *x;      // (batch, inputs)
    const Weight *left;  // L: (outputs, rank)
    const Weight *right; // R: (rank, inputs)
    const float *bias;   // (outputs,), or null
    float *out;          // (batch, outputs)
    std::int64_t batch;
    std::int64_t inputs;
    std::int64_t rank;
    std::int64_t outputs;
};

// All arrays contiguous and row-major, none overlapping `out`. Uses up to `threads` threads where that pays.
// Throws std::bad_alloc where its scratch memory cannot be had.
using LowRankProduct = LowRankProductOf<float>;

void low_rank_apply(const LowRankProduct &product, int threads);
void low_rank_apply(const LowRankProductOf<Bfloat16> &product, int threads);

}  // namespace weft
