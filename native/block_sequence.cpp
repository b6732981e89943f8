#include "block_sequence.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>
#include <vector>

#include "columns_product.hpp"
#include "threads.hpp"

namespace weft {

namespace {

// Inputs per pass over the weights: as many as keep states and weights in the cache between the steps.
constexpr std::int64_t slice = 96;

std::vector<float> &float_scratch() {
    thread_local std::vector<float> memory;
    return memory;
}

template <typename Weight>
struct Segments {
    std::vector<ColumnsSegmentOf<Weight>> own, next;
};

template <typename Weight>
Segments<Weight> &segment_scratch() {
    thread_local Segments<Weight> memory;
    return memory;
}

float *grown(std::vector<float> &memory, std::int64_t floats) {
    if (memory.size() < static_cast<std::size_t>(floats)) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
}

// As `parallel`, for tasks that may run out of memory: no exception may leave a worker.
template <typename Task>
void parallel_or_throw(std::int64_t parts, Task &&task) {
    std::atomic<bool> failed{false};
    parallel(static_cast<int>(parts), [&](int part) {
        try {
            task(part);
        } catch (const std::bad_alloc &) {
            failed.store(true, std::memory_order_relaxed);
        }
    });
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// The vectors that steps read and write, each with its rows' distance.
struct Vectors {
    const float *input;
    float *states;
    float *output;
    std::int64_t inputs, state_count, outputs;
    const float *bias;
    std::int64_t batch;
};

template <typename Weight>
class Interpreter {
public:
    explicit Interpreter(const BlockSequenceOf<Weight> &p) : p_(p), kernels_(columns_product_kernels()) {}

    // Runs `groups` groups, the first of which starts at `at`; returns where the next one starts.
    const std::int64_t *run_groups(const std::int64_t *at, std::int64_t groups, const Vectors &v) const {
        Segments<Weight> &memory = segment_scratch<Weight>();
        std::int64_t steps = 0;  // still to be read of the group
        Step step, following;
        bool there = read(at, groups, steps, v, memory.own, step);
        while (there) {
            const bool more = read(at, groups, steps, v, memory.next, following);
            const bool output = step.space == program::output, gathered = step.start >= 0;
            kernels_(ColumnsProductOf<Weight>{
                     memory.own.data(), step.count, more && following.count > 0 ? memory.next.data() : nullptr,
                     gathered ? v.states + step.start : output && v.bias != nullptr ? v.bias + step.offset : nullptr,
                     gathered ? v.state_count : 0, (output ? v.output : v.states) + step.offset,
                     output ? v.outputs : v.state_count, v.batch, step.size});
            memory.own.swap(memory.next);
            step = following;
            there = more;
        }
        return at;
    }

    static const std::int64_t *beyond_group(const std::int64_t *at) {
        const std::int64_t steps = at[1];
        at += 2;
        for (std::int64_t step = 0; step < steps; ++step) at += 5 + 6 * at[4];
        return at;
    }

    void run(const Vectors &v, int threads) const {
        const std::int64_t *at = p_.code + program::head_size;
        for (std::int64_t phase = 0; phase < p_.code[program::phases]; ++phase)
            at = threads > 1 ? phase_on_threads(at, v, threads) : phase_here(at, v);
    }

private:
    struct Step {
        std::int64_t space, offset, size, start, count;
    };

    // Reads the step at `at` and goes on behind it; false where the groups are at their end.
    bool read(const std::int64_t *&at, std::int64_t &groups, std::int64_t &steps, const Vectors &v,
              std::vector<ColumnsSegmentOf<Weight>> &segments, Step &step) const {
        for (; steps == 0; at += 2) {
            if (groups == 0) return false;
            --groups;
            steps = at[1];
        }
        --steps;
        step = {at[0], at[1], at[2], at[3], at[4]};
        at += 5;
        if (segments.size() < static_cast<std::size_t>(step.count)) segments.resize(static_cast<std::size_t>(step.count));
        for (std::int64_t s = 0; s < step.count; ++s, at += 6) {
            const float *source = at[3] == program::state ? v.states : at[3] == program::output ? v.output : v.input;
            const std::int64_t source_stride =
                at[3] == program::state ? v.state_count : at[3] == program::output ? v.outputs : v.inputs;
            segments[static_cast<std::size_t>(s)] = {p_.matrices[at[0]] + at[1], at[2], source + at[4], source_stride,
                                                     at[5]};
        }
        return true;
    }

    const std::int64_t *phase_here(const std::int64_t *at, const Vectors &v) const {
        return run_groups(at + 1, at[0], v);
    }

    // Consecutive groups with about the same number of multiply-adds for each thread.
    const std::int64_t *phase_on_threads(const std::int64_t *at, const Vectors &v, int threads) const {
        const std::int64_t groups = *at++;
        std::int64_t total = 0;
        const std::int64_t *end = at;
        for (std::int64_t g = 0; g < groups; ++g) {
            total += end[0];
            end = beyond_group(end);
        }
        const std::int64_t parts =
            std::clamp<std::int64_t>(total * v.batch / worth_a_thread, 1, std::min<std::int64_t>(threads, groups));
        if (parts <= 1) return phase_here(at - 1, v);
        parallel_or_throw(parts, [&](int part) {
            // A group belongs to the part that its middle falls into: each part has groups that follow each other.
            const std::int64_t *at_group = at, *first = nullptr;
            std::int64_t before = 0, mine = 0;
            for (std::int64_t g = 0; g < groups; ++g) {
                const std::int64_t work = at_group[0];
                const std::int64_t owner = total > 0 ? std::min(parts - 1, (2 * before + work) * parts / (2 * total)) : 0;
                if (owner == part && mine++ == 0) first = at_group;
                before += work;
                at_group = beyond_group(at_group);
            }
            if (mine > 0) run_groups(first, mine, v);
        });
        return end;
    }

    const BlockSequenceOf<Weight> &p_;
    const ColumnsProductKernels &kernels_;
};

// Inputs [first, first + batch) of the whole product.
template <typename Weight>
void apply_slice(const BlockSequenceOf<Weight> &p, std::int64_t first, std::int64_t batch, int threads) {
    const std::int64_t *code = p.code;
    const std::int64_t inputs = code[program::inputs], outputs = code[program::outputs];
    const std::int64_t states = code[program::states];
    const std::int64_t gathered = code[program::gathered], *sources = code + code[program::sources];
    const std::int64_t *places = code[program::output_places] != 0 ? code + code[program::output_places] : nullptr;

    // An odd number of cache lines from one input's states to the next: a power of two would make them meet
    // in the same few places of the cache.
    const std::int64_t state_stride = (states + 15) / 16 * 16 | 16;
    float *memory = grown(float_scratch(), batch * (state_stride + (places != nullptr ? outputs : 0)));
    float *ordered = memory + batch * state_stride;

    const float *x = p.x + first * inputs;
    float *out = p.out + first * outputs;
    for (std::int64_t b = 0; b < batch; ++b)
        for (std::int64_t i = 0; i < gathered; ++i) memory[b * state_stride + i] = x[b * inputs + sources[i]];
    Interpreter<Weight>(p).run({x, memory, places != nullptr ? ordered : out, inputs, state_stride, outputs,
                                places != nullptr ? nullptr : p.bias, batch},
                               threads);
    if (places != nullptr)
        for (std::int64_t b = 0; b < batch; ++b)
            for (std::int64_t i = 0; i < outputs; ++i)
                out[b * outputs + i] = ordered[b * outputs + places[i]] + (p.bias != nullptr ? p.bias[i] : 0.0f);
}

template <typename Weight>
void apply(const BlockSequenceOf<Weight> &p, int threads) {
    // Many inputs are divided among the threads, which then never wait for each other; few share the steps.
    const std::int64_t per_thread = (p.batch + threads - 1) / std::max(threads, 1);
    if (threads > 1 && per_thread >= 8) {
        parallel_or_throw(threads, [&](int part) {
            const std::int64_t begin = std::min(p.batch, part * per_thread);
            const std::int64_t end = std::min(p.batch, begin + per_thread);
            for (std::int64_t first = begin; first < end; first += slice)
                apply_slice(p, first, std::min(slice, end - first), 1);
        });
        return;
    }
    for (std::int64_t first = 0; first < p.batch; first += slice)
        apply_slice(p, first, std::min(slice, p.batch - first), threads);
}

}  // namespace

void block_sequence_apply(const BlockSequenceOf<float> &p, int threads) { apply(p, threads); }

void block_sequence_apply(const BlockSequenceOf<Bfloat16> &p, int threads) { apply(p, threads); }

}  // namespace weft
