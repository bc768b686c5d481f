// AdamW, the norm of the gradient and its scale, over flat buffers. Nothing here needs the host to wait: what one kernel
// finds out the next one reads from device memory.
#include "common.cuh"

// partial[block] = the sum of x^2 of what the block has read.
template <typename T> __global__ void sum_of_squares(const T* x, double* partial, long long n) {
    float sum[1] = {};
    over_flat<WIDE<T>>(n, in_packs<1>(0, x), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        const auto a = load<N>(x + i);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) squares += a[j] * a[j];
        sum[0] += squares;
    });
    block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}

// gradient *= *inverse, and *found becomes 1 where one of the numbers was infinite or NaN before.
template <typename T> __global__ void unscale(T* gradient, const float* inverse, int* found, long long n) {
    const float factor = *inverse;
    bool is_bad = false;
    over_flat<WIDE<T>>(n, in_packs<1>(0, gradient), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto a = load<N>(gradient + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            is_bad |= !(fabsf(a[j]) <= 3.402823466e38f);
            a.set(j, a[j] * factor);
        }
        store<N>(gradient + i, a);
    });
    if (is_bad) atomicOr(found, 1);
}

// One AdamW step (Loshchilov and Hutter 2019, arXiv:1711.05101) of n parameters in place, the first `decayed` of them
// with weight decay. hyper, in device memory: 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1^step),
// 1 / sqrt(1 - beta2^step), 1 - lr * weight_decay, what gradients are multiplied by. clip, unless null: the factor that
// clips gradients, and whether this step is left out (not 0).
// shadow, unless null, receives the parameters in type U, whether this step is left out or not.
template <typename U>
__global__ void adamw(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, U* shadow,
                      const float* hyper, const float* clip, long long n, long long decayed) {
    const bool left_out = clip && clip[1] != 0.0f;
    if (left_out && !shadow) return;
    const float rate1 = hyper[0], beta2 = hyper[1], rate2 = hyper[2], eps = hyper[3], step_size = hyper[4];
    const float correction = hyper[5], decay = hyper[6], factor = hyper[7] * (clip ? clip[0] : 1.0f);
    const bool packs = in_packs<1>(0, parameter, gradient, exp_avg, exp_avg_sq, shadow);
    over_flat<WIDE<float, U>>(n, packs, [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto p = load<N>(parameter + i);
        Pack<U, N> copy;
        if (left_out) {
#pragma unroll
            for (int j = 0; j < N; j++) copy.set(j, p[j]);
            store<N>(shadow + i, copy);
            return;
        }
        auto m = load<N>(exp_avg + i), v = load<N>(exp_avg_sq + i);
        const auto g = load<N>(gradient + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float d = g[j] * factor;
            m.value[j] += (d - m[j]) * rate1;
            v.value[j] = v[j] * beta2 + d * d * rate2;
            const float kept = i + j < decayed ? p[j] * decay : p[j];
            p.value[j] = kept - step_size * m[j] / (sqrtf(v[j]) * correction + eps);
            copy.set(j, p[j]);
        }
        store<N>(parameter + i, p);
        store<N>(exp_avg + i, m);
        store<N>(exp_avg_sq + i, v);
        if (shadow) store<N>(shadow + i, copy);
    });
}
