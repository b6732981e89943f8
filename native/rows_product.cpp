#include "rows_product.hpp"

#include "unrolled.hpp"
#include "vector.hpp"

namespace {

// A tile of Rows x Batch inner products: every loaded vector of a row serves Batch inputs and every
// loaded vector of an input serves Rows rows, so Rows * Batch products cost Rows + Batch loads.
template <int Rows, int Batch, typename Weight>
inline void tile(const weft::RowsProductOf<Weight> &p, std::int64_t row, std::int64_t input) {
    Vector sums[Batch][Rows];
    WEFT_UNROLLED
    for (int b = 0; b < Batch; ++b)
        WEFT_UNROLLED
        for (int r = 0; r < Rows; ++r) sums[b][r] = Vector::zero();

    const float *x = p.x + input * p.x_stride;
    const Weight *rows = p.rows + row * p.columns;
    // One input reads every row once: the next ones are fetched while these are computed, at least so far ahead
    // that they come in time.
    constexpr std::int64_t least_ahead = 512;
    const bool last = row + 2 * Rows > p.count && p.then != nullptr;
    const std::int64_t distance = Rows * p.columns < least_ahead ? least_ahead : Rows * p.columns;
    const Weight *ahead = last ? p.then : rows + distance;
    std::int64_t k = 0;
    for (; k + Vector::width <= p.columns; k += Vector::width) {
        Vector values[Batch];
        WEFT_UNROLLED
        for (int b = 0; b < Batch; ++b) values[b] = Vector::load(x + b * p.x_stride + k);
        WEFT_UNROLLED
        for (int r = 0; r < Rows; ++r) {
            if (Batch == 1) fetch_ahead(ahead + r * p.columns + k);
            const Vector weights = Vector::load(rows + r * p.columns + k);
            WEFT_UNROLLED
            for (int b = 0; b < Batch; ++b) sums[b][r] = sums[b][r].add_product(weights, values[b]);
        }
    }
    const std::int64_t rest = p.columns - k;
    if (rest > 0) {
        Vector values[Batch];
        WEFT_UNROLLED
        for (int b = 0; b < Batch; ++b) values[b] = Vector::load_first(x + b * p.x_stride + k, rest);
        WEFT_UNROLLED
        for (int r = 0; r < Rows; ++r) {
            const Vector weights = Vector::load_first(rows + r * p.columns + k, rest);
            WEFT_UNROLLED
            for (int b = 0; b < Batch; ++b) sums[b][r] = sums[b][r].add_product(weights, values[b]);
        }
    }

    const float *bias = p.bias != nullptr ? p.bias + row : nullptr;
    WEFT_UNROLLED
    for (int b = 0; b < Batch; ++b) {
        float *out = p.out + (input + b) * p.out_stride + row;
        if constexpr (Rows % 4 == 0) {
            WEFT_UNROLLED
            for (int r = 0; r < Rows; r += 4)
                store_four_sums(sums[b][r], sums[b][r + 1], sums[b][r + 2], sums[b][r + 3],
                                bias != nullptr ? bias + r : nullptr, out + r);
        } else {
            WEFT_UNROLLED
            for (int r = 0; r < Rows; ++r) out[r] = sums[b][r].sum() + (bias != nullptr ? bias[r] : 0.0f);
        }
    }
}

// As many inputs at once as leave registers for their vectors and one of the weights.
constexpr int batch_tile = Vector::registers >= 32 ? 5 : 3;

template <int Rows, typename Weight>
inline void all_inputs(const weft::RowsProductOf<Weight> &p, std::int64_t row) {
    std::int64_t input = 0;
    for (; input + batch_tile <= p.batch; input += batch_tile) tile<Rows, batch_tile>(p, row, input);
    for (; input < p.batch; ++input) tile<Rows, 1>(p, row, input);
}

template <typename Weight>
void rows_product(const weft::RowsProductOf<Weight> &p) {
    std::int64_t row = 0;
    if (p.batch == 1)  // one input: eight sums hide the latency of the multiply-add
        for (; row + 8 <= p.count; row += 8) tile<8, 1>(p, row, 0);
    for (; row + 4 <= p.count; row += 4) all_inputs<4>(p, row);
    for (; row < p.count; ++row) all_inputs<1>(p, row);
}

}  // namespace

namespace weft::WEFT_VARIANT {

const RowsProductKernels rows_product = {::rows_product<float>, ::rows_product<Bfloat16>};

}  // namespace weft::WEFT_VARIANT
