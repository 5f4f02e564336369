// CUDA on one CPU thread, to run kernels where there is no GPU: a block's threads are fibers that take turns at
// barriers, blocks run one after another. Shuffles, votes, atomics and shared memory behave as on a device; time does
// not. The order in which fibers resume is shuffled from a seed, so that a missing barrier gives different results from
// run to run; a barrier that some thread never reaches is an error, not a hang.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using std::isfinite;
using std::max;
using std::min;

namespace emulate {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Barrier {
    int arrived = 0, members = 0;
    uint64_t generation = 0;
    int any = 0, result = 0;
};

struct Fiber {
    ucontext_t context;  // to start it; after that jumps are faster, they make no system call
    jmp_buf place;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = true;
    Barrier* blocked = nullptr;
    uint64_t until = 0;
};

class Block {
   public:
    dim3 thread, block, size, grid;
    char* shared = nullptr;

    void run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& body) {
        static std::mutex one_at_a_time;  // of the threads that launch
        const std::lock_guard<std::mutex> guard(one_at_a_time);
        grid = grid_size;
        size = block_size;
        const int threads = int(size.x * size.y * size.z);
        if (threads % kWarp) throw std::runtime_error("emulated blocks are whole warps");
        while (fibers_.size() < size_t(threads)) fibers_.emplace_back(new Fiber);
        memory_.resize(shared_bytes / 8 + 2);
        shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16);
        body_ = &body;
        for (block.z = 0; block.z < grid.z; ++block.z)
            for (block.y = 0; block.y < grid.y; ++block.y)
                for (block.x = 0; block.x < grid.x; ++block.x) {
                    std::memset(memory_.data(), 0xff, memory_.size() * 8);  // NaN: what nobody wrote
                    run_block(threads);
                }
    }

    // Waits for all live members; returns the OR of what they brought.
    int wait(Barrier& b, int value = 0) {
        b.any |= value;
        if (++b.arrived == b.members) {
            release(b);
            return b.result;
        }
        Fiber& self = *fibers_[size_t(current_)];
        self.blocked = &b;
        self.until = b.generation;
        yield();
        return b.result;
    }
    Barrier& all() { return all_; }
    Barrier& warp() { return warps_[size_t(rank() / kWarp)]; }
    int rank() const { return current_; }

    // What lane `from` of the caller's warp brought.
    template <class T>
    T exchange(T value, int from) {
        static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
        const int first = current_ / kWarp * kWarp;
        std::memcpy(&slots_[size_t(current_)], &value, sizeof(T));
        wait(warp());
        T result;
        std::memcpy(&result, &slots_[size_t(first + from)], sizeof(T));
        wait(warp());
        return result;
    }

    // What the lanes of the caller's warp brought, combined: the same for all.
    template <class Combine>
    unsigned combine(unsigned value, Combine&& together) {
        const int first = current_ / kWarp * kWarp;
        slots_[size_t(current_)] = value;
        wait(warp());
        unsigned result = unsigned(slots_[size_t(first)]);
        for (int lane = 1; lane < kWarp; ++lane) result = together(result, unsigned(slots_[size_t(first + lane)]));
        wait(warp());
        return result;
    }

   private:
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<uint64_t> memory_;
    std::vector<Barrier> warps_;
    std::vector<uint64_t> slots_;
    Barrier all_;
    ucontext_t start_;
    jmp_buf home_;
    const std::function<void()>* body_ = nullptr;
    int current_ = 0;
    uint64_t random_ = 0x9e3779b97f4a7c15;

    uint64_t next_random() {
        random_ ^= random_ << 13;
        random_ ^= random_ >> 7;
        return random_ ^= random_ << 17;
    }

    static void release(Barrier& b) {
        b.arrived = 0;
        b.result = b.any;
        b.any = 0;
        ++b.generation;
    }
    void leave(Barrier& b) {
        if (--b.members > 0 && b.arrived == b.members) release(b);
    }
    void yield() {
        if (_setjmp(fibers_[size_t(current_)]->place) == 0) _longjmp(home_, 1);
    }
    void resume(Fiber& fiber) {
        if (_setjmp(home_) != 0) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        swapcontext(&start_, &fiber.context);
    }

    static void enter(unsigned high, unsigned low) {
        auto* block = reinterpret_cast<Block*>(uintptr_t(high) << 32 | low);
        const int rank = block->current_;
        (*block->body_)();
        block->fibers_[size_t(rank)]->done = true;
        block->leave(block->warps_[size_t(rank / kWarp)]);
        block->leave(block->all_);
        block->yield();
    }

    void run_block(int threads) {
        all_ = Barrier{};
        all_.members = threads;
        warps_.assign(size_t(threads / kWarp), Barrier{});
        slots_.assign(size_t(threads), 0);
        for (Barrier& b : warps_) b.members = kWarp;
        const auto self = reinterpret_cast<uintptr_t>(this);
        std::vector<int> order;
        for (int t = 0; t < threads; ++t) {
            Fiber& fiber = *fibers_[size_t(t)];
            fiber.done = false;
            fiber.blocked = nullptr;
            fiber.started = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(self >> 32),
                        unsigned(self));
            order.push_back(t);
        }
        while (!order.empty()) {
            for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
            bool moved = false;
            for (int t : order) {
                Fiber& fiber = *fibers_[size_t(t)];
                if (fiber.blocked && fiber.blocked->generation == fiber.until) continue;
                fiber.blocked = nullptr;
                current_ = t;
                thread = dim3(unsigned(t) % size.x, unsigned(t) / size.x % size.y, unsigned(t) / (size.x * size.y));
                moved = true;
                resume(fiber);
            }
            if (!moved) throw std::runtime_error("some threads wait at a barrier that others never reach");
            order.erase(std::remove_if(order.begin(), order.end(), [&](int t) { return fibers_[size_t(t)]->done; }),
                        order.end());
        }
    }
};

// What a device would say to a launch with so much dynamic shared memory, after its kernel `asked` for so much, 0: for
// none. A kernel has variables in shared memory too; here each is taken to have a kilobyte of them.
inline void admit(int64_t dynamic, int64_t asked) {
    constexpr int64_t variables = 1 << 10, without_asking = 48 << 10, at_most = 99 << 10;
    if (asked + variables > at_most) throw std::runtime_error("more shared memory asked for than a block may have");
    if (dynamic > (asked ? asked : without_asking - variables))
        throw std::runtime_error("more shared memory than a kernel has that asked for none, or for less");
}

inline Block& block() {
    static Block one;
    return one;
}

}  // namespace emulate

#define threadIdx (emulate::block().thread)
#define blockIdx (emulate::block().block)
#define blockDim (emulate::block().size)
#define gridDim (emulate::block().grid)

inline void __syncthreads() { emulate::block().wait(emulate::block().all()); }
inline int __syncthreads_or(int value) { return emulate::block().wait(emulate::block().all(), value != 0); }
inline void __syncwarp(unsigned = ~0u) { emulate::block().wait(emulate::block().warp()); }
inline void __threadfence() {}
inline void __threadfence_system() {}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulate::block().exchange(value, (emulate::block().rank() % emulate::kWarp) ^ mask);
}
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return emulate::block().exchange(value, lane);
}
inline int __any_sync(unsigned, int value) { return emulate::block().wait(emulate::block().warp(), value != 0); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    return emulate::block().combine(value, [](unsigned u, unsigned v) { return max(u, v); });
}
inline unsigned __ballot_sync(unsigned, int flag) {
    const unsigned mine = flag ? 1u << (emulate::block().rank() % emulate::kWarp) : 0u;
    return emulate::block().combine(mine, [](unsigned u, unsigned v) { return u | v; });
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
template <class T>
inline T atomicAdd(T* target, T value) {
    const T old = *target;
    *target = old + value;
    return old;
}
inline int atomicOr(int* target, int value) {
    const int old = *target;
    *target |= value;
    return old;
}
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}
template <class T>
inline void __stcg(T* p, T value) {
    *p = value;
}
