// The small solve of an Anderson step, by one warp: enter the new column into the sample's matrices, solve for gamma,
// choose the slot of the next column. Up to kRowsMax columns live in registers, a lane a row; what a step waits for
// here is latency, about 300 cycles a column.
#pragma once

#include "deqfast/anderson.h"

#include "dense.cuh"
#include "verdict.cuh"

namespace deqfast::cuda {

// What a block shares, in dynamic shared memory.
template <class A>
struct Shared {
    double *warp_sums, *sums;          // (warps, D), (D)
    A *system, *y, *q, *w, *diagonal;  // (m, m), then (m) each
    A* gamma;                          // (m), 0: not used
    int* columns;                      // columns in use
    A* largest;                        // (2, warps)

    static __host__ __device__ int64_t bytes(int m, int warps) { return anderson_shared(m, warps, sizeof(A)); }
    __device__ Shared(char* p, int m, int warps) {
        const int64_t d = anderson_products(m);
        warp_sums = reinterpret_cast<double*>(p);
        sums = warp_sums + d * warps;
        system = reinterpret_cast<A*>(sums + d);
        y = system + m * m;
        q = y + m, w = q + m, diagonal = w + m;
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

template <class A>
class Decision {
   public:
    __device__ Decision(const AndersonArgs& args, int64_t sample, char* memory, int warps)
        : a(args),
          b(sample),
          m(args.m),
          rank(lane_of()),
          type2(args.test_space == 0),
          in_registers(m <= kRowsMax),
          s(memory, m, warps),
          small(args, sample),
          system{s.system, 1},
          y{s.y, 1},
          diagonal{s.diagonal, 1} {}

    __device__ void run(int slot, int32_t outcome) {
        const int n = enter(slot, outcome);
        const bool mixes = a.at(kSteps, b) % a.mix_every == 0;
        const bool failed = mixes && WarpTeam::any(!solve(n));
        int used = 0, empty = m;
        for (int j = rank; j < m; j += kWarpSize) {
            if (failed) small.norms[j] = s.q[j] = 0;
            s.gamma[j] = j < n && mixes && !failed && s.q[j] > 0 ? s.y[j] / s.q[j] : A(0);
            if (s.q[j] > 0)
                ++used;
            else
                empty = min(empty, j);
        }
        used = warp_sum(used);
        for (int step = kWarpSize / 2; step > 0; step /= 2) empty = min(empty, __shfl_xor_sync(kAll, empty, step));
        const bool full = used == m;
        const int wanted = mixes ? a.mix_every : 1;  // columns for which the mix leaves room
        int next = empty, evicted = 0;
        if (m - used < wanted) {
            score(mixes);
            if (full) {
                next = victim(-1);  // used until it is overwritten
                evicted = 1;
            }
            for (; m - used + full < wanted; --used, ++evicted) {
                const int gone = victim(next);
                if (gone % kWarpSize == rank) small.norms[gone] = s.q[gone] = 0;
                __syncwarp();
            }
        }
        if (rank != 0) return;
        a.at(kSlot, b) = next;
        a.at(kCount, b) = used;
        a.at(kEvictions, b) += evicted;
        a.at(kSolveFallbacks, b) += failed;
    }

   private:
    const AndersonArgs& a;
    const int64_t b;
    const int m, rank;
    const bool type2, in_registers;
    const Shared<A> s;
    const Small<A> small;
    const Numbers<A> system, y, diagonal;

    // Whether one of the lane's columns is a turned one: W_j = -dF_j.
    __device__ bool has_turned() const {
        bool found = false;
        for (int j = rank; a.turn > 0 && j < m; j += kWarpSize)
            found = found || (small.norms[j] > 0 && small.norms[m + j] < 0);
        return found;
    }

    // Norms, ages and products of the new column into the sample's matrices, right-hand side into y; returns a bound on
    // the columns in use.
    __device__ int enter(int slot, int32_t outcome) const {
        const bool reset = outcome & kReset, grew = outcome & kGrew && (type2 || WarpTeam::any(has_turned()));
        if (grew && rank == 0) a.at(kGrowthRestarts, b)++;
        const bool adding = slot >= 0 && !reset;
        const auto product = [&](int j, int which) { return A(s.sums[kHeadProducts + j * kColumnProducts + which]); };
        const A qq = A(s.sums[kQQ]), vg = A(s.sums[kVG]), new_q = sqrt(qq);
        A ww = A(s.sums[kWW]), wv = A(s.sums[kWV]), wg = A(s.sums[kWG]);
        const bool turned = a.turn > 0 && turns<A>(A(a.turn), wv, qq);
        const A twice = turned ? A(2) : A(0);
        ww += twice * (wv + wv + qq + qq);
        wg += twice * vg;
        wv += twice * qq;
        const A root_w = type2 ? new_q : sqrt(ww), new_w = turned ? -root_w : root_w;
        const bool usable = new_q > 0 && root_w > 0 && isfinite(new_q) && isfinite(root_w);
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
        __syncwarp();
        for (int j = rank; j < last; j += kWarpSize) {
            const bool is_new = adding && j == slot, valid = s.q[j] > 0;
            const A rq = valid ? 1 / s.q[j] : A(0), rw = valid ? 1 / s.w[j] : A(0);
            const A new_rq = usable ? 1 / new_q : A(0), new_rw = usable ? 1 / new_w : A(0);
            const A rhs = is_new ? type2 ? vg : wg : product(j, kRhs);
            s.y[j] = !valid ? A(0) : type2 ? rhs * rq : -rhs * rw;
            if (!adding) continue;
            small.gram[max(slot, j) * m + min(slot, j)] = (is_new ? qq : product(j, kGramRow)) * new_rq * rq;
            if (type2) continue;
            const A row = is_new ? wv : product(j, kRow) + twice * product(j, kGramRow);
            small.matrix[slot * m + j] = row * new_rw * rq;
            if (!is_new) small.matrix[j * m + slot] = product(j, kCol) * new_rq * rw;
        }
        __syncwarp();
        return last;
    }

    // dG^T dG with the ridge: the lower triangle.
    __device__ void load_gram(int n) const {
        for (int i = rank; i < n * n; i += kWarpSize) {
            const int r = i / n, c = i % n;
            if (c > r) continue;
            const bool valid = s.q[r] > 0 && s.q[c] > 0;
            const A entry = valid ? small.gram[r * m + c] : r == c ? A(1) : A(0);
            s.system[r * m + c] = r == c ? entry + A(a.ridge) : entry;
        }
        __syncwarp();
    }

    // y from y; true if the lane's numbers are finite and, of Type II, every pivot is positive.
    __device__ bool solve(int n) const {
        bool solved = true;
        if (type2) {
            load_gram(n);
            if (in_registers) {
                solved = solve_spd_rows(s.system, s.y, s.diagonal, n, m);
            } else {
                solved = factor_ldl<WarpTeam>(system, n, m);
                solve_ldl<WarpTeam>(system, y, n, m);
            }
        } else {
            for (int i = rank; i < n * n; i += kWarpSize) {
                const int r = i / n, c = i % n;
                const bool valid = s.q[r] > 0 && s.q[c] > 0;
                const A entry = valid ? -small.matrix[r * m + c] : A(0);
                s.system[r * m + c] = r != c ? entry : valid ? A(a.ridge) + entry : A(1);
            }
            __syncwarp();
            if (in_registers)
                solve_rows(s.system, s.y, n, m);
            else
                solve_lu<WarpTeam>(system, y, n, m);
        }
        for (int j = rank; j < n; j += kWarpSize) solved = solved && isfinite(s.y[j]);
        return solved;
    }

    // How much each column is worth, into y: of a history that has to give some up.
    __device__ void score(bool mixes) const {
        const bool by_use = mixes && a.evict == Evict::least_useful && m > 3;
        if (by_use && !(type2 && in_registers)) {
            if (!type2) load_gram(m);
            if (in_registers) {
                solve_spd_rows<A>(s.system, nullptr, s.diagonal, m, m);
            } else {
                if (!type2) factor_ldl<WarpTeam>(system, m, m);
                inverse_diagonal<WarpTeam>(system, diagonal, m, m);
            }
        }
        const int newest = a.at(kSteps, b) - newest_kept(m);
        for (int j = rank; j < m; j += kWarpSize) {
            const bool kept = by_use && small.ages[j] > newest;
            s.y[j] = kept ? A(INFINITY) : by_use ? s.y[j] * s.y[j] / s.diagonal[j] : A(small.ages[j]);
        }
        __syncwarp();
    }

    // The column in use that is worth least, but for `not_this`.
    __device__ int victim(int not_this) const {
        A best = A(INFINITY);
        int chosen = m;
        for (int j = rank; j < m; j += kWarpSize)
            if (s.q[j] > 0 && j != not_this && s.y[j] < best) best = s.y[j], chosen = j;
        A negative = -best;
        WarpTeam::largest(negative, chosen);
        return chosen < m ? chosen : 0;
    }
};

// A call, not inlined: that takes a quarter off the time to compile, and one call a step costs nothing.
template <class A>
__device__ __noinline__ void decide(const AndersonArgs& a, int64_t b, char* memory, int warps, int slot,
                                    int32_t outcome) {
    Decision<A>(a, b, memory, warps).run(slot, outcome);
}

}  // namespace deqfast::cuda
