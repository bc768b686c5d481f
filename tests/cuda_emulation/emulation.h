// CUDA C++ on a CPU: with this header included first, g++ compiles the kernels' source as it is, and `launch` runs it.
//
// One block runs after another, the threads of a block as fibers that take turns in one thread of the operating system:
// thousands of times cheaper than threads, and always the same. A fault (misaligned pack, barrier that not all reach)
// ends the launch with a message instead of the process. The sanitizers see fibers as threads.
// Missing: everything that the kernels do not use. Not checked: speed, memory limits, denormals (CuPy flushes them).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#ifdef EMULATE_NO_BARRIER  // the planted race of the tests
#define __syncthreads() ((void)0)
#else
#define __syncthreads() emulation::sync_block()
#endif
#define __shared__ static  // blocks run one after another: one copy is enough
#define DYNAMIC_SHARED(name) float* name = emulation::dynamic_shared
#define CHECK_ALIGNED(pointer, bytes) emulation::check_aligned(pointer, bytes)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace emulation {
inline float* dynamic_shared;
[[noreturn]] void fail(const char* message);
inline void check_aligned(const void* pointer, int bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("misaligned access: a pack does not start on 16 bytes");
}
}  // namespace emulation

#include "fibers.h"

// ---- warp functions, through lane() and exchange(value of this lane, lane to read) ------------------------

namespace emulation {
template <typename T> T shuffle(unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4);
    if (mask != 0xffffffffu) fail("only full warps can shuffle here");
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    bits = exchange(bits, source < 0 || source > 31 ? lane() : source);
    std::memcpy(&value, &bits, 4);
    return value;
}
}  // namespace emulation
template <typename T> T __shfl_sync(unsigned mask, T x, int source) { return emulation::shuffle(mask, x, source); }
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int d) {
    return emulation::shuffle(mask, x, emulation::lane() ^ d);
}
template <typename T> T __shfl_down_sync(unsigned mask, T x, int d) {
    return emulation::shuffle(mask, x, emulation::lane() + d);
}
template <typename T> T __shfl_up_sync(unsigned mask, T x, int d) {
    return emulation::shuffle(mask, x, emulation::lane() - d);
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::sync_warp(); }

// ---- atomics and mathematics -----------------------------------------------------------------------------------------

inline int atomicOr(int* at, int x) { return __atomic_fetch_or(at, x, __ATOMIC_RELAXED); }
inline long long atomicMax(long long* at, long long x) {
    long long seen = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (seen < x && !__atomic_compare_exchange_n(at, &seen, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return seen;
}
inline float atomicAdd(float* at, float x) {
    auto* word = reinterpret_cast<unsigned*>(at);
    unsigned seen = __atomic_load_n(word, __ATOMIC_RELAXED), wanted;
    float old;
    do {
        std::memcpy(&old, &seen, 4);
        const float sum = old + x;
        std::memcpy(&wanted, &sum, 4);
    } while (!__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// ---- kernels by name -------------------------------------------------------------------------------------------------

namespace emulation {
using Call = std::function<void(void**)>;
inline std::map<std::string, Call>& kernels() {
    static std::map<std::string, Call> all;
    return all;
}
template <typename... A, size_t... I> Call unpacked(void (*kernel)(A...), std::index_sequence<I...>) {
    return [kernel](void** arguments) { kernel(*static_cast<A*>(arguments[I])...); };  // as cuLaunchKernel does
}
template <typename... A> int add_kernel(const char* name, void (*kernel)(A...)) {
    kernels()[name] = unpacked(kernel, std::index_sequence_for<A...>());
    return 0;
}

// Runs a kernel; the message of a fault, or null. `shared` is the size of dynamic shared memory in bytes: exactly that,
// so that the address sanitizer sees what goes beyond, and filled with NaN before each block.
inline const char* launch(const char* name, dim3 grid, dim3 block, size_t shared, void** arguments) {
    static std::string message;
    const auto kernel = kernels().find(name);
    const unsigned count = block.x * block.y * block.z;
    if (kernel == kernels().end()) message = std::string("no kernel ") + name;
    else if (!count || count % 32 || count > 1024) message = "a block needs 32 to 1024 threads, in whole warps";
    // a launch may have 48 KiB unless it asks for more, the kernel's own __shared__ arrays and the system's 1 KiB included
    else if (shared > 46 * 1024) message = "more than 46 KiB of dynamic shared memory";
    else {
        std::unique_ptr<char[]> memory(new char[shared]);
        dynamic_shared = reinterpret_cast<float*>(memory.get());
        const auto poison = [&] { if (shared) std::memset(memory.get(), 0xff, shared); };
        const char* fault = run_blocks([&] { kernel->second(arguments); }, grid, block, poison);
        message = fault ? fault : "";
    }
    return message.empty() ? nullptr : message.c_str();
}
}  // namespace emulation
