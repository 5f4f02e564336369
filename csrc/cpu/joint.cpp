// The joint map on the CPU. What moves, per number: the iterate and what f or its gradient gave are read, the mapped
// state is written: 3s, at once with the norms of the block. Of x, where its step needs a norm first, a pass more reads
// the gradient (normalisation) and one more iterate, gradient and centre (L2 ball): x is the small block, and in cache
// by then. Chunks go over threads; their sums, in double, are added up in order, so that the schedule changes no bit.
#include "deqfast/joint.h"

#include "sample.h"

namespace deqfast::cpu::DEQFAST_ISA {
namespace {

constexpr int64_t kThreadsFrom = 1 << 14;  // numbers below which starting threads takes longer than the work

// The lanes that hold numbers, the others zero.
template <class A>
inline Vec<A> only(Vec<A> v, Whole) {
    return v;
}
template <class A>
inline Vec<A> only(Vec<A> v, Part part) {
    A kept[kLanes<A>] = {};
    std::memcpy(kept, &v, size_t(part.count) * sizeof(A));
    return read<Vec<A>>(kept);
}

// A sum of squares in double: no square of a finite float overflows or vanishes there.
template <class A>
class Squares {
   public:
    void add(Vec<A> v) {
        const A* lanes = reinterpret_cast<const A*>(&v);
        for (int part = 0; part < kParts; ++part) {
            const Vec<double> wide = Codec<double, A>::load(lanes + part * kLanes<double>);
            sums_[part] += wide * wide;
        }
    }
    double total() const {
        double sum = 0;
        for (int part = 0; part < kParts; ++part)
            for (int i = 0; i < kLanes<double>; ++i) sum += sums_[part][i];
        return sum;
    }

   private:
    static constexpr int kParts = kLanes<A> / kLanes<double>;
    Vec<double> sums_[kParts] = {};
};

template <class A, class S>
class JointMap {
    using V = Vec<A>;

   public:
    explicit JointMap(const JointArgs& args) : a(args) {
        int64_t numbers = 0;
        int64_t chunk = 0;
        for (int i = 0; i < a.n_parts; ++i) {
            numbers += a.parts[i].n;
            chunk += chunks_of(a.parts[i].n);
            for (int block = a.parts[i].block; block <= kInputBlock; ++block) end_[block] = chunk;
        }
        threads_ = a.B * numbers < kThreadsFrom ? 1 : a.threads;
    }

    void run() {
        const int64_t inputs = end_[kAdjointBlock];
        if (a.needs_factors()) {
            for (int64_t b = 0; b < a.B; ++b) factor(b, 0) = a.step_size, factor(b, 1) = 1;
            if (a.normalize) measure_inputs([&](auto&&... at) { return gradient(at...); }, 0, gradient_factor);
            if (a.ball == Ball::l2) measure_inputs([&](auto&&... at) { return distance(at...); }, 1, shrink_factor);
        }
        over_chunks(0, [&](const JointPart& part, int64_t b, int64_t begin, int64_t chunk) {
            double* sums = partial(b, chunk);
            if (chunk < inputs)
                damp(part, b, begin, sums);
            else
                step(part, b, begin, sums);
        });
        for (int64_t b = 0; b < a.B; ++b) {
            if (a.status[b] != kRunning) continue;
            for (int block = 0; block < a.n_blocks; ++block)
                for (int which = 0; which < 2; ++which)
                    a.norm(block, which, b) = std::sqrt(total(b, block ? end_[block - 1] : 0, end_[block], which)) +
                                              a.doubt<A>(block, which, b);
        }
    }

   private:
    const JointArgs& a;
    int64_t end_[kInputBlock + 1] = {};  // chunks of a sample up to the end of each block
    int threads_;

    double* partial(int64_t b, int64_t chunk) const { return a.partials + 2 * (b * a.chunks + chunk); }
    double& factor(int64_t b, int which) const { return a.factors[2 * b + which]; }
    double total(int64_t b, int64_t chunk, int64_t end, int which) const {
        double sum = 0;
        for (; chunk < end; ++chunk) sum += partial(b, chunk)[which];
        return sum;
    }

    // use(part, sample, first number, chunk) for the chunks of every running sample from chunk `first` on.
    template <class Use>
    void over_chunks(int64_t first, Use&& use) const {
        const int64_t count = a.chunks - first;
#pragma omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)
        for (int64_t unit = 0; unit < a.B * count; ++unit) {
            const int64_t b = unit / count, chunk = first + unit % count;
            if (a.status[b] != kRunning) continue;
            int64_t rest = chunk;
            const JointPart* part = a.parts;
            for (; rest >= chunks_of(part->n); ++part) rest -= chunks_of(part->n);
            use(*part, b, rest * kChunk, chunk);
        }
    }

    // A factor of every running sample, from the norm over x whose squares over a chunk `squares` gives.
    template <class Use>
    void measure_inputs(Use&& squares, int which, double (*from_norm)(const JointArgs&, double)) const {
        const int64_t inputs = end_[kAdjointBlock];
        over_chunks(inputs, [&](const JointPart& part, int64_t b, int64_t begin, int64_t chunk) {
            partial(b, chunk)[0] = squares(part, b, begin);
        });
        for (int64_t b = 0; b < a.B; ++b)
            if (a.status[b] == kRunning) factor(b, which) = from_norm(a, std::sqrt(total(b, inputs, a.chunks, 0)));
    }

    // body(where in the row, where in the block, which lanes, f's numbers of the block) over a chunk, by registers.
    template <class Body>
    void over_numbers(const JointPart& part, int64_t b, int64_t begin, Body&& body) const {
        alignas(64) A buffer[kBlock];
        const int64_t end = std::min(begin + kChunk, part.n);
        for (int64_t n = begin; n < end; n += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, end - n);
            const A* value = read_source(part.value, b, n, count, buffer);
            for_registers<A>(count, [&](int64_t i, auto lanes) { body(n + i, load<A>(value + i, lanes), lanes); });
        }
    }
    const S* iterate(const JointPart& part, int64_t b) const { return static_cast<const S*>(part.v) + b * part.n; }
    S* mapped(const JointPart& part, int64_t b) const { return static_cast<S*>(part.mapped) + b * part.n; }
    template <class Lanes>
    V center(const JointPart& part, int64_t b, int64_t n, Lanes lanes) const {
        return part.center ? load<A>(static_cast<const A*>(part.center) + b * part.n + n, lanes) : V{};
    }
    InputStep<A> input_step(int64_t b) const {
        return a.needs_factors() ? InputStep<A>(a, factor(b, 0), factor(b, 1)) : InputStep<A>(a, a.step_size, 1);
    }

    double gradient(const JointPart& part, int64_t b, int64_t begin) const {
        Squares<A> size;
        over_numbers(part, b, begin, [&](int64_t, V q, auto) { size.add(q); });
        return size.total();
    }
    double distance(const JointPart& part, int64_t b, int64_t begin) const {
        const S* v = iterate(part, b);
        const InputStep<A> input = input_step(b);
        Squares<A> size;
        over_numbers(part, b, begin, [&](int64_t n, V q, auto lanes) {
            size.add(input.stepped(load<A>(v + n, lanes), q) - center(part, b, n, lanes));
        });
        return size.total();
    }

    void damp(const JointPart& part, int64_t b, int64_t begin, double* sums) const {
        const S* v = iterate(part, b);
        S* to = mapped(part, b);
        const A rate = A(a.damping[part.block]);
        const bool whole = rate == 1;
        Squares<A> moved, size;
        over_numbers(part, b, begin, [&](int64_t n, V f, auto lanes) {
            const V at = load<A>(v + n, lanes), g = f - at;
            store<A>(to + n, whole ? f : at + rate * g, lanes);
            moved.add(g);
            size.add(f);
        });
        sums[0] = moved.total();
        sums[1] = size.total();
    }
    void step(const JointPart& part, int64_t b, int64_t begin, double* sums) const {
        const S* v = iterate(part, b);
        S* to = mapped(part, b);
        const InputStep<A> input = input_step(b);
        Squares<A> moved, size;
        over_numbers(part, b, begin, [&](int64_t n, V q, auto lanes) {
            const V at = load<A>(v + n, lanes);
            const V t = only<A>(input.projected(input.stepped(at, q), center(part, b, n, lanes)), lanes);
            store<A>(to + n, t, lanes);
            moved.add(t - at);
            size.add(t);
        });
        sums[0] = moved.total();
        sums[1] = size.total();
    }
};

}  // namespace

void joint_map(const JointArgs& args) {
    with_type(args.dtype, [&](auto type) {
        using S = decltype(type);
        if constexpr (sizeof(S) > 1) {
            using A = std::conditional_t<sizeof(S) == 8, double, float>;
            JointMap<A, S>(args).run();
        }
    });
}

}  // namespace deqfast::cpu::DEQFAST_ISA
