// One pass over flat arrays of n elements: conversion, addition, dropout, filling.
#include "common.cuh"

// y = x in another type.
template <typename T, typename U> __global__ void cast(const T* x, U* y, long long n) {
    over_flat<WIDE<T, U>>(n, in_packs<1>(0, x, y), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        const auto a = load<N>(x + i);
        Pack<U, N> result;
#pragma unroll
        for (int j = 0; j < N; j++) result.set(j, a[j]);
        store<N>(y + i, result);
    });
}

// out = a + b; out may be a or b.
template <typename T, typename U> __global__ void add(const T* a, const U* b, T* out, long long n) {
    over_flat<WIDE<T, U>>(n, in_packs<1>(0, a, b, out), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto sum = load<N>(a + i);
        const auto other = load<N>(b + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum.set(j, sum[j] + other[j]);
        store<N>(out + i, sum);
    });
}

// y = x * scale where the hash keeps the element, else 0; element i has the number start + i. y may be x. The gradient
// is the same map.
template <typename T>
__global__ void dropout(const T* x, T* y, long long n, unsigned int multiplier, unsigned int offset,
                        unsigned int threshold, unsigned int start, float scale) {
    over_flat<WIDE<T>>(n, in_packs<1>(0, x, y), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto a = load<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            a.set(j, is_kept(start + (unsigned int)i + j, multiplier, offset, threshold) ? a[j] * scale : 0.0f);
        store<N>(y + i, a);
    });
}

// y = value.
template <typename T> __global__ void fill(T* y, long long n, float value) {
    over_flat<WIDE<T>>(n, in_packs<1>(0, y), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        Pack<T, N> result;
#pragma unroll
        for (int j = 0; j < N; j++) result.set(j, value);
        store<N>(y + i, result);
    });
}
