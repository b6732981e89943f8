// Products by one copy of the leaf kernels against those by the portable copy; the name of the copy is the argument.
//
// For processors that are not at hand: tools/check_neon.py builds it for ARM and runs it in an emulator. Where the
// processor is there the tests in Python prove more.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "bfloat16.hpp"
#include "block_sequence.hpp"
#include "codewords.hpp"
#include "low_rank.hpp"
#include "processor.hpp"
#include "quantized.hpp"
#include "sparse_chain.hpp"

namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::uint8_t>;

std::mt19937 generator;

Floats drawn(std::int64_t count) {
    std::normal_distribution<float> normal;
    Floats values(static_cast<std::size_t>(count));
    for (float &value : values) value = normal(generator);
    return values;
}

Bytes codes(std::int64_t count) {
    Bytes values(static_cast<std::size_t>(count));
    for (std::uint8_t &value : values) value = static_cast<std::uint8_t>(generator());
    return values;
}

std::vector<weft::Bfloat16> halves(const Floats &values) {
    std::vector<weft::Bfloat16> found;
    for (const float value : values) found.push_back(weft::narrowed(value));
    return found;
}

std::string copy;
int cases = 0, failures = 0;

// Runs a product with both copies; they may differ by rounding only.
void compare(const std::string &name, std::int64_t count, const std::function<void(float *)> &product) {
    Floats portable(static_cast<std::size_t>(count)), other(portable);
    weft::use_instructions("portable");
    product(portable.data());
    weft::use_instructions(copy.c_str());
    product(other.data());
    double largest = 0, difference = 0;
    for (std::size_t i = 0; i < portable.size(); ++i) {
        largest = std::max(largest, std::fabs(double(portable[i])));
        difference = std::max(difference, std::fabs(double(portable[i]) - other[i]));
    }
    ++cases;
    if (!(difference <= 2e-5 * largest)) {
        ++failures;
        std::printf("%s: differs by %g of %g\n", name.c_str(), difference, largest);
    }
}

void low_rank(std::int64_t batch, std::int64_t inputs, std::int64_t rank, std::int64_t outputs) {
    const Floats x = drawn(batch * inputs), left = drawn(outputs * rank), right = drawn(rank * inputs);
    const Floats bias = drawn(outputs);
    compare("low rank", batch * outputs, [&](float *out) {
        weft::low_rank_apply(
            weft::LowRankProduct{x.data(), left.data(), right.data(), bias.data(), out, batch, inputs, rank, outputs}, 2);
    });
    const std::vector<weft::Bfloat16> small_left = halves(left), small_right = halves(right);
    compare("low rank of halves", batch * outputs, [&](float *out) {
        weft::low_rank_apply(weft::LowRankProductOf<weft::Bfloat16>{x.data(), small_left.data(), small_right.data(),
                                                                    bias.data(), out, batch, inputs, rank, outputs},
                             2);
    });
}

// y = x A + b as a program of one step, and as one of two halves.
void block(std::int64_t batch, std::int64_t inputs, std::int64_t outputs) {
    const Floats x = drawn(batch * inputs), matrix = drawn(inputs * outputs), bias = drawn(outputs);
    const float *matrices[] = {matrix.data()};
    const std::int64_t half = inputs / 2;
    std::vector<std::int64_t> code = {inputs, outputs, 0, 1, 0, 0, inputs * outputs, 0, 0, 1, inputs * outputs, 1,
                                      2, 0, outputs, 2, 0, 0, outputs, 0, 0, half, 0, half * outputs, outputs, 0, half,
                                      inputs - half};
    compare("blocks", batch * outputs, [&](float *out) {
        weft::block_sequence_apply(
            weft::BlockSequenceOf<float>{code.data(), matrices, x.data(), bias.data(), out, batch}, 2);
    });
    const std::vector<weft::Bfloat16> small = halves(matrix);
    const weft::Bfloat16 *small_matrices[] = {small.data()};
    compare("blocks of halves", batch * outputs, [&](float *out) {
        weft::block_sequence_apply(
            weft::BlockSequenceOf<weft::Bfloat16>{code.data(), small_matrices, x.data(), bias.data(), out, batch}, 2);
    });
}

void sparse(std::int64_t batch, std::int64_t inputs, std::int64_t outputs, std::int64_t each, bool narrow) {
    const Floats x = drawn(batch * inputs), values = drawn(outputs * each), bias = drawn(outputs);
    std::vector<std::int32_t> wide;
    std::vector<std::uint16_t> small;
    std::vector<std::int64_t> starts = {0};
    for (std::int64_t row = 0; row < outputs; ++row) {
        for (std::int64_t k = 0; k < each; ++k) {
            wide.push_back(static_cast<std::int32_t>(generator() % inputs));
            small.push_back(static_cast<std::uint16_t>(wide.back()));
        }
        starts.push_back((row + 1) * each);
    }
    const void *columns = narrow ? static_cast<const void *>(small.data()) : wide.data();
    const weft::SparseSupport support = {outputs, inputs, columns, starts.data(), narrow};
    compare("sparse", batch * outputs, [&](float *out) {
        weft::sparse_chain_apply({x.data(), values.data(), &support, 1, bias.data(), out, batch}, 2);
    });
}

void quantized(std::int64_t batch, std::int64_t inputs, std::int64_t outputs, int bits, std::int64_t group,
               bool zeros) {
    const std::int64_t bytes = (inputs * bits + 7) / 8;
    const Floats x = drawn(batch * inputs), scales = drawn(outputs * inputs / group), bias = drawn(outputs);
    const Floats middle = drawn(outputs * inputs / group), book = drawn(outputs << bits);
    const Bytes packed = codes(outputs * bytes);
    const std::string name = std::to_string(bits) + " bits in groups of " + std::to_string(group);
    weft::QuantizedProduct product = {{packed.data(), scales.data(), zeros ? middle.data() : nullptr, nullptr, 0,
                                       inputs, outputs, group, bits},
                                      x.data(), bias.data(), nullptr, batch};
    compare(name, batch * outputs, [&](float *out) {
        product.out = out;
        weft::quantized_float(product, 2);
    });
    compare(name + ", int8", batch * outputs, [&](float *out) {
        product.out = out;
        weft::quantized_int8(product, 2);
    });
    compare(name + ", codebook", batch * outputs, [&](float *out) {
        weft::quantized_float({{packed.data(), nullptr, nullptr, book.data(), std::int64_t{1} << bits, inputs, outputs,
                                inputs, bits},
                               x.data(), bias.data(), out, batch},
                              2);
    });
}

void codewords(std::int64_t batch, std::int64_t subspaces, std::int64_t width, std::int64_t words,
               std::int64_t outputs) {
    const Floats x = drawn(batch * subspaces * width), book = drawn(width * words), scales = drawn(outputs);
    Bytes packed = codes(outputs * (words <= 16 ? (subspaces + 1) / 2 : subspaces));
    compare("codewords", batch * outputs, [&](float *out) {
        weft::codewords_apply({{packed.data(), book.data(), scales.data(), outputs, subspaces, 1, words, width},
                               x.data(), nullptr, out, batch},
                              2);
    });
}

}  // namespace

int main(int count, char **arguments) {
    copy = count > 1 ? arguments[1] : "portable";
    if (!weft::use_instructions(copy.c_str())) {
        std::printf("%s instructions are not to be had here\n", copy.c_str());
        return 2;
    }
    for (const std::int64_t batch : {1, 2, 5, 33, 130}) {
        for (const std::int64_t size : {1, 7, 16, 61, 200}) {
            low_rank(batch, size, 3, 2 * size + 1);
            low_rank(batch, 2 * size, size, size);
            block(batch, size + 1, size);
            sparse(batch, size, 50, 5, true);
            sparse(batch, size, 50, 13, false);
        }
        for (int bits = 1; bits <= 8; ++bits)
            for (const std::int64_t group : {2, 6, 24, 96}) quantized(batch, 96, 11, bits, group, bits % 2 == 0);
        for (const std::int64_t inputs : {5, 64, 257}) quantized(batch, inputs, 9, 4, inputs, false);
        for (const std::int64_t words : {3, 16, 100, 256}) codewords(batch, 27, 5, words, 40);
    }
    std::printf("%s: %d products, %d differ from the portable copy's\n", copy.c_str(), cases, failures);
    return failures == 0 ? 0 : 1;
}
