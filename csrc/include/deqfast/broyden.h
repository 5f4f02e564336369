// One Broyden step; the formulas and the oracle are in deqfast/ops/formulas/broyden.py.
#pragma once

#include "deqfast/args.h"

namespace deqfast {

// The numbers of the method; the fields of deqfast/ops/broyden.py.
struct BroydenMethod {
    int memory = 0;
    bool scale_first = false;
};
template <class Visit>
void fields(BroydenMethod& method, Visit&& visit) {
    visit("memory", method.memory);
    visit("scale_first", method.scale_first);
}

struct BroydenArgs : SolveArgs, BroydenMethod {
    void* history = nullptr;  // (B, memory, N) of the accumulation type: steps s_j
    void* norms = nullptr;    // (B, memory): ||s_j||^2
    void* gram = nullptr;     // (B, memory, memory): s_i . s_j, i >= j; null: the chain form
};

DEQFAST_HD inline int64_t broyden_products(int memory) { return 2 + int64_t(memory); }

// Carried, of the newest step: on how many ranks it was not finite, below 0: there is none; its squared norm, its
// products with the older ones.
DEQFAST_HD inline int64_t broyden_carried(int memory) { return 2 + int64_t(memory); }

inline int64_t broyden_scratch_bytes(int64_t N, bool chain, int64_t number) {
    return (4 * (kBlock + kTile) * number + (chain ? N + kTile : 0) * number + 63) / 64 * 64;
}

}  // namespace deqfast
