#pragma once
// Numbers of 16 bits with the exponent of a float: weights are read as such and everything is summed in float.
//
// Functions are static because leaf kernels include this: copies for different instruction sets must not be merged.

#include <cstdint>
#include <cstring>

namespace weft {

struct Bfloat16 {
    std::uint16_t bits;
};

static inline float widened(Bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// The nearest, halves to the even one; a NaN stays one.
static inline Bfloat16 narrowed(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// Arrays of them, compiled once.
void widen(const Bfloat16 *from, std::int64_t count, float *to);
void narrow(const float *from, std::int64_t count, Bfloat16 *to);

}  // namespace weft
