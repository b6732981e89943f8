#include "sparse_rows.hpp"

#include <cstring>

#include "unrolled.hpp"
#include "vector.hpp"

namespace {

using weft::SparseTileProduct;
using weft::SparseVectorProduct;

// ----------------------------------------------------------------------------------------------------
// One vector. The gather instructions measure slower than four loads put together in a register.

struct FourColumns {
    std::uint32_t at[4];
};

inline FourColumns four_columns(const std::uint16_t *columns) {
    std::uint64_t all;  // one load in place of four, which are what limits this loop
    std::memcpy(&all, columns, sizeof all);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return {{columns[0], columns[1], columns[2], columns[3]}};
#else
    return {{static_cast<std::uint32_t>(all & 0xFFFF), static_cast<std::uint32_t>(all >> 16 & 0xFFFF),
             static_cast<std::uint32_t>(all >> 32 & 0xFFFF), static_cast<std::uint32_t>(all >> 48)}};
#endif
}

inline FourColumns four_columns(const std::int32_t *columns) {
    FourColumns result;
    std::memcpy(&result, columns, sizeof result);
    return result;
}

#if defined(__AVX2__) || defined(__AVX512F__)

struct FourSums {
    __m128 lanes = _mm_setzero_ps();

    void add_products(const float *values, const float *x, FourColumns columns) {
        __m128 gathered = _mm_load_ss(x + columns.at[0]);
        gathered = _mm_insert_ps(gathered, _mm_load_ss(x + columns.at[1]), 0x10);
        gathered = _mm_insert_ps(gathered, _mm_load_ss(x + columns.at[2]), 0x20);
        gathered = _mm_insert_ps(gathered, _mm_load_ss(x + columns.at[3]), 0x30);
        lanes = _mm_fmadd_ps(_mm_loadu_ps(values), gathered, lanes);
    }
    float sum() const {
        const __m128 half = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    FourSums operator+(FourSums other) const { return {_mm_add_ps(lanes, other.lanes)}; }
};

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct FourSums {
    float32x4_t lanes = vdupq_n_f32(0.0f);

    void add_products(const float *values, const float *x, FourColumns columns) {
        float32x4_t gathered = vld1q_dup_f32(x + columns.at[0]);
        gathered = vld1q_lane_f32(x + columns.at[1], gathered, 1);
        gathered = vld1q_lane_f32(x + columns.at[2], gathered, 2);
        gathered = vld1q_lane_f32(x + columns.at[3], gathered, 3);
        lanes = vfmaq_f32(lanes, vld1q_f32(values), gathered);
    }
    float sum() const { return vaddvq_f32(lanes); }
    FourSums operator+(FourSums other) const { return {vaddq_f32(lanes, other.lanes)}; }
};

#else

struct FourSums {
    float lanes[4] = {};

    void add_products(const float *values, const float *x, FourColumns columns) {
        for (int i = 0; i < 4; ++i) lanes[i] += values[i] * x[columns.at[i]];
    }
    float sum() const { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
    FourSums operator+(FourSums other) const {
        FourSums result;
        for (int i = 0; i < 4; ++i) result.lanes[i] = lanes[i] + other.lanes[i];
        return result;
    }
};

#endif

template <typename Index>
inline void rows_of_vector(const SparseVectorProduct &p) {
    const float *values = p.matrix.values;
    const Index *columns = static_cast<const Index *>(p.matrix.columns);
    std::int64_t k = p.begin < p.end ? p.matrix.starts[p.begin] : 0;
    for (std::int64_t row = p.begin; row < p.end; ++row) {
        const std::int64_t end = p.matrix.starts[row + 1];
        FourSums even, odd;
        for (; k + 8 <= end; k += 8) {
            even.add_products(values + k, p.x, four_columns(columns + k));
            odd.add_products(values + k + 4, p.x, four_columns(columns + k + 4));
        }
        if (k + 4 <= end) {
            even.add_products(values + k, p.x, four_columns(columns + k));
            k += 4;
        }
        float rest = p.bias != nullptr ? p.bias[row] : 0.0f;
        for (; k < end; ++k) rest += values[k] * p.x[columns[k]];
        p.out[row] = (even + odd).sum() + rest;
    }
}

// ----------------------------------------------------------------------------------------------------
// A tile of a batch: every entry multiplies a whole line of x.

// `Unroll` entries at a time have sums of their own, to hide the latency of the multiply-add.
template <int Vectors, int Unroll, typename Index>
inline void rows_of_tile(const SparseTileProduct &p) {
    constexpr std::int64_t tile = Vectors * Vector::width;
    const float *values = p.matrix.values;
    const Index *columns = static_cast<const Index *>(p.matrix.columns);
    std::int64_t k = p.begin < p.end ? p.matrix.starts[p.begin] : 0;
    float *out = p.out;
    for (std::int64_t row = p.begin; row < p.end; ++row, out += tile) {
        const std::int64_t end = p.matrix.starts[row + 1];
        Vector sums[Unroll][Vectors];
        WEFT_UNROLLED
        for (int u = 0; u < Unroll; ++u)
            WEFT_UNROLLED
            for (int v = 0; v < Vectors; ++v) sums[u][v] = Vector::zero();
        if (p.bias != nullptr)
            WEFT_UNROLLED
            for (int v = 0; v < Vectors; ++v) sums[0][v] = Vector::fill(p.bias[row]);
        for (; k + Unroll <= end; k += Unroll)
            WEFT_UNROLLED
            for (int u = 0; u < Unroll; ++u) {
                const float *line = p.x + static_cast<std::int64_t>(columns[k + u]) * tile;
                const Vector value = Vector::fill(values[k + u]);
                WEFT_UNROLLED
                for (int v = 0; v < Vectors; ++v)
                    sums[u][v] = sums[u][v].add_product(Vector::load(line + v * Vector::width), value);
            }
        for (; k < end; ++k) {
            const float *line = p.x + static_cast<std::int64_t>(columns[k]) * tile;
            const Vector value = Vector::fill(values[k]);
            WEFT_UNROLLED
            for (int v = 0; v < Vectors; ++v)
                sums[0][v] = sums[0][v].add_product(Vector::load(line + v * Vector::width), value);
        }
        WEFT_UNROLLED
        for (int v = 0; v < Vectors; ++v) {
            Vector sum = sums[0][v];
            WEFT_UNROLLED
            for (int u = 1; u < Unroll; ++u) sum = sum.add(sums[u][v]);
            sum.store(out + v * Vector::width);
        }
    }
}

template <typename Index>
inline void rows_of_any_tile(const SparseTileProduct &p) {
    switch (p.tile / Vector::width) {
        case 1: rows_of_tile<1, 4, Index>(p); break;
        case 2: rows_of_tile<2, 4, Index>(p); break;
        default: rows_of_tile<4, 2, Index>(p); break;
    }
}

// ----------------------------------------------------------------------------------------------------
// Between a batch's own layout and a tile's

#if defined(__AVX2__) || defined(__AVX512F__)
inline void transpose_block(const float *from, std::int64_t from_stride, float *to, std::int64_t to_stride) {
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
    __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
}
#else
inline void transpose_block(const float *from, std::int64_t from_stride, float *to, std::int64_t to_stride) {
    for (int c = 0; c < 4; ++c)
        for (int r = 0; r < 4; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

void transpose_any(const float *from, std::int64_t from_stride, float *to, std::int64_t to_stride,
                   std::int64_t rows, std::int64_t columns) {
    const std::int64_t whole_rows = rows - rows % 4, whole_columns = columns - columns % 4;
    // Sixteen rows at a time fill a cache line of each of their columns.
    for (std::int64_t first = 0; first < whole_rows; first += 16)
        for (std::int64_t c = 0; c < whole_columns; c += 4)
            for (std::int64_t r = first; r < whole_rows && r < first + 16; r += 4)
                transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
            to[c * to_stride + r] = from[r * from_stride + c];
}

void vector_product(const SparseVectorProduct &p) {
    if (p.matrix.narrow) rows_of_vector<std::uint16_t>(p);
    else rows_of_vector<std::int32_t>(p);
}

void tile_product(const SparseTileProduct &p) {
    if (p.matrix.narrow) rows_of_any_tile<std::uint16_t>(p);
    else rows_of_any_tile<std::int32_t>(p);
}

}  // namespace

namespace weft::WEFT_VARIANT {

const SparseKernels sparse_rows = {vector_product, tile_product, transpose_any, Vector::width};

}  // namespace weft::WEFT_VARIANT
