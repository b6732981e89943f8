#include "table_sums.hpp"

#include "unrolled.hpp"
#include "vector.hpp"

namespace {

constexpr std::int64_t entries = weft::table_entries;

void fill(const float *words, const float *x, std::int64_t width, std::int64_t codewords, float *table) {
    constexpr int unroll = 4;
    std::int64_t k = 0;
    for (; k + unroll * Vector::width <= codewords; k += unroll * Vector::width) {
        Vector sums[unroll];
        WEFT_UNROLLED
        for (int u = 0; u < unroll; ++u) sums[u] = Vector::zero();
        for (std::int64_t w = 0; w < width; ++w) {
            const Vector value = Vector::fill(x[w]);
            WEFT_UNROLLED
            for (int u = 0; u < unroll; ++u)
                sums[u] = sums[u].add_product(Vector::load(words + w * codewords + k + u * Vector::width), value);
        }
        WEFT_UNROLLED
        for (int u = 0; u < unroll; ++u) sums[u].store(table + k + u * Vector::width);
    }
    for (; k < codewords; k += Vector::width) {
        const std::int64_t lanes = codewords - k < Vector::width ? codewords - k : Vector::width;
        Vector sum = Vector::zero();
        for (std::int64_t w = 0; w < width; ++w) {
            const float *from = words + w * codewords + k;
            const Vector word = lanes < Vector::width ? Vector::load_first(from, lanes) : Vector::load(from);
            sum = sum.add_product(word, Vector::fill(x[w]));
        }
        if (lanes < Vector::width) sum.store_first(table + k, lanes);
        else sum.store(table + k);
    }
}

void pair(const float *lows, const float *highs, float *table) {
    for (std::int64_t high = 0; high < 16; ++high) {
        const Vector value = Vector::fill(highs[high]);
        for (std::int64_t low = 0; low < 16; low += Vector::width)
            Vector::load(lows + low).add(value).store(table + 16 * high + low);
    }
}

// Four sums of their own hide the latency of the addition; the codes come eight at a time.
inline float row_sum(const float *table, const std::uint8_t *codes, std::int64_t columns) {
    float sums[4] = {};
    std::int64_t c = 0;
    for (; c + 8 <= columns; c += 8)
        for (int part = 0; part < 8; ++part) sums[part % 4] += table[(c + part) * entries + codes[c + part]];
    for (; c < columns; ++c) sums[0] += table[c * entries + codes[c]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void add(const float *tables, const std::uint8_t *codes, std::int64_t stride, std::int64_t columns, std::int64_t rows,
         float *sums) {
    constexpr std::int64_t early = 12;  // rows, as long as a line of the cache takes from memory
    for (std::int64_t i = 0; i < rows; ++i, codes += stride) {
        fetch_ahead(codes + (i + early < rows ? early * stride : 0));
        sums[i] += row_sum(tables, codes, columns);
    }
}

}  // namespace

namespace weft::WEFT_VARIANT {

const TableSums table_sums = {fill, pair, add};

}  // namespace weft::WEFT_VARIANT
