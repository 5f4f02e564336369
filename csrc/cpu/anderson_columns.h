// What an Anderson step does with the numbers of a sample, chunk by chunk: the new column and its products with the
// older ones, and the mix.
#pragma once

#include "anderson_sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A, class H>
class AndersonColumns {
    using V = Vec<A>;

   public:
    const AndersonSample<A, H> sample;

    explicit AndersonColumns(const AndersonArgs& args) : sample(args), a(args) {}

    // The step did not stay finite: x' = f, and the history is forgotten.
    void picard(int64_t b, Scratch<A>& s) const {
        for (int l = 0; l < a.n_leaves; ++l)
            for (int64_t c = 0; c < a.leaves[l].n; c += kChunk) mix_chunk(b, l, c, -1, nullptr, 0, s);
        if (a.carry) {  // the other ranks have to hear of it
            a.carry[b * kAndersonCarried] = 1;
            return;
        }
        a.at(kStepFallbacks, b)++;
        sample.forget(b);
    }

    // Adds the products of numbers [begin, begin + kChunk) of leaf l to `sums`; writes the new column there.
    __attribute__((noinline)) void reduce_chunk(int64_t b, int l, int64_t begin, int slot, int n_columns, Scratch<A>& s,
                                                double* sums) const {
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        const V unit = splat<A>(a.at<A>(kUnit, b));
        const V c = splat<A>(A(a.test_space));
        V head[kHeadProducts] = {};
        const int per_column = sample.type2 ? 2 : 4;
        std::memset(static_cast<void*>(s.sums), 0, size_t(n_columns) * per_column * sizeof(V));
        for (int64_t n = begin; n < end; n += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, end - n);
            const A* f = read_source(leaf.f, f_row(a, b), n, count, s.f);
            const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, n, count, s.x);
            if (slot < 0) {
                for_registers<A>(count, [&](int64_t i, auto part) {
                    const V fi = load<A>(f + i, part) * unit;
                    const V gi = fi - load<A>(x + i, part) * unit;
                    head[kFF] += fi * fi;
                    head[kGG] += gi * gi;
                    write(s.g + i, gi);
                    write(s.w + i, V{});
                    write(s.v + i, V{});
                });
            } else {
                const A* f_prev = read_source(leaf.f_prev, f_prev_row(a, b), n, count, s.f_prev);
                const A* x_prev = read_block(row_of(leaf.x_prev, a, leaf, b), a.dtype, n, count, s.x_prev);
                const int64_t at = leaf.offset + n, block = leaf.block + n / kBlock;
                if (sample.type2)
                    new_column<true>(b, slot, at, block, count, f, x, f_prev, x_prev, unit, c, head, s);
                else
                    new_column<false>(b, slot, at, block, count, f, x, f_prev, x_prev, unit, c, head, s);
            }
            const int64_t at = leaf.offset + n, block = leaf.block + n / kBlock;
            int k = 0;
            for (; k + 2 <= n_columns; k += 2)
                column_products<2>(b, s.columns + k, at, block, count, s, s.sums + k * per_column);
            if (k < n_columns) column_products<1>(b, s.columns + k, at, block, count, s, s.sums + k * per_column);
        }
        for (int p = 0; p < kHeadProducts; ++p) sums[p] += double(sum_lanes<A>(head[p]));
        for (int k = 0; k < n_columns; ++k) {
            double* column_sums = sums + kHeadProducts + s.columns[k] * kColumnProducts;
            const V* p = s.sums + k * per_column;
            column_sums[kRhs] += double(sum_lanes<A>(p[0]));
            column_sums[kGramRow] += double(sum_lanes<A>(p[1]));
            if (sample.type2) continue;
            column_sums[kRow] += double(sum_lanes<A>(p[2]));
            column_sums[kCol] += double(sum_lanes<A>(p[3]));
        }
    }

    // Writes the next iterate for numbers [begin, begin + kChunk) of leaf l; n < 0: plain Picard. False if not finite.
    __attribute__((noinline)) bool mix_chunk(int64_t b, int l, int64_t begin, int n, const A* gamma, int64_t stride,
                                             Scratch<A>& s) const {
        const Leaf& leaf = a.leaves[l];
        const int64_t end = std::min(begin + kChunk, leaf.n);
        char* target = row_of(leaf.x_prev, a, leaf, b);
        const A beta = A(n < 0 ? 1 : a.mixing);
        const A per_unit = A(1) / a.at<A>(kUnit, b);
        bool finite = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, end - at);
            const A* from = read_source(leaf.f, f_row(a, b), at, count, s.f);
            if (beta != 1) {
                const A* x = read_block(row_of(leaf.x, a, leaf, b), a.dtype, at, count, s.x);
                for_registers<A>(count, [&](int64_t i, auto part) {
                    const V xi = load<A>(x + i, part);
                    write(s.out + i, xi + beta * (load<A>(from + i, part) - xi));
                });
                from = s.out;
            }
            const Mix mix{b,   leaf.offset + at, leaf.block + at / kBlock, count, s.columns, gamma, stride, per_unit,
                          beta};
            int k = 0;
            for (; n - k > 8; k += 8) {
                mix_columns<8>(mix, k, from, s.out);
                from = s.out;
            }
            if (a.dtype == kDTypeOf<A>) {
                finite &= mix_rest(mix, k, n - k, from, reinterpret_cast<A*>(target) + at);
            } else {
                if (n > k) {
                    (void)mix_rest(mix, k, n - k, from, s.out);
                    from = s.out;
                }
                finite &= write_block(static_cast<void*>(target), a.dtype, at, count, from);
            }
        }
        return finite;
    }

   private:
    const AndersonArgs& a;

    // Makes `count` numbers of the new column, rounds them into the history, and leaves g, dG and (not Type II) W as
    // stored in scratch.
    template <bool second>
    void new_column(int64_t b, int slot, int64_t at, int64_t block, int64_t count, const A* f, const A* x,
                    const A* f_prev, const A* x_prev, V unit, V c, V* head, Scratch<A>& s) const {
        H *d_f = sample.column(0, b, slot) + at, *d_g = sample.column(1, b, slot) + at;
        V scale_f = V{} + A(1), scale_g = scale_f;
        if constexpr (kScaled<H>) {
            V largest_f = {}, largest_g = {};
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V fi = load<A>(f + i, part) * unit - load<A>(f_prev + i, part) * unit;
                const V gi = fi - (load<A>(x + i, part) * unit - load<A>(x_prev + i, part) * unit);
                largest_f = select(absolute(fi) > largest_f, absolute(fi), largest_f);
                largest_g = select(absolute(gi) > largest_g, absolute(gi), largest_g);
            });
            scale_f = splat<A>(scale_for(largest_f));
            scale_g = splat<A>(scale_for(largest_g));
            sample.scales(0, b, slot)[block] = float(scale_f[0]);
            sample.scales(1, b, slot)[block] = float(scale_g[0]);
        }
        const V back_f = V{} + A(1) / scale_f, back_g = V{} + A(1) / scale_g;
        V sums[kHeadProducts];
        for (int p = 0; p < kHeadProducts; ++p) sums[p] = head[p];
        A *const s_g = s.g, *const s_w = s.w, *const s_v = s.v;
        for_registers<A>(count, [&](int64_t i, auto part) {
            const V fi = load<A>(f + i, part) * unit, xi = load<A>(x + i, part) * unit;
            const V g = fi - xi;
            V df = fi - load<A>(f_prev + i, part) * unit;
            V dg = df - (xi - load<A>(x_prev + i, part) * unit);
            df = rounded(d_f + i, df * back_f, part) * scale_f;
            dg = rounded(d_g + i, dg * back_g, part) * scale_g;
            sums[kFF] += fi * fi;
            sums[kGG] += g * g;
            sums[kQQ] += dg * dg;
            write(s_g + i, g);
            write(s_v + i, dg);
            sums[kVG] += dg * g;
            if constexpr (!second) {
                const V w = df - c * dg;
                sums[kWW] += w * w;
                sums[kWG] += w * g;
                sums[kWV] += w * dg;
                write(s_w + i, w);
            }
        });
        for (int p = 0; p < kHeadProducts; ++p) head[p] = sums[p];
    }

    // Stores a register in the history's type and returns it as stored.
    template <class Extent>
    static V rounded(H* p, V v, Extent part) {
        H stored[kLanes<A>];
        Codec<A, H>::store(stored, v);
        if constexpr (std::is_same<Extent, Whole>::value)
            std::memcpy(p, stored, sizeof(stored));
        else
            for (int i = 0; i < part.count; ++i) p[i] = stored[i];
        return Codec<A, H>::load(stored);
    }

    // Power of two that brings the largest magnitude to [1/2, 1), for int8 to [64, 128).
    static A scale_for(V largest) {
        A peak = 0;
        for (int i = 0; i < kLanes<A>; ++i) peak = largest[i] > peak ? largest[i] : peak;
        int exponent = 0;
        if (std::isfinite(peak)) (void)std::frexp(peak, &exponent);
        return A(std::ldexp(1.0, std::is_same<H, int8_t>::value ? exponent - 7 : exponent));
    }

    // Asks for a column's block after this one, for when every other column has had its turn. A visit of 1024 numbers
    // is too short for the processor to see a stream: without this a step of 48 samples of 47,824 numbers with 20
    // bfloat16 columns ran at .60 of the floor's speed, with it at .81 to .92 (two cores, AVX-512;
    // bench/test_joint.py).
    static void fetch_next(const H* numbers) { __builtin_prefetch(numbers + kBlock, 0, 2); }

    V scale_of(int which, int64_t b, int j, int64_t block) const {
        if constexpr (kScaled<H>) return splat<A>(A(sample.scales(which, b, j)[block]));
        return V{} + A(1);
    }
    static V scaled(V v, V scale) {
        if constexpr (kScaled<H>) return v * scale;
        return v;
    }

    // Products of n <= 2 older columns with the new one and with g.
    template <int n>
    void column_products(int64_t b, const int* columns, int64_t at, int64_t block, int64_t count, const Scratch<A>& s,
                         V* out) const {
        const H *d_f[n], *d_g[n];
        V scale_f[n], scale_g[n], rhs[n], gram[n], row[n], col[n], c[n];
        const int per_column = sample.type2 ? 2 : 4;
        const A *const s_g = s.g, *const s_v = s.v, *const s_w = s.w;
        for (int k = 0; k < n; ++k) {
            d_f[k] = sample.column(0, b, columns[k]) + at;
            d_g[k] = sample.column(1, b, columns[k]) + at;
            scale_f[k] = scale_of(0, b, columns[k], block);
            scale_g[k] = scale_of(1, b, columns[k], block);
            rhs[k] = out[k * per_column];
            gram[k] = out[k * per_column + 1];
        }
        if (sample.type2) {
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V g = read<V>(s_g + i), new_v = read<V>(s_v + i);
                for (int k = 0; k < n; ++k) {
                    fetch_next(d_g[k] + i);
                    const V v = scaled(load<A>(d_g[k] + i, part), scale_g[k]);
                    rhs[k] += v * g;
                    gram[k] += v * new_v;
                }
            });
        } else {
            for (int k = 0; k < n; ++k) {
                c[k] = splat<A>(sample.test_space(b, columns[k]));
                row[k] = out[k * per_column + 2];
                col[k] = out[k * per_column + 3];
            }
            for_registers<A>(count, [&](int64_t i, auto part) {
                const V g = read<V>(s_g + i), new_v = read<V>(s_v + i), new_w = read<V>(s_w + i);
                for (int k = 0; k < n; ++k) {
                    fetch_next(d_g[k] + i);
                    fetch_next(d_f[k] + i);
                    const V v = scaled(load<A>(d_g[k] + i, part), scale_g[k]);
                    const V w = scaled(load<A>(d_f[k] + i, part), scale_f[k]) - c[k] * v;
                    rhs[k] += w * g;
                    gram[k] += v * new_v;
                    row[k] += v * new_w;
                    col[k] += w * new_v;
                }
            });
            for (int k = 0; k < n; ++k) {
                out[k * per_column + 2] = row[k];
                out[k * per_column + 3] = col[k];
            }
        }
        for (int k = 0; k < n; ++k) {
            out[k * per_column] = rhs[k];
            out[k * per_column + 1] = gram[k];
        }
    }

    struct Mix {
        int64_t b, at, block, count;
        const int* columns;
        const A* gamma;
        int64_t stride;
        A per_unit, beta;
    };

    bool mix_rest(const Mix& mix, int k, int n, const A* from, A* out) const {
        switch (n < 0 ? 0 : n) {
            case 0:
                return mix_columns<0>(mix, k, from, out);
            case 1:
                return mix_columns<1>(mix, k, from, out);
            case 2:
                return mix_columns<2>(mix, k, from, out);
            case 3:
                return mix_columns<3>(mix, k, from, out);
            case 4:
                return mix_columns<4>(mix, k, from, out);
            case 5:
                return mix_columns<5>(mix, k, from, out);
            case 6:
                return mix_columns<6>(mix, k, from, out);
            case 7:
                return mix_columns<7>(mix, k, from, out);
            default:
                return mix_columns<8>(mix, k, from, out);
        }
    }

    // out = from - sum of n weighted columns; false if not finite.
    template <int n>
    bool mix_columns(const Mix& mix, int first_column, const A* from, A* out) const {
        const H *d_f[n + 1], *d_g[n + 1];
        V weight_f[n + 1], weight_g[n + 1];
        for (int k = 0; k < n; ++k) {
            const int j = mix.columns[first_column + k];
            const A weight = mix.gamma[j * mix.stride] * mix.per_unit;
            d_f[k] = sample.column(0, mix.b, j) + mix.at;
            d_g[k] = sample.column(1, mix.b, j) + mix.at;
            weight_f[k] = scaled(splat<A>(-weight), scale_of(0, mix.b, j, mix.block));
            weight_g[k] = scaled(splat<A>((1 - mix.beta) * weight), scale_of(1, mix.b, j, mix.block));
        }
        const V infinity = splat<A>(A(INFINITY));
        auto bad = V{} != V{};
        if (mix.beta == 1) {
            for_registers<A>(mix.count, [&](int64_t i, auto part) {
                V sum = load<A>(from + i, part);
                for (int k = 0; k < n; ++k) {
                    fetch_next(d_f[k] + i);
                    sum += weight_f[k] * load<A>(d_f[k] + i, part);
                }
                bad |= ~(absolute(sum) < infinity);
                store<A>(out + i, sum, part);
            });
        } else {
            for_registers<A>(mix.count, [&](int64_t i, auto part) {
                V sum = load<A>(from + i, part);
                for (int k = 0; k < n; ++k)
                    sum += weight_f[k] * load<A>(d_f[k] + i, part) + weight_g[k] * load<A>(d_g[k] + i, part);
                bad |= ~(absolute(sum) < infinity);
                store<A>(out + i, sum, part);
            });
        }
        return !any(bad);
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
