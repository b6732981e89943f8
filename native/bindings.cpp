// The only file that knows Python. Tensors arrive as addresses and sizes: converting them to arrays of
// nanobind's would cost more than a small product. weft.kernels checks them before it calls.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "block_sequence.hpp"
#include "low_rank.hpp"
#include "processor.hpp"
#include "quantized.hpp"

namespace nb = nanobind;

namespace {

template <typename T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

void low_rank_apply(std::uintptr_t x, std::uintptr_t left, std::uintptr_t right, std::uintptr_t bias,
                    std::uintptr_t out, std::int64_t batch, std::int64_t inputs, std::int64_t rank,
                    std::int64_t outputs, int threads) {
    nb::gil_scoped_release release;
    weft::low_rank_apply({at<const float>(x), at<const float>(left), at<const float>(right),
                          at<const float>(bias), at<float>(out), batch, inputs, rank, outputs},
                         threads);
}

constexpr std::size_t most_matrices = 8;

void block_sequence_apply(std::uintptr_t code, nb::list matrices, std::uintptr_t x, std::uintptr_t bias,
                          std::uintptr_t out, std::int64_t batch, int threads) {
    const float *addresses[most_matrices];
    if (matrices.size() > most_matrices) throw std::invalid_argument("at most 8 matrices");
    for (std::size_t i = 0; i < matrices.size(); ++i)
        addresses[i] = at<const float>(nb::cast<std::uintptr_t>(matrices[i]));
    nb::gil_scoped_release release;
    weft::block_sequence_apply(
        {at<const std::int64_t>(code), addresses, at<const float>(x), at<const float>(bias), at<float>(out), batch},
        threads);
}

weft::QuantizedMatrix quantized_matrix(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                                       std::uintptr_t codebook, std::int64_t book_stride, std::int64_t inputs,
                                       std::int64_t outputs, std::int64_t group, int bits) {
    return {at<const std::uint8_t>(codes), at<const float>(scales), at<const float>(zeros),
            at<const float>(codebook), book_stride, inputs, outputs, group, bits};
}

void quantized_apply(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                     std::uintptr_t bias, std::uintptr_t out, std::int64_t batch, std::int64_t inputs,
                     std::int64_t outputs, std::int64_t group, int bits, bool int8, int threads) {
    nb::gil_scoped_release release;
    const weft::QuantizedProduct product = {
        quantized_matrix(codes, scales, zeros, 0, 0, inputs, outputs, group, bits), at<const float>(x),
        at<const float>(bias), at<float>(out), batch};
    if (int8) weft::quantized_int8(product, threads);
    else weft::quantized_float(product, threads);
}

void codebook_apply(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t codebook, std::int64_t book_stride,
                    std::uintptr_t bias, std::uintptr_t out, std::int64_t batch, std::int64_t inputs,
                    std::int64_t outputs, int bits, int threads) {
    nb::gil_scoped_release release;
    weft::quantized_float({quantized_matrix(codes, 0, 0, codebook, book_stride, inputs, outputs, inputs, bits),
                           at<const float>(x), at<const float>(bias), at<float>(out), batch},
                          threads);
}

void quantized_write(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t codebook,
                     std::int64_t book_stride, std::uintptr_t out, std::int64_t inputs, std::int64_t outputs,
                     std::int64_t group, int bits, int threads) {
    nb::gil_scoped_release release;
    weft::quantized_write(
        quantized_matrix(codes, scales, zeros, codebook, book_stride, inputs, outputs, group, bits),
        at<float>(out), threads);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("instructions", &weft::instructions_name, "Name of the instruction set in use.");
    module.def("block_sequence_apply", &block_sequence_apply,
               "out = the program's product with x (+ bias) on float32 arrays; all arguments are addresses.");
    module.def("use_instructions", &weft::use_instructions,
               "Uses the leaf kernels' copy of this name from now on; False where build or processor lack it.");
    module.def("low_rank_apply", &low_rank_apply,
               "out = (x rightᵀ) leftᵀ + bias on float32 arrays given by their addresses (bias may be 0).");
    module.def("quantized_apply", &quantized_apply,
               "out = x Ŵᵀ + bias for uniform codes, on float32 arrays given by their addresses (zeros and bias "
               "may be 0); with vectors rounded to whole numbers where `int8`.");
    module.def("codebook_apply", &codebook_apply, "The same for codes of a codebook (book_stride 0: one for all).");
    module.def("quantized_write", &quantized_write, "out = Ŵ: the weights that codes stand for.");
}
