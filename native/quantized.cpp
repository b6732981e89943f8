#include "quantized.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "processor.hpp"
#include "quantized_leaf.hpp"
#include "rows_product.hpp"
#include "threads.hpp"

namespace weft {

namespace {

// Multiply-adds below which waking a thread costs more than it saves: PyTorch's own threads, which keep spinning
// after their work, may have to give up a core first.
constexpr std::int64_t worth_a_thread = 1536 * 1024;

template <typename Number>
Number *at_least(std::vector<Number> &memory, std::int64_t count) {
    if (memory.size() < static_cast<std::size_t>(count)) memory.resize(static_cast<std::size_t>(count));
    return memory.data();
}

// Every thread that calls keeps its own; workers read the caller's.
struct Scratch {
    std::vector<float> x, sums, widths, decoded;
    std::vector<std::int32_t> first, within;
    std::vector<std::int8_t> whole;
    std::vector<std::uint8_t> codes;
};
Scratch &scratch() {
    thread_local Scratch memory;
    return memory;
}

std::int64_t rounded_up(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

std::int64_t row_bytes(const QuantizedMatrix &m) { return (m.inputs * m.bits + 7) / 8; }

int parts_of(std::int64_t work, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, std::max(threads, 1)));
}

// Calls task(part, begin, end) for the rows [0, rows), in fours because the leaves work on four at once.
template <typename Task>
void share_rows(std::int64_t rows, int parts, Task &&task) {
    if (parts == 1) return task(0, 0, rows);
    const std::int64_t fours = (rows + 3) / 4;
    parallel(parts, [&](int part) {
        task(part, std::min(rows, fours * part / parts * 4), std::min(rows, fours * (part + 1) / parts * 4));
    });
}

// Groups that the lanes of the leaves' sums, four inputs each, do not divide into.
bool odd_groups(const QuantizedMatrix &m) { return m.group != m.inputs && m.group % 4 != 0; }

// Which group the first, and the last, input of every lane of every step belongs to.
void lane_groups(const QuantizedMatrix &m, const QuantizedLeaf &leaf, Scratch &memory) {
    const std::int64_t steps = rounded_up(m.inputs, leaf.integer_step) / leaf.integer_step;
    const std::int64_t last = m.inputs / m.group - 1;
    std::int32_t *first = at_least(memory.first, steps);
    std::int32_t *within = at_least(memory.within, 2 * steps * leaf.lanes);
    for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t begin = s * leaf.integer_step;
        first[s] = static_cast<std::int32_t>(begin / m.group);
        for (std::int64_t k = 0; k < leaf.lanes; ++k)
            for (int end = 0; end < 2; ++end) {
                const std::int64_t group = std::min(last, (begin + 4 * k + 3 * end) / m.group);
                within[(end * steps + s) * leaf.lanes + k] = static_cast<std::int32_t>(group - first[s]);
            }
    }
}

// Moves from x to `second` what belongs to another group than the first of its four neighbours.
void part_odd_groups(std::int8_t *x, std::int8_t *second, std::int64_t inputs, std::int64_t group) {
    for (std::int64_t start = group; start < inputs; start += group)
        for (std::int64_t j = start; j % 4 != 0 && j < inputs; ++j) std::swap(x[j], second[j]);
}

// One row of weights as they are. `codes` holds its codes as bytes meanwhile.
void decode_row(const QuantizedMatrix &m, const QuantizedLeaf &leaf, std::int64_t row, std::uint8_t *codes, float *to) {
    const std::int64_t bytes = row_bytes(m), groups = m.inputs / m.group;
    leaf.unpack_row(m.codes + row * bytes, bytes, m.inputs, m.bits, codes);
    if (m.codebook != nullptr) return leaf.look_up(codes, m.inputs, m.bits, m.codebook + row * m.book_stride, to);
    for (std::int64_t g = 0; g < groups; ++g) {
        const float zero =
            m.zeros != nullptr ? m.zeros[row * groups + g] : static_cast<float>(1 << (m.bits - 1));
        leaf.levels(codes + g * m.group, m.group, zero, m.scales[row * groups + g], to + g * m.group);
    }
}

// Inputs per pass over the codes: they, or their whole numbers, stay in the cache, and scratch memory stays small.
constexpr std::int64_t slice = 128;

// Four rows of weights at a time, decoded into the nearest cache: for many inputs, and for what whole numbers do not
// serve.
void by_decoded_rows(const QuantizedProduct &p, const float *x, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const QuantizedMatrix &m = p.matrix;
    const RowsProductKernels &product = rows_product_kernels();
    const int parts = parts_of(p.batch * m.inputs * m.outputs, threads);
    const std::int64_t each = 4 * m.inputs, codes_each = m.inputs + integer_padding;
    float *all = at_least(scratch().decoded, parts * each);
    std::uint8_t *all_codes = at_least(scratch().codes, parts * codes_each);
    share_rows(m.outputs, parts, [&](int part, std::int64_t begin, std::int64_t end) {
        float *decoded = all + part * each;
        for (std::int64_t first = 0; first < p.batch; first += slice)
            for (std::int64_t row = begin; row < end; row += 4) {
                const std::int64_t count = std::min<std::int64_t>(4, end - row);
                for (std::int64_t r = 0; r < count; ++r)
                    decode_row(m, leaf, row + r, all_codes + part * codes_each, decoded + r * m.inputs);
                product.floats({x + first * m.inputs, m.inputs, decoded, p.bias != nullptr ? p.bias + row : nullptr,
                         p.out + first * m.outputs + row, m.outputs, std::min(slice, p.batch - first), count, m.inputs,
                         nullptr});
            }
    });
}

// Inputs as vectors of whole numbers, which `write(x, to, widths)` makes; false where it cannot.
template <typename Write>
bool by_whole_numbers(const QuantizedProduct &p, int digits, int threads, Write &&write) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const QuantizedMatrix &m = p.matrix;
    Scratch &memory = scratch();
    const std::int64_t padded = rounded_up(m.inputs, integer_padding), groups = m.inputs / m.group;
    const std::int64_t most = std::min(slice, p.batch), bytes = row_bytes(m);
    const std::int64_t second = odd_groups(m) ? most * digits * padded : 0;

    std::int8_t *whole = at_least(memory.whole, most * digits * padded + second);
    float *widths = at_least(memory.widths, most * digits);
    float *sums = at_least(memory.sums, most * groups);
    if (groups > 1) lane_groups(m, leaf, memory);
    const std::int64_t lanes_in_all = rounded_up(m.inputs, leaf.integer_step) / leaf.integer_step * leaf.lanes;
    for (std::int64_t first = 0; first < p.batch; first += slice) {
        const std::int64_t batch = std::min(slice, p.batch - first);
        std::fill(sums, sums + batch * groups, 0.0f);
        std::fill(whole + most * digits * padded, whole + most * digits * padded + second, std::int8_t{0});
        for (std::int64_t b = 0; b < batch; ++b) {
            std::int8_t *to = whole + b * digits * padded;
            if (!write(p.x + (first + b) * m.inputs, to, padded, widths + b * digits)) return false;
            for (int d = 0; d < digits; ++d, to += padded) {
                std::fill(to + m.inputs, to + padded, std::int8_t{0});
                const float width = digits == 1 ? 1.0f : widths[b * digits + d];
                leaf.add_group_sums(to, groups, m.group, width, sums + b * groups);
                if (second != 0) part_odd_groups(to, to + second, m.inputs, m.group);
            }
        }
        IntegerRows rows = {};
        rows.codes = m.codes;
        rows.codes_end = m.codes + bytes * m.outputs;
        rows.row_bytes = bytes;
        rows.x = whole;
        rows.x_stride = padded;
        rows.widths = widths;
        rows.scales = m.scales;
        rows.zeros = m.zeros;
        rows.sums = sums;
        rows.first = memory.first.data();
        rows.within = memory.within.data();
        rows.within_second = memory.within.data() + (second != 0 ? lanes_in_all : 0);
        rows.second = second;
        rows.group = m.group;
        rows.bias = p.bias;
        rows.out = p.out + first * m.outputs;
        rows.batch = batch;
        rows.inputs = m.inputs;
        rows.outputs = m.outputs;
        rows.groups = groups;
        rows.bits = m.bits;
        rows.digits = digits;
        share_rows(m.outputs, parts_of(batch * m.inputs * m.outputs, threads),
                   [&](int, std::int64_t begin, std::int64_t end) { leaf.integer_rows(rows, begin, end); });
    }
    return true;
}

// The largest batch for products of codes themselves: for more vectors it measures faster to decode rows (AVX-512 with
// VNNI; later where a long row has one scale).
std::int64_t most_vectors(const QuantizedMatrix &m) {
    return m.codebook == nullptr && m.group == m.inputs && m.inputs >= 1024 ? 64 : 8;
}

// Groups of one to three inputs: too many for a register's lanes to choose from.
bool tiny_groups(const QuantizedMatrix &m) { return m.group != m.inputs && m.group < 4; }

void codebook_float(const QuantizedProduct &p, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const QuantizedMatrix &m = p.matrix;
    const std::int64_t lanes = leaf.lanes, block = 8 * lanes, padded = rounded_up(m.inputs, block);
    float *x = at_least(scratch().x, p.batch * padded);
    for (std::int64_t b = 0; b < p.batch; ++b) {
        const float *from = p.x + b * m.inputs;
        float *to = x + b * padded;
        const std::int64_t whole = m.inputs / block * block;
        for (std::int64_t begin = 0; begin < whole; begin += block)
            for (std::int64_t k = 0; k < lanes; ++k)
                for (std::int64_t i = 0; i < 8; ++i) to[begin + i * lanes + k] = from[begin + 8 * k + i];
        if (whole < padded) {
            std::fill(to + whole, to + padded, 0.0f);
            for (std::int64_t j = whole; j < m.inputs; ++j)
                to[whole + (j - whole) % 8 * lanes + (j - whole) / 8] = from[j];
        }
    }
    const CodebookRows rows = {m.codes, row_bytes(m), x,        padded,   m.codebook, m.book_stride,
                               p.bias,  p.out,        p.batch,  m.inputs, m.outputs,  m.bits};
    share_rows(m.outputs, parts_of(p.batch * m.inputs * m.outputs, threads),
               [&](int, std::int64_t begin, std::int64_t end) { leaf.codebook_rows(rows, begin, end); });
}

}  // namespace

void quantized_float(const QuantizedProduct &p, int threads) {
    if (p.batch > most_vectors(p.matrix)) return by_decoded_rows(p, p.x, threads);
    if (p.matrix.codebook != nullptr) return codebook_float(p, threads);
    const QuantizedLeaf &leaf = quantized_leaf();
    const auto split = [&](const float *x, std::int8_t *to, std::int64_t stride, float *widths) {
        return leaf.split_vector(x, p.matrix.inputs, to, stride, widths);
    };
    if (!tiny_groups(p.matrix) && by_whole_numbers(p, float_digits, threads, split)) return;
    by_decoded_rows(p, p.x, threads);
}

void quantized_int8(const QuantizedProduct &p, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const std::int64_t inputs = p.matrix.inputs;
    const auto round = [&](const float *x, std::int8_t *to, std::int64_t, float *widths) {
        widths[0] = leaf.round_vector(x, inputs, to);
        return true;
    };
    if (!tiny_groups(p.matrix)) {
        by_whole_numbers(p, 1, threads, round);
        return;
    }
    std::vector<std::int8_t> whole(static_cast<std::size_t>(inputs));
    float *rounded = at_least(scratch().x, p.batch * inputs);
    for (std::int64_t b = 0; b < p.batch; ++b) {
        const float width = leaf.round_vector(p.x + b * inputs, inputs, whole.data());
        for (std::int64_t j = 0; j < inputs; ++j)
            rounded[b * inputs + j] = static_cast<float>(whole[static_cast<std::size_t>(j)]) * width;
    }
    by_decoded_rows(p, rounded, threads);
}

const QuantizedLeaf &quantized_leaf() {
    switch (instructions()) {
#if defined(WEFT_HAS_neon)
        case Instructions::neon: return neon::quantized_leaf;
#endif
#if defined(WEFT_HAS_avx2)
        case Instructions::avx512:
#if defined(WEFT_HAS_avx512vnni)
            if (has_avx512_integers()) return avx512vnni::quantized_leaf;
#endif
            return avx2::quantized_leaf;
        case Instructions::avx2: return avx2::quantized_leaf;
#endif
        default: return portable::quantized_leaf;
    }
}

}  // namespace weft
