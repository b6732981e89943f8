#pragma once
// What the processor can do, asked once at run time.

namespace weft {

enum class Instructions { portable, neon, avx2, avx512 };

// The instruction set in use: the best that both this build and this processor have, or the one chosen below.
Instructions instructions();

// Uses another copy of the leaf kernels from now on, for tests and comparisons; `name` as `instructions_name`
// gives it. False, and nothing changes, where build or processor lack it.
bool use_instructions(const char *name);

const char *instructions_name();

// Whether the processor has AVX-512's byte and integer dot products too (BW, VBMI, VNNI), as the copies named
// avx512vnni need.
bool has_avx512_integers();

}  // namespace weft
