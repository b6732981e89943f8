#include "quantized.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "processor.hpp"
#include "quantized_leaf.hpp"
#include "threads.hpp"

namespace weft {

namespace {

// Multiply-adds below which waking a thread costs more than it saves.
constexpr std::int64_t worth_a_thread = 256 * 1024;

template <typename Number>
Number *at_least(std::vector<Number> &memory, std::int64_t count) {
    if (memory.size() < static_cast<std::size_t>(count)) memory.resize(static_cast<std::size_t>(count));
    return memory.data();
}

// Every thread that calls keeps its own; workers read the caller's.
struct Scratch {
    std::vector<float> x, sums, widths;
    std::vector<std::int32_t> first, within;
    std::vector<std::int16_t> whole;
};
Scratch &scratch() {
    thread_local Scratch memory;
    return memory;
}

std::int64_t rounded_up(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

std::int64_t row_bytes(const QuantizedMatrix &m) { return (m.inputs * m.bits + 7) / 8; }

// Calls task(begin, end) for the rows [0, rows), in fours because the leaves work on four at once.
template <typename Task>
void share_rows(std::int64_t rows, std::int64_t work, int threads, Task &&task) {
    const int parts = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, std::max(threads, 1)));
    if (parts == 1) return task(0, rows);
    const std::int64_t fours = (rows + 3) / 4;
    parallel(parts, [&](int part) {
        task(std::min(rows, fours * part / parts * 4), std::min(rows, fours * (part + 1) / parts * 4));
    });
}

// Which group every lane of every register belongs to, where a register's lanes hold `each` neighbouring inputs.
void lane_groups(std::int64_t inputs, std::int64_t group, std::int64_t lanes, std::int64_t each, Scratch &memory) {
    const std::int64_t registers = rounded_up(inputs, lanes * each) / (lanes * each);
    const std::int64_t last = inputs / group - 1;
    std::int32_t *first = at_least(memory.first, registers);
    std::int32_t *within = at_least(memory.within, registers * lanes);
    for (std::int64_t r = 0; r < registers; ++r) {
        const std::int64_t begin = r * lanes * each;
        first[r] = static_cast<std::int32_t>(begin / group);
        for (std::int64_t k = 0; k < lanes; ++k)
            within[r * lanes + k] = static_cast<std::int32_t>(std::min(last, (begin + k * each) / group) - first[r]);
    }
}

// sums (batch, groups) of x over each group, in a fixed order that does not depend on the instruction set.
template <typename Number>
void group_sums(const Number *x, std::int64_t x_stride, std::int64_t batch, std::int64_t groups, std::int64_t group,
                float *sums) {
    for (std::int64_t b = 0; b < batch; ++b)
        for (std::int64_t g = 0; g < groups; ++g) {
            const Number *from = x + b * x_stride + g * group;
            // Whole numbers up to 127 fit 64 bits however many; floats are added up in double precision.
            using Sum = std::conditional_t<std::is_same_v<Number, float>, double, std::int64_t>;
            Sum parts[8] = {};
            std::int64_t j = 0;
            for (; j + 8 <= group; j += 8)
                for (int k = 0; k < 8; ++k) parts[k] += from[j + k];
            for (; j < group; ++j) parts[0] += from[j];
            Sum sum = 0;
            for (const Sum part : parts) sum += part;
            sums[b * groups + g] = static_cast<float>(sum);
        }
}

}  // namespace

void quantized_float(const QuantizedProduct &p, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const QuantizedMatrix &m = p.matrix;
    Scratch &memory = scratch();
    const std::int64_t lanes = leaf.lanes, block = 8 * lanes, padded = rounded_up(m.inputs, block);
    const std::int64_t groups = m.inputs / m.group;

    float *x = at_least(memory.x, p.batch * padded);
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
    float *sums = nullptr;
    if (m.codebook == nullptr) {
        sums = at_least(memory.sums, p.batch * groups);
        group_sums(p.x, m.inputs, p.batch, groups, m.group, sums);
        if (groups > 1) lane_groups(m.inputs, m.group, lanes, 8, memory);
    }
    const FloatRows rows = {m.codes,  row_bytes(m), x,          padded,   m.codebook, m.book_stride,
                            m.scales, m.zeros,      sums,       memory.first.data(), memory.within.data(),
                            p.bias,   p.out,        p.batch,    m.inputs, m.outputs,  groups,
                            m.bits};
    share_rows(m.outputs, p.batch * m.inputs * m.outputs, threads,
               [&](std::int64_t begin, std::int64_t end) { leaf.float_rows(rows, begin, end); });
}

// Vectors per pass over the codes: their whole numbers stay in the cache, and scratch memory stays small.
constexpr std::int64_t slice = 128;

void quantized_int8(const QuantizedProduct &p, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const QuantizedMatrix &m = p.matrix;
    Scratch &memory = scratch();
    const std::int64_t padded = rounded_up(m.inputs, integer_padding), groups = m.inputs / m.group;
    const std::int64_t most = std::min(slice, p.batch);

    // Enough for the wider of the leaves' two integer types.
    std::int16_t *whole = at_least(memory.whole, most * padded);
    float *widths = at_least(memory.widths, most);
    float *sums = at_least(memory.sums, most * groups);
    if (groups > 1) lane_groups(m.inputs, m.group, leaf.lanes, leaf.integer_step / leaf.lanes, memory);
    for (std::int64_t first = 0; first < p.batch; first += slice) {
        const std::int64_t batch = std::min(slice, p.batch - first);
        for (std::int64_t b = 0; b < batch; ++b) {
            char *to = reinterpret_cast<char *>(whole) + b * padded * leaf.integer_bytes;
            widths[b] = leaf.round_vector(p.x + (first + b) * m.inputs, m.inputs, to);
            std::fill(to + m.inputs * leaf.integer_bytes, to + padded * leaf.integer_bytes, char{0});
        }
        if (leaf.integer_bytes == 1)
            group_sums(reinterpret_cast<const std::int8_t *>(whole), padded, batch, groups, m.group, sums);
        else
            group_sums(whole, padded, batch, groups, m.group, sums);
        const IntegerRows rows = {m.codes, row_bytes(m), whole,  padded, widths, m.scales, m.zeros,
                                  sums,    memory.first.data(),  memory.within.data(),     m.group,
                                  p.bias,  p.out + first * m.outputs,    batch,  m.inputs, m.outputs,
                                  groups,  m.bits};
        share_rows(m.outputs, batch * m.inputs * m.outputs, threads,
                   [&](std::int64_t begin, std::int64_t end) { leaf.integer_rows(rows, begin, end); });
    }
}

void quantized_write(const QuantizedMatrix &m, float *out, int threads) {
    const QuantizedLeaf &leaf = quantized_leaf();
    const std::int64_t bytes = row_bytes(m), groups = m.inputs / m.group;
    share_rows(m.outputs, m.inputs * m.outputs, threads, [&](std::int64_t begin, std::int64_t end) {
        thread_local std::vector<std::uint8_t> memory;
        std::uint8_t *codes = at_least(memory, m.inputs + integer_padding);
        for (std::int64_t row = begin; row < end; ++row) {
            float *to = out + row * m.inputs;
            leaf.unpack_row(m.codes + row * bytes, bytes, m.inputs, m.bits, codes);
            if (m.codebook != nullptr) {
                leaf.look_up(codes, m.inputs, m.bits, m.codebook + row * m.book_stride, to);
                continue;
            }
            for (std::int64_t g = 0; g < groups; ++g) {
                const float zero = m.zeros != nullptr ? m.zeros[row * groups + g] : 1 << (m.bits - 1);
                leaf.levels(codes + g * m.group, m.group, zero, m.scales[row * groups + g], to + g * m.group);
            }
        }
    });
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
