#pragma once
// The leaves of products with packed codes. A row of codes is a little-endian stream of bits, so eight codes
// fill exactly `bits` bytes, and every leaf steps by whole groups of eight.

#include <cstdint>

namespace weft {

// Products with the values of a codebook. The vectors come arranged in blocks of 8 * lanes inputs so that register
// i of a block holds the inputs 8 k + i, k = 0 ... lanes - 1: lane k then meets the codes of the k-th group of
// eight, which are shifted out of one register one after the other.
struct CodebookRows {
    const std::uint8_t *codes;  // (outputs, row_bytes)
    std::int64_t row_bytes;
    const float *x;             // (batch, x_stride), arranged, zeros beyond the inputs
    std::int64_t x_stride;
    const float *codebook;      // values of the codes, rows `book_stride` apart
    std::int64_t book_stride;
    const float *bias;          // (outputs,), or null
    float *out;                 // (batch, outputs)
    std::int64_t batch, inputs, outputs;
    int bits;
};

// Products of uniform levels with vectors of whole numbers from -127 to 127. An input is a sum of `digits` such
// vectors, each with what one step of it is worth: one for rounded inputs, float_digits for inputs as they are.
struct IntegerRows {
    const std::uint8_t *codes;     // (outputs, row_bytes)
    const std::uint8_t *codes_end; // of them all
    std::int64_t row_bytes;
    const std::int8_t *x;       // (batch * digits, x_stride), zeros beyond the inputs
    std::int64_t x_stride;
    const float *widths;        // (batch * digits,): what one step of each vector is worth
    const float *scales;        // (outputs, groups)
    const float *zeros;         // (outputs, groups), or null for the middle code
    const float *sums;          // (batch, groups): the sums of the inputs over each group, in steps where digits is 1
    const std::int32_t *first;  // per step: the group of its first input
    const std::int32_t *within; // per step and lane: the group of the lane's first input, counted from that one
    // Where groups of more than one per row are no multiples of four, and at least five inputs: the same for the
    // lane's last input, and how far behind each vector there is another one that holds the inputs of those
    // groups, in place of the first one; else null and 0.
    const std::int32_t *within_second;
    std::int64_t second;
    std::int64_t group;
    const float *bias;          // (outputs,), or null
    float *out;                 // (batch, outputs)
    std::int64_t batch, inputs, outputs, groups;
    int bits, digits;
};

// A float vector is a sum of three of whole numbers, each of which tells the last one's steps apart into
// `digit_base`: what is lost is at most 2^-24 of the largest entry, as in a float of its size.
constexpr int float_digits = 3;
constexpr float digit_base = 254.0f;

// How many times larger than the mean absolute value the largest entry may be for that: beyond it what the
// smaller entries lose would show.
constexpr float largest_outlier = 128.0f;

struct QuantizedLeaf {
    std::int64_t lanes;         // floats in a register
    std::int64_t integer_step;  // inputs per step of a product of whole numbers
    // Rows [begin, end) of the products.
    void (*codebook_rows)(const CodebookRows &, std::int64_t begin, std::int64_t end);
    void (*integer_rows)(const IntegerRows &, std::int64_t begin, std::int64_t end);
    // One row of codes as bytes. Writes up to 63 bytes beyond `inputs`.
    void (*unpack_row)(const std::uint8_t *row, std::int64_t row_bytes, std::int64_t inputs, int bits,
                       std::uint8_t *out);
    // out[j] = values[codes[j]] with 2^bits values.
    void (*look_up)(const std::uint8_t *codes, std::int64_t inputs, int bits, const float *values, float *out);
    // out[j] = (codes[j] - zero) * scale.
    void (*levels)(const std::uint8_t *codes, std::int64_t count, float zero, float scale, float *out);
    // Rounds x to whole numbers and returns what one step is worth; NaN where x is not finite.
    float (*round_vector)(const float *x, std::int64_t inputs, std::int8_t *out);
    // Writes x as float_digits vectors, rows `stride` apart; false where that would lose too much.
    bool (*split_vector)(const float *x, std::int64_t inputs, std::int8_t *out, std::int64_t stride, float *widths);
    // sums[g] += width * (the sum of x over group g)
    void (*add_group_sums)(const std::int8_t *x, std::int64_t groups, std::int64_t group, float width, float *sums);
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
