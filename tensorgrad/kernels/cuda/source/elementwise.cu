// One pass over flat arrays of n elements: dropout, and whether ids are in range.
#include "common.cuh"

// y = x * scale where the hash keeps the element, else 0. y may be x. The gradient is the same map.
template <typename T>
__global__ void dropout(const T* x, T* y, long long n, unsigned int multiplier, unsigned int offset,
                        unsigned int threshold, float scale) {
    over_flat<WIDE<T>>(n, in_packs<1>(0, x, y), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto a = load<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            a.set(j, is_kept((unsigned int)i + j, multiplier, offset, threshold) ? a[j] * scale : 0.0f);
        store<N>(y + i, a);
    });
}

// *worst becomes the largest of itself and the numbers outside low <= index < high, `ignore` left aside.
__global__ void note_outside(const long long* index, long long* worst, long long n, long long low, long long high,
                             long long ignore) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)
        if ((index[i] < low || index[i] >= high) && index[i] != ignore) atomicMax(worst, index[i]);
}
