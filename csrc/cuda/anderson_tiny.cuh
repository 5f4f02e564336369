// Anderson step of samples of up to kTinyN numbers, a thread a sample, one launch. What moves: x, f and the previous
// ones, every column once (tiles of 16 samples, so that half a warp reads neighbours), the new column and x' written:
// 5s + 2mh a number. The small matrices would be larger than the columns that they are made of: they are formed anew in
// shared memory, a block's threads interleaved, so that no two threads of a warp use one bank.
#pragma once

#include "anderson_sample.cuh"
#include "launch.cuh"

namespace deqfast::cuda {

template <class A>
constexpr int kTinyThreads = sizeof(A) == 8 ? 32 : 64;  // as many as their small matrices leave room for

template <class A, class S, class H>
class TinyStep {
   public:
    static __host__ __device__ int64_t bytes(const AndersonArgs& a) {
        return tiny_shared(a.m, a.N, kTinyThreads<A>, sizeof(A));
    }
    __device__ TinyStep(const Params<1>& params, int64_t sample, char* memory)
        : p(params),
          a(params.a),
          leaf(params.leaf[0]),
          b(sample),
          m(a.m),
          N(int(a.N)),
          type2(a.test_space == 0),
          d_f{reinterpret_cast<A*>(memory) + threadIdx.x, kTinyThreads<A>},
          d_g(d_f.from(m * N)),
          system(d_g.from(m * N)),
          y(system.from(m * m)),
          q(y.from(m)),
          w(q.from(m)),
          diagonal(w.from(m)),
          norms{static_cast<A*>(a.norms) + b / kTile * 2 * m * kTile + b % kTile, kTile},
          ages{a.ages + b / kTile * m * kTile + b % kTile, kTile} {}

    __device__ void run() {
        const bool started = a.template at<A>(kUnit, b) > 0;
        double ff = 0, gg = 0;
        each([&](int n) {
            f[n] = read_number<A, S>(leaf.f, f_row(a, b) * leaf.f.batch_stride, n);
            x[n] = Format<A, S>::read(row_of<S>(leaf.x, leaf, b)[n]);
            const double difference = double(f[n]) - double(x[n]);
            ff += double(f[n]) * double(f[n]);
            gg += difference * difference;
        });
        const int32_t outcome = judge<A>(a, p.work, b, ff, gg);
        spill_and_rest(outcome);
        if (!(outcome & kGoing)) return;
        unit = a.template at<A>(kUnit, b);
        each([&](int n) { g[n] = f[n] * unit - x[n] * unit; });
        const bool grew = outcome & kGrew && ((type2 && m > 0) || has_turned());
        if (grew) a.at(kGrowthRestarts, b)++;
        const bool adding = a.has_previous && started && !(outcome & kReset);
        const int slot = adding ? a.at(kSlot, b) : -1;
        int used = 0;  // columns beyond this are empty
        for (int j = 0; j < m; ++j) {
            if (j == slot)
                new_column(j);
            else
                old_column(j, !(outcome & kReset) && !grew);
            if (q[j] > 0) used = j + 1;
        }
        const bool mixes = a.at(kSteps, b) % a.mix_every == 0;
        choose_slot(used, mixes, !mixes || solve(used));
        mix(mixes ? used : 0);
    }

   private:
    const Params<1>& p;
    const AndersonArgs& a;
    const Leaf& leaf;
    const int64_t b;
    const int m, N;
    const bool type2;
    const Numbers<A> d_f, d_g;                   // shared: (m, N) each
    const Numbers<A> system, y, q, w, diagonal;  // (m, m), then (m) each
    const Numbers<A> norms;                      // global: (2, m)
    const Numbers<int32_t> ages;                 // (m)
    A f[kTinyN], x[kTinyN], g[kTinyN], unit;

    // Unrolled over the most numbers there can be, so that arrays of them stay in registers.
    template <class Body>
    __device__ __forceinline__ void each(Body&& body) const {
        DEQFAST_UNROLL
        for (int n = 0; n < kTinyN; ++n)
            if (n < N) body(n);
    }

    __device__ H* history(int which, int j) const {
        const int64_t tiles = (a.B + kTile - 1) / kTile;
        return static_cast<H*>(a.history) + ((which * tiles + b / kTile) * m + j) * N * kTile + b % kTile;
    }

    __device__ void spill_and_rest(int32_t outcome) const {
        S *now = row_of<S>(leaf.x, leaf, b), *before = row_of<S>(leaf.x_prev, leaf, b);
        S* saved = row_of<S>(leaf.saved, leaf, b);
        if (outcome & kSpill)
            for (int n = 0; n < N; ++n) saved[n] = before[n];
        if (outcome & kGoing) return;
        for (int n = 0; n < N; ++n) before[n] = now[n] = outcome & kUseSaved ? saved[n] : now[n];
    }

    __device__ void old_column(int j, bool keep) const {
        if (!keep) norms[j] = 0;
        const A kept = norms[j];
        q[j] = kept;
        w[j] = norms[m + j];
        const H *from_f = history(0, j), *from_g = history(1, j);
        for (int n = 0; n < N; ++n) {
            d_f[j * N + n] = kept > 0 ? Format<A, H>::read(from_f[n * kTile]) : A(0);
            d_g[j * N + n] = kept > 0 ? Format<A, H>::read(from_g[n * kTile]) : A(0);
        }
    }

    __device__ void new_column(int j) const {
        H *to_f = history(0, j), *to_g = history(1, j);
        A qq = 0, ww = 0, wv = 0;
        each([&](int n) {
            const A previous_f = read_number<A, S>(leaf.f_prev, f_prev_row(a, b) * leaf.f_prev.batch_stride, n);
            const A previous_x = Format<A, S>::read(row_of<S>(leaf.x_prev, leaf, b)[n]);
            const A change = f[n] * unit - previous_f * unit;
            to_f[n * kTile] = Format<A, H>::write(change);
            to_g[n * kTile] = Format<A, H>::write(change - (x[n] * unit - previous_x * unit));
            const A u = Format<A, H>::read(to_f[n * kTile]), v = Format<A, H>::read(to_g[n * kTile]);
            d_f[j * N + n] = u;
            d_g[j * N + n] = v;
            qq += v * v;
            const A t = type2 ? v : u - A(a.test_space) * v;
            ww += t * t;
            wv += t * v;
        });
        const bool turned = a.turn > 0 && turns<A>(A(a.turn), wv, qq);
        if (turned) ww += 4 * (wv + qq);
        const A new_q = sqrt(qq), new_w = sqrt(ww);
        const bool usable = new_q > 0 && new_w > 0 && isfinite(new_q) && isfinite(new_w);
        norms[j] = q[j] = usable ? new_q : A(0);
        norms[m + j] = w[j] = turned ? -new_w : new_w;
        ages[j] = a.at(kSteps, b);
    }

    // A number of W_j, for Type II of -W_j; of a turned column, whose w_j is negative, of -W_j too.
    __device__ __forceinline__ A test(int j, A u, A v) const {
        return type2 ? v : w[j] < 0 ? u : u - A(a.test_space) * v;
    }

    __device__ bool has_turned() const {
        for (int j = 0; a.turn > 0 && j < m; ++j)
            if (norms[j] > 0 && norms[m + j] < 0) return true;
        return false;
    }

    __device__ __forceinline__ A product(const A* u, const Numbers<A>& v) const {
        A sum = 0;
        each([&](int n) { sum += u[n] * v[n]; });
        return sum;
    }

    // dG^T dG, equilibrated, with the ridge: the lower triangle.
    __device__ void form_gram(int used) const {
        for (int i = 0; i < used; ++i) {
            A row[kTinyN] = {};
            each([&](int n) { row[n] = d_g[i * N + n]; });
            for (int j = 0; j <= i; ++j) {
                const bool valid = q[i] > 0 && q[j] > 0;
                const A entry = valid ? product(row, d_g.from(j * N)) / (q[i] * q[j]) : i == j ? A(1) : A(0);
                system[i * m + j] = i == j ? entry + A(a.ridge) : entry;
            }
        }
    }

    // Fills y; true if every number is finite and, of Type II, every pivot positive.
    __device__ bool solve(int used) const {
        for (int i = 0; i < used; ++i) {
            A row[kTinyN] = {};
            each([&](int n) { row[n] = test(i, d_f[i * N + n], d_g[i * N + n]); });
            A rhs = 0;
            each([&](int n) { rhs += row[n] * g[n]; });
            y[i] = !(q[i] > 0) ? A(0) : type2 ? rhs / q[i] : -rhs / w[i];
            for (int j = 0; j < used && !type2; ++j) {
                const bool valid = q[i] > 0 && q[j] > 0;
                const A entry = valid ? -product(row, d_g.from(j * N)) / (w[i] * q[j]) : A(0);
                system[i * m + j] = i != j ? entry : valid ? A(a.ridge) + entry : A(1);
            }
        }
        bool solved = true;
        if (type2) {
            form_gram(used);
            solved = factor_ldl<LoneTeam>(system, used, m);
            solve_ldl<LoneTeam>(system, y, used, m);
        } else {
            solve_lu<LoneTeam>(system, y, used, m);
        }
        for (int j = 0; j < used; ++j) solved = solved && isfinite(y[j]);
        return solved;
    }

    __device__ void choose_slot(int used, bool mixes, bool solved) const {
        int count = 0, next = m;
        for (int j = m - 1; j >= 0; --j) {
            if (!solved) norms[j] = q[j] = 0;
            if (q[j] > 0)
                ++count;
            else
                next = j;
        }
        const bool full = count == m;
        const int wanted = mixes ? a.mix_every : 1;  // columns for which the mix leaves room
        int evicted = 0;
        if (m - count < wanted) {
            score(used, mixes);
            if (full) {
                next = victim(-1);  // used until it is overwritten
                evicted = 1;
            }
            for (; m - count + full < wanted; --count, ++evicted) norms[victim(next)] = 0;
        }
        a.at(kSlot, b) = next;
        a.at(kCount, b) = count;
        a.at(kEvictions, b) += evicted;
        a.at(kSolveFallbacks, b) += !solved;
    }

    // How much each column is worth, into the diagonal: of a history that has to give some up.
    __device__ void score(int used, bool mixes) const {
        const bool by_use = mixes && a.evict == Evict::least_useful && m > 3;
        if (by_use) {
            if (!type2) {
                form_gram(used);
                factor_ldl<LoneTeam>(system, used, m);
            }
            inverse_diagonal<LoneTeam>(system, diagonal, used, m);
        }
        const int newest = a.at(kSteps, b) - newest_kept(m);
        for (int j = 0; j < m; ++j) {
            const bool kept = by_use && ages[j] > newest;
            diagonal[j] = kept ? A(INFINITY) : by_use ? y[j] * y[j] / diagonal[j] : A(ages[j]);
        }
    }

    // The column in use that is worth least, but for `not_this`.
    __device__ int victim(int not_this) const {
        A least = A(INFINITY);
        int chosen = 0;
        for (int j = 0; j < m; ++j)
            if (norms[j] > 0 && j != not_this && diagonal[j] < least) least = diagonal[j], chosen = j;
        return chosen;
    }

    __device__ void mix(int used) {
        const A beta = A(a.mixing);
        A out[kTinyN];
        each([&](int n) { out[n] = beta == 1 ? f[n] : x[n] + beta * (f[n] - x[n]); });
        for (int j = 0; j < used; ++j) {
            if (!(q[j] > 0)) continue;
            const A weight = y[j] / (q[j] * unit);
            each([&](int n) {
                out[n] -= weight * d_f[j * N + n];
                if (beta != 1) out[n] += (1 - beta) * weight * d_g[j * N + n];
            });
        }
        if (!write(out)) {
            write(f);
            a.at(kStepFallbacks, b)++;
            for (int j = 0; j < m; ++j) norms[j] = 0;
            a.at(kSlot, b) = a.at(kCount, b) = 0;
        }
        after_step(a, b);
    }

    __device__ bool write(const A* out) const {
        S* next = row_of<S>(leaf.x_prev, leaf, b);
        bool finite = true;
        each([&](int n) {
            next[n] = Format<A, S>::write(out[n]);
            finite = finite && isfinite(double(Format<A, S>::read(next[n])));
        });
        return finite;
    }
};

// One block a multiprocessor is enough to ask for: left to itself the compiler aims at more, and spills.
template <class A, class S, class H>
__global__ void __launch_bounds__(kTinyThreads<A>, 1) tiny_kernel(const __grid_constant__ Params<1> p) {
    DEQFAST_SHARED(memory);
    const int64_t b = int64_t(blockIdx.x) * kTinyThreads<A> + threadIdx.x;
    if (b < p.a.B && p.a.at(kStatus, b) == kRunning) TinyStep<A, S, H>(p, b, memory).run();
    finish(p.work, gridDim.x);
}

template <class A, class S, class H>
void run_tiny(const AndersonArgs& a, const DeviceWork& work, int phase) {
    if (a.N > kTinyN || a.n_leaves != 1 || a.m > kTinyN || phase != kStep)
        throw std::invalid_argument(
            "a workspace that keeps no small matrices takes whole steps of one tensor of at most " +
            std::to_string(kTinyN) + " numbers a sample");
    Params<1> p;
    p.a = a;
    p.work = work;
    p.phase = phase;
    p.leaf[0] = a.leaves[0];
    p.a.leaves = nullptr;
    const int64_t blocks = (a.B + kTinyThreads<A> - 1) / kTinyThreads<A>;
    launch(tiny_kernel<A, S, H>, dim3(unsigned(blocks)), kTinyThreads<A>, TinyStep<A, S, H>::bytes(a), work.stream, p);
}

}  // namespace deqfast::cuda
