// One sample of an Anderson step, worked on by one block: the products of its chunks, the mix.
// Sums are float in a thread (8 numbers) and a warp, double beyond; their order depends on N alone.
#pragma once

#include "anderson_decide.cuh"
#include "source.cuh"
#include "verdict.cuh"

namespace deqfast::cuda {

template <class H>
constexpr bool kScaled = std::is_same<H, F16>::value || std::is_same<H, int8_t>::value;

template <int leaves>
struct Params {
    AndersonArgs a;
    DeviceWork work;
    int phase;
    Leaf leaf[leaves];
};

template <class A, class S, class H, int leaves>
class Step {
   public:
    static constexpr int V = kGroup<S, H>;
    __device__ Step(const Params<leaves>& params, int64_t sample, char* block_memory)
        : p(params),
          a(params.a),
          b(sample),
          D(int(anderson_products(a.m))),
          type2(a.test_space == 0),
          memory(block_memory),
          s(memory, a.m, int(blockDim.x) / kWarpSize),
          unit(a.at<A>(kUnit, sample)) {}

    // Slot of the column that this step makes, -1: none.
    __device__ int new_slot() const {
        const bool first = !(unit > 0), last = a.max_iter && a.at(kSteps, b) + 1 >= a.max_iter;
        return a.m == 0 || !a.has_previous || first || last ? -1 : a.at(kSlot, b);
    }

    // Zeroes the sums and lists the older columns that count; the whole block.
    __device__ int open(int slot) {
        const Small<A> small(a, b);
        for (int i = int(threadIdx.x); i < D * (int(blockDim.x) / kWarpSize); i += int(blockDim.x)) s.warp_sums[i] = 0;
        const bool none = !(unit > 0) || (a.max_iter && a.at(kSteps, b) + 1 >= a.max_iter);
        const auto counts = [&](int j) { return j != slot && small.norms[j] > 0; };
        const int n = list_of(none ? 0 : a.m, s.columns, counts);
        __syncthreads();
        return n;
    }

    // Adds the products of the numbers [begin, begin + length) of leaf l; writes the new column there.
    __device__ void reduce(int l, int64_t begin, int64_t length, int slot, int n_columns) {
        const Leaf& leaf = p.leaf[l];
        const int64_t end = min(begin + length, leaf.n);
        for (int64_t at = begin; at < end; at += int64_t(blockDim.x) * kItems)
            reduce_tile(leaf, tile_of<V>(a, leaf, at, end), slot, n_columns);
    }

    // Adds the warps' sums up; then every thread may read `sums`.
    __device__ void close() {
        __syncthreads();
        for (int d = int(threadIdx.x); d < D; d += int(blockDim.x)) {
            double sum = 0;
            for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) sum += s.warp_sums[w * D + d];
            s.sums[d] = sum;
        }
        __syncthreads();
    }

    // The small solve, by the first warp: enters the new column, fills gamma, chooses the next slot.
    __device__ void decide(int slot, int32_t outcome) const {
        cuda::decide<A>(a, b, memory, int(blockDim.x) / kWarpSize, slot, outcome);
    }

    // Writes the next iterate for [begin, begin + length) of leaf l from `gamma`; false if not finite.
    __device__ bool mix(int l, int64_t begin, int64_t length) {
        const Leaf& leaf = p.leaf[l];
        const int64_t end = min(begin + length, leaf.n);
        const A beta = A(a.mixing), per_unit = A(1) / a.at<A>(kUnit, b);
        const int n = list_weighted();
        bool finite = true;
        for (int64_t at = begin; at < end; at += int64_t(blockDim.x) * kItems) {
            const Tile<V> tile = tile_of<V>(a, leaf, at, end);
            A out[kItems];
            read_source<A, S>(leaf.f, f_row(a, b), tile, out);
            if (beta != 1) {
                A part[kItems];
                read_tile(row_of<S>(leaf.x, leaf, b), tile, part);
                for (int k = 0; k < kItems; ++k) out[k] = part[k] + beta * (out[k] - part[k]);
            }
            const Tile<V> column{leaf.offset + at, tile.count, tile.neighbours};
            for (int i = 0; i < n; i += kMixed) subtract_columns(0, i, n, per_unit, leaf, column, out);
            for (int i = 0; i < n && beta != 1; i += kMixed)
                subtract_columns(1, i, n, (beta - 1) * per_unit, leaf, column, out);
            finite &= write_state(row_of<S>(leaf.x_prev, leaf, b), tile, out);
        }
        return finite;
    }

    // The step did not stay finite: x' = f, and the history is forgotten.
    __device__ void picard() {
        for (int l = 0; l < a.n_leaves; ++l) {
            const Leaf& leaf = p.leaf[l];
            for (int64_t at = 0; at < leaf.n; at += int64_t(blockDim.x) * kItems) {
                const Tile<V> tile = tile_of<V>(a, leaf, at, leaf.n);
                A f[kItems];
                read_source<A, S>(leaf.f, f_row(a, b), tile, f);
                write_state(row_of<S>(leaf.x_prev, leaf, b), tile, f);
            }
        }
        const Small<A> small(a, b);
        for (int j = int(threadIdx.x); j < a.m; j += int(blockDim.x)) small.norms[j] = 0;
        if (threadIdx.x != 0) return;
        a.at(kStepFallbacks, b)++;
        if (a.m > 0) a.at(kSlot, b) = a.at(kCount, b) = 0;
    }

    __device__ Shared<A>& shared() { return s; }

   private:
    const Params<leaves>& p;
    const AndersonArgs& a;
    const int64_t b;
    const int D;
    const bool type2;
    char* const memory;
    Shared<A> s;
    const A unit;

    // Columns whose loads are under way together: 64 bytes a thread, or a multiprocessor does not keep its memory busy.
    static constexpr int kMixed = sizeof(H) == 8 ? 1 : sizeof(H) == 4 ? 2 : 4;
    static constexpr int kMultiplied = kMixed;  // Type II reads one column of each pair, else half as many pairs

    // Lists the columns that have a weight; the whole block.
    __device__ int list_weighted() {
        __syncthreads();
        const int n = list_of(a.m, s.columns, [&](int j) { return s.gamma[j] != 0; });
        __syncthreads();
        return n;
    }

    // out -= factor * (gamma_j times column j of dF or dG), for up to kMixed of the n listed columns.
    __device__ __forceinline__ void subtract_columns(int which, int first, int n, A factor, const Leaf& leaf,
                                                     const Tile<V>& column, A* out) const {
        Pack<H, V> packs[kMixed];
        DEQFAST_UNROLL
        for (int i = 0; i < kMixed; ++i) packs[i] = load_tile(history(which, s.columns[min(first + i, n - 1)]), column);
        DEQFAST_UNROLL
        for (int i = 0; i < kMixed; ++i) {
            if (first + i >= n) continue;
            const int j = s.columns[first + i];
            const A weight = factor * s.gamma[j] * scale_of(which, j, leaf, column.begin - leaf.offset);
            A part[kItems];
            unpack<H>(packs[i], part);
            for (int k = 0; k < kItems; ++k) out[k] -= weight * part[k];
        }
    }

    __device__ H* history(int which, int j) const {
        return static_cast<H*>(a.history) + ((which * a.B + b) * a.m + j) * a.N;
    }
    __device__ float& scale(int which, int j, const Leaf& leaf, int64_t at) const {
        return a.scales[((which * a.B + b) * a.m + j) * a.blocks + leaf.block + at / kBlock];
    }
    __device__ A scale_of(int which, int j, const Leaf& leaf, int64_t at) const {
        return kScaled<H> ? A(scale(which, j, leaf, at)) : A(1);
    }
    __device__ void add(int product, double value) { s.warp_sums[warp_of() * D + product] += value; }
    // Four sums at once: the lanes 0, 8, 16, 24 hold them.
    __device__ void add_4(int base, A first, A second, A third, A fourth) {
        const A sum = warp_sum_4(first, second, third, fourth);
        if (lane_of() % 8 == 0) add(base + lane_of() / 8, double(sum));
    }

    // Rounds the thread's part of a column into the history and leaves it as it was stored.
    __device__ void store(int which, int slot, const Leaf& leaf, const Tile<V>& tile, A* column) {
        A factor = 1;
        if (kScaled<H>) factor = block_scale(which, column);
        if (kScaled<H> && threadIdx.x == 0) scale(which, slot, leaf, tile.begin) = float(factor);
        H part[kItems];
        for (int k = 0; k < kItems; ++k) {
            part[k] = Format<A, H>::write(kScaled<H> ? column[k] / factor : column[k]);
            column[k] = Format<A, H>::read(part[k]) * factor;
        }
        write_tile(history(which, slot), Tile<V>{leaf.offset + tile.begin, tile.count, tile.neighbours}, part);
    }

    // Power of two that brings the tile's largest magnitude to [1/2, 1), for int8 to [64, 128).
    __device__ A block_scale(int which, const A* column) {
        A largest = 0;
        for (int k = 0; k < kItems; ++k) largest = fabs(column[k]) > largest ? fabs(column[k]) : largest;
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            const A other = __shfl_xor_sync(kAll, largest, step);
            largest = other > largest ? other : largest;
        }
        A* of_warp = s.largest + which * (int(blockDim.x) / kWarpSize);
        if (lane_of() == 0) of_warp[warp_of()] = largest;
        __syncthreads();
        for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) largest = of_warp[w] > largest ? of_warp[w] : largest;
        __syncthreads();
        int exponent = 0;
        if (isfinite(largest)) (void)frexp(largest, &exponent);
        return A(ldexp(1.0, std::is_same<H, int8_t>::value ? exponent - 7 : exponent));
    }

    __device__ void reduce_tile(const Leaf& leaf, const Tile<V>& tile, int slot, int n_columns) {
        A f[kItems], x[kItems], g[kItems], v[kItems], w[kItems];
        read_source<A, S>(leaf.f, f_row(a, b), tile, f);
        read_tile(row_of<S>(leaf.x, leaf, b), tile, x);
        double ff = 0, gg = 0;
        for (int k = 0; k < kItems; ++k) {
            const double difference = double(f[k]) - double(x[k]);
            ff += double(f[k]) * double(f[k]);
            gg += difference * difference;
            f[k] *= unit;
            x[k] *= unit;
            g[k] = f[k] - x[k];
            v[k] = w[k] = 0;
        }
        ff = warp_sum(ff);
        gg = warp_sum(gg);
        if (lane_of() == 0) add(kFF, ff), add(kGG, gg);
        if (!(unit > 0)) return;
        if (slot >= 0) new_column(leaf, tile, slot, f, x, g, v, w);
        column_products(leaf, tile, n_columns, g, v, w);
    }

    __device__ void new_column(const Leaf& leaf, const Tile<V>& tile, int slot, const A* f, const A* x, const A* g,
                               A* v, A* w) {
        A d_f[kItems], previous[kItems];
        read_source<A, S>(leaf.f_prev, f_prev_row(a, b), tile, previous);
        for (int k = 0; k < kItems; ++k) d_f[k] = f[k] - previous[k] * unit;
        read_tile(row_of<S>(leaf.x_prev, leaf, b), tile, previous);
        for (int k = 0; k < kItems; ++k) v[k] = d_f[k] - (x[k] - previous[k] * unit);
        store(0, slot, leaf, tile, d_f);
        store(1, slot, leaf, tile, v);
        A qq = 0, ww = 0, wg = 0, vg = 0, wv = 0;
        for (int k = 0; k < kItems; ++k) {
            w[k] = d_f[k] - A(a.test_space) * v[k];
            qq += v[k] * v[k];
            ww += w[k] * w[k];
            wg += w[k] * g[k];
            vg += v[k] * g[k];
            wv += w[k] * v[k];
        }
        static_assert(kWW == kQQ + 1 && kWG == kQQ + 2 && kVG == kQQ + 3, "the order in which four are added");
        add_4(kQQ, qq, ww, wg, vg);
        wv = warp_sum(wv);
        if (lane_of() == 0) add(kWV, double(wv));
    }

    __device__ void column_products(const Leaf& leaf, const Tile<V>& tile, int n_columns, const A* g, const A* v,
                                    const A* w) {
        static_assert(kRhs == 0 && kRow == 1 && kCol == 2 && kGramRow == 3, "the order in which four are added");
        if (type2)
            multiply<true>(leaf, tile, n_columns, g, v, w);
        else
            multiply<false>(leaf, tile, n_columns, g, v, w);
    }

    // Of Type II the columns of dG, else those of both.
    template <bool dg_alone>
    __device__ __forceinline__ void multiply(const Leaf& leaf, const Tile<V>& tile, int n_columns, const A* g,
                                             const A* v, const A* w) {
        constexpr int each = dg_alone ? 1 : 2, together = kMultiplied > each ? kMultiplied / each : 1;
        const Small<A> small(a, b);
        const Tile<V> column{leaf.offset + tile.begin, tile.count, tile.neighbours};
        for (int first = 0; first < n_columns; first += together) {
            Pack<H, V> packs[together][each];
            DEQFAST_UNROLL
            for (int i = 0; i < together; ++i) DEQFAST_UNROLL
            for (int h = 0; h < each; ++h)
                packs[i][h] = load_tile(history(1 - h, s.columns[min(first + i, n_columns - 1)]), column);
            DEQFAST_UNROLL
            for (int i = 0; i < together; ++i) {
                if (first + i >= n_columns) continue;
                const int j = s.columns[first + i];
                A old_v[kItems], old_f[kItems] = {}, rhs = 0, row = 0, col = 0, gram = 0;
                unpack<H>(packs[i][0], old_v);
                if constexpr (!dg_alone) unpack<H>(packs[i][each - 1], old_f);
                const A scale_v = scale_of(1, j, leaf, tile.begin);
                const A scale_f = dg_alone ? A(0) : scale_of(0, j, leaf, tile.begin);
                const A space = !dg_alone && a.turn > 0 && small.norms[a.m + j] < 0 ? A(0) : A(a.test_space);
                for (int k = 0; k < kItems; ++k) {
                    const A vj = old_v[k] * scale_v;
                    const A wj = dg_alone ? vj : old_f[k] * scale_f - space * vj;
                    rhs += wj * g[k];
                    gram += vj * v[k];
                    row += vj * w[k];
                    col += wj * v[k];
                }
                add_4(kHeadProducts + j * kColumnProducts, rhs, row, col, gram);
            }
        }
    }
};

}  // namespace deqfast::cuda
