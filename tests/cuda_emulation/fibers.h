// The threads of a block as fibers in one thread. A fiber runs until it has to wait, then hands over to the next one;
// a barrier at which everybody waits in vain is found after two idle rounds.
#pragma once
#ifndef __x86_64__
#include <ucontext.h>
#endif

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
#ifdef __x86_64__
struct Context { void* stack_pointer; };
extern "C" void emulation_switch(Context* from, Context* to);
asm(R"(
    .weak emulation_switch
    .type emulation_switch, @function
emulation_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov (%rsi), %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size) - 1;  // entry begins 8 bytes off a multiple of 16
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;  // six registers to pop, of any value
}
#else
using Context = ucontext_t;
inline void emulation_switch(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

struct Group { unsigned members = 0, arrived = 0, generation = 0; };  // of a barrier
struct Warp : Group { unsigned slot[2][32]; };
struct Fiber {
    Context context;
    dim3 index;
    unsigned turn = 0;  // which of the warp's two rows of slots comes next
    bool done = false;
};
constexpr size_t STACK = 64 * 1024;
struct State {
    std::vector<Fiber> fibers;
    std::vector<char> stacks;
    std::vector<Warp> warps;
    Group block;
    Context main;
    unsigned current, running, idle;
    std::function<void()> body;
    std::string fault;
};
inline State state;

inline void enter(unsigned number) {
    Context& from = state.fibers[state.current].context;
    state.current = number;
    threadIdx = state.fibers[number].index;
    emulation_switch(&from, &state.fibers[number].context);
}
inline void next() {
    unsigned number = state.current;
    do number = number + 1 == state.fibers.size() ? 0 : number + 1;
    while (state.fibers[number].done && number != state.current);
    if (number != state.current) enter(number);
}
inline void fail(const std::string& message) {
    const dim3 t = threadIdx, b = blockIdx;
    state.fault = message + " (block " + std::to_string(b.x) + "," + std::to_string(b.y) + ", thread " +
                  std::to_string(t.x) + "," + std::to_string(t.y) + ")";
    emulation_switch(&state.fibers[state.current].context, &state.main);
    std::abort();
}
inline void release(Group& group) {
    group.arrived = 0;
    group.generation++;
    state.idle = 0;
}
inline void wait(Group& group) {
    const unsigned generation = group.generation;
    if (++group.arrived == group.members) return release(group);
    while (group.generation == generation) {
        if (++state.idle > 2 * state.fibers.size()) fail("deadlock: a barrier that not all threads reach");
        next();
    }
}
inline void leave(Group& group) {
    if (--group.members && group.arrived == group.members) release(group);
}

inline int lane() { return state.current % 32; }
inline void sync_block() { wait(state.block); }
inline unsigned exchange(unsigned bits, int source) {
    Fiber& self = state.fibers[state.current];
    Warp& warp = state.warps[state.current / 32];
    unsigned* slot = warp.slot[self.turn ^= 1];  // the row before may still be read by slower lanes
    slot[lane()] = bits;
    wait(warp);
    return slot[source];
}

inline void fiber_main() {
    state.body();
    state.idle = 0;
    state.fibers[state.current].done = true;
    leave(state.warps[state.current / 32]);
    leave(state.block);
    if (--state.running) next();
    emulation_switch(&state.fibers[state.current].context, &state.main);
}

inline std::string run_blocks(std::function<void()> body, dim3 grid, dim3 block, std::function<void()> before_block) {
    const unsigned count = block.x * block.y * block.z;
    gridDim = grid, blockDim = block;
    state.body = std::move(body);
    state.fault.clear();
    if (state.stacks.size() < count * STACK) state.stacks.resize(count * STACK);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                before_block();
                blockIdx = {x, y, z};
                state.fibers.assign(count, {});
                state.warps.assign(count / 32, {});
                for (Warp& warp : state.warps) warp.members = 32;
                state.block = {count};
                state.running = count, state.idle = 0, state.current = 0;
                for (unsigned i = 0; i < count; i++) {
                    state.fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
                    prepare(state.fibers[i].context, state.stacks.data() + i * STACK, STACK, fiber_main);
                }
                threadIdx = state.fibers[0].index;
                emulation_switch(&state.main, &state.fibers[0].context);
                if (!state.fault.empty()) return state.fault;
            }
    return "";
}
}  // namespace emulation
