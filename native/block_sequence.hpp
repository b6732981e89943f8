#pragma once
// Products with matrices made of blocks, as a program: steps that each compute one stretch of a vector from
// stretches of others, out = start + Σ source block. Hierarchical matrices and state recurrences are such
// programs; weft.kernels.block_sequence writes them.

#include <cstdint>

#include "bfloat16.hpp"

namespace weft {

// A program is a sequence of 64-bit numbers. Its head:
//     inputs, outputs, states, phases, gathered, sources, output places, multiply-adds, matrices, sizes
// of which sources, places and sizes say where in the program there are such numbers: the first `gathered` states
// are x[source] from the beginning; out[i] is what stands at place[i], if places are not 0; and so many numbers each
// matrix has. Then the phases, one after the other:
//     groups
// and per group, of which those of a phase may run at the same time:
//     multiply-adds, steps
// and per step:
//     space (1 states, 2 output), offset, size, start, segments
// and per segment:
//     matrix, offset in it, row stride, space (0 input, 1 states, 2 output), offset, depth
// The sums of a step start from the states at `start`, which are gathered ones; from the bias or zeros where it is -1.
// Outputs are read by later phases only, and where there are output places: the bias is then added at the end.
namespace program {
enum Head : std::int64_t {
    inputs,
    outputs,
    states,
    phases,
    gathered,
    sources,
    output_places,
    multiply_adds,
    matrices,
    sizes,
    head_size
};
enum Space : std::int64_t { input, state, output };
}  // namespace program

// Multiply-adds below which waking a thread costs more than it saves: PyTorch's own threads, which keep spinning
// after their work, may have to give up a core first.
constexpr std::int64_t worth_a_thread = 1024 * 1024;

template <typename Weight>
struct BlockSequenceOf {
    const std::int64_t *code;
    const Weight *const *matrices;
    const float *x;     // (batch, inputs)
    const float *bias;  // (outputs,), or null
    float *out;         // (batch, outputs)
    std::int64_t batch;
};

// All arrays contiguous and row-major, none overlapping `out`. The program must stay inside of its arrays:
// it is not checked here. Uses up to `threads` threads where that pays. Throws std::bad_alloc where its
// scratch memory cannot be had.
void block_sequence_apply(const BlockSequenceOf<float> &sequence, int threads);
void block_sequence_apply(const BlockSequenceOf<Bfloat16> &sequence, int threads);

}  // namespace weft
