#include "columns_product.hpp"

#include "unrolled.hpp"
#include "vector.hpp"

namespace {

// Where the registers of a strip of columns start. The last one ends at the strip's end and overlaps the one
// before it, whose shared lanes it computes again alike: so no lane needs a mask unless the strip is
// narrower than a register.
template <int Vectors>
struct Strip {
    std::int64_t first;  // column
    std::int64_t last;   // where the last register starts, from `first`
    std::int64_t lanes;  // that count, in a strip narrower than a register

    std::int64_t at(int v) const { return v + 1 < Vectors ? v * Vector::width : last; }
};

template <bool Narrow, typename Number>
inline Vector load(const Number *from, std::int64_t lanes) {
    if constexpr (Narrow) return Vector::load_first(from, lanes);
    else return Vector::load(from);
}

template <bool Narrow>
inline void store(Vector v, float *to, std::int64_t lanes) {
    if constexpr (Narrow) v.store_first(to, lanes);
    else v.store(to);
}

// One input: `Unroll` rows at a time have sums of their own, to hide the latency of the multiply-add.
template <int Vectors, int Unroll, bool Narrow, typename Weight>
inline void one_input(const weft::ColumnsProductOf<Weight> &p, Strip<Vectors> strip) {
    Vector sums[Unroll][Vectors];
    WEFT_UNROLLED
    for (int u = 0; u < Unroll; ++u)
        WEFT_UNROLLED
        for (int v = 0; v < Vectors; ++v)
            sums[u][v] = u == 0 && p.start != nullptr ? load<Narrow>(p.start + strip.first + strip.at(v), strip.lanes)
                                                      : Vector::zero();
    constexpr std::int64_t early = 768 / (Vectors * Vector::width);  // rows, hence some lines of the cache
    for (std::int64_t s = 0; s < p.segment_count; ++s) {
        const weft::ColumnsSegmentOf<Weight> segment = p.segments[s];
        const weft::ColumnsSegmentOf<Weight> then = s + 1 < p.segment_count ? p.segments[s + 1] : p.next != nullptr ? *p.next : segment;
        const Weight *row = segment.matrix + strip.first;
        const std::int64_t own = segment.count > early ? segment.count - early : 0;
        std::int64_t k = 0;
        for (int part = 0; part < 2; ++part) {
            const bool ending = part == 1;
            const std::int64_t end = ending ? segment.count : own;
            const Weight *ahead = ending ? then.matrix + strip.first : row + early * segment.matrix_stride;
            const std::int64_t ahead_stride = ending ? then.matrix_stride : segment.matrix_stride;
            for (; k + Unroll <= end; k += Unroll) {
                WEFT_UNROLLED
                for (int u = 0; u < Unroll; ++u, row += segment.matrix_stride, ahead += ahead_stride) {
                    const Vector value = Vector::fill(segment.source[k + u]);
                    WEFT_UNROLLED
                    for (int v = 0; v < Vectors; ++v) {
                        fetch_ahead(ahead + strip.at(v));
                        sums[u][v] = sums[u][v].add_product(load<Narrow>(row + strip.at(v), strip.lanes), value);
                    }
                }
            }
        }
        for (; k < segment.count; ++k, row += segment.matrix_stride) {
            const Vector value = Vector::fill(segment.source[k]);
            WEFT_UNROLLED
            for (int v = 0; v < Vectors; ++v)
                sums[0][v] = sums[0][v].add_product(load<Narrow>(row + strip.at(v), strip.lanes), value);
        }
    }
    WEFT_UNROLLED
    for (int v = 0; v < Vectors; ++v) {
        Vector sum = sums[0][v];
        WEFT_UNROLLED
        for (int u = 1; u < Unroll; ++u) sum = sum.add(sums[u][v]);
        store<Narrow>(sum, p.out + strip.first + strip.at(v), strip.lanes);
    }
}

// A tile of Batch inputs by Vectors registers of columns: Batch * Vectors products cost Batch + Vectors loads.
template <int Vectors, int Batch, bool Narrow, typename Weight>
inline void tile(const weft::ColumnsProductOf<Weight> &p, Strip<Vectors> strip, std::int64_t input) {
    Vector sums[Batch][Vectors];
    WEFT_UNROLLED
    for (int b = 0; b < Batch; ++b) {
        const float *start = p.start != nullptr ? p.start + (input + b) * p.start_stride + strip.first : nullptr;
        WEFT_UNROLLED
        for (int v = 0; v < Vectors; ++v)
            sums[b][v] = start != nullptr ? load<Narrow>(start + strip.at(v), strip.lanes) : Vector::zero();
    }
    for (std::int64_t s = 0; s < p.segment_count; ++s) {
        const weft::ColumnsSegmentOf<Weight> segment = p.segments[s];
        const Weight *row = segment.matrix + strip.first;
        const float *source = segment.source + input * segment.source_stride;
        for (std::int64_t k = 0; k < segment.count; ++k, row += segment.matrix_stride) {
            Vector weights[Vectors];
            WEFT_UNROLLED
            for (int v = 0; v < Vectors; ++v) weights[v] = load<Narrow>(row + strip.at(v), strip.lanes);
            WEFT_UNROLLED
            for (int b = 0; b < Batch; ++b) {
                const Vector value = Vector::fill(source[b * segment.source_stride + k]);
                WEFT_UNROLLED
                for (int v = 0; v < Vectors; ++v) sums[b][v] = sums[b][v].add_product(weights[v], value);
            }
        }
    }
    WEFT_UNROLLED
    for (int b = 0; b < Batch; ++b) {
        float *out = p.out + (input + b) * p.out_stride + strip.first;
        WEFT_UNROLLED
        for (int v = 0; v < Vectors; ++v) store<Narrow>(sums[b][v], out + strip.at(v), strip.lanes);
    }
}

constexpr bool many_registers = Vector::registers >= 32;

// Sums that fit beside a tile's weights and one input.
constexpr int most_sums = many_registers ? 24 : 12;
constexpr int widest_strip = 8;

template <int Vectors>
constexpr int batch_tile = most_sums / Vectors < 12 ? most_sums / Vectors : 12;

template <int Vectors, bool Narrow, typename Weight>
inline void strip_product(const weft::ColumnsProductOf<Weight> &p, Strip<Vectors> strip) {
    if (p.batch == 1) {
        constexpr int unroll = Vectors == 1 ? 8 : Vectors == 2 ? 4 : Vectors <= 4 ? 2 : 1;
        one_input<Vectors, unroll, Narrow>(p, strip);
        return;
    }
    constexpr int most = batch_tile<Vectors>;
    std::int64_t input = 0;
    for (; input + most <= p.batch; input += most) tile<Vectors, most, Narrow>(p, strip, input);
    if constexpr (most > 8)
        for (; input + 8 <= p.batch; input += 8) tile<Vectors, 8, Narrow>(p, strip, input);
    if constexpr (most > 6)
        for (; input + 6 <= p.batch; input += 6) tile<Vectors, 6, Narrow>(p, strip, input);
    if constexpr (most > 4)
        for (; input + 4 <= p.batch; input += 4) tile<Vectors, 4, Narrow>(p, strip, input);
    if constexpr (most > 3)
        for (; input + 3 <= p.batch; input += 3) tile<Vectors, 3, Narrow>(p, strip, input);
    if constexpr (most > 2)
        for (; input + 2 <= p.batch; input += 2) tile<Vectors, 2, Narrow>(p, strip, input);
    for (; input < p.batch; ++input) tile<Vectors, 1, Narrow>(p, strip, input);
}

template <int Vectors, typename Weight>
inline void wide(const weft::ColumnsProductOf<Weight> &p, std::int64_t first, std::int64_t width) {
    strip_product<Vectors, false>(p, {first, width - Vector::width, 0});
}

// The registers [begin, end) of a row, `outputs` numbers long; as many as a strip may have.
template <typename Weight>
inline void strip_of(const weft::ColumnsProductOf<Weight> &p, std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * Vector::width;
    const std::int64_t beyond = end * Vector::width < p.outputs ? end * Vector::width : p.outputs;
    switch (end - begin) {
        // A last strip of one register that hangs over the end is moved back instead.
        case 1: wide<1>(p, beyond - Vector::width, Vector::width); break;
        case 2: wide<2>(p, first, beyond - first); break;
        case 3: wide<3>(p, first, beyond - first); break;
        case 4: wide<4>(p, first, beyond - first); break;
        case 5: wide<5>(p, first, beyond - first); break;
        case 6: wide<6>(p, first, beyond - first); break;
        case 7: wide<7>(p, first, beyond - first); break;
        default: wide<8>(p, first, beyond - first); break;
    }
}

// In as few strips as there can be, all about equally wide.
template <int Widest, typename Weight>
inline void in_strips(const weft::ColumnsProductOf<Weight> &p) {
    const std::int64_t vectors = (p.outputs + Vector::width - 1) / Vector::width;
    const std::int64_t strips = (vectors + Widest - 1) / Widest;
    for (std::int64_t s = 0; s < strips; ++s) strip_of(p, vectors * s / strips, vectors * (s + 1) / strips);
}

template <typename Weight>
void columns_product(const weft::ColumnsProductOf<Weight> &p) {
    // Few inputs: wide strips, whose rows are long; many: strips that leave registers for more inputs.
    if (p.outputs < Vector::width) strip_product<1, true>(p, {0, 0, p.outputs});
    else if (p.batch <= most_sums / widest_strip) in_strips<widest_strip>(p);
    else in_strips<many_registers ? 4 : 3>(p);
}

}  // namespace

namespace weft::WEFT_VARIANT {

const ColumnsProductKernels columns_product = {::columns_product<float>, ::columns_product<Bfloat16>};

}  // namespace weft::WEFT_VARIANT
