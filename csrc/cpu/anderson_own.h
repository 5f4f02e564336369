// A residual of the caller's own in place of f - x, possibly in another space: its norm, its differences in place of
// dG, and their products. What moves, per number of it: the residual and the one before are read once, the new
// difference written, the older ones read.
#pragma once

#include "anderson_sample.h"

namespace deqfast::cpu::DEQFAST_ISA {

template <class A>
class OwnResidual {
    using V = Vec<A>;

   public:
    explicit OwnResidual(const AndersonArgs& args) : a(args) {}

    // Puts the products of sample b with it, and its norm, in place of those with f - x; ||f|| stays.
    void reduce(int64_t b, int slot, int n_columns, Scratch<A>& s, int64_t products, double* sums) const {
        std::fill_n(sums + kFF + 1, products - kFF - 1, 0.0);
        const V unit = splat<A>(a.at<A>(kUnit, b));
        for (int64_t begin = 0; begin < a.own_n; begin += kChunk) {
            const int64_t count = std::min<int64_t>(kChunk, a.own_n - begin);
            const A* r = row(a.own, b) + begin;
            if (slot < 0) {
                V square = {};
                for_registers<A>(count, [&](int64_t i, auto part) {
                    const V g = load<A>(r + i, part) * unit;
                    square += g * g;
                });
                sums[kGG] += double(sum_lanes<A>(square));
                for (int k = 0; k < n_columns; ++k) products_of(b, s.columns[k], nullptr, r, begin, count, unit, sums);
                continue;
            }
            A* d_g = column(b, slot) + begin;
            new_column(r, row(a.own_prev, b) + begin, d_g, count, unit, sums);
            for (int k = 0; k < n_columns; ++k) products_of(b, s.columns[k], d_g, r, begin, count, unit, sums);
        }
    }

   private:
    const AndersonArgs& a;

    const A* row(const void* base, int64_t b) const { return static_cast<const A*>(base) + b * a.own_n; }
    A* column(int64_t b, int j) const { return static_cast<A*>(a.own_columns) + (b * a.m + j) * a.own_n; }

    void new_column(const A* r, const A* before, A* d_g, int64_t count, V unit, double* sums) const {
        V gg = {}, qq = {}, vg = {};
        for_registers<A>(count, [&](int64_t i, auto part) {
            const V g = load<A>(r + i, part) * unit, v = g - load<A>(before + i, part) * unit;
            store<A>(d_g + i, v, part);
            gg += g * g;
            qq += v * v;
            vg += v * g;
        });
        sums[kGG] += double(sum_lanes<A>(gg));
        sums[kQQ] += double(sum_lanes<A>(qq));
        sums[kVG] += double(sum_lanes<A>(vg));
    }

    // Products of an older column with the residual and, where there is one, with the new column.
    void products_of(int64_t b, int j, const A* d_g, const A* r, int64_t begin, int64_t count, V unit,
                     double* sums) const {
        const A* older = column(b, j) + begin;
        V rhs = {}, gram = {};
        for_registers<A>(count, [&](int64_t i, auto part) {
            const V v = load<A>(older + i, part);
            rhs += v * (load<A>(r + i, part) * unit);
            if (d_g) gram += v * load<A>(d_g + i, part);
        });
        double* found = sums + kHeadProducts + j * kColumnProducts;
        found[kRhs] += double(sum_lanes<A>(rhs));
        found[kGramRow] += double(sum_lanes<A>(gram));
    }
};

}  // namespace deqfast::cpu::DEQFAST_ISA
