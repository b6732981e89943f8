#pragma once
// What the processor can do, asked once at run time.

namespace weft {

enum class Instructions { portable, neon, avx2, avx512 };

// The best instruction set that both this build and this processor have.
Instructions instructions();

const char *instructions_name();

}  // namespace weft
