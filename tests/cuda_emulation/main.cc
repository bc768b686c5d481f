// Built as a library: launch kernels from Python. Built with -DREPLAY: a program that reads recorded launches from a
// file, runs them, and writes what the buffers then hold (formats: tests/cuda_emulator.py).
#include "emulation.h"

namespace planted {
#include "planted.cu"
int misaligned = emulation::add_kernel("planted_misaligned", &planted_misaligned);
int deadlock = emulation::add_kernel("planted_deadlock", &planted_deadlock);
}  // namespace planted

#ifndef REPLAY
extern "C" const char* emulation_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared,
                                        void** arguments) {
    return emulation::launch(name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, arguments);
}
#else
static FILE* in;
static uint64_t number() {
    uint64_t n;
    if (std::fread(&n, 8, 1, in) != 1) std::exit(3);
    return n;
}
static void bytes(void* to, size_t n) {
    if (n && std::fread(to, 1, n, in) != n) std::exit(3);
}

int main(int, char** names) {
    in = std::fopen(names[1], "rb");
    FILE* out = std::fopen(names[2], "wb");
    if (!in || !out) return 3;
    for (uint64_t launches = number(); launches; launches--) {
        std::string name(number(), ' ');
        bytes(name.data(), name.size());
        unsigned size[6];
        for (unsigned& n : size) n = number();
        const uint64_t shared = number();
        std::vector<std::pair<char*, size_t>> buffers(number());
        for (auto& [data, n] : buffers) {
            n = number();
            data = static_cast<char*>(std::malloc(n));  // exactly so much: the address sanitizer guards both ends
            bytes(data, n);
        }
        std::vector<uint64_t> values(number());
        std::vector<void*> arguments;
        for (uint64_t& value : values) {
            const uint64_t buffer = number();  // 0: the value itself, else buffer - 1 and an offset into it
            value = number();
            if (buffer) value += reinterpret_cast<uint64_t>(buffers[buffer - 1].first);
            arguments.push_back(&value);
        }
        const char* fault =
            emulation::launch(name.c_str(), {size[0], size[1], size[2]}, {size[3], size[4], size[5]}, shared, arguments.data());
        if (fault) {
            std::fprintf(stderr, "emulation: %s: %s\n", name.c_str(), fault);
            return 4;
        }
        for (auto& [data, n] : buffers) {
            std::fwrite(data, 1, n, out);
            std::free(data);
        }
    }
    return std::fclose(out) ? 3 : 0;
}
#endif
