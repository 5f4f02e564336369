// One sample of an Anderson step, worked on by one block: the products of its chunks, the small solve, the mix.
// Sums are float in a thread (8 numbers) and a warp, double beyond; their order depends on N alone.
#pragma once

#include "deqfast/anderson.h"

#include "dense.cuh"
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

// What a block shares, in dynamic shared memory.
template <class A>
struct Shared {
    double *warp_sums, *sums;                                 // (warps, D), (D)
    A *system, *y, *q, *w, *row, *col, *gram_row, *diagonal;  // (m, m), then (m) each
    A* gamma;                                                 // (m), 0: not used
    int* columns;                                             // columns in use
    A* largest;                                               // (2, warps)

    static __host__ __device__ int64_t bytes(int m, int warps) {
        const int64_t d = anderson_products(m);
        return 8 * (d * (warps + 1)) + int64_t(sizeof(A)) * (int64_t(m) * m + 8 * m + 2 * warps) + 4 * m + 64;
    }
    __device__ Shared(char* p, int m, int warps) {
        const int64_t d = anderson_products(m);
        warp_sums = reinterpret_cast<double*>(p);
        sums = warp_sums + d * warps;
        system = reinterpret_cast<A*>(sums + d);
        y = system + m * m;
        q = y + m, w = q + m, row = w + m, col = row + m, gram_row = col + m, diagonal = gram_row + m;
        gamma = diagonal + m;
        largest = gamma + m;
        columns = reinterpret_cast<int*>(largest + 2 * warps);
    }
};

// One sample's small matrices.
template <class A>
struct Small {
    Numbers<A> matrix, gram, norms;
    Numbers<int32_t> ages;

    __device__ Small(const AndersonArgs& a, int64_t b) {
        const int64_t t = b / kTile, lane = b % kTile, m = a.m;
        matrix = {static_cast<A*>(a.matrix) + t * m * m * kTile + lane, kTile};
        gram = {static_cast<A*>(a.gram) + t * m * m * kTile + lane, kTile};
        norms = {static_cast<A*>(a.norms) + t * 2 * m * kTile + lane, kTile};
        ages = {a.ages + t * m * kTile + lane, kTile};
    }
};

template <class A, class S, class H, int leaves>
class Step {
   public:
    __device__ Step(const Params<leaves>& params, int64_t sample, char* memory)
        : p(params),
          a(params.a),
          b(sample),
          D(int(anderson_products(a.m))),
          type2(a.test_space == 0),
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
        int n = 0;
        const bool none = !(unit > 0) || (a.max_iter && a.at(kSteps, b) + 1 >= a.max_iter);
        for (int j = 0; j < a.m && !none; ++j)
            if (j != slot && small.norms[j] > 0) {
                if (threadIdx.x == 0) s.columns[n] = j;
                ++n;
            }
        __syncthreads();
        return n;
    }

    // Adds the products of the numbers [begin, begin + length) of leaf l; writes the new column there.
    __device__ void reduce(int l, int64_t begin, int64_t length, int slot, int n_columns) {
        const Leaf& leaf = p.leaf[l];
        const int64_t end = min(begin + length, leaf.n);
        for (int64_t at = begin; at < end; at += int64_t(blockDim.x) * kItems)
            reduce_tile(leaf, tile_of(a, leaf, at, end), slot, n_columns);
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
    __device__ void decide(int slot, int32_t outcome) {
        const bool reset = outcome & kReset, grew = type2 && outcome & kGrew;
        if (grew && lane_of() == 0) a.at(kGrowthRestarts, b)++;
        const int m = a.m;
        const Small<A> small(a, b);
        const bool adding = slot >= 0 && !reset;
        const auto product = [&](int j, int which) { return A(s.sums[kHeadProducts + j * kColumnProducts + which]); };
        const A new_q = sqrt(A(s.sums[kQQ])), new_w = type2 ? new_q : sqrt(A(s.sums[kWW]));
        const bool usable = new_q > 0 && new_w > 0 && isfinite(new_q) && isfinite(new_w);
        const int rank = lane_of();
        int last = 0;
        for (int j = rank; j < m; j += kWarpSize) {
            const bool is_new = adding && j == slot;
            const A qj = is_new ? (usable ? new_q : A(0)) : reset || grew ? A(0) : small.norms[j];
            const A wj = is_new ? new_w : small.norms[m + j];
            small.norms[j] = qj;
            small.norms[m + j] = wj;
            s.q[j] = qj;
            s.w[j] = wj;
            if (qj > 0) last = j + 1;
            if (is_new) small.ages[j] = a.at(kSteps, b);
        }
        for (int step = kWarpSize / 2; step > 0; step /= 2) last = max(last, __shfl_xor_sync(kAll, last, step));
        const int n = last;  // columns beyond this are empty
        __syncwarp();
        for (int j = rank; j < n; j += kWarpSize) {
            const bool is_new = adding && j == slot, valid = s.q[j] > 0;
            const A rq = valid ? 1 / s.q[j] : A(0), rw = valid ? 1 / s.w[j] : A(0);
            const A new_rq = usable ? 1 / new_q : A(0), new_rw = usable ? 1 / new_w : A(0);
            const A rhs = is_new ? A(s.sums[type2 ? kVG : kWG]) : product(j, kRhs);
            s.y[j] = !valid ? A(0) : type2 ? rhs * rq : -rhs * rw;
            s.gram_row[j] = (is_new ? A(s.sums[kQQ]) : product(j, kGramRow)) * new_rq * rq;
            s.row[j] = (is_new ? A(s.sums[kWV]) : product(j, kRow)) * new_rw * rq;
            s.col[j] = (is_new ? A(s.sums[kWV]) : product(j, kCol)) * new_rq * rw;
        }
        __syncwarp();
        if (adding)
            for (int j = rank; j < n; j += kWarpSize) {
                small.gram[max(slot, j) * m + min(slot, j)] = s.gram_row[j];
                if (type2) continue;
                small.matrix[slot * m + j] = s.row[j];
                if (j != slot) small.matrix[j * m + slot] = s.col[j];
            }
        __syncwarp();
        const Numbers<A> system{s.system, 1}, y{s.y, 1};
        bool solved = true;
        if (type2) {
            load_gram(small, n);
            solved = factor_ldl<WarpTeam>(system, n, m);
            solve_ldl<WarpTeam>(system, y, n, m);
        } else {
            for (int i = rank; i < n * n; i += kWarpSize) {
                const int r = i / n, c = i % n;
                const bool valid = s.q[r] > 0 && s.q[c] > 0;
                const A entry = valid ? -small.matrix[r * m + c] : A(0);
                s.system[r * m + c] = r != c ? entry : valid ? A(a.ridge) + entry : A(1);
            }
            __syncwarp();
            solve_lu<WarpTeam>(system, y, n, m);
        }
        for (int j = rank; j < n; j += kWarpSize) solved = solved && isfinite(s.y[j]);
        const bool failed = WarpTeam::any(!solved);
        int used = 0, empty = m;
        for (int j = rank; j < m; j += kWarpSize) {
            if (failed) small.norms[j] = s.q[j] = 0;
            s.gamma[j] = j < n && !failed && s.q[j] > 0 ? s.y[j] / s.q[j] : A(0);
            if (s.q[j] > 0)
                ++used;
            else
                empty = min(empty, j);
        }
        used = warp_sum(used);
        for (int step = kWarpSize / 2; step > 0; step /= 2) empty = min(empty, __shfl_xor_sync(kAll, empty, step));
        const bool full = used == m;
        const int next = full ? victim(small) : empty;
        if (rank == 0) {
            a.at(kSlot, b) = next;
            a.at(kCount, b) = used;
            a.at(kEvictions, b) += full;
            a.at(kSolveFallbacks, b) += failed;
        }
    }

    // Writes the next iterate for [begin, begin + length) of leaf l from `gamma`; false if not finite.
    __device__ bool mix(int l, int64_t begin, int64_t length, bool picard) {
        const Leaf& leaf = p.leaf[l];
        const int64_t end = min(begin + length, leaf.n);
        const A beta = picard ? A(1) : A(a.mixing), per_unit = A(1) / a.at<A>(kUnit, b);
        bool finite = true;
        for (int64_t at = begin; at < end; at += int64_t(blockDim.x) * kItems) {
            const Tile tile = tile_of(a, leaf, at, end);
            A out[kItems], part[kItems];
            read_source<A, S>(leaf.f, f_row(a, b), tile, out);
            if (beta != 1) {
                read_tile(row_of<S>(leaf.x, leaf, b), tile, part);
                for (int k = 0; k < kItems; ++k) out[k] = part[k] + beta * (out[k] - part[k]);
            }
            const Tile column{leaf.offset + at, tile.count, tile.neighbours};
            for (int j = 0; j < a.m && !picard; ++j) {
                const A weight = s.gamma[j] * per_unit;
                if (weight == 0) continue;
                const A weight_f = weight * scale_of(0, j, leaf, at);
                read_tile(history(0, j), column, part);
                for (int k = 0; k < kItems; ++k) out[k] -= weight_f * part[k];
                if (beta == 1) continue;
                const A weight_g = (1 - beta) * weight * scale_of(1, j, leaf, at);
                read_tile(history(1, j), column, part);
                for (int k = 0; k < kItems; ++k) out[k] += weight_g * part[k];
            }
            finite &= write_state(row_of<S>(leaf.x_prev, leaf, b), tile, out);
        }
        return finite;
    }

    // The step did not stay finite: x' = f, and the history is forgotten.
    __device__ void picard() {
        for (int l = 0; l < a.n_leaves; ++l) mix(l, 0, p.leaf[l].n, true);
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
    Shared<A> s;
    const A unit;

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
    __device__ void store(int which, int slot, const Leaf& leaf, const Tile& tile, A* column) {
        A factor = 1;
        if (kScaled<H>) factor = block_scale(which, column);
        if (kScaled<H> && threadIdx.x == 0) scale(which, slot, leaf, tile.begin) = float(factor);
        H part[kItems];
        for (int k = 0; k < kItems; ++k) {
            part[k] = Format<A, H>::write(kScaled<H> ? column[k] / factor : column[k]);
            column[k] = Format<A, H>::read(part[k]) * factor;
        }
        write_tile<A>(history(which, slot), Tile{leaf.offset + tile.begin, tile.count, tile.neighbours}, part);
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

    __device__ void reduce_tile(const Leaf& leaf, const Tile& tile, int slot, int n_columns) {
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

    __device__ void new_column(const Leaf& leaf, const Tile& tile, int slot, const A* f, const A* x, const A* g, A* v,
                               A* w) {
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

    __device__ void column_products(const Leaf& leaf, const Tile& tile, int n_columns, const A* g, const A* v,
                                    const A* w) {
        const Tile column{leaf.offset + tile.begin, tile.count, tile.neighbours};
        static_assert(kRhs == 0 && kRow == 1 && kCol == 2 && kGramRow == 3, "the order in which four are added");
        for (int i = 0; i < n_columns; ++i) {
            const int j = s.columns[i];
            A old_v[kItems], old_f[kItems], rhs = 0, row = 0, col = 0, gram = 0;
            read_tile(history(1, j), column, old_v);
            const A scale_v = scale_of(1, j, leaf, tile.begin);
            if (!type2) read_tile(history(0, j), column, old_f);
            const A scale_f = type2 ? A(0) : scale_of(0, j, leaf, tile.begin);
            for (int k = 0; k < kItems; ++k) {
                const A vj = old_v[k] * scale_v;
                const A wj = type2 ? vj : old_f[k] * scale_f - A(a.test_space) * vj;
                rhs += wj * g[k];
                gram += vj * v[k];
                row += vj * w[k];
                col += wj * v[k];
            }
            add_4(kHeadProducts + j * kColumnProducts, rhs, row, col, gram);
        }
    }

    __device__ void load_gram(const Small<A>& small, int n) {
        const int m = a.m;
        for (int i = lane_of(); i < n * n; i += kWarpSize) {
            const int r = i / n, c = i % n;
            if (c > r) continue;
            const bool valid = s.q[r] > 0 && s.q[c] > 0;
            const A entry = valid ? small.gram[r * m + c] : r == c ? A(1) : A(0);
            s.system[r * m + c] = r == c ? entry + A(a.ridge) : entry;
        }
        __syncwarp();
    }

    // Which column a full history gives up.
    __device__ int victim(const Small<A>& small) {
        const int m = a.m;
        const bool by_use = a.evict_least_useful && m > 3;
        if (by_use) {
            const Numbers<A> system{s.system, 1}, diagonal{s.diagonal, 1};
            if (!type2) {
                load_gram(small, m);
                factor_ldl<WarpTeam>(system, m, m);
            }
            inverse_diagonal<WarpTeam>(system, diagonal, m, m);
        }
        const int newest = a.at(kSteps, b) - (m / 3 > 2 ? m / 3 : 2);
        A best = A(INFINITY);
        int chosen = m;
        for (int j = lane_of(); j < m; j += kWarpSize) {
            if (by_use && small.ages[j] > newest) continue;
            const A loss = by_use ? s.y[j] * s.y[j] / s.diagonal[j] : A(small.ages[j]);
            if (loss < best) best = loss, chosen = j;
        }
        A negative = -best;
        WarpTeam::largest(negative, chosen);
        return chosen < m ? chosen : 0;
    }
};

}  // namespace deqfast::cuda
