// AdamW and the norm of the gradient, over flat buffers. Nothing here needs the host to wait: what one kernel finds out
// the next one reads from device memory.
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

// From `count` partial sums: clip[0] = the norm, times *scale unless null; clip[1] = min(1, max_norm / (norm + 1e-6));
// clip[2] = 1 where the norm is infinite or NaN and `may_skip` is set: this step must be skipped. One block.
__global__ void clip_factor(const double* partial, const float* scale, float* clip, int count, float max_norm,
                            int may_skip) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += 256) sum += partial[i];
    sums[threadIdx.x] = sum;
    for (unsigned int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x) return;
    const float norm = float(sqrt(sums[0])) * (scale ? *scale : 1.0f);
    const float factor = max_norm / (norm + 1e-6f);
    clip[0] = norm;
    clip[1] = factor > 1.0f ? 1.0f : factor;  // NaN stays NaN
    clip[2] = may_skip && !(norm <= 3.402823466e38f) ? 1.0f : 0.0f;
}

// One AdamW step (Loshchilov and Hutter 2019, arXiv:1711.05101) of n parameters in place, the first `decayed` of them
// with weight decay. hyper, in device memory: 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1^step),
// 1 / sqrt(1 - beta2^step), 1 - lr * weight_decay, what gradients are multiplied by. clip: of clip_factor, or null.
// shadow, unless null, receives the parameters in type U, whether this step is left out or not.
template <typename U>
__global__ void adamw(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, U* shadow,
                      const float* hyper, const float* clip, long long n, long long decayed) {
    const bool left_out = clip && clip[2] != 0.0f;
    if (left_out && !shadow) return;
    const float rate1 = hyper[0], beta2 = hyper[1], rate2 = hyper[2], eps = hyper[3], step_size = hyper[4];
    const float correction = hyper[5], decay = hyper[6], factor = hyper[7] * (clip ? clip[1] : 1.0f);
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
