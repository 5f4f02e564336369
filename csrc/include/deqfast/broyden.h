// One Broyden step; the formulas are in deqfast/broyden.py, the oracle is deqfast/ops/reference.py.
#pragma once

#include "deqfast/args.h"

namespace deqfast {

struct BroydenArgs : SolveArgs {
    int memory = 0;
    bool scale_first = false;
    void* history = nullptr;  // (B, memory, N) of the accumulation type: steps s_j
    void* norms = nullptr;    // (B, memory): ||s_j||^2
    void* gram = nullptr;     // (B, memory, memory): s_i . s_j, i >= j; null: the chain form
};

DEQFAST_HD inline int64_t broyden_products(int memory) { return 2 + int64_t(memory); }

inline int64_t broyden_scratch_bytes(int64_t N, bool chain, int64_t number) {
    return (4 * (kBlock + kTile) * number + (chain ? N + kTile : 0) * number + 63) / 64 * 64;
}

}  // namespace deqfast
