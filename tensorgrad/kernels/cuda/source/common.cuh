// What all kernels share: conversion to and from float32, 16-byte loads and stores, sums over a warp and over a block.
//
// Conventions. Arrays are contiguous unless a stride is given. T is the type of activations (float, __nv_bfloat16 or
// __half), everything is computed in float32. Parameters (weights and biases of norms, biases), their gradients, means
// and losses are float32 whatever T is. Blocks have a multiple of 32 threads, and a warp leaves a kernel as a whole.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef DYNAMIC_SHARED  // the emulation on a CPU has its own definitions of these two
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#define CHECK_ALIGNED(pointer, bytes)
#endif

constexpr unsigned int ALL_LANES = 0xffffffffu;

// ---- conversion ------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// ---- packs: N neighbouring elements, moved 16 bytes at a time --------------------------------------------------------

template <typename T, int N> struct alignas(N * sizeof(T) % 16 == 0 ? 16 : sizeof(T)) Pack {
    T value[N];
    __device__ float operator[](int i) const { return to_float(value[i]); }
    __device__ void set(int i, float x) { value[i] = from_float<T>(x); }
};

// How many elements a pack has where all that is loaded beside it is of type T or U: 16 bytes of the smaller one.
template <typename T, typename U = T> constexpr int WIDE = 16 / (sizeof(T) < sizeof(U) ? sizeof(T) : sizeof(U));

template <int N, typename T> __device__ inline Pack<T, N> load(const T* from) {
    Pack<T, N> pack;
    if constexpr (N * sizeof(T) % 16 == 0) {
        CHECK_ALIGNED(from, 16);
#pragma unroll
        for (int i = 0; i < int(N * sizeof(T) / 16); i++)
            reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) pack.value[i] = from[i];
    }
    return pack;
}

template <int N, typename T> __device__ inline void store(T* to, const Pack<T, N>& pack) {
    if constexpr (N * sizeof(T) % 16 == 0) {
        CHECK_ALIGNED(to, 16);
#pragma unroll
        for (int i = 0; i < int(N * sizeof(T) / 16); i++)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&pack)[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = pack.value[i];
    }
}

// Between two passes over the same packs: makes the compiler convert them to float32 again, instead of holding on to
// twice as many registers of converted values.
template <typename T, int N> __device__ inline void stay_packed(Pack<T, N>& pack) {
    if constexpr (sizeof(T) == 2 && N * sizeof(T) % 16 == 0)
#pragma unroll
        for (int i = 0; i < int(N * sizeof(T) / 4); i++) asm volatile("" : "+r"(reinterpret_cast<unsigned int*>(&pack)[i]));
}

// May rows of `width` elements at these addresses (null: absent) be moved in packs of N? Every kernel has a body for
// packs and one for single elements, and asks this.
template <int N, typename... P> __device__ inline bool in_packs(long long width, const P*... pointers) {
    return width % N == 0 && ((reinterpret_cast<unsigned long long>(pointers) % 16 == 0) && ...);
}

// Visits the packs of one row that belong to this thread: visit(column, k). The first KEPT packs have numbers of their
// own, known at compile time, so that an array indexed by k stays in registers; all others have k = KEPT.
template <int KEPT, typename F> __device__ inline void over_row(int width, int first, int step, F visit) {
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (first + k * step < width) visit(first + k * step, k);
    for (int column = first + KEPT * step; column < width; column += step) visit(column, KEPT);
}

template <int N> struct Count { static constexpr int value = N; };

// A grid-stride loop over n elements: visit(index of the first, Count<how many>) for every pack of this thread. The last
// few elements, and arrays that do not start on 16 bytes, go one by one.
template <int N, typename F> __device__ inline void over_flat(long long n, bool packs, F visit) {
    const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long threads = gridDim.x * (long long)blockDim.x;
    const long long packed = packs ? n / N * N : 0;
    for (long long i = thread * N; i < packed; i += threads * N) visit(i, Count<N>());
    for (long long i = packed + thread; i < n; i += threads) visit(i, Count<1>());
}

// ---- sums and maxima -------------------------------------------------------------------------------------------------

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Both leave the result in every thread, in the same order of additions whatever the timing.
template <int COUNT> __device__ inline void block_sum(float (&x)[COUNT]) {
    __shared__ float of_warp[COUNT][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = warp_sum(x[i]);
    __syncthreads();  // the sums before this one have been read
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < COUNT; i++) of_warp[i][warp] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = warp_sum(lane < warps ? of_warp[i][lane] : 0.0f);
}

__device__ inline float block_max(float x) {
    __shared__ float of_warp[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? of_warp[lane] : minus_infinity());
}

// ---- dropout ---------------------------------------------------------------------------------------------------------

// Is element `index` kept? The hash of kernels/reference.py: Wellons' lowbias32 behind the stream's multiplier and
// offset.
__device__ inline bool is_kept(unsigned int index, unsigned int multiplier, unsigned int offset,
                               unsigned int threshold) {
    unsigned int h = index * multiplier + offset;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return (h ^ (h >> 16)) >= threshold;
}
