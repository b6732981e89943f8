#include "sparse_chain.hpp"

#include <algorithm>
#include <vector>

#include "threads.hpp"

namespace weft {

namespace {

// Steps of one matrix, an entry times a vector or a register of a tile, below which waking a thread costs more
// than it saves.
constexpr std::int64_t worth_a_thread = 32 * 1024;

// Rows of the result that are turned back into the batch's own layout at a time.
constexpr std::int64_t block_rows = 16;

float *scratch(int which, std::int64_t floats) {
    thread_local std::vector<float> memory[2];
    if (memory[which].size() < static_cast<std::size_t>(floats))
        memory[which].resize(static_cast<std::size_t>(floats));
    return memory[which].data();
}

struct Range {
    std::int64_t begin, end;
};

Range share(std::int64_t count, int part, int parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

// Rows with about the same number of entries for every part.
Range share_of_rows(const SparseSupport &s, int part, int parts) {
    const auto cut = [&](int at) {
        if (at == parts) return s.rows;
        const std::int64_t before = s.starts[s.rows] / parts * at;
        return static_cast<std::int64_t>(std::lower_bound(s.starts, s.starts + s.rows, before) - s.starts);
    };
    return {part == 0 ? 0 : cut(part), cut(part + 1)};
}

class Chain {
public:
    Chain(const SparseChainProduct &p, const SparseKernels &kernels) : p_(p), kernels_(kernels) {
        const float *values = p.values;
        for (std::int64_t i = 0; i < p.count; ++i) {
            const SparseSupport &s = p.supports[i];
            matrices_.push_back({values, s.columns, s.starts, s.narrow});
            values += s.starts[s.rows];
            longest_ = std::max({longest_, s.rows, s.columns_count});
        }
        entries_ = values - p.values;
    }

    std::int64_t entries() const { return entries_; }

    // One vector after the other, through each of the matrices in parts.
    void by_vector(int parts) const {
        float *memory[2] = {scratch(0, longest_), scratch(1, longest_)};
        for (std::int64_t b = 0; b < p_.batch; ++b) {
            const float *x = p_.x + b * inputs();
            for (std::int64_t i = p_.count - 1; i >= 0; --i) {
                float *out = i == 0 ? p_.out + b * outputs() : memory[i % 2];
                const float *bias = i == 0 ? p_.bias : nullptr;
                parallel(parts, [&](int part) {
                    const Range rows = share_of_rows(p_.supports[i], part, parts);
                    kernels_.vector_product({matrices_[i], x, bias, out, rows.begin, rows.end});
                });
                x = out;
            }
        }
    }

    // A tile of the batch through the whole chain and two buffers, each step in parts.
    void by_tile(std::int64_t first, std::int64_t size, float *const *memory, int parts) const {
        const std::int64_t tile = tile_of(size);
        float *x = memory[p_.count % 2];
        parallel(parts, [&](int part) {
            const Range columns = share(inputs(), part, parts);
            kernels_.transpose(p_.x + first * inputs() + columns.begin, inputs(), x + columns.begin * tile, tile,
                               size, columns.end - columns.begin);
        });
        for (std::int64_t i = p_.count - 1; i > 0; --i) {
            float *out = memory[i % 2];
            parallel(parts, [&](int part) {
                const Range rows = share_of_rows(p_.supports[i], part, parts);
                kernels_.tile_product(
                    {matrices_[i], x, nullptr, out + rows.begin * tile, rows.begin, rows.end, tile});
            });
            x = out;
        }
        parallel(parts, [&](int part) {
            const Range rows = share_of_rows(p_.supports[0], part, parts);
            float block[block_rows * 64];
            for (std::int64_t row = rows.begin; row < rows.end; row += block_rows) {
                const std::int64_t end = std::min(rows.end, row + block_rows);
                kernels_.tile_product({matrices_[0], x, p_.bias, block, row, end, tile});
                kernels_.transpose(block, tile, p_.out + first * outputs() + row, outputs(), end - row, size);
            }
        });
    }

    // Numbers of each of the two buffers that a tile goes through.
    std::int64_t buffer(std::int64_t tile) const { return longest_ * tile; }

    // The largest tile that leaves every one of the threads something to do.
    std::int64_t widest(int parts) const {
        std::int64_t tile = 4 * kernels_.lanes;
        while (tile > kernels_.lanes && (p_.batch + tile - 1) / tile < parts) tile /= 2;
        return tile;
    }

private:
    std::int64_t inputs() const { return p_.supports[p_.count - 1].columns_count; }
    std::int64_t outputs() const { return p_.supports[0].rows; }

    std::int64_t tile_of(std::int64_t size) const {
        std::int64_t tile = kernels_.lanes;
        while (tile < size) tile *= 2;
        return tile;
    }

    const SparseChainProduct &p_;
    const SparseKernels &kernels_;
    std::vector<SparseMatrix> matrices_;
    std::int64_t longest_ = 0;
    std::int64_t entries_ = 0;
};

}  // namespace

void sparse_chain_apply(const SparseChainProduct &p, int threads) {
    if (p.batch == 0) return;
    const SparseKernels &kernels = sparse_kernels();
    const Chain chain(p, kernels);
    const std::int64_t registers = (p.batch + kernels.lanes - 1) / kernels.lanes;
    const std::int64_t work = chain.entries() / p.count * registers;
    const int parts = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, std::max(threads, 1)));
    if (p.batch == 1) {
        chain.by_vector(parts);
        return;
    }
    const std::int64_t tile = chain.widest(parts);
    const std::int64_t tiles = (p.batch + tile - 1) / tile;
    const std::int64_t buffer = chain.buffer(tile);
    const auto one = [&](std::int64_t t, float *const *memory, int inner) {
        chain.by_tile(t * tile, std::min(tile, p.batch - t * tile), memory, inner);
    };
    if (tiles < parts) {
        float *const memory[2] = {scratch(0, buffer), scratch(1, buffer)};
        for (std::int64_t t = 0; t < tiles; ++t) one(t, memory, parts);
        return;
    }
    // Had before the threads start, where running out of memory is still an exception for the caller.
    float *const all[2] = {scratch(0, buffer * parts), scratch(1, buffer * parts)};
    parallel(parts, [&](int part) {
        float *const memory[2] = {all[0] + buffer * part, all[1] + buffer * part};
        const Range mine = share(tiles, part, parts);
        for (std::int64_t t = mine.begin; t < mine.end; ++t) one(t, memory, 1);
    });
}

}  // namespace weft
