// The threads of a block as fibers in one thread. A fiber runs until it has to wait, then hands over to the next one;
// a barrier at which everybody waits in vain is found after two idle rounds.
#pragma once
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
#ifdef __x86_64__
struct Context { void* stack_pointer; };
extern "C" void emulation_switch(Context* from, Context* to);
asm(R"(
    .pushsection .text
    .weak emulation_switch
    .type emulation_switch, @function
emulation_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov (%rsi), %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .popsection
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

// ---- what the sanitizers have to know --------------------------------------------------------------------------------

// Under the thread sanitizer a fiber is a thread of its own: it is ordered with others by barriers only, whatever the
// turns it took. (A shuffle is no memory barrier, neither here nor on a GPU.) The scheduler itself is not looked at.
#ifdef __SANITIZE_THREAD__
#define UNSEEN __attribute__((no_sanitize_thread, noinline))
inline void* new_identity() { return __tsan_create_fiber(0); }
UNSEEN inline void take_identity(void* identity) { __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync); }
UNSEEN inline void release_to(void* sync) { __tsan_release(sync); }
UNSEEN inline void acquire_from(void* sync) { __tsan_acquire(sync); }
inline void* main_identity() { return __tsan_get_current_fiber(); }
#else
#define UNSEEN
inline void* new_identity() { return nullptr; }
inline void take_identity(void*) {}
inline void release_to(void*) {}
inline void acquire_from(void*) {}
inline void* main_identity() { return nullptr; }
#endif

// ---- scheduler -------------------------------------------------------------------------------------------------------

struct Group {  // of a barrier
    unsigned members = 0, arrived = 0, generation = 0;
    char sync[2];  // for odd and even generations: who is early for the next one must not order this one
};
struct Warp : Group { unsigned slot[2][32]; };
struct Fiber {
    Context context;
    dim3 index;
    unsigned turn;  // which of the warp's two rows of slots comes next
    bool done;
    void* identity = nullptr;
};
constexpr size_t STACK = 64 * 1024;
constexpr unsigned MOST = 1024;  // threads of a block
struct State {
    Fiber fibers[MOST];
    Warp warps[MOST / 32];
    Group block;
    Context main;
    char* stacks = new char[MOST * STACK];
    void* identity;
    unsigned count, current, running, idle;
    std::function<void()> body;
    const char* fault;
    char before, after;  // a block's threads come after what was before it, and before what is after
};
inline State& state = *new State;

UNSEEN inline void enter(unsigned number) {
    Context& from = state.fibers[state.current].context;
    state.current = number;
    threadIdx = state.fibers[number].index;
    take_identity(state.fibers[number].identity);
    emulation_switch(&from, &state.fibers[number].context);
}
UNSEEN inline void leave_to_main() {
    take_identity(state.identity);
    emulation_switch(&state.fibers[state.current].context, &state.main);
}
UNSEEN inline void next() {
    unsigned number = state.current;
    do number = number + 1 == state.count ? 0 : number + 1;
    while (state.fibers[number].done && number != state.current);
    if (number != state.current) enter(number);
}
UNSEEN inline void fail(const char* message) {
    state.fault = message;
    leave_to_main();
    std::abort();
}
UNSEEN inline void release(Group& group) {
    group.arrived = 0;
    group.generation++;
    state.idle = 0;
}
UNSEEN inline void wait(Group& group, bool orders_memory) {
    const unsigned generation = group.generation;
    char* sync = &group.sync[generation % 2];
    if (orders_memory) release_to(sync);
    if (++group.arrived == group.members) release(group);
    while (group.generation == generation) {
        if (++state.idle > 2 * state.count) fail("deadlock: a barrier that not all threads reach");
        next();
    }
    if (orders_memory) acquire_from(sync);
}
UNSEEN inline void leave(Group& group) {
    if (--group.members && group.arrived == group.members) release(group);
}

UNSEEN inline int lane() { return state.current % 32; }
UNSEEN inline void sync_block() { wait(state.block, true); }
UNSEEN inline void sync_warp() { wait(state.warps[state.current / 32], true); }
UNSEEN inline unsigned exchange(unsigned bits, int source) {
    Fiber& self = state.fibers[state.current];
    Warp& warp = state.warps[state.current / 32];
    unsigned* slot = warp.slot[self.turn ^= 1];  // the row before may still be read by slower lanes
    slot[lane()] = bits;
    wait(warp, false);
    return slot[source];
}

UNSEEN inline void fiber_main() {
    acquire_from(&state.before);
    state.body();
    release_to(&state.after);
    state.idle = 0;
    state.fibers[state.current].done = true;
    leave(state.warps[state.current / 32]);
    leave(state.block);
    if (--state.running) next();
    leave_to_main();
}

// Runs `body` for all threads of all blocks, `before_block` before each block. The message of a fault, or null.
UNSEEN inline const char* run_blocks(std::function<void()> body, dim3 grid, dim3 block,
                                     std::function<void()> before_block) {
    state.count = block.x * block.y * block.z;
    state.identity = main_identity();
    state.body = std::move(body);
    state.fault = nullptr;
    gridDim = grid, blockDim = block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                before_block();
                blockIdx = {x, y, z};
                for (unsigned i = 0; i < state.count / 32; i++) state.warps[i].members = 32, state.warps[i].arrived = 0;
                state.block.members = state.running = state.count, state.block.arrived = 0;
                state.idle = 0, state.current = 0;
#ifdef __SANITIZE_ADDRESS__
                __asan_unpoison_memory_region(state.stacks, state.count * STACK);  // of frames that were never left
#endif
                for (unsigned i = 0; i < state.count; i++) {
                    Fiber& fiber = state.fibers[i];
                    fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
                    fiber.turn = 0, fiber.done = false;
                    if (!fiber.identity) fiber.identity = new_identity();
                    prepare(fiber.context, state.stacks + i * STACK, STACK, fiber_main);
                }
                threadIdx = state.fibers[0].index;
                release_to(&state.before);
                take_identity(state.fibers[0].identity);
                emulation_switch(&state.main, &state.fibers[0].context);
                acquire_from(&state.after);
                if (state.fault) return state.fault;
            }
    return nullptr;
}
}  // namespace emulation
