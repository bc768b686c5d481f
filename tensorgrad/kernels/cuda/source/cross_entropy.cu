// Cross-entropy of logits (rows, stride), of which the first `classes` columns count: -log softmax(logits)[target] per
// row, 0 where the target is ignore_index or no class. The gradient may replace the logits; it is 0 in the columns of
// padding. One row per block.
#include "common.cuh"
#include "row.cuh"

__device__ inline bool is_counted(long long target, int classes, long long ignore_index) {
    return target != ignore_index && target >= 0 && target < classes;
}

template <int N, typename T>
__device__ inline void forward_row(const T* logits, const long long* targets, float* loss, float* lse, int classes,
                                   int stride, long long ignore_index) {
    const long long row = blockIdx.x, target = targets[row];
    const T* const at = logits + row * stride;
    Row<N, T> logit;
    logit.read(at, classes);
    if (threadIdx.x) return;
    const float rest = logf(logit.sum);
    loss[row] = is_counted(target, classes, ignore_index) ? (logit.top - to_float(at[target])) + rest : 0.0f;
    lse[2 * row] = logit.top;
    lse[2 * row + 1] = rest;
}

// Loss per row and the two parts of log-sum-exp per row (rows, 2), as kernels/reference.py has them.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_forward(const T* logits, const long long* targets, float* loss, float* lse, long long rows,
                          int classes, int stride, long long ignore_index) {
    if (in_packs<WIDE<T>>(stride, logits))
        forward_row<WIDE<T>>(logits, targets, loss, lse, classes, stride, ignore_index);
    else
        forward_row<1>(logits, targets, loss, lse, classes, stride, ignore_index);
}

template <int N, typename T>
__device__ inline void backward_row(const T* logits, const long long* targets, const float* lse, const float* g,
                                    T* gradient, int classes, int stride, int g_stride, long long ignore_index) {
    const long long row = blockIdx.x, at = row * stride, target = targets[row];
    const float top = lse[2 * row], rest = lse[2 * row + 1];
    const float d = is_counted(target, classes, ignore_index) ? g[row * g_stride] : 0.0f;
    for (int c = threadIdx.x * N; c < stride; c += blockDim.x * N) {
        Pack<T, N> pack{};
        if (d != 0.0f && c < classes) pack = load<N>(logits + at + c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool counts = d != 0.0f && c + i < classes;
            pack.set(i, counts ? (expf(pack[i] - top - rest) - (c + i == target)) * d : 0.0f);
        }
        store<N>(gradient + at + c, pack);
    }
}

// (softmax - one_hot) * g, 0 in the whole row where g is 0; g has one number per row, or one for all (g_stride 0).
// gradient may be logits.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_backward(const T* logits, const long long* targets, const float* lse, const float* g, T* gradient,
                           long long rows, int classes, int stride, int g_stride, long long ignore_index) {
    if (in_packs<WIDE<T>>(stride, logits, gradient))
        backward_row<WIDE<T>>(logits, targets, lse, g, gradient, classes, stride, g_stride, ignore_index);
    else
        backward_row<1>(logits, targets, lse, g, gradient, classes, stride, g_stride, ignore_index);
}
