#pragma once
// The leaves of products with packed codes. A row of codes is a little-endian stream of bits, so eight codes
// fill exactly `bits` bytes, and every leaf steps by whole groups of eight.

#include <cstdint>

namespace weft {

// Products with float vectors. The vectors come arranged in blocks of 8 * lanes inputs so that register i of a
// block holds the inputs 8 k + i, k = 0 ... lanes - 1: lane k then meets the codes of the k-th group of eight,
// which are shifted out of one register one after the other.
struct FloatRows {
    const std::uint8_t *codes;  // (outputs, row_bytes)
    std::int64_t row_bytes;
    const float *x;             // (batch, x_stride), arranged, zeros beyond the inputs
    std::int64_t x_stride;
    const float *codebook;      // values of the codes, rows `book_stride` apart; null for uniform levels
    std::int64_t book_stride;
    const float *scales;        // (outputs, groups); null for a codebook
    const float *zeros;         // (outputs, groups); null for the middle code
    const float *sums;          // (batch, groups): the sums of x over each group; null for a codebook
    const std::int32_t *first;  // per block: the group of its first input
    const std::int32_t *within; // per block and lane: the lane's group, counted from that one
    const float *bias;          // (outputs,), or null
    float *out;                 // (batch, outputs)
    std::int64_t batch, inputs, outputs, groups;
    int bits;
};

// Products with vectors of whole numbers from -127 to 127.
struct IntegerRows {
    const std::uint8_t *codes;
    std::int64_t row_bytes;
    const void *x;              // (batch, x_stride) of the leaf's own integer type, zeros beyond the inputs
    std::int64_t x_stride;
    const float *widths;        // (batch,): what one step of each vector is worth
    const float *scales;        // (outputs, groups)
    const float *zeros;         // (outputs, groups), or null
    const float *sums;          // (batch, groups)
    const std::int32_t *first;  // per step: the group of its first input
    const std::int32_t *within; // per step and lane: the lane's group, counted from that one
    std::int64_t group;
    const float *bias;
    float *out;
    std::int64_t batch, inputs, outputs, groups;
    int bits;
};

struct QuantizedLeaf {
    std::int64_t lanes;         // floats in a register
    std::int64_t integer_bytes; // of one number of a vector of whole numbers
    std::int64_t integer_step;  // inputs per step of a product of whole numbers
    // Rows [begin, end) of the products.
    void (*float_rows)(const FloatRows &, std::int64_t begin, std::int64_t end);
    void (*integer_rows)(const IntegerRows &, std::int64_t begin, std::int64_t end);
    // One row of codes as bytes. Writes up to 63 bytes beyond `inputs`.
    void (*unpack_row)(const std::uint8_t *row, std::int64_t row_bytes, std::int64_t inputs, int bits,
                       std::uint8_t *out);
    // out[j] = values[codes[j]] with 2^bits values.
    void (*look_up)(const std::uint8_t *codes, std::int64_t inputs, int bits, const float *values, float *out);
    // out[j] = (codes[j] - zero) * scale.
    void (*levels)(const std::uint8_t *codes, std::int64_t count, float zero, float scale, float *out);
    // Rounds x to whole numbers and returns what one step is worth; NaN where x is not finite.
    float (*round_vector)(const float *x, std::int64_t inputs, void *out);
};

// Inputs of a vector of whole numbers are padded to a multiple of this.
constexpr std::int64_t integer_padding = 64;

// Vectors whose largest entry is below this are rounded as if it were this: its inverse stays finite.
constexpr float smallest_activation = 1e-30f;

// The copy for the instruction set in use.
const QuantizedLeaf &quantized_leaf();

namespace portable {
extern const QuantizedLeaf quantized_leaf;
}
namespace avx2 {
extern const QuantizedLeaf quantized_leaf;
}
namespace avx512vnni {
extern const QuantizedLeaf quantized_leaf;
}
namespace neon {
extern const QuantizedLeaf quantized_leaf;
}

}  // namespace weft
