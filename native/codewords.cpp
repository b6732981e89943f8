#include "codewords.hpp"

#include <algorithm>
#include <vector>

#include "rows_product.hpp"
#include "table_sums.hpp"
#include "threads.hpp"

namespace weft {

namespace {

// Bytes of codes whose tables stay in the first cache while all rows look them up.
constexpr std::int64_t columns_at_a_time = 24;

// Rows of the weight that are written down together: few enough for the second cache.
constexpr std::int64_t rows_at_a_time = 16;

// Look-ups below which waking a thread costs more than it saves.
constexpr std::int64_t worth_a_thread = 128 * 1024;

float *scratch(std::int64_t floats) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<std::size_t>(floats)) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
}

bool two_to_a_byte(const CodewordMatrix &m) { return m.codewords <= 16; }

std::int64_t row_bytes(const CodewordMatrix &m) { return two_to_a_byte(m) ? (m.subspaces + 1) / 2 : m.subspaces; }

const float *words_of(const CodewordMatrix &m, std::int64_t subspace) {
    return m.words + subspace * m.books / m.subspaces * m.width * m.codewords;
}

int parts_of(std::int64_t work, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, std::max(threads, 1)));
}

// The tables of the bytes [begin, end) for one vector, one after the other.
void fill_tables(const CodewordMatrix &m, const TableSums &leaf, const float *x, std::int64_t begin, std::int64_t end,
                 float *tables) {
    const auto fill = [&](std::int64_t subspace, float *table) {
        leaf.fill(words_of(m, subspace), x + subspace * m.width, m.width, m.codewords, table);
    };
    for (std::int64_t c = begin; c < end; ++c, tables += table_entries) {
        if (!two_to_a_byte(m)) {
            fill(c, tables);
            std::fill(tables + m.codewords, tables + table_entries, 0.0f);
            continue;
        }
        float lows[16] = {}, highs[16] = {};  // an odd last subspace has no second half: zeros
        fill(2 * c, lows);
        if (2 * c + 1 < m.subspaces) fill(2 * c + 1, highs);
        leaf.pair(lows, highs, tables);
    }
}

// Every vector's inner products with all words, then sums of those that the codes name.
void by_tables(const CodewordProduct &p, int threads) {
    const CodewordMatrix &m = p.matrix;
    const TableSums &leaf = table_sums_kernels();
    const std::int64_t bytes = row_bytes(m);
    const int parts = parts_of(m.outputs * bytes, threads);
    float *tables = scratch(bytes * table_entries);
    for (std::int64_t b = 0; b < p.batch; ++b) {
        const float *x = p.x + b * m.subspaces * m.width;
        float *out = p.out + b * m.outputs;
        auto own_tables = [&](int part) {
            const std::int64_t begin = bytes * part / parts, end = bytes * (part + 1) / parts;
            fill_tables(m, leaf, x, begin, end, tables + begin * table_entries);
        };
        auto own_rows = [&](int part) {
            const std::int64_t begin = m.outputs * part / parts, end = m.outputs * (part + 1) / parts;
            std::fill(out + begin, out + end, 0.0f);
            for (std::int64_t c = 0; c < bytes; c += columns_at_a_time)
                leaf.add(tables + c * table_entries, m.codes + begin * bytes + c, bytes,
                         std::min(columns_at_a_time, bytes - c), end - begin, out + begin);
            for (std::int64_t i = begin; i < end; ++i) {
                if (m.scales != nullptr) out[i] *= m.scales[i];
                if (p.bias != nullptr) out[i] += p.bias[i];
            }
        };
        parallel(parts, own_tables);
        parallel(parts, own_rows);
    }
}

// Writes rows [begin, end) of the weight. The width is a constant where it is a usual one.
template <int Width>
void write_rows(const CodewordMatrix &m, const float *words, std::int64_t begin, std::int64_t end, float *to) {
    const std::int64_t bytes = row_bytes(m), width = Width > 0 ? Width : m.width;
    const bool halves = two_to_a_byte(m);
    for (std::int64_t i = begin; i < end; ++i) {
        const std::uint8_t *codes = m.codes + i * bytes;
        const float scale = m.scales != nullptr ? m.scales[i] : 1.0f;
        for (std::int64_t book = 0; book < m.books; ++book) {
            const float *own = words + book * m.codewords * width;
            // Subspace s has book s · books / subspaces: the first with this one, and the first beyond.
            const std::int64_t first = (book * m.subspaces + m.books - 1) / m.books;
            const std::int64_t last = ((book + 1) * m.subspaces + m.books - 1) / m.books;
            for (std::int64_t s = first; s < last; ++s, to += width) {
                const std::int64_t code = halves ? codes[s / 2] >> (s % 2 * 4) & 15 : codes[s];
                const float *word = own + std::min(code, m.codewords - 1) * width;
                for (std::int64_t w = 0; w < width; ++w) to[w] = scale * word[w];
            }
        }
    }
}

// Some rows of the weight at a time are written down and multiplied by all vectors.
void by_rows(const CodewordProduct &p, int threads) {
    const CodewordMatrix &m = p.matrix;
    const RowsProductKernels &product = rows_product_kernels();
    const std::int64_t inputs = m.subspaces * m.width, size = m.width * m.codewords;
    // Whole words, one after the other, which the tables' filling has in columns.
    std::vector<float> words(static_cast<std::size_t>(m.books * size));
    for (std::int64_t book = 0; book < m.books; ++book)
        for (std::int64_t w = 0; w < m.width; ++w)
            for (std::int64_t k = 0; k < m.codewords; ++k)
                words[static_cast<std::size_t>(book * size + k * m.width + w)] =
                    m.words[book * size + w * m.codewords + k];
    const auto write = m.width == 2   ? write_rows<2>
                       : m.width == 4 ? write_rows<4>
                       : m.width == 8 ? write_rows<8>
                       : m.width == 16 ? write_rows<16>
                                       : write_rows<0>;
    const int parts = parts_of(m.outputs * inputs / 8, threads);
    std::vector<float> rows(static_cast<std::size_t>(parts * rows_at_a_time * inputs));
    auto own_rows = [&](int part) {
        float *own = rows.data() + part * rows_at_a_time * inputs;
        const std::int64_t end = m.outputs * (part + 1) / parts;
        for (std::int64_t i = m.outputs * part / parts; i < end; i += rows_at_a_time) {
            const std::int64_t count = std::min(rows_at_a_time, end - i);
            write(m, words.data(), i, i + count, own);
            product.floats({p.x, inputs, own, p.bias != nullptr ? p.bias + i : nullptr, p.out + i, m.outputs, p.batch, count,
                     inputs, nullptr});
        }
    };
    parallel(parts, own_rows);
}

// Measured nanoseconds (one thread, AVX-512): of a look-up, of a multiply-add that fills a table, of one of the product
// by rows, and of writing down a word and each of its numbers.
bool tables_pay(const CodewordProduct &p) {
    const CodewordMatrix &m = p.matrix;
    constexpr double look_up = 0.2, filling = 0.022, product = 0.013, word = 1.1, number = 0.05;
    const double bytes = static_cast<double>(row_bytes(m)), inputs = static_cast<double>(m.subspaces * m.width);
    const double outputs = static_cast<double>(m.outputs), batch = static_cast<double>(p.batch);
    const double by_tables = batch * (look_up * outputs * bytes + filling * static_cast<double>(m.codewords) * inputs);
    const double writing = word * static_cast<double>(m.subspaces) + number * inputs;
    return by_tables <= outputs * (writing + product * inputs * batch);
}

}  // namespace

void codewords_apply(const CodewordProduct &p, int threads) {
    if (tables_pay(p)) by_tables(p, threads);
    else by_rows(p, threads);
}

}  // namespace weft
