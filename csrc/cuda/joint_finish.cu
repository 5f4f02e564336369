// The end of a joint step on a GPU: a thread a sample for the records, then, where tensors have rows to be copied, a
// block a chunk of a tensor. Nothing is added up, so no order matters.
#include "deqfast/joint_finish.h"

#include "joint_work.h"
#include "launch.cuh"
#include "source.cuh"
#include "split.cuh"

namespace deqfast::cuda {
namespace {

constexpr int kFinishThreads = 256;

struct RecordParams {
    FinishArgs a;
};

template <int parts>
struct CopyParams {
    FinishArgs a;
    FinishPart leaf[parts];
};

template <class A>
__global__ void __launch_bounds__(kFinishThreads) joint_record_kernel(const __grid_constant__ RecordParams p) {
    const int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (b < p.a.B) p.a.taken[b] = record<A>(p.a, b);
}

// Numbers [begin, end) of one sample's rows, each of S's size, as words of another type.
template <class Word, class S>
__device__ __forceinline__ void copy_rows(const FinishPart& part, int64_t b, int64_t begin, int64_t end, bool keep,
                                          const Move& move) {
    constexpr int64_t each = sizeof(Word) / sizeof(S);
    const int64_t row = b * part.n / each;
    const Word* x = static_cast<const Word*>(part.x) + row;
    const Word* mapped = static_cast<const Word*>(part.mapped) + row;
    Word *next = static_cast<Word*>(part.next) + row, *saved = static_cast<Word*>(part.saved) + row,
         *kept = static_cast<Word*>(part.kept) + row;
    for (int64_t i = begin / each + threadIdx.x; i < end / each; i += blockDim.x) {
        const Word at = x[i];
        if (keep) ToGlobal::put(&kept[i], at);
        if (!part.next) continue;
        ToGlobal::put(&next[i], move.next == From::mapped ? mapped[i] : move.next == From::saved ? saved[i] : at);
        if (move.save) ToGlobal::put(&saved[i], at);
    }
}

// S: an integer of a number's size.
template <class S, int parts>
__global__ void __launch_bounds__(kFinishThreads) joint_copy_kernel(const __grid_constant__ CopyParams<parts> p) {
    const FinishArgs& a = p.a;
    const Place place(p, a.n_parts);
    const Chunk chunk(p, place.index);
    const FinishPart& part = p.leaf[chunk.leaf];
    const int64_t b = place.b, end = min(chunk.begin + kSplitChunk, part.n);
    const bool keep = part.kept && a.taken[b];
    const Move move = part.next ? move_of(a, b) : Move{From::iterate, false};
    if (!keep && !part.next) return;
    uintptr_t together = uintptr_t(part.n) * sizeof(S);
    for (const void* row :
         {static_cast<const void*>(part.x), static_cast<const void*>(part.mapped), static_cast<const void*>(part.next),
          static_cast<const void*>(part.saved), static_cast<const void*>(part.kept)})
        together |= reinterpret_cast<uintptr_t>(row);
    if (together % sizeof(uint4) == 0)
        copy_rows<uint4, S>(part, b, chunk.begin, end, keep, move);
    else
        copy_rows<S, S>(part, b, chunk.begin, end, keep, move);
}

template <class S, int parts>
void copy(const FinishArgs& a, void* stream) {
    CopyParams<parts> p;
    p.a = a;
    p.a.parts = nullptr;
    p.a.n_parts = 0;
    int64_t chunks = 0;
    for (int i = 0; i < a.n_parts; ++i) {
        if (!a.parts[i].next && !a.parts[i].kept) continue;
        p.leaf[p.a.n_parts++] = a.parts[i];
        chunks += (a.parts[i].n + kSplitChunk - 1) / kSplitChunk;
    }
    if (chunks) launch(joint_copy_kernel<S, parts>, grid_of(a.B, chunks), kFinishThreads, 0, stream, p);
}

template <class S>
void copy(const FinishArgs& a, void* stream) {
    if (a.n_parts <= 4) return copy<S, 4>(a, stream);
    return copy<S, kMaxParts>(a, stream);
}

}  // namespace

void joint_finish(const FinishArgs& a, void* stream) {
    check_parts(a.n_parts);
    if (a.B == 0) return;
    const dim3 grid(unsigned((a.B + kFinishThreads - 1) / kFinishThreads));
    RecordParams p{a};
    p.a.parts = nullptr;
    if (a.dtype == DType::f64)
        launch(joint_record_kernel<double>, grid, kFinishThreads, 0, stream, p);
    else
        launch(joint_record_kernel<float>, grid, kFinishThreads, 0, stream, p);
    if (!a.copies()) return;
    switch (a.dtype) {
        case DType::f64:
            return copy<uint64_t>(a, stream);
        case DType::f32:
            return copy<uint32_t>(a, stream);
        default:
            return copy<uint16_t>(a, stream);
    }
}

}  // namespace deqfast::cuda
