// Everything is in unnamed namespaces and free of the standard library's templates, for the reason that
// vector.hpp gives.

#include "quantized_leaf.hpp"

#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

// ------------------------------------------------------------------------------------------------------------
// One register of floats, one of 32-bit words, and how codes come out of the latter. `words` reads exactly
// lanes * Bits bytes: bytes 0-3 of every group of eight codes go to `low`, its last four bytes to `high` (only
// for more than four bits).

// Where code i of a group of eight stands: in `low`, or in `high` and so many bits further down.
template <int Bits>
constexpr bool in_low(int i) {
    return i * Bits + Bits <= 32;
}
template <int Bits>
constexpr int place(int i) {
    return in_low<Bits>(i) ? i * Bits : i * Bits - 8 * (Bits - 4);
}

#if defined(__AVX512VNNI__)

constexpr int lanes = 16;
using Floats = __m512;
using Words = __m512i;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline Floats choose(const float *from, int64_t count, const int32_t *which) {
    const Floats values = count >= 16 ? _mm512_loadu_ps(from)
                                      : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
    return _mm512_permutexvar_ps(_mm512_loadu_si512(which), values);
}

inline __m512i load_bytes(const uint8_t *from, int64_t count) {
    if (count >= 64) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(count <= 0 ? 0 : ~uint64_t{0} >> (64 - count), from);
}

// The first `count` bytes, and whatever follows them within `available`. A masked load of bytes takes several
// times as long as a plain one.
template <int count>
inline __m512i load_some(const uint8_t *from, int64_t available) {
    if (available >= 64) return _mm512_loadu_si512(from);
    if constexpr (count <= 16)
        if (available >= 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    if constexpr (count <= 32)
        if (available >= 32)
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    return load_bytes(from, available);
}

// Byte m of lane k is byte k * Bits + m + from of the block.
template <int Bits>
struct Spread {
    alignas(64) uint8_t low[64], high[64], eights[64];
    constexpr Spread() : low(), high(), eights() {
        for (int k = 0; k < 16; ++k)
            for (int m = 0; m < 4; ++m) {
                low[4 * k + m] = static_cast<uint8_t>(k * Bits + (m < Bits ? m : 0));
                high[4 * k + m] = static_cast<uint8_t>(k * Bits + (Bits > 4 ? Bits - 4 + m : 0));
            }
        for (int k = 0; k < 8; ++k)
            for (int m = 0; m < 8; ++m) eights[8 * k + m] = static_cast<uint8_t>(k * Bits + (m < Bits ? m : 0));
    }
};
template <int Bits>
constexpr Spread<Bits> spread{};

template <int Bits>
inline void words(const uint8_t *from, int64_t available, Words &low, Words &high) {
    if constexpr (Bits == 4) {
        low = load_bytes(from, available);
    } else if constexpr (Bits < 4) {
        low = _mm512_permutexvar_epi8(_mm512_load_si512(spread<Bits>.low), load_some<16 * Bits>(from, available));
    } else {
        const __m512i first = load_bytes(from, available);
        const __m512i second = load_some<16 * Bits - 64>(from + 64, available - 64);
        low = _mm512_permutex2var_epi8(first, _mm512_load_si512(spread<Bits>.low), second);
        high = _mm512_permutex2var_epi8(first, _mm512_load_si512(spread<Bits>.high), second);
    }
}

template <int Bits, int I>
inline Words shifted(Words low, Words high) {
    const Words from = in_low<Bits>(I) ? low : high;
    return place<Bits>(I) == 0 ? from : _mm512_srli_epi32(from, place<Bits>(I));
}

template <int Bits>
struct Number {
    explicit Number(const float *) {}
    Floats value(Words word) const {
        return _mm512_cvtepi32_ps(_mm512_and_si512(word, _mm512_set1_epi32((1 << Bits) - 1)));
    }
};

// A codebook: up to 64 values sit in registers, where a shuffle looks at the low bits of a word only.
template <int Bits>
struct Book {
    static constexpr int registers = Bits <= 4 ? 1 : Bits == 5 ? 2 : Bits == 6 ? 4 : 1;
    Floats table[registers];
    const float *values;
    explicit Book(const float *from) : values(from) {
        if constexpr (Bits < 4) {
            float repeated[16];
            for (int i = 0; i < 16; ++i) repeated[i] = from[i & ((1 << Bits) - 1)];
            table[0] = load(repeated);
        } else if constexpr (Bits <= 6) {
            for (int i = 0; i < registers; ++i) table[i] = load(from + 16 * i);
        } else {
            table[0] = zero();
        }
    }
    Floats value(Words word) const {
        if constexpr (Bits <= 4) return _mm512_permutexvar_ps(word, table[0]);
        if constexpr (Bits == 5) return _mm512_permutex2var_ps(table[0], word, table[1]);
        if constexpr (Bits == 6)
            return _mm512_mask_blend_ps(_mm512_test_epi32_mask(word, _mm512_set1_epi32(32)),
                                        _mm512_permutex2var_ps(table[0], word, table[1]),
                                        _mm512_permutex2var_ps(table[2], word, table[3]));
        return _mm512_i32gather_ps(_mm512_and_si512(word, _mm512_set1_epi32((1 << Bits) - 1)), values, 4);
    }
};
// Levels of few bits are looked up like a codebook that starts at the middle.
constexpr int table_bits = 4;

#elif defined(__AVX2__)

constexpr int lanes = 8;
using Floats = __m256;
using Words = __m256i;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float *from) { return _mm256_loadu_ps(from); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline float sum(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Floats choose(const float *from, int64_t count, const int32_t *which) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count >= 8 ? 8 : static_cast<int>(count)), lane);
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(from, there),
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i *>(which)));
}

inline int word_at(const uint8_t *from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return word;
}
inline __m128i load128(const uint8_t *from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
}
inline __m256i load256(const uint8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}

template <int Bits>
inline Words every(const uint8_t *p) {
    return _mm256_setr_epi32(word_at(p), word_at(p + Bits), word_at(p + 2 * Bits), word_at(p + 3 * Bits),
                             word_at(p + 4 * Bits), word_at(p + 5 * Bits), word_at(p + 6 * Bits),
                             word_at(p + 7 * Bits));
}

template <int Bits>
inline void words(const uint8_t *from, int64_t available, Words &low, Words &high) {
    uint8_t copy[64];
    if (available < 8 * Bits) {
        std::memset(copy, 0, sizeof copy);
        std::memcpy(copy, from, static_cast<std::size_t>(available));
        from = copy;
    }
    if constexpr (Bits == 1) {
        low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    } else if constexpr (Bits == 2) {
        low = _mm256_cvtepu16_epi32(load128(from));
    } else if constexpr (Bits == 3) {
        const __m128i first = _mm_shuffle_epi8(
            load128(from), _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
        const __m128i second = _mm_shuffle_epi8(
            load128(from + 8), _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1));
        low = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    } else if constexpr (Bits == 4) {
        low = load256(from);
    } else if constexpr (Bits == 8) {
        const __m256 first = _mm256_castsi256_ps(load256(from)), second = _mm256_castsi256_ps(load256(from + 32));
        low = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), 0xD8);
        high = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xDD)), 0xD8);
    } else {
        low = every<Bits>(from);
        high = every<Bits>(from + Bits - 4);
    }
}

template <int Bits, int I>
inline Words shifted(Words low, Words high) {
    const Words from = in_low<Bits>(I) ? low : high;
    return place<Bits>(I) == 0 ? from : _mm256_srli_epi32(from, place<Bits>(I));
}

template <int Bits>
struct Number {
    explicit Number(const float *) {}
    Floats value(Words word) const {
        return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32((1 << Bits) - 1)));
    }
};

template <int Bits>
struct Book {
    Floats table[2];
    const float *values;
    explicit Book(const float *from) : values(from) {
        table[0] = table[1] = zero();
        if constexpr (Bits < 3) {
            float repeated[8];
            for (int i = 0; i < 8; ++i) repeated[i] = from[i & ((1 << Bits) - 1)];
            table[0] = load(repeated);
        } else if constexpr (Bits <= 4) {
            for (int i = 0; i < Bits - 2; ++i) table[i] = load(from + 8 * i);
        }
    }
    Floats value(Words word) const {
        if constexpr (Bits <= 3) return _mm256_permutevar8x32_ps(table[0], word);
        if constexpr (Bits == 4)
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table[0], word),
                                    _mm256_permutevar8x32_ps(table[1], word),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(word, 28)));
        return _mm256_i32gather_ps(values, _mm256_and_si256(word, _mm256_set1_epi32((1 << Bits) - 1)), 4);
    }
};
constexpr int table_bits = 3;

#else

constexpr int lanes = 8;
struct Floats {
    float lane[lanes];
};
struct Words {
    uint32_t lane[lanes];
};

inline Floats zero() { return {}; }
inline Floats load(const float *from) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = from[k];
    return result;
}
inline Floats multiply(Floats a, Floats b) {
    for (int k = 0; k < lanes; ++k) a.lane[k] *= b.lane[k];
    return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    for (int k = 0; k < lanes; ++k) c.lane[k] += a.lane[k] * b.lane[k];
    return c;
}
inline Floats add(Floats a, Floats b) {
    for (int k = 0; k < lanes; ++k) a.lane[k] += b.lane[k];
    return a;
}
inline float sum(Floats a) {
    for (int k = 0; k < 4; ++k) a.lane[k] += a.lane[k + 4];
    return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]);
}
inline Floats choose(const float *from, int64_t, const int32_t *which) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = from[which[k]];
    return result;
}

// Little-endian whatever the processor.
inline uint32_t bytes_at(const uint8_t *from, int count) {
    uint32_t word = 0;
    for (int m = 0; m < count; ++m) word |= static_cast<uint32_t>(from[m]) << (8 * m);
    return word;
}

template <int Bits>
inline void words(const uint8_t *from, int64_t available, Words &low, Words &high) {
    uint8_t copy[64];
    if (available < 8 * Bits) {
        std::memset(copy, 0, sizeof copy);
        std::memcpy(copy, from, static_cast<std::size_t>(available));
        from = copy;
    }
    for (int k = 0; k < lanes; ++k) {
        low.lane[k] = bytes_at(from + k * Bits, Bits < 4 ? Bits : 4);
        high.lane[k] = Bits > 4 ? bytes_at(from + k * Bits + Bits - 4, 4) : 0;
    }
}

template <int Bits, int I>
inline Words shifted(Words low, Words high) {
    Words from = in_low<Bits>(I) ? low : high;
    for (int k = 0; k < lanes; ++k) from.lane[k] >>= place<Bits>(I);
    return from;
}

template <int Bits>
struct Number {
    explicit Number(const float *) {}
    Floats value(Words word) const {
        Floats result;
        for (int k = 0; k < lanes; ++k)
            result.lane[k] = static_cast<float>(static_cast<int32_t>(word.lane[k] & ((1u << Bits) - 1u)));
        return result;
    }
};

template <int Bits>
struct Book {
    const float *values;
    explicit Book(const float *from) : values(from) {}
    Floats value(Words word) const {
        Floats result;
        for (int k = 0; k < lanes; ++k) result.lane[k] = values[word.lane[k] & ((1u << Bits) - 1u)];
        return result;
    }
};
constexpr int table_bits = 0;

#endif

constexpr int block = 8 * lanes;

// ------------------------------------------------------------------------------------------------------------
// Float vectors

// The codes from the middle on: -2^(bits - 1) ... 2^(bits - 1) - 1, where they are looked up.
struct Centred {
    float values[16];
    explicit Centred(int bits) {
        for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - (1 << (bits - 1)));
    }
};

template <int Bits, typename Decoder, int Batch, int Sums>
inline void one_block(const Decoder &decoder, Words low, Words high, const float *x, int64_t x_stride,
                      Floats (&sums)[Batch][Sums]) {
#define WEFT_CODE(i)                                                                           \
    {                                                                                          \
        const Floats value = decoder.value(shifted<Bits, i>(low, high));                       \
        for (int b = 0; b < Batch; ++b)                                                        \
            sums[b][i % Sums] =                                                                \
                multiply_add(value, load(x + b * x_stride + i * lanes), sums[b][i % Sums]);    \
    }
    WEFT_CODE(0) WEFT_CODE(1) WEFT_CODE(2) WEFT_CODE(3)
    WEFT_CODE(4) WEFT_CODE(5) WEFT_CODE(6) WEFT_CODE(7)
#undef WEFT_CODE
}

// What the products of the codes are too large by: the sum of scale * zero * (sum of x) over the groups.
inline float surplus(const float *scales, const float *zeros, float middle, const float *of_groups, int64_t groups) {
    Floats sums = zero();
    int64_t g = 0;
    for (; g + lanes <= groups; g += lanes) {
        const Floats weighted = multiply(load(scales + g), load(of_groups + g));
        sums = zeros != nullptr ? multiply_add(weighted, load(zeros + g), sums) : add(sums, weighted);
    }
    float result = g > 0 ? sum(sums) : 0.0f;
    for (; g < groups; ++g) result += scales[g] * of_groups[g] * (zeros != nullptr ? zeros[g] : 1.0f);
    return zeros != nullptr ? result : middle * result;
}

template <int Batch, int Sums>
inline void clear(Floats (&sums)[Batch][Sums]) {
    for (int b = 0; b < Batch; ++b)
        for (int s = 0; s < Sums; ++s) sums[b][s] = zero();
}

template <int Sums>
inline Floats total(const Floats (&sums)[Sums]) {
    Floats result = sums[0];
    for (int s = 1; s < Sums; ++s) result = add(result, sums[s]);
    return result;
}

// One row against Batch vectors. `offset` is what the decoder's values lack: level = value - offset.
template <int Bits, typename Decoder, int Batch>
inline void float_row(const weft::FloatRows &p, const Decoder &decoder, int64_t row, int64_t input, float offset) {
    const uint8_t *codes = p.codes + row * p.row_bytes;
    const float *x = p.x + input * p.x_stride;
    const int64_t blocks = (p.inputs + block - 1) / block;
    Words low, high = {};
    float results[Batch];
    if (p.groups <= 1) {
        // Eight sums in flight hide the latency of the multiply-add.
        constexpr int sums_each = Batch == 1 ? 8 : 2;
        Floats sums[Batch][sums_each];
        clear(sums);
        for (int64_t i = 0; i < blocks; ++i) {
            words<Bits>(codes + i * lanes * Bits, p.row_bytes - i * lanes * Bits, low, high);
            one_block<Bits>(decoder, low, high, x + i * block, p.x_stride, sums);
        }
        for (int b = 0; b < Batch; ++b) results[b] = sum(total(sums[b]));
        if (p.scales != nullptr) {
            const float middle = p.zeros != nullptr ? p.zeros[row] : offset;
            for (int b = 0; b < Batch; ++b)
                results[b] = p.scales[row] * (results[b] - middle * p.sums[input + b]);
        }
    } else {
        const float *scales = p.scales + row * p.groups;
        Floats sums[Batch];
        for (int b = 0; b < Batch; ++b) sums[b] = zero();
        for (int64_t i = 0; i < blocks; ++i) {
            Floats parts[Batch][2];
            clear(parts);
            words<Bits>(codes + i * lanes * Bits, p.row_bytes - i * lanes * Bits, low, high);
            one_block<Bits>(decoder, low, high, x + i * block, p.x_stride, parts);
            const Floats scale = choose(scales + p.first[i], p.groups - p.first[i], p.within + i * lanes);
            for (int b = 0; b < Batch; ++b) sums[b] = multiply_add(scale, add(parts[b][0], parts[b][1]), sums[b]);
        }
        for (int b = 0; b < Batch; ++b) {
            results[b] = sum(sums[b]);
            if (p.zeros != nullptr || offset != 0.0f)
                results[b] -= surplus(scales, p.zeros != nullptr ? p.zeros + row * p.groups : nullptr, offset,
                                      p.sums + (input + b) * p.groups, p.groups);
        }
    }
    for (int b = 0; b < Batch; ++b)
        p.out[(input + b) * p.outputs + row] = results[b] + (p.bias != nullptr ? p.bias[row] : 0.0f);
}

template <int Bits, typename Decoder>
inline void all_vectors(const weft::FloatRows &p, const Decoder &decoder, int64_t row, float offset) {
    int64_t input = 0;
    for (; input + 4 <= p.batch; input += 4) float_row<Bits, Decoder, 4>(p, decoder, row, input, offset);
    for (; input < p.batch; ++input) float_row<Bits, Decoder, 1>(p, decoder, row, input, offset);
}

template <int Bits>
inline void float_rows_of(const weft::FloatRows &p, int64_t begin, int64_t end) {
    constexpr float middle = 1 << (Bits - 1);
    if (p.codebook != nullptr) {
        for (int64_t row = begin; row < end; ++row)
            all_vectors<Bits>(p, Book<Bits>(p.codebook + row * p.book_stride), row, 0.0f);
    } else if constexpr (Bits <= table_bits) {
        const Centred levels(Bits);
        // With `zeros` the codes themselves are looked up.
        float plain[16];
        for (int i = 0; i < 16; ++i) plain[i] = static_cast<float>(i);
        const Book<Bits> book(p.zeros != nullptr ? plain : levels.values);
        for (int64_t row = begin; row < end; ++row) all_vectors<Bits>(p, book, row, 0.0f);
    } else {
        for (int64_t row = begin; row < end; ++row) all_vectors<Bits>(p, Number<Bits>(nullptr), row, middle);
    }
}

void float_rows(const weft::FloatRows &p, int64_t begin, int64_t end) {
    switch (p.bits) {
        case 1: return float_rows_of<1>(p, begin, end);
        case 2: return float_rows_of<2>(p, begin, end);
        case 3: return float_rows_of<3>(p, begin, end);
        case 4: return float_rows_of<4>(p, begin, end);
        case 5: return float_rows_of<5>(p, begin, end);
        case 6: return float_rows_of<6>(p, begin, end);
        case 7: return float_rows_of<7>(p, begin, end);
        default: return float_rows_of<8>(p, begin, end);
    }
}

// ------------------------------------------------------------------------------------------------------------
// Vectors of whole numbers. A step takes `step` codes to one register each of codes and numbers; a lane of the
// 32-bit sums belongs to `step / lanes` neighbouring inputs.

#if defined(__AVX512VNNI__)

constexpr int step = 64;
using Whole = std::int8_t;
using Codes = __m512i;
using Sums = __m512i;

inline Sums no_sums() { return _mm512_setzero_si512(); }
template <int Bits>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    if constexpr (Bits == 8) {
        return load_bytes(from, available);
    } else {
        // A group of eight codes moves to a word of 64 bits, whose bytes then take eight bits from any place.
        const __m512i eights = _mm512_permutexvar_epi8(
            _mm512_load_si512(spread<Bits>.eights), load_some<8 * Bits>(from, available));
        constexpr uint64_t places = 0ull | uint64_t{Bits} << 8 | uint64_t{2 * Bits} << 16 | uint64_t{3 * Bits} << 24 |
                                    uint64_t{4 * Bits} << 32 | uint64_t{5 * Bits} << 40 | uint64_t{6 * Bits} << 48 |
                                    uint64_t{7 * Bits} << 56;
        return _mm512_and_si512(
            _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(places)), eights),
            _mm512_set1_epi8((1 << Bits) - 1));
    }
}
inline Codes numbers_at(const Whole *from) { return _mm512_loadu_si512(from); }
inline Sums dot(Sums sums, Codes codes, Codes numbers) { return _mm512_dpbusd_epi32(sums, codes, numbers); }
inline Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline void store_codes(uint8_t *to, Codes codes) { _mm512_storeu_si512(to, codes); }

#elif defined(__AVX2__)

constexpr int step = 16;
using Whole = std::int16_t;
using Codes = __m256i;
using Sums = __m256i;

inline Sums no_sums() { return _mm256_setzero_si256(); }
template <int Bits>
inline __m128i sixteen(const uint8_t *from, int64_t available) {
    if constexpr (Bits == 8) {
        if (available >= 16) return load128(from);
        uint8_t copy[16] = {};
        std::memcpy(copy, from, static_cast<std::size_t>(available));
        return load128(copy);
    } else {
        // Eight codes spread out to eight bytes at once.
        constexpr uint64_t mask = 0x0101010101010101ull * ((1u << Bits) - 1u);
        uint64_t first = 0, second = 0;
        if (available >= 2 * Bits) {
            std::memcpy(&first, from, Bits);
            std::memcpy(&second, from + Bits, Bits);
        } else {
            const int64_t in_first = available < Bits ? available : Bits;
            std::memcpy(&first, from, static_cast<std::size_t>(in_first));
            std::memcpy(&second, from + in_first, static_cast<std::size_t>(available - in_first));
        }
        return _mm_set_epi64x(static_cast<long long>(_pdep_u64(second, mask)),
                              static_cast<long long>(_pdep_u64(first, mask)));
    }
}
template <int Bits>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    return _mm256_cvtepu8_epi16(sixteen<Bits>(from, available));
}
inline Codes numbers_at(const Whole *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}
// In 16 bits two products of 255 and 127 cannot be added; widened to 32 they can.
inline Sums dot(Sums sums, Codes codes, Codes numbers) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(codes, numbers));
}
inline Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
inline Sums add_sums(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }

#else

constexpr int step = 8;
using Whole = std::int16_t;
struct Codes {
    std::int16_t lane[8];
};
struct Sums {
    int32_t lane[8];
};

inline Sums no_sums() { return {}; }
template <int Bits>
inline uint64_t eight(const uint8_t *from, int64_t available) {
    uint64_t word = 0;
    const int count = available < Bits ? static_cast<int>(available) : Bits;
    for (int m = 0; m < count; ++m) word |= static_cast<uint64_t>(from[m]) << (8 * m);
    return word;
}
template <int Bits>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    const uint64_t word = eight<Bits>(from, available);
    Codes result;
    for (int k = 0; k < 8; ++k)
        result.lane[k] = static_cast<std::int16_t>((word >> (k * Bits)) & ((1u << Bits) - 1u));
    return result;
}
inline Codes numbers_at(const Whole *from) {
    Codes result;
    for (int k = 0; k < 8; ++k) result.lane[k] = from[k];
    return result;
}
inline Sums dot(Sums sums, Codes codes, Codes numbers) {
    for (int k = 0; k < 8; ++k) sums.lane[k] += static_cast<int32_t>(codes.lane[k]) * numbers.lane[k];
    return sums;
}
inline Floats to_floats(Sums sums) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = static_cast<float>(sums.lane[k]);
    return result;
}
inline Sums add_sums(Sums a, Sums b) {
    for (int k = 0; k < 8; ++k) a.lane[k] += b.lane[k];
    return a;
}
inline Floats broadcast(float value) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = value;
    return result;
}

#endif

// 255 * 127 * 65536 is the last such product of a power of two below 2^31: no sum of one lane may take more.
constexpr int64_t longest_run = 65536 / step;

template <int Bits, int Rows, int Batch>
inline void integer_tile(const weft::IntegerRows &p, int64_t row, int64_t input) {
    constexpr int step_bytes = step / 8 * Bits;
    const uint8_t *codes = p.codes + row * p.row_bytes;
    const Whole *x = static_cast<const Whole *>(p.x) + input * p.x_stride;
    const int64_t steps = (p.inputs + step - 1) / step;
    const bool lanes_differ = p.groups > 1 && p.group % step != 0;
    const int64_t steps_each = p.groups <= 1 ? steps : p.group / step;
    const int64_t run = steps_each < longest_run ? steps_each : longest_run;

    Floats results[Rows][Batch];
    for (int r = 0; r < Rows; ++r)
        for (int b = 0; b < Batch; ++b) results[r][b] = zero();

    // Groups that share a register: every step is scaled lane by lane.
    for (int64_t s = 0; lanes_differ && s < steps; ++s) {
        Codes of_rows[Rows];
        Floats scale[Rows];
        for (int r = 0; r < Rows; ++r) {
            of_rows[r] =
                codes_at<Bits>(codes + r * p.row_bytes + s * step_bytes, p.row_bytes - s * step_bytes);
            scale[r] = choose(p.scales + (row + r) * p.groups + p.first[s], p.groups - p.first[s],
                              p.within + s * lanes);
        }
        for (int b = 0; b < Batch; ++b) {
            const Codes numbers = numbers_at(x + b * p.x_stride + s * step);
            for (int r = 0; r < Rows; ++r)
                results[r][b] =
                    multiply_add(scale[r], to_floats(dot(no_sums(), of_rows[r], numbers)), results[r][b]);
        }
    }

    int64_t group_end = 0;
    for (int64_t begin = lanes_differ ? steps : 0; begin < steps;) {
        if (begin == group_end) {
            group_end += p.groups <= 1 ? steps : steps_each;
            if (group_end > steps) group_end = steps;
        }
        // A run neither crosses the end of a group nor grows beyond what 32 bits hold.
        int64_t end = begin + run;
        if (end > group_end) end = group_end;

        Sums sums[Rows][Batch];
        for (int r = 0; r < Rows; ++r)
            for (int b = 0; b < Batch; ++b) sums[r][b] = no_sums();
        for (int64_t s = begin; s < end; ++s) {
            const int64_t left = p.row_bytes - s * step_bytes;
            Codes of_rows[Rows];
            for (int r = 0; r < Rows; ++r)
                of_rows[r] = codes_at<Bits>(codes + r * p.row_bytes + s * step_bytes, left);
            for (int b = 0; b < Batch; ++b) {
                const Codes numbers = numbers_at(x + b * p.x_stride + s * step);
                for (int r = 0; r < Rows; ++r) sums[r][b] = dot(sums[r][b], of_rows[r], numbers);
            }
        }

        for (int r = 0; r < Rows; ++r) {
            const float *scales = p.scales + (row + r) * p.groups;
            const Floats scale = broadcast(scales[p.groups <= 1 ? 0 : p.first[begin]]);
            for (int b = 0; b < Batch; ++b)
                results[r][b] = multiply_add(scale, to_floats(sums[r][b]), results[r][b]);
        }
        begin = end;
    }

    constexpr float middle = 1 << (Bits - 1);
    for (int r = 0; r < Rows; ++r) {
        const float *scales = p.scales + (row + r) * p.groups;
        const float *zeros = p.zeros != nullptr ? p.zeros + (row + r) * p.groups : nullptr;
        for (int b = 0; b < Batch; ++b) {
            const float excess = surplus(scales, zeros, middle, p.sums + (input + b) * p.groups, p.groups);
            p.out[(input + b) * p.outputs + row + r] =
                p.widths[input + b] * (sum(results[r][b]) - excess) + (p.bias != nullptr ? p.bias[row + r] : 0.0f);
        }
    }
}

template <int Bits, int Rows>
inline void all_numbers(const weft::IntegerRows &p, int64_t row) {
    int64_t input = 0;
    for (; input + 4 <= p.batch; input += 4) integer_tile<Bits, Rows, 4>(p, row, input);
    for (; input < p.batch; ++input) integer_tile<Bits, Rows, 1>(p, row, input);
}

template <int Bits>
inline void integer_rows_of(const weft::IntegerRows &p, int64_t begin, int64_t end) {
    int64_t row = begin;
    // One vector: one row after the other reads the codes in one stream, which the memory likes best.
    if (p.batch > 1)
        for (; row + 4 <= end; row += 4) all_numbers<Bits, 4>(p, row);
    for (; row < end; ++row) all_numbers<Bits, 1>(p, row);
}

void integer_rows(const weft::IntegerRows &p, int64_t begin, int64_t end) {
    switch (p.bits) {
        case 1: return integer_rows_of<1>(p, begin, end);
        case 2: return integer_rows_of<2>(p, begin, end);
        case 3: return integer_rows_of<3>(p, begin, end);
        case 4: return integer_rows_of<4>(p, begin, end);
        case 5: return integer_rows_of<5>(p, begin, end);
        case 6: return integer_rows_of<6>(p, begin, end);
        case 7: return integer_rows_of<7>(p, begin, end);
        default: return integer_rows_of<8>(p, begin, end);
    }
}

// ------------------------------------------------------------------------------------------------------------
// What stands around the products

template <int Bits>
void unpack_row_of(const uint8_t *row, int64_t row_bytes, int64_t inputs, uint8_t *out) {
    constexpr int step_bytes = step / 8 * Bits;
    for (int64_t j = 0, at = 0; j < inputs; j += step, at += step_bytes) {
#if defined(__AVX512VNNI__)
        store_codes(out + j, codes_at<Bits>(row + at, row_bytes - at));
#elif defined(__AVX2__)
        const int64_t left = row_bytes - at;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + j),
                         sixteen<Bits>(row + at, left < step_bytes ? left : step_bytes));
#else
        const uint64_t word = eight<Bits>(row + at, row_bytes - at);
        for (int k = 0; k < 8; ++k) out[j + k] = static_cast<uint8_t>((word >> (k * Bits)) & ((1u << Bits) - 1u));
#endif
    }
}

void unpack_row(const uint8_t *row, int64_t row_bytes, int64_t inputs, int bits, uint8_t *out) {
    switch (bits) {
        case 1: return unpack_row_of<1>(row, row_bytes, inputs, out);
        case 2: return unpack_row_of<2>(row, row_bytes, inputs, out);
        case 3: return unpack_row_of<3>(row, row_bytes, inputs, out);
        case 4: return unpack_row_of<4>(row, row_bytes, inputs, out);
        case 5: return unpack_row_of<5>(row, row_bytes, inputs, out);
        case 6: return unpack_row_of<6>(row, row_bytes, inputs, out);
        case 7: return unpack_row_of<7>(row, row_bytes, inputs, out);
        default: return unpack_row_of<8>(row, row_bytes, inputs, out);
    }
}

template <int Bits>
void look_up_of(const uint8_t *codes, int64_t inputs, const float *values, float *out) {
    int64_t j = 0;
#if defined(__AVX512VNNI__) || defined(__AVX2__)
    const Book<Bits> book(values);
    for (; j + lanes <= inputs; j += lanes) {
#if defined(__AVX512VNNI__)
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + j));
        _mm512_storeu_ps(out + j, book.value(_mm512_cvtepu8_epi32(bytes)));
#else
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + j));
        _mm256_storeu_ps(out + j, book.value(_mm256_cvtepu8_epi32(bytes)));
#endif
    }
#endif
    for (; j < inputs; ++j) out[j] = values[codes[j]];
}

void look_up(const uint8_t *codes, int64_t inputs, int bits, const float *values, float *out) {
    switch (bits) {
        case 1: return look_up_of<1>(codes, inputs, values, out);
        case 2: return look_up_of<2>(codes, inputs, values, out);
        case 3: return look_up_of<3>(codes, inputs, values, out);
        case 4: return look_up_of<4>(codes, inputs, values, out);
        case 5: return look_up_of<5>(codes, inputs, values, out);
        case 6: return look_up_of<6>(codes, inputs, values, out);
        default: return look_up_of<8>(codes, inputs, values, out);
    }
}

void levels(const uint8_t *codes, int64_t count, float zero_code, float scale, float *out) {
    for (int64_t j = 0; j < count; ++j) out[j] = (static_cast<float>(codes[j]) - zero_code) * scale;
}

// Adding and taking away 1.5 * 2^23 rounds to a whole number, halves to the even one, as torch.round does.
constexpr float round_here = 12582912.0f;

float round_vector(const float *x, int64_t inputs, void *out) {
    // As whole numbers the bit patterns of absolute values have the same order, with NaN above infinity.
    uint32_t largest = 0;
    for (int64_t j = 0; j < inputs; ++j) {
        uint32_t pattern;
        std::memcpy(&pattern, x + j, 4);
        pattern &= 0x7FFFFFFFu;
        largest = largest < pattern ? pattern : largest;
    }
    float most;
    std::memcpy(&most, &largest, 4);
    Whole *whole = static_cast<Whole *>(out);
    if (largest >= 0x7F800000u) {
        std::memset(whole, 0, static_cast<std::size_t>(inputs) * sizeof(Whole));
        const uint32_t not_a_number = 0x7FC00000u;
        std::memcpy(&most, &not_a_number, 4);
        return most;
    }
    if (most < weft::smallest_activation) most = weft::smallest_activation;
    const float inverse = 127.0f / most;
    for (int64_t j = 0; j < inputs; ++j) {
        // Two statements: no compiler may fuse the product with the sum.
        const float scaled = x[j] * inverse;
        const float shifted_up = scaled + round_here;
        whole[j] = static_cast<Whole>(static_cast<int32_t>(shifted_up - round_here));
    }
    return most / 127.0f;
}

}  // namespace

namespace weft::WEFT_VARIANT {

extern const QuantizedLeaf quantized_leaf;
const QuantizedLeaf quantized_leaf = {lanes, sizeof(Whole), step, float_rows, integer_rows, unpack_row,
                                      look_up, levels,        round_vector};

}  // namespace weft::WEFT_VARIANT
