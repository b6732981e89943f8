#include "low_rank.hpp"

#include <algorithm>
#include <vector>

#include "rows_product.hpp"
#include "threads.hpp"

namespace weft {

namespace {

// Inputs per pass over the weights: their x Rᵀ stays in the cache between the two products.
constexpr std::int64_t slice = 64;

// Multiply-adds below which waking a thread costs more than it saves: PyTorch's own threads, which keep spinning
// after their work, may have to give up a core first.
constexpr std::int64_t worth_a_thread = 1024 * 1024;

// Inputs that a thread needs so that reading all the weights by itself pays.
constexpr std::int64_t least_inputs = 8;

float *scratch(std::int64_t floats) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<std::size_t>(floats)) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
}

struct Range {
    std::int64_t begin, size;
};

// Part `part` of `parts` of [0, count), in steps of four because the leaf works on four rows at once.
Range share(std::int64_t count, int part, int parts) {
    const std::int64_t fours = (count + 3) / 4;
    const std::int64_t begin = std::min(count, fours * part / parts * 4);
    const std::int64_t end = std::min(count, fours * (part + 1) / parts * 4);
    return {begin, end - begin};
}

template <typename Weight>
void apply(const LowRankProductOf<Weight> &p, int threads) {
    const RowsProductKernels &kernels = rows_product_kernels();

    const auto to_hidden = [&](std::int64_t first, std::int64_t batch, Range rows, float *hidden) {
        kernels(RowsProductOf<Weight>{
            p.x + first * p.inputs, p.inputs, p.right + rows.begin * p.inputs, nullptr,
                hidden + rows.begin, p.rank, batch, rows.size, p.inputs, p.left});
    };
    const auto to_out = [&](std::int64_t first, std::int64_t batch, Range rows, const float *hidden) {
        kernels(RowsProductOf<Weight>{
            hidden, p.rank, p.left + rows.begin * p.rank, p.bias != nullptr ? p.bias + rows.begin : nullptr,
                p.out + first * p.outputs + rows.begin, p.outputs, batch, rows.size, p.rank, nullptr});
    };

    const std::int64_t work = p.batch * p.rank * (p.inputs + p.outputs);
    const int parts = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, std::max(threads, 1)));

    // Many inputs are divided among the threads, which then never wait for each other; few share the rows.
    const std::int64_t per_thread = (p.batch + parts - 1) / parts;
    if (parts > 1 && per_thread >= least_inputs) {
        float *all = scratch(parts * std::min(per_thread, slice) * p.rank);
        parallel(parts, [&](int part) {
            float *hidden = all + part * std::min(per_thread, slice) * p.rank;
            const std::int64_t end = std::min(p.batch, (part + 1) * per_thread);
            for (std::int64_t first = part * per_thread; first < end; first += slice) {
                const std::int64_t batch = std::min(slice, end - first);
                to_hidden(first, batch, {0, p.rank}, hidden);
                to_out(first, batch, {0, p.outputs}, hidden);
            }
        });
        return;
    }

    float *hidden = scratch(std::min(p.batch, slice) * p.rank);
    for (std::int64_t first = 0; first < p.batch; first += slice) {
        const std::int64_t batch = std::min(slice, p.batch - first);
        if (parts == 1) {
            to_hidden(first, batch, {0, p.rank}, hidden);
            to_out(first, batch, {0, p.outputs}, hidden);
            continue;
        }
        parallel(parts, [&](int part) { to_hidden(first, batch, share(p.rank, part, parts), hidden); });
        parallel(parts, [&](int part) { to_out(first, batch, share(p.outputs, part, parts), hidden); });
    }
}

}  // namespace

void low_rank_apply(const LowRankProduct &p, int threads) { apply(p, threads); }

void low_rank_apply(const LowRankProductOf<Bfloat16> &p, int threads) { apply(p, threads); }

}  // namespace weft
