#pragma once
// Products with packed codes: uniform levels with float vectors or with vectors rounded to whole numbers, and
// codebooks.

#include <cstdint>

namespace weft {

struct QuantizedMatrix {
    const std::uint8_t *codes;  // (outputs, ⌈inputs · bits / 8⌉): each row a little-endian stream of bits
    const float *scales;        // (outputs, inputs / group)
    const float *zeros;         // (outputs, inputs / group), or null for 2^(bits - 1)
    const float *codebook;      // (outputs or 1, 2^bits); where there is one there are no scales
    std::int64_t book_stride;   // 2^bits, or 0 where one book serves all rows
    std::int64_t inputs, outputs, group;
    int bits;                   // 1 to 8
};

struct QuantizedProduct {
    QuantizedMatrix matrix;
    const float *x;     // (batch, inputs)
    const float *bias;  // (outputs,), or null
    float *out;         // (batch, outputs)
    std::int64_t batch;
};

// Any group; the fast ones are whole rows and multiples of four inputs.
//
// All arrays contiguous and row-major, none overlapping what is written. Use up to `threads` threads where that
// pays. Throw std::bad_alloc where scratch memory cannot be had.
void quantized_float(const QuantizedProduct &product, int threads);
void quantized_int8(const QuantizedProduct &product, int threads);

}  // namespace weft
