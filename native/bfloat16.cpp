#include "bfloat16.hpp"

namespace weft {

void widen(const Bfloat16 *from, std::int64_t count, float *to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

void narrow(const float *from, std::int64_t count, Bfloat16 *to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = narrowed(from[i]);
}

}  // namespace weft
