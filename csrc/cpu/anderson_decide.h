// The small dense part of an Anderson step, for as many samples at once as a register has lanes: enter the new column
// into the matrices, solve for gamma, choose the slot of the next column.
#pragma once

#include <cmath>

#include "deqfast/anderson.h"
#include "deqfast/dense.h"
#include "lanes.h"

namespace deqfast::cpu::DEQFAST_ISA {

// The small matrices of up to 16 samples, sample innermost.
template <class A>
struct Tile {
    A *matrix, *gram, *norms;
    int32_t* ages;
};

// What the reduction found for each lane and what was decided.
template <class A>
struct Lanes {
    A going[kTile], slot[kTile], reset[kTile], grew[kTile], steps[kTile];  // slot -1: no new column
    A next_slot[kTile], count[kTile], evicted[kTile], failed[kTile];
};

// Every product of the columns, row-major with stride m, where the small matrices are not kept: then nothing is
// entered.
template <class A>
struct AllProducts {
    const Vec<A>*matrix, *gram;  // W_i . dG_j; dG_i . dG_j, i >= j
};

// The lanes whose evaluation mixes; the others take the plain step.
template <class A>
auto mixes(const AndersonArgs& a, Vec<A> steps) {
    Vec<A> rest = {};
    for (int i = 0; a.mix_every > 1 && i < kLanes<A>; ++i) rest[i] = A(int64_t(steps[i]) % a.mix_every);
    return rest == Vec<A>{};
}

// `products` is (products, 16), `gamma` (m, 16); `work` holds anderson_work(m) registers. Handles lanes [lane, lane +
// L). With `all`, products (kRhs) covers the new column too.
template <class A>
__attribute__((noinline)) void decide(const AndersonArgs& a, const Tile<A>& t, Lanes<A>& lanes, int lane,
                                      const A* products, A* gamma, Vec<A>* work, const AllProducts<A>* all) {
    using V = Vec<A>;
    using Ints = typename VectorOf<int32_t, kLanes<A>>::type;
    const int m = a.m;
    const bool type2 = a.test_space == 0;
    const auto get = [&](const A* base, int i) { return read<V>(base + i * kTile + lane); };
    const auto put = [&](A* base, int i, V v) { write(base + i * kTile + lane, v); };
    V *e = work, *h = e + m * m, *y = h + m * m, *q = y + m, *rq = q + m, *rw = rq + m, *extra = rw + m;

    const V going_lanes = get(lanes.going, 0), slot = get(lanes.slot, 0), zero = splat<A>(0), one = splat<A>(1);
    const auto going = going_lanes > zero;
    const auto reset = get(lanes.reset, 0) > zero;
    const auto grew = get(lanes.grew, 0) > zero;
    const auto adding = going & (slot >= zero) & ~reset;
    const V new_q = root<A>(get(products, kQQ));
    V own = get(products, kWV), new_wg = get(products, kWG), new_ww = get(products, kWW), twice = zero;
    if (a.turn > 0) {
        const V qq = get(products, kQQ);
        const auto turned = turns<V>(splat<A>(A(a.turn)), own, qq);
        twice = select(turned, splat<A>(2), zero);
        new_ww += twice * (own + own + qq + qq);
        new_wg += twice * get(products, kVG);
        own += twice * qq;
    }
    V new_w = type2 ? new_q : root<A>(new_ww);
    const auto new_usable_w = (new_w > zero) & (new_w < splat<A>(A(INFINITY)));
    new_w = select(twice > zero, -new_w, new_w);
    const V infinity = splat<A>(A(INFINITY));
    const auto new_usable = (new_q > zero) & (new_q < infinity) & new_usable_w;

    int n = 0;  // columns beyond this are empty in every lane
    for (int j = 0; j < m; ++j) {
        const auto is_new = adding & (slot == splat<A>(A(j)));
        const V old_q = get(t.norms, j), old_w = get(t.norms, m + j);
        V qj = select(is_new, select(new_usable, new_q, zero), select(reset | grew, zero, old_q));
        qj = select(going, qj, old_q);
        const V wj = select(is_new, new_w, old_w);
        put(t.norms, j, qj);
        put(t.norms, m + j, wj);
        q[j] = qj;
        const auto valid = qj > zero;
        rq[j] = select(valid, one / qj, zero);
        rw[j] = select(valid, one / wj, zero);
        if (any(valid)) n = j + 1;
    }
    const auto new_valid = adding & new_usable;
    const V new_rq = select(new_valid, one / new_q, zero), new_rw = select(new_valid, one / new_w, zero);
    V *row = extra, *col = row + m, *gram_row = col + m;
    const V ridge = splat<A>(A(a.ridge));
    const auto product = [&](int j, AndersonColumnProduct which) {
        return get(products, kHeadProducts + j * kColumnProducts + which);
    };
    const auto set_rhs = [&](int j, V rhs) { y[j] = select(q[j] > zero, type2 ? rhs * rq[j] : -rhs * rw[j], zero); };
    if (all) {
        for (int i = 0; i < n; ++i) {
            const auto valid_i = q[i] > zero;
            set_rhs(i, product(i, kRhs));
            for (int j = 0; j <= i; ++j) {
                const V entry = all->gram[i * m + j] * (rq[i] * rq[j]);
                const V kept = select(valid_i & (q[j] > zero), entry, i == j ? one : zero);
                h[i * m + j] = i == j ? kept + ridge : kept;
            }
            if (type2) continue;
            for (int j = 0; j < n; ++j) {
                const V entry = all->matrix[i * m + j] * (rw[i] * rq[j]);
                e[i * m + j] = select(valid_i & (q[j] > zero), i == j ? ridge - entry : -entry, i == j ? one : zero);
            }
        }
    } else {
        for (int j = 0; j < n; ++j) {
            const auto is_new = adding & (slot == splat<A>(A(j)));
            set_rhs(j, select(is_new, type2 ? get(products, kVG) : new_wg, product(j, kRhs)));
            gram_row[j] = select(is_new, get(products, kQQ), product(j, kGramRow)) * (new_rq * rq[j]);
            if (type2) continue;
            row[j] = select(is_new, own, product(j, kRow) + twice * product(j, kGramRow)) * (new_rw * rq[j]);
            col[j] = select(is_new, own, product(j, kCol)) * (new_rq * rw[j]);
        }
        for (int i = 0; i < n; ++i) {
            const auto new_i = adding & (slot == splat<A>(A(i)));
            const auto valid_i = q[i] > zero;
            for (int j = 0; j <= i; ++j) {
                const auto new_j = adding & (slot == splat<A>(A(j)));
                V entry = get(t.gram, i * m + j);
                entry = select(new_i, gram_row[j], select(new_j, gram_row[i], entry));
                put(t.gram, i * m + j, entry);
                const V kept = select(valid_i & (q[j] > zero), entry, i == j ? one : zero);
                h[i * m + j] = i == j ? kept + ridge : kept;
            }
            if (type2) continue;
            for (int j = 0; j < n; ++j) {
                const auto new_j = adding & (slot == splat<A>(A(j)));
                V entry = get(t.matrix, i * m + j);
                entry = select(new_i, row[j], select(new_j, col[i], entry));
                put(t.matrix, i * m + j, entry);
                const auto valid = valid_i & (q[j] > zero);
                e[i * m + j] = select(valid, i == j ? ridge - entry : -entry, i == j ? one : zero);
            }
        }
    }

    const V steps = get(lanes.steps, 0);
    const auto mixing = going & mixes<A>(a, steps);
    auto solved = mixing;
    bool factored = false;
    if (any(mixing)) {
        if (type2) {
            solved &= factor_ldl<LaneOps>(h, n, m);
            factored = true;
            solve_ldl<LaneOps>(h, y, n, m);
        } else {
            solve_lu<LaneOps>(e, y, n, m);
        }
        for (int j = 0; j < n; ++j) solved &= absolute(y[j]) < infinity;
    }
    const auto failed = mixing & ~solved;
    put(lanes.failed, 0, select(failed, one, zero));

    auto has_empty = ~(zero == zero);
    V next_slot = zero, count = zero;
    for (int j = m - 1; j >= 0; --j) {
        if (j < n) {
            y[j] = select(solved, y[j], zero);
            const V qj = select(failed, zero, q[j]);
            put(t.norms, j, qj);
            q[j] = qj;
            put(gamma, j, y[j] * rq[j]);
        } else {
            put(gamma, j, zero);
        }
        const auto empty = ~(q[j] > zero);
        has_empty |= empty;
        next_slot = select(empty, splat<A>(A(j)), next_slot);
        count = select(empty, count, count + one);
    }
    V* age = row;
    for (int j = 0; j < m; ++j) {
        const auto is_new = adding & (slot == splat<A>(A(j)));
        int32_t* stored = t.ages + j * kTile + lane;
        age[j] = select(is_new, steps, __builtin_convertvector(read<Ints>(stored), V));
        write(stored, __builtin_convertvector(age[j], Ints));
    }
    // The mix leaves room for the columns until the next one: the slot of the next column, and empty ones.
    const auto full = going & ~has_empty;
    V room = splat<A>(A(m)) - count, evicted = zero;
    bool scored = false;
    for (int wanted = 1; wanted <= a.mix_every; ++wanted) {
        const auto short_of = (wanted == 1 ? full : mixing) & (room < splat<A>(A(wanted)));
        if (!any(short_of)) continue;
        V* score = rw;
        if (!scored) {
            scored = true;
            if (a.evict == Evict::least_useful && m > 3) {
                V *diagonal = rw, *scratch = col;
                if (!factored) factor_ldl<LaneOps>(h, n, m);
                factored = true;
                inverse_diagonal<LaneOps>(h, diagonal, scratch, n, m);
                const V newest = steps - splat<A>(A(newest_kept(m)));
                for (int j = 0; j < m; ++j) {
                    const V loss = y[j] * y[j] / diagonal[j];
                    score[j] = select(age[j] <= newest, loss, infinity);
                }
            } else {
                for (int j = 0; j < m; ++j) score[j] = age[j];
            }
        }
        V victim = zero, least = infinity;
        for (int j = 0; j < m; ++j) {
            auto better = score[j] < least;
            if (wanted > 1) better &= (q[j] > zero) & (next_slot != splat<A>(A(j)));
            least = select(better, score[j], least);
            victim = select(better, splat<A>(A(j)), victim);
        }
        room = select(short_of, room + one, room);
        evicted = select(short_of, evicted + one, evicted);
        if (wanted == 1) {
            next_slot = select(full, victim, next_slot);  // used until it is overwritten
            continue;
        }
        count = select(short_of, count - one, count);
        for (int j = 0; j < m; ++j) {
            q[j] = select(short_of & (victim == splat<A>(A(j))), zero, q[j]);
            put(t.norms, j, q[j]);
        }
    }
    put(lanes.evicted, 0, evicted);
    put(lanes.count, 0, count);
    put(lanes.next_slot, 0, next_slot);
}

inline int64_t anderson_work(int m) { return 2 * int64_t(m) * m + 8 * int64_t(m); }

}  // namespace deqfast::cpu::DEQFAST_ISA
