// What every solver's kernels receive: raw pointers and sizes, no tensor library.
#pragma once

#include <cstdint>

#include "deqfast/constants.h"
#include "deqfast/regimes.h"

// Functions that a GPU's compiler makes for both sides.
#ifdef __CUDACC__
#define DEQFAST_HD __host__ __device__
#else
#define DEQFAST_HD
#endif

namespace deqfast {

constexpr int kMaxDims = 16;
constexpr int kMaxBlocks = 4;

enum class DType : int { f64, f32, bf16, f16, i8 };

enum Phase : int { kReduce = 1, kApply = 2, kStep = 3 };

// Where f's output for one leaf lies. Dense: a sample is n consecutive numbers. Else the inner dimensions, outermost
// first in the leaf's memory order, with their strides.
struct Source {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t batch_stride = 0;
    bool dense = true;
    int ndim = 0;
    int64_t size[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};
};

struct Leaf {
    int64_t n = 0;           // numbers a sample
    int64_t offset = 0;      // where the leaf begins in a history row
    int64_t block = 0;       // index of its first block of scales
    void* x = nullptr;       // the iterate f was evaluated at, (B, n) dense
    void* x_prev = nullptr;  // the one before; receives the next
    void* saved = nullptr;   // an earlier best iterate
    Source f, f_prev;
};

// When a sample stops; the fields of deqfast/ops/workspace.py.
struct Stopping {
    double rtol = 0, atol = 0;
    int max_iter = 0;  // 0: none
    bool keep_best = true;
};
template <class Visit>
void fields(Stopping& s, Visit&& visit) {
    visit("rtol", s.rtol);
    visit("atol", s.atol);
    visit("max_iter", s.max_iter);
    visit("keep_best", s.keep_best);
}

struct SolveArgs : Stopping {
    int64_t B = 0, N = 0;
    int n_leaves = 0;
    Leaf* leaves = nullptr;
    DType dtype = DType::f32;   // of the state; products are accumulated in float, for f64 in double
    const void* own = nullptr;  // (B, own_n), accumulated: a residual of the caller's own, null: f - x
    int64_t own_n = 0;
    const int32_t* f_rows = nullptr;       // sample -> row of f, null: the same
    const int32_t* f_prev_rows = nullptr;  // the same for f_prev
    int32_t* ints = nullptr;               // (rows, padded)
    void* reals = nullptr;                 // (rows, padded) of the accumulation type
    int64_t padded = 0;                    // from one row of them to the next: B rounded up to tiles, or more
    // A state of several blocks, each to a tolerance of its own: block_norms (n_blocks, 2, padded), how far each block
    // moves and how large it is; null: the whole state is one.
    int n_blocks = 0;
    const double* block_norms = nullptr;
    double block_rtol[kMaxBlocks] = {}, block_atol[kMaxBlocks] = {}, block_weight[kMaxBlocks] = {};
    int threads = 1;
    char* scratch = nullptr;  // threads * scratch_bytes, 64-byte aligned
    int64_t scratch_bytes = 0;
    double* sums = nullptr;      // (B, products a sample), between reduce and apply
    double* partials = nullptr;  // (B, chunks, products a sample), where a sample is split over threads
    int64_t chunks = 0;          // chunks a sample
    int64_t* running = nullptr;  // out: samples still running
    // A sample that is spread over ranks: `sums` and `carry` are added up over them between reduce and apply.
    int64_t spread_n = 0;     // numbers a sample on all of them; 0: it is whole here
    double* carry = nullptr;  // (B, carried a sample): what an apply leaves to be added up with the next products
    const double* squares = nullptr;  // (B, 2): squared norms of f and of f - x where the products' unit does not fit

    DEQFAST_HD int64_t total() const { return spread_n ? spread_n : N; }

    DEQFAST_HD int32_t& at(IntRow row, int64_t b) const { return ints[row * padded + b]; }
    template <class A>
    DEQFAST_HD A& at(RealRow row, int64_t b) const {
        return static_cast<A*>(reals)[row * padded + b];
    }
};

// Of a spread sample: whether the products' unit does not fit, so that the norms have to be added up for themselves.
struct Squares {
    int64_t products;  // from one sample's sums to the next's; ||f||^2 and ||f - x||^2 come first
    double* out;       // see SolveArgs::squares; 0 where the unit fits
};

// When a sample that converged before evaluation `made` is still within its tolerance: slack, of the tolerance, and
// noise, of ||f||, are allowed for f's own rounding; residuals that differ by `same` are one; see ops/recheck.py.
struct Recheck {
    int made;
    double slack, noise, same;
};

DEQFAST_HD inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
DEQFAST_HD inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

}  // namespace deqfast
