// Devices, streams under capture, and the counts that a step leaves in host memory.
#include "runtime.h"

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "launch.cuh"
#include "verdict.cuh"
#include "waiting.h"

namespace deqfast::cuda {
namespace {

constexpr int64_t kTicketMask = 0x7fffffff;  // the bits of a ticket that an entry holds

struct Ring {
    volatile int64_t* entries = nullptr;
    int64_t ticket = 0;

    int64_t first_word(int64_t of) const { return entries[of % Counts::kEntries * 2]; }
    bool written(int64_t of) const { return first_word(of) >> 32 == (of & kTicketMask); }
};

__global__ void report_kernel(const __grid_constant__ DeviceWork work) {
    if (threadIdx.x == 0) tell_host(work);
}

std::mutex idle_lock;
// Rings of solves that have ended; the device may still be writing into some.
std::vector<Ring>& idle() {
    static auto* rings = new std::vector<Ring>;  // never destroyed: the driver may be gone before a static is
    return *rings;
}

#ifdef __CUDACC__
__global__ void nothing() {}

volatile int64_t* host_memory(size_t bytes) {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped), "pinned memory for the counts");
    return static_cast<volatile int64_t*>(memory);
}

// Throws where a step that has not been counted never will be.
void check_alive(const Ring& ring, int64_t ticket, void* stream) {
    const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(stream));
    if (state == cudaErrorNotReady) return;
    check(state, "a step failed");
    if (!ring.written(ticket)) throw std::runtime_error("deqfast: a step ended without counting its samples");
}
#else
volatile int64_t* host_memory(size_t bytes) { return static_cast<volatile int64_t*>(std::malloc(bytes)); }

void check_alive(const Ring&, int64_t, void*) { throw std::logic_error("an emulated step was not counted"); }
#endif

}  // namespace

#ifdef __CUDACC__
std::string why_not(int device) {
    int count = 0;
    const cudaError_t found = cudaGetDeviceCount(&count);
    if (found == cudaErrorInsufficientDriver) {
        int driver = 0, runtime = 0;
        (void)cudaDriverGetVersion(&driver);
        (void)cudaRuntimeGetVersion(&runtime);
        const auto text = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
        if (driver == 0) return "there is no NVIDIA driver";
        return "the NVIDIA driver serves CUDA " + text(driver) + ", the kernels were built with " + text(runtime) +
               "; update the driver, or build with an older toolkit";
    }
    if (found != cudaSuccess) return std::string("CUDA finds no device: ") + cudaGetErrorString(found);
    if (device < 0 || device >= count)
        return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count);
    int major = 0, minor = 0;
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    try {
        const OnDevice on(device);
        cudaFuncAttributes attributes;
        const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&nothing));
        if (code == cudaSuccess) return "";
        (void)cudaGetLastError();
        return "the module has no code for compute capability " + std::to_string(major) + "." + std::to_string(minor) +
               " (" + cudaGetErrorString(code) +
               "); build it with DEQFAST_CUDA_ARCHS=" + std::to_string(major * 10 + minor);
    } catch (const std::exception& error) {
        return error.what();
    }
}

bool capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "stream");
    return status != cudaStreamCaptureStatusNone;
}

OnDevice::OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "device");
    if (before_ != device_) check(cudaSetDevice(device_), "device");
}
OnDevice::~OnDevice() {
    if (before_ != device_) (void)cudaSetDevice(before_);
}
#else
std::string why_not(int) { return ""; }
bool capturing(void*) { return false; }
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() { (void)before_, (void)device_; }
#endif

void report(const DeviceWork& work) { launch(report_kernel, dim3(1), kWarpSize, 0, work.stream, work); }

Counts::Counts() {
    const std::lock_guard<std::mutex> guard(idle_lock);
    for (Ring& ring : idle()) {
        if (!ring.written(ring.ticket)) continue;  // an earlier step may still write there
        ring_ = ring.entries;
        ticket_ = ring.ticket;
        ring = idle().back();
        idle().pop_back();
        return;
    }
    ring_ = host_memory(kEntries * 2 * sizeof(int64_t));
    for (int i = 0; i < kEntries * 2; ++i) ring_[i] = 0;
}

Counts::~Counts() {
    const std::lock_guard<std::mutex> guard(idle_lock);
    idle().push_back({ring_, ticket_});
}

Counts::Entry Counts::read(int lag) const {
    const Ring ring{ring_, ticket_};
    const int64_t ticket = ticket_ - lag;
    wait_for([&] { return ring.written(ticket); }, [&] { check_alive(ring, ticket, streams_[ticket % kEntries]); });
    std::atomic_thread_fence(std::memory_order_acquire);
    return {ring.first_word(ticket) & 0xffffffff, ring_[ticket % kEntries * 2 + 1]};
}

}  // namespace deqfast::cuda
