// Everything is in unnamed namespaces and free of the standard library's templates, for the reason that
// vector.hpp gives.

#include "quantized_leaf.hpp"

#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using std::int8_t;
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
    // No wider than needed: what crosses into another line of the cache costs a second load.
    if constexpr (count <= 16)
        if (available >= 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    if constexpr (count <= 32)
        if (available >= 32)
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    return load_bytes(from, available);  // a plain load where all 64 bytes are there
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
struct Book {
    const float *values;
    explicit Book(const float *from) : values(from) {}
    Floats value(Words word) const {
        Floats result;
        for (int k = 0; k < lanes; ++k) result.lane[k] = values[word.lane[k] & ((1u << Bits) - 1u)];
        return result;
    }
};

#endif

constexpr int block = 8 * lanes;

// ------------------------------------------------------------------------------------------------------------
// Codebooks

template <int Bits, int Batch, int Sums>
inline void one_block(const Book<Bits> &book, Words low, Words high, const float *x, int64_t x_stride,
                      Floats (&sums)[Batch][Sums]) {
#define WEFT_CODE(i)                                                                           \
    {                                                                                          \
        const Floats value = book.value(shifted<Bits, i>(low, high));                          \
        for (int b = 0; b < Batch; ++b)                                                        \
            sums[b][i % Sums] =                                                                \
                multiply_add(value, load(x + b * x_stride + i * lanes), sums[b][i % Sums]);    \
    }
    WEFT_CODE(0) WEFT_CODE(1) WEFT_CODE(2) WEFT_CODE(3)
    WEFT_CODE(4) WEFT_CODE(5) WEFT_CODE(6) WEFT_CODE(7)
#undef WEFT_CODE
}

// One row against Batch vectors.
template <int Bits, int Batch>
inline void codebook_row(const weft::CodebookRows &p, const Book<Bits> &book, int64_t row, int64_t input) {
    // Eight sums in flight hide the latency of the multiply-add.
    constexpr int sums_each = Batch == 1 ? 8 : 2;
    Floats sums[Batch][sums_each];
    for (int b = 0; b < Batch; ++b)
        for (int s = 0; s < sums_each; ++s) sums[b][s] = zero();
    const uint8_t *codes = p.codes + row * p.row_bytes;
    const float *x = p.x + input * p.x_stride;
    const int64_t blocks = (p.inputs + block - 1) / block;
    Words low, high = {};
    for (int64_t i = 0; i < blocks; ++i) {
        words<Bits>(codes + i * lanes * Bits, p.row_bytes - i * lanes * Bits, low, high);
        one_block<Bits>(book, low, high, x + i * block, p.x_stride, sums);
    }
    for (int b = 0; b < Batch; ++b) {
        Floats total = sums[b][0];
        for (int s = 1; s < sums_each; ++s) total = add(total, sums[b][s]);
        p.out[(input + b) * p.outputs + row] = sum(total) + (p.bias != nullptr ? p.bias[row] : 0.0f);
    }
}

template <int Bits>
void codebook_rows_of(const weft::CodebookRows &p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const Book<Bits> book(p.codebook + row * p.book_stride);
        int64_t input = 0;
        for (; input + 4 <= p.batch; input += 4) codebook_row<Bits, 4>(p, book, row, input);
        for (; input < p.batch; ++input) codebook_row<Bits, 1>(p, book, row, input);
    }
}

void codebook_rows(const weft::CodebookRows &p, int64_t begin, int64_t end) {
    switch (p.bits) {
        case 1: return codebook_rows_of<1>(p, begin, end);
        case 2: return codebook_rows_of<2>(p, begin, end);
        case 3: return codebook_rows_of<3>(p, begin, end);
        case 4: return codebook_rows_of<4>(p, begin, end);
        case 5: return codebook_rows_of<5>(p, begin, end);
        case 6: return codebook_rows_of<6>(p, begin, end);
        case 7: return codebook_rows_of<7>(p, begin, end);
        default: return codebook_rows_of<8>(p, begin, end);
    }
}

// ------------------------------------------------------------------------------------------------------------
// Vectors of whole numbers. A step takes `step` codes to one register of bytes, in their order; a lane of the
// 32-bit sums belongs to four neighbouring inputs. Where Careful, only `available` bytes may be read; else
// `step` bytes may, whatever the number of bits.

#if defined(__AVX512VNNI__)

constexpr int step = 64;
constexpr int rows_at_once = 4;
using Codes = __m512i;
using Sums = __m512i;

inline Sums no_sums() { return _mm512_setzero_si512(); }
template <int Bits, bool Careful>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    if constexpr (Bits == 8) {
        return Careful ? load_bytes(from, available) : _mm512_loadu_si512(from);
    } else if constexpr (Bits == 4 && !Careful) {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
        return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    } else {
        // A group of eight codes moves to a word of 64 bits, whose bytes then take eight bits from any place.
        const __m512i packed = load_some<8 * Bits>(from, Careful ? available : step);
        const __m512i eights = _mm512_permutexvar_epi8(_mm512_load_si512(spread<Bits>.eights), packed);
        constexpr uint64_t places = 0ull | uint64_t{Bits} << 8 | uint64_t{2 * Bits} << 16 | uint64_t{3 * Bits} << 24 |
                                    uint64_t{4 * Bits} << 32 | uint64_t{5 * Bits} << 40 | uint64_t{6 * Bits} << 48 |
                                    uint64_t{7 * Bits} << 56;
        return _mm512_and_si512(
            _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(places)), eights),
            _mm512_set1_epi8((1 << Bits) - 1));
    }
}
inline Codes numbers_at(const int8_t *from) { return _mm512_loadu_si512(from); }
template <int Bits>
inline Sums dot(Sums sums, Codes codes, Codes numbers) {
    // Written out: compilers of 2022 move the sums to another register and back around the intrinsic.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(numbers));
    return sums;
}
// What the codes in `dot` lack.
template <int Bits>
constexpr float centre = 0.0f;
inline Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline void store_codes(uint8_t *to, Codes codes) { _mm512_storeu_si512(to, codes); }
inline void four_sums(const Floats (&of)[4], float *out) {
    __m256 halves[4];
    for (int i = 0; i < 4; ++i)
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256(of[i]), _mm512_extractf32x8_ps(of[i], 1));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline void fetch_ahead(const uint8_t *at) { _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0); }

// The sums across the lanes of sixteen registers, that of [r][v] in lane 4 v + r.
inline __m512i sixteen_sums(const Sums (&of)[4][4]) {
    const auto both = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
    __m512i fours[4];  // in every quarter the sums of the four rows' own quarters
    for (int v = 0; v < 4; ++v) {
        const __m512i low = both(_mm512_unpacklo_epi32(of[0][v], of[1][v]), _mm512_unpackhi_epi32(of[0][v], of[1][v]));
        const __m512i high = both(_mm512_unpacklo_epi32(of[2][v], of[3][v]), _mm512_unpackhi_epi32(of[2][v], of[3][v]));
        fours[v] = both(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    __m512i halves[2];
    for (int i = 0; i < 2; ++i)
        halves[i] = both(_mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                         _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xEE));
    return both(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88), _mm512_shuffle_i32x4(halves[0], halves[1], 0xDD));
}

// The same four numbers in every quarter, and each of four numbers all over its own quarter.
inline Floats by_row(const float *four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
inline Floats by_vector(const float *four) {
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(_mm_loadu_ps(four)));
}

// Four rows of one scale each against four vectors of one digit: what stands around the products takes as long as
// the products themselves where rows are short, unless all sixteen results share it.
template <int Bits>
inline void finish_sixteen(const weft::IntegerRows &p, const Sums (&sums)[4][4], int64_t row, int64_t input) {
    constexpr float middle = 1 << (Bits - 1);
    const Floats zero_codes = p.zeros != nullptr ? by_row(p.zeros + row) : _mm512_set1_ps(middle);
    const Floats excess = multiply(zero_codes, by_vector(p.sums + input));
    const Floats scaled = multiply(by_row(p.scales + row), _mm512_sub_ps(to_floats(sixteen_sums(sums)), excess));
    Floats y = multiply(by_vector(p.widths + input), scaled);
    if (p.bias != nullptr) y = add(y, by_row(p.bias + row));
    float *out = p.out + input * p.outputs + row;
    _mm_storeu_ps(out, _mm512_castps512_ps128(y));
    _mm_storeu_ps(out + p.outputs, _mm512_extractf32x4_ps(y, 1));
    _mm_storeu_ps(out + 2 * p.outputs, _mm512_extractf32x4_ps(y, 2));
    _mm_storeu_ps(out + 3 * p.outputs, _mm512_extractf32x4_ps(y, 3));
}
#define WEFT_SIXTEEN_AT_ONCE

#elif defined(__AVX2__)

constexpr int step = 32;
constexpr int rows_at_once = 2;
using Codes = __m256i;
using Sums = __m256i;

inline Sums no_sums() { return _mm256_setzero_si256(); }
// Eight bytes as one number: a copy of fewer bytes into it would wait for the store before it can be read.
inline uint64_t eight_bytes(const uint8_t *from) {
    uint64_t result;
    std::memcpy(&result, from, 8);
    return result;
}
template <int Bits, bool Careful>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    uint8_t copy[32];
    if (Careful && available < 32) {
        std::memset(copy, 0, sizeof copy);
        if (available > 0) std::memcpy(copy, from, static_cast<std::size_t>(available));
        from = copy;
    }
    if constexpr (Bits == 8) {
        return load256(from);
    } else if constexpr (Bits == 4) {
        const __m256i wide = _mm256_cvtepu8_epi16(load128(from));
        return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
    } else if constexpr (Bits == 2) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
        const __m256i fours = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
        return _mm256_and_si256(_mm256_or_si256(fours, _mm256_slli_epi32(fours, 6)), _mm256_set1_epi8(3));
    } else {
        // Eight codes spread out to eight bytes at once.
        constexpr uint64_t mask = 0x0101010101010101ull * ((1u << Bits) - 1u);
        long long eights[4];
        for (int i = 0; i < 4; ++i)
            eights[i] = static_cast<long long>(_pdep_u64(eight_bytes(from + i * Bits), mask));
        return _mm256_setr_epi64x(eights[0], eights[1], eights[2], eights[3]);
    }
}
inline Codes numbers_at(const int8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}
// The instruction adds two products in 16 bits. Those of codes up to 127 fit; codes of eight bits are taken
// from 128 and their signs given to the numbers.
template <int Bits>
inline Sums dot(Sums sums, Codes codes, Codes numbers) {
    __m256i pairs;
    if constexpr (Bits == 8) {
        const __m256i centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(numbers, centred));
    } else {
        pairs = _mm256_maddubs_epi16(codes, numbers);
    }
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int Bits>
constexpr float centre = Bits == 8 ? 128.0f : 0.0f;
inline Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline void store_codes(uint8_t *to, Codes codes) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), codes); }
inline void four_sums(const Floats (&of)[4], float *out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline void fetch_ahead(const uint8_t *at) { _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0); }

#else

constexpr int step = 32;
constexpr int rows_at_once = 2;
struct Codes {
    uint8_t lane[step];
};
struct Numbers {
    int8_t lane[step];
};
struct Sums {
    int32_t lane[lanes];
};

inline Sums no_sums() { return {}; }
template <int Bits, bool Careful>
inline Codes codes_at(const uint8_t *from, int64_t available) {
    Codes result;
    for (int k = 0; k < step; k += 8, from += Bits, available -= Bits) {
        uint64_t word = 0;
        const int64_t count = Careful && available < Bits ? available : Bits;
        for (int m = 0; m < count; ++m) word |= static_cast<uint64_t>(from[m]) << (8 * m);
        for (int i = 0; i < 8; ++i)
            result.lane[k + i] = static_cast<uint8_t>((word >> (i * Bits)) & ((1u << Bits) - 1u));
    }
    return result;
}
inline Numbers numbers_at(const int8_t *from) {
    Numbers result;
    std::memcpy(result.lane, from, step);
    return result;
}

#if defined(__ARM_NEON) && defined(__aarch64__)

// Two products of 128 * 127 fit 16 bits; codes of eight bits are taken from 128.
template <int Bits>
inline Sums dot(Sums sums, Codes codes, Numbers numbers) {
    for (int k = 0; k < step; k += 16) {
        uint8x16_t bytes = vld1q_u8(codes.lane + k);
        if (Bits == 8) bytes = veorq_u8(bytes, vdupq_n_u8(128));
        const int8x16_t centred = vreinterpretq_s8_u8(bytes), values = vld1q_s8(numbers.lane + k);
        // Every result belongs to eight neighbouring inputs, its pair of products to four of them.
        const int16x8_t low = vmull_s8(vget_low_s8(centred), vget_low_s8(values));
        const int16x8_t high = vmull_s8(vget_high_s8(centred), vget_high_s8(values));
        int32_t *to = sums.lane + k / 4;
        vst1q_s32(to, vaddq_s32(vld1q_s32(to), vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
    }
    return sums;
}
template <int Bits>
constexpr float centre = Bits == 8 ? 128.0f : 0.0f;

#else

template <int Bits>
inline Sums dot(Sums sums, Codes codes, Numbers numbers) {
    for (int k = 0; k < step; ++k)
        sums.lane[k / 4] += static_cast<int32_t>(codes.lane[k]) * static_cast<int32_t>(numbers.lane[k]);
    return sums;
}
template <int Bits>
constexpr float centre = 0.0f;

#endif

inline Floats to_floats(Sums sums) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = static_cast<float>(sums.lane[k]);
    return result;
}
inline Floats broadcast(float value) {
    Floats result;
    for (int k = 0; k < lanes; ++k) result.lane[k] = value;
    return result;
}
inline void store_codes(uint8_t *to, Codes codes) { std::memcpy(to, codes.lane, step); }
inline void four_sums(const Floats (&of)[4], float *out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(of[i]);
}
inline void fetch_ahead(const uint8_t *) {}

#endif

// One lane adds up four products of at most 255 * 127 per step: 2^14 steps stay below 2^31.
constexpr int64_t longest_run = 1 << 14;

// What the products of the codes of one row are too large by: the sum of scale * zero * (sum of x) over the groups.
template <int Bits>
inline float surplus(const weft::IntegerRows &p, int64_t row, const float *sums) {
    constexpr float middle = 1 << (Bits - 1);
    const float *scales = p.scales + row * p.groups;
    const float *zeros = p.zeros != nullptr ? p.zeros + row * p.groups : nullptr;
    Floats totals = zero();
    int64_t g = 0;
    for (; g + lanes <= p.groups; g += lanes) {
        Floats excess = broadcast((zeros != nullptr ? 0.0f : middle) - centre<Bits>);
        if (zeros != nullptr) excess = add(excess, load(zeros + g));
        totals = multiply_add(multiply(load(scales + g), load(sums + g)), excess, totals);
    }
    float result = g > 0 ? sum(totals) : 0.0f;
    for (; g < p.groups; ++g)
        result += scales[g] * sums[g] * ((zeros != nullptr ? zeros[g] : middle) - centre<Bits>);
    return result;
}

// What a tile of Rows rows of codes and Vectors vectors of whole numbers reads.
template <int Rows, int Vectors>
struct Tile {
    const uint8_t *codes[Rows];
    const int8_t *x[Vectors];
    const uint8_t *codes_end;
    int64_t ahead;  // from a row's codes to those that are wanted next
};

template <int Rows, int Vectors>
using Results = Floats[Rows][Vectors];

// The products of steps [begin, end), as many as 32 bits hold.
template <int Bits, bool Careful, int Rows, int Vectors>
inline void add_steps(const Tile<Rows, Vectors> &tile, int64_t begin, int64_t end, Sums (&sums)[Rows][Vectors]) {
    constexpr int step_bytes = step / 8 * Bits;
    for (int64_t at = begin * step_bytes, k = begin * step; k < end * step; at += step_bytes, k += step) {
        Codes of_rows[Rows];
        for (int r = 0; r < Rows; ++r) {
            const uint8_t *from = tile.codes[r] + at;
            of_rows[r] = codes_at<Bits, Careful>(from, Careful ? tile.codes_end - from : 0);
            // A few vectors read every code once: the next rows' are fetched while these are computed.
            if (Vectors <= 3 && !Careful) fetch_ahead(from + tile.ahead);
        }
        for (int v = 0; v < Vectors; ++v) {
            const auto numbers = numbers_at(tile.x[v] + k);
            for (int r = 0; r < Rows; ++r) sums[r][v] = dot<Bits>(sums[r][v], of_rows[r], numbers);
        }
    }
}

// Groups of whole steps. The scale of whole rows, the usual case, is left to the end.
template <int Bits, bool Careful, int Rows, int Vectors>
inline void whole_steps(const weft::IntegerRows &p, const Tile<Rows, Vectors> &tile, const float *scales,
                        Results<Rows, Vectors> &results) {
    const int64_t steps = (p.inputs + step - 1) / step, steps_each = p.groups <= 1 ? steps : p.group / step;
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t group_end = (g + 1) * steps_each;
        for (int64_t begin = g * steps_each; begin < group_end; begin += longest_run) {
            Sums sums[Rows][Vectors];
            for (int r = 0; r < Rows; ++r)
                for (int v = 0; v < Vectors; ++v) sums[r][v] = no_sums();
            add_steps<Bits, Careful>(tile, begin, begin + longest_run < group_end ? begin + longest_run : group_end,
                                     sums);
            for (int r = 0; r < Rows; ++r) {
                const Floats scale = broadcast(p.groups <= 1 ? 1.0f : scales[r * p.groups + g]);
                for (int v = 0; v < Vectors; ++v)
                    results[r][v] = multiply_add(scale, to_floats(sums[r][v]), results[r][v]);
            }
        }
    }
}

// Groups that share a register: every step is scaled lane by lane. Where the groups are no multiples of four, a
// lane's inputs may belong to two of them, and the second one's stand in vectors of their own.
template <int Bits, bool Careful, int Rows, int Vectors>
inline void shared_steps(const weft::IntegerRows &p, const Tile<Rows, Vectors> &tile, const float *scales,
                         const int32_t *within, int64_t beyond, Results<Rows, Vectors> &results) {
    constexpr int step_bytes = step / 8 * Bits;
    const int64_t steps = (p.inputs + step - 1) / step;
    for (int64_t s = 0; s < steps; ++s)
        for (int r = 0; r < Rows; ++r) {
            const uint8_t *from = tile.codes[r] + s * step_bytes;
            const Codes codes = codes_at<Bits, Careful>(from, Careful ? tile.codes_end - from : 0);
            const Floats scale =
                choose(scales + r * p.groups + p.first[s], p.groups - p.first[s], within + s * lanes);
            for (int v = 0; v < Vectors; ++v) {
                const Sums sums = dot<Bits>(no_sums(), codes, numbers_at(tile.x[v] + beyond + s * step));
                results[r][v] = multiply_add(scale, to_floats(sums), results[r][v]);
            }
        }
}

// The sums of products of codes and whole numbers over a row of no more inputs stay below 2^31.
constexpr int64_t longest_sum = 1 << 16;

// Rows of codes against the vectors of whole numbers that Batch inputs were made into, Digits for each.
template <int Bits, int Rows, int Batch, int Digits, bool Careful>
inline void integer_tile(const weft::IntegerRows &p, int64_t row, int64_t input) {
    constexpr int vectors = Batch * Digits;
    Tile<Rows, vectors> tile;
    for (int r = 0; r < Rows; ++r) tile.codes[r] = p.codes + (row + r) * p.row_bytes;
    for (int v = 0; v < vectors; ++v) tile.x[v] = p.x + (input * Digits + v) * p.x_stride;
    tile.codes_end = p.codes_end;
    tile.ahead = Rows * p.row_bytes;
    const float *scales = p.scales + row * p.groups;

#if defined(WEFT_SIXTEEN_AT_ONCE)
    if constexpr (Rows == 4 && Batch == 4 && Digits == 1 && !Careful) {
        if (p.groups == 1 && p.inputs <= longest_sum) {
            Sums sums[Rows][vectors];
            for (int r = 0; r < Rows; ++r)
                for (int v = 0; v < vectors; ++v) sums[r][v] = no_sums();
            add_steps<Bits, Careful>(tile, 0, (p.inputs + step - 1) / step, sums);
            return finish_sixteen<Bits>(p, sums, row, input);
        }
    }
#endif

    Results<Rows, vectors> results;
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < vectors; ++v) results[r][v] = zero();
    if (p.groups <= 1 || p.group % step == 0) {
        whole_steps<Bits, Careful>(p, tile, scales, results);
    } else {
        shared_steps<Bits, Careful>(p, tile, scales, p.within, 0, results);
        if (p.second != 0)
            shared_steps<Bits, Careful>(p, tile, scales, p.within_second, p.second, results);
    }

    for (int b = 0; b < Batch; ++b) {
        const float *widths = p.widths + (input + b) * Digits;
        Floats lanes_of[(Rows + 3) / 4][4] = {};
        for (int r = 0; r < Rows; ++r) {
            Floats &total = lanes_of[r / 4][r % 4];
            total = results[r][b * Digits];
            if (Digits > 1) total = multiply(broadcast(widths[0]), total);
            for (int d = 1; d < Digits; ++d)
                total = multiply_add(broadcast(widths[d]), results[r][b * Digits + d], total);
        }
        float totals[(Rows + 3) / 4 * 4];
        if constexpr (Rows == 1) totals[0] = sum(lanes_of[0][0]);
        else
            for (int r = 0; r < Rows; r += 4) four_sums(lanes_of[r / 4], totals + r);
        float *out = p.out + (input + b) * p.outputs + row;
        const float *x_sums = p.sums + (input + b) * p.groups;
        if (p.groups <= 1) {
            constexpr float middle = 1 << (Bits - 1);
            for (int r = 0; r < Rows; ++r) {
                const float zero_code = (p.zeros != nullptr ? p.zeros[row + r] : middle) - centre<Bits>;
                totals[r] = scales[r] * (totals[r] - zero_code * x_sums[0]);
            }
        } else {
            for (int r = 0; r < Rows; ++r) totals[r] -= surplus<Bits>(p, row + r, x_sums);
        }
        // With one digit both terms of each difference are whole numbers times the scale: what stays is exact.
        const float unit = Digits > 1 ? 1.0f : widths[0];
        for (int r = 0; r < Rows; ++r)
            out[r] = unit * totals[r] + (p.bias != nullptr ? p.bias[row + r] : 0.0f);
    }
}

template <int Bits, int Rows, int Digits, bool Careful>
inline void all_inputs(const weft::IntegerRows &p, int64_t row) {
    constexpr int most = Rows > rows_at_once ? 1 : Digits == 1 ? 4 : 2;
    int64_t input = 0;
    if constexpr (most > 1)
        for (; input + most <= p.batch; input += most) integer_tile<Bits, Rows, most, Digits, Careful>(p, row, input);
    for (; input < p.batch; ++input) integer_tile<Bits, Rows, 1, Digits, Careful>(p, row, input);
}

// As many rows as [row, end) holds, Rows at a time; returns where it stopped.
template <int Bits, int Rows, int Digits>
inline int64_t several_rows(const weft::IntegerRows &p, int64_t row, int64_t end) {
    // The last step of a row reads beyond it, but not beyond all codes.
    for (; row + Rows <= end && p.codes_end - (p.codes + (row + Rows) * p.row_bytes) >= step; row += Rows)
        all_inputs<Bits, Rows, Digits, false>(p, row);
    return row;
}

template <int Bits, int Digits>
inline void integer_rows_of(const weft::IntegerRows &p, int64_t begin, int64_t end) {
    int64_t row = begin;
    // One vector has one sum per row: more rows hide the latency of the products.
    if (rows_at_once < 4 && Digits == 1 && p.batch == 1) row = several_rows<Bits, 4, Digits>(p, row, end);
    row = several_rows<Bits, rows_at_once, Digits>(p, row, end);
    for (; row < end; ++row) all_inputs<Bits, 1, Digits, true>(p, row);
}

template <int Digits>
inline void integer_rows_with(const weft::IntegerRows &p, int64_t begin, int64_t end) {
    switch (p.bits) {
        case 1: return integer_rows_of<1, Digits>(p, begin, end);
        case 2: return integer_rows_of<2, Digits>(p, begin, end);
        case 3: return integer_rows_of<3, Digits>(p, begin, end);
        case 4: return integer_rows_of<4, Digits>(p, begin, end);
        case 5: return integer_rows_of<5, Digits>(p, begin, end);
        case 6: return integer_rows_of<6, Digits>(p, begin, end);
        case 7: return integer_rows_of<7, Digits>(p, begin, end);
        default: return integer_rows_of<8, Digits>(p, begin, end);
    }
}

void integer_rows(const weft::IntegerRows &p, int64_t begin, int64_t end) {
    if (p.digits == 1) integer_rows_with<1>(p, begin, end);
    else integer_rows_with<weft::float_digits>(p, begin, end);
}

// ------------------------------------------------------------------------------------------------------------
// What stands around the products

template <int Bits>
void unpack_row_of(const uint8_t *row, int64_t row_bytes, int64_t inputs, uint8_t *out) {
    constexpr int step_bytes = step / 8 * Bits;
    for (int64_t j = 0, at = 0; j < inputs; j += step, at += step_bytes)
        store_codes(out + j, codes_at<Bits, true>(row + at, row_bytes - at));
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

// The largest absolute value; NaN where there is a NaN, else infinity where there is one.
float largest_of(const float *x, int64_t inputs) {
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
    return most;
}

constexpr float largest_float = 3.402823466e38f;

float round_vector(const float *x, int64_t inputs, int8_t *out) {
    float most = largest_of(x, inputs);
    if (!(most <= largest_float)) {
        std::memset(out, 0, static_cast<std::size_t>(inputs));
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
        out[j] = static_cast<int8_t>(static_cast<int32_t>(shifted_up - round_here));
    }
    return most / 127.0f;
}

bool split_vector(const float *x, int64_t inputs, int8_t *out, int64_t stride, float *widths) {
    const float most = largest_of(x, inputs);
    float lanes_of[16] = {};
    int64_t j = 0;
    for (; j + 16 <= inputs; j += 16)
        for (int k = 0; k < 16; ++k) lanes_of[k] += x[j + k] < 0.0f ? -x[j + k] : x[j + k];
    float total = 0.0f;
    for (; j < inputs; ++j) total += x[j] < 0.0f ? -x[j] : x[j];
    for (int k = 0; k < 16; ++k) total += lanes_of[k];
    // Also false for what is not finite.
    if (!(most >= weft::smallest_activation &&
          most / weft::largest_outlier * static_cast<float>(inputs) <= total && total <= largest_float))
        return false;
    const float inverse = 127.0f / most;
    int8_t *second = out + stride, *third = second + stride;
    for (j = 0; j < inputs; ++j) {
        const float scaled = x[j] * inverse;
        const float first_up = scaled + round_here;
        const float first = first_up - round_here;
        // Exact: the difference has no more digits than what it is taken from.
        const float rest = (scaled - first) * weft::digit_base;
        const float second_up = rest + round_here;
        const float middle = second_up - round_here;
        const float last = (rest - middle) * weft::digit_base;
        const float third_up = last + round_here;
        out[j] = static_cast<int8_t>(static_cast<int32_t>(first));
        second[j] = static_cast<int8_t>(static_cast<int32_t>(middle));
        third[j] = static_cast<int8_t>(static_cast<int32_t>(third_up - round_here));
    }
    widths[0] = most / 127.0f;
    widths[1] = widths[0] / weft::digit_base;
    widths[2] = widths[1] / weft::digit_base;
    return true;
}

void add_group_sums(const int8_t *x, int64_t groups, int64_t group, float width, float *sums) {
    constexpr int64_t most = 1 << 24;  // numbers up to 127 that 32 bits add up
    for (int64_t g = 0; g < groups; ++g) {
        int64_t total = 0;
        for (int64_t begin = 0; begin < group; begin += most) {
            const int64_t end = begin + most < group ? begin + most : group;
            int32_t part = 0;
            for (int64_t j = begin; j < end; ++j) part += x[g * group + j];
            total += part;
        }
        sums[g] += width * static_cast<float>(total);
    }
}

}  // namespace

namespace weft::WEFT_VARIANT {

extern const QuantizedLeaf quantized_leaf;
const QuantizedLeaf quantized_leaf = {lanes,   step,   codebook_rows, integer_rows, unpack_row,
                                      look_up, levels, round_vector,  split_vector, add_group_sums};

}  // namespace weft::WEFT_VARIANT
