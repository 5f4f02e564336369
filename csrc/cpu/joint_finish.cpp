// The end of a joint step on the CPU. What moves: of the tensors that are not accelerated a row is read and written,
// and one more where the sample is the best so far; of all, with Returns::cost, a row where the sample's iterate is
// taken.
#include "deqfast/joint_finish.h"

#include <cstring>

#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

constexpr int64_t kThreadsFrom = 1 << 18;  // bytes below which starting threads takes longer than the copies

void copy_rows(const FinishArgs& a, const FinishPart& part, int64_t b, int64_t bytes) {
    if (!bytes) return;  // and perhaps no address
    const auto row = [&](auto* rows) { return reinterpret_cast<char*>(const_cast<void*>(rows)) + b * bytes; };
    if (part.kept && a.taken[b]) std::memcpy(row(part.kept), row(part.x), size_t(bytes));
    if (!part.next) return;
    const Move move = move_of(a, b);
    if (move.save) std::memcpy(row(part.saved), row(part.x), size_t(bytes));
    const void* from = move.next == From::mapped ? part.mapped : move.next == From::saved ? part.saved : part.x;
    std::memcpy(row(part.next), row(from), size_t(bytes));
}

}  // namespace

void joint_finish(const FinishArgs& a) {
    for (int64_t b = 0; b < a.B; ++b) a.taken[b] = a.dtype == DType::f64 ? record<double>(a, b) : record<float>(a, b);
    if (!a.copies()) return;
    const int64_t size = size_of(a.dtype);
    int64_t bytes = 0;
    for (int i = 0; i < a.n_parts; ++i)
        if (a.parts[i].next || a.parts[i].kept) bytes += a.parts[i].n * size;
    const int threads = a.B * bytes < kThreadsFrom ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t unit = 0; unit < a.B * a.n_parts; ++unit) {
        const FinishPart& part = a.parts[unit % a.n_parts];
        copy_rows(a, part, unit / a.n_parts, part.n * size);
    }
}

}  // namespace deqfast::cpu::DEQFAST_ISA
