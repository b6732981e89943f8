#pragma once
// A matrix whose rows are put together from codewords, applied to vectors without forming it.

#include <cstdint>

namespace weft {

// Piece s of row i is scales[i] · word code(i, s) of codebook s · books / subspaces.
struct CodewordMatrix {
    const std::uint8_t *codes;  // (outputs, bytes): one code per byte, or two where codewords <= 16, even ones low
    const float *words;         // (books, width, codewords): the words stand in the columns
    const float *scales;        // (outputs,), or null
    std::int64_t outputs, subspaces, books, codewords, width;  // codewords at most 256; a code beyond them is never followed out of the arrays
};

struct CodewordProduct {
    CodewordMatrix matrix;
    const float *x;     // (batch, subspaces · width)
    const float *bias;  // (outputs,), or null
    float *out;         // (batch, outputs)
    std::int64_t batch;
};

// out = x Ŵᵀ + bias: y_i = scale_i Σ_s ⟨x_s, word(code(i, s))⟩ + b_i.
void codewords_apply(const CodewordProduct &product, int threads);

}  // namespace weft
