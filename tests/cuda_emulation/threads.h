// The threads of a block as threads of the operating system: slow, but what the sanitizers understand.
#pragma once
#include <barrier>
#include <deque>
#include <optional>
#include <thread>

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {
struct Warp {
    std::barrier<> barrier{32};
    unsigned slot[2][32];
};
inline std::optional<std::barrier<>> block_barrier;
inline std::deque<Warp> warps;
inline thread_local unsigned number, turn;  // of this thread in its block; which row of slots comes next

inline void fail(const std::string& message) {
    std::fprintf(stderr, "emulation: %s\n", message.c_str());
    std::abort();
}
inline int lane() { return number % 32; }
inline void sync_block() { block_barrier->arrive_and_wait(); }
inline unsigned exchange(unsigned bits, int source) {
    Warp& warp = warps[number / 32];
    unsigned* slot = warp.slot[turn ^= 1];  // the row before may still be read by slower lanes
    slot[lane()] = bits;
    warp.barrier.arrive_and_wait();
    return slot[source];
}

inline std::string run_blocks(std::function<void()> body, dim3 grid, dim3 block, std::function<void()> before_block) {
    const unsigned count = block.x * block.y * block.z;
    gridDim = grid, blockDim = block;
    const auto renew = [&]() noexcept {  // runs in one thread while all others wait
        block_barrier.emplace(count);
        warps.clear();
        for (unsigned i = 0; i < count / 32; i++) warps.emplace_back();
        before_block();
    };
    std::barrier between(count, renew);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; i++)
        threads.emplace_back([&, i] {
            number = i;
            threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            for (unsigned z = 0; z < grid.z; z++)
                for (unsigned y = 0; y < grid.y; y++)
                    for (unsigned x = 0; x < grid.x; x++) {
                        between.arrive_and_wait();
                        blockIdx = {x, y, z};
                        turn = 0;
                        body();
                        warps[i / 32].barrier.arrive_and_drop();
                        block_barrier->arrive_and_drop();
                    }
        });
    for (auto& thread : threads) thread.join();
    return "";
}
}  // namespace emulation
