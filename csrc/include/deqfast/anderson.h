// One Anderson step; the formulas and the oracle are in deqfast/ops/formulas/anderson.py.
#pragma once

#include "deqfast/args.h"

namespace deqfast {

// The numbers of the method; the fields of deqfast/ops/anderson.py.
struct AndersonMethod {
    int m = 0;
    double test_space = 2;  // c in W = dF - c dG: 2 mixed, 1 Type I; 0: Type II, W = -dG
    double mixing = 1;
    double ridge = 0;
    Evict evict = Evict::least_useful;
    int mix_every = 1;  // evaluations from one mix to the next; those between take the plain step
    double turn = 0;    // mixed: |W . dG| below so much of dX . dG + ||dG||^2 takes -dF for W; 0: never
};
template <class Visit>
void fields(AndersonMethod& method, Visit&& visit) {
    visit("m", method.m);
    visit("test_space", method.test_space);
    visit("mixing", method.mixing);
    visit("ridge", method.ridge);
    visit("evict", method.evict);
    visit("mix_every", method.mix_every);
    visit("turn", method.turn);
}

struct AndersonArgs : SolveArgs, AndersonMethod {
    bool has_previous = false;  // f_prev is there: a new column can be made
    // With `own`, the residual before it and its differences, in place of dG; Type II with mixing 1 on a CPU.
    const void* own_prev = nullptr;  // (B, own_n)
    void* own_columns = nullptr;     // (B, m, own_n)
    DType history_dtype = DType::bf16;
    void* history = nullptr;  // (2, B, m, N): dF, dG; without gram (2, tiles, m, N, 16)
    float* scales = nullptr;  // (2, B, m, blocks), float16 and int8 only
    int64_t blocks = 0;
    void* matrix = nullptr;   // (tiles, m, m, 16): W_i . dG_j / (w_i q_j)
    void* gram = nullptr;     // (tiles, m, m, 16): dG_i . dG_j / (q_i q_j), i >= j; null: both are formed anew
    void* norms = nullptr;    // (tiles, 2, m, 16): q_j = ||dG_j||, w_j = ||W_j||; q_j = 0: empty; w_j < 0: W_j = -dF_j
    int32_t* ages = nullptr;  // (tiles, m, 16)
};

// Carried: whether the last mix was not finite on some rank, so that no rank's columns count any more.
constexpr int64_t kAndersonCarried = 1;

// The newest columns, which a full history does not give up as least useful.
DEQFAST_HD inline int newest_kept(int m) { return m / 3 > 2 ? m / 3 : 2; }

// Products a sample: norms and products of the new column, then for every column j the four products with it.
enum AndersonProduct { kFF, kGG, kQQ, kWW, kWG, kVG, kWV, kHeadProducts };
enum AndersonColumnProduct { kRhs, kRow, kCol, kGramRow, kColumnProducts };  // W_j.g, W_n.dG_j, W_j.dG_n, dG_n.dG_j

// Whether a new column of the mixed test space takes -dF for W, from W . dG and ||dG||^2; its products follow from
// those with W and dG, dF = W + 2 dG. See deqfast/ops/formulas/anderson.py.
template <class V>
DEQFAST_HD inline auto turns(V turn, V wv, V qq) {
    const V bound = turn * (wv + V(qq + qq));
    return (wv < bound) & (V{} - wv < bound);
}

inline int64_t anderson_scratch_bytes(int m_columns, int64_t number) {
    const int64_t m = m_columns, products = kHeadProducts + int64_t(kColumnProducts) * m, registers = 64;
    const int64_t bytes = 8 * (kBlock + 16) * number                             // blocks
                          + (products + 2 * m * m + 8 * m) * registers           // sums, small solve
                          + (products + m + 2 * m * m + 2 * m) * kTile * number  // products, gamma, one tile
                          + m * kTile * 4 + products * 8 + m * 4                 // ages, sums of a sample, columns
                          + (8 + kTile) * kShortN * registers                    // short samples: registers, rows
                          + 5 * kTinyN * kTinyN * registers;                     // their columns and products
    return (bytes + 32 * 64 + 63) / 64 * 64;
}

DEQFAST_HD inline int64_t anderson_products(int m) { return kHeadProducts + int64_t(kColumnProducts) * m; }

}  // namespace deqfast
