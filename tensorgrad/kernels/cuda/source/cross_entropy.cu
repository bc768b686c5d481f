// Cross-entropy of logits (rows, stride), of which the first `classes` columns count: -log softmax(logits)[target] per
// row, 0 where the target is ignore_index. The gradient may replace the logits; it is 0 in the columns of padding. One
// row per block; the gradient's pass finds most of the row in the caches, and its beginning in registers.
//
// A target that is no class is counted like an ignored one and sets bit 1 of *error.
#include "common.cuh"

constexpr unsigned int BAD_TARGET = 2;

// Is this row's target a class? Uniform over the block.
__device__ inline bool is_counted(long long target, int classes, long long ignore_index, unsigned int* error) {
    if (target == ignore_index) return false;
    if (target >= 0 && target < classes) return true;
    if (error && threadIdx.x == 0) atomicOr(error, BAD_TARGET);
    return false;
}

constexpr int KEPT = 4, THREADS = 512;

// Reads the row once, its beginning into `kept`: the largest logit, and log(sum(exp(logit - largest))).
template <int N, typename T> struct RowLse {
    Pack<T, N> kept[KEPT + 1];
    float top, rest;

    __device__ void read(const T* row, int classes) {
        float own = minus_infinity(), sum[1] = {};  // this thread's largest logit so far, and its sum
        over_row<KEPT>(classes, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
            kept[k] = load<N>(row + c);
            float larger = own;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (c + i < classes) larger = fmaxf(larger, kept[k][i]);
            if (larger == minus_infinity()) return;
            sum[0] *= expf(own - larger);
            own = larger;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (c + i < classes) sum[0] += expf(kept[k][i] - own);
        });
        top = block_max(own);
        if (own != minus_infinity()) sum[0] *= expf(own - top);
        block_sum(sum);
        rest = logf(sum[0]);
    }
};

// gradient[c] = (softmax - one_hot) * g, or 0 in the whole row where g is 0
template <int N, typename T>
__device__ inline void write_gradient(const T* row, T* gradient, long long target, Pack<T, N>* kept, bool is_read,
                                      float top, float rest, float g, int classes, int stride) {
    over_row<KEPT>(stride, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
        if (g != 0.0f && c < classes && (!is_read || k == KEPT)) kept[k] = load<N>(row + c);
        Pack<T, N> result;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool counts = g != 0.0f && c + i < classes;
            result.set(i, counts ? (expf(kept[k][i] - top - rest) - (c + i == target)) * g : 0.0f);
        }
        store<N>(gradient + c, result);
    });
}

template <int N, typename T>
__device__ inline void fused_row(T* logits, const long long* targets, float* loss, const float* scale,
                                 const float* factor, int classes, int stride, long long ignore_index,
                                 unsigned int* error) {
    const long long row = blockIdx.x, target = targets[row];
    T* const at = logits + row * stride;
    RowLse<N, T> lse;
    float g = 0.0f, picked = 0.0f;
    lse.top = lse.rest = 0.0f;
    if (is_counted(target, classes, ignore_index, error)) {
        picked = to_float(at[target]);  // all read it before the first barrier, and write behind the last
        lse.read(at, classes);
        g = *scale * (factor ? *factor : 1.0f);
    }
    if (threadIdx.x == 0) loss[row] = (lse.top - picked) + lse.rest;
    write_gradient<N>(at, at, target, lse.kept, true, lse.top, lse.rest, g, classes, stride);
}

// Forward and backward at once: loss per row, and logits become their gradient times *scale (1 / count of a mean) and
// *factor (of mixed precision, or null).
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy(T* logits, const long long* targets, float* loss, const float* scale, const float* factor,
                  unsigned int* error, long long rows, int classes, int stride, long long ignore_index) {
    if (in_packs<WIDE<T>>(stride, logits))
        fused_row<WIDE<T>>(logits, targets, loss, scale, factor, classes, stride, ignore_index, error);
    else
        fused_row<1>(logits, targets, loss, scale, factor, classes, stride, ignore_index, error);
}

template <int N, typename T>
__device__ inline void forward_row(const T* logits, const long long* targets, float* loss, float* lse_out, int classes,
                                   int stride, long long ignore_index, unsigned int* error) {
    const long long row = blockIdx.x, target = targets[row];
    const T* const at = logits + row * stride;
    RowLse<N, T> lse;
    lse.read(at, classes);
    const bool counted = is_counted(target, classes, ignore_index, error);
    if (threadIdx.x) return;
    loss[row] = counted ? (lse.top - to_float(at[target])) + lse.rest : 0.0f;
    lse_out[2 * row] = lse.top;
    lse_out[2 * row + 1] = lse.rest;
}

// Loss per row and the two parts of log-sum-exp per row (rows, 2), as kernels/reference.py has them.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_forward(const T* logits, const long long* targets, float* loss, float* lse, unsigned int* error,
                          long long rows, int classes, int stride, long long ignore_index) {
    if (in_packs<WIDE<T>>(stride, logits))
        forward_row<WIDE<T>>(logits, targets, loss, lse, classes, stride, ignore_index, error);
    else
        forward_row<1>(logits, targets, loss, lse, classes, stride, ignore_index, error);
}

template <int N, typename T>
__device__ inline void backward_row(const T* logits, const long long* targets, const float* lse, const float* g,
                                    T* gradient, int classes, int stride, int g_stride, long long ignore_index) {
    const long long row = blockIdx.x, target = targets[row];
    const float d = is_counted(target, classes, ignore_index, nullptr) ? g[row * g_stride] : 0.0f;
    Pack<T, N> kept[KEPT + 1];
    write_gradient<N>(logits + row * stride, gradient + row * stride, target, kept, false, lse[2 * row],
                      lse[2 * row + 1], d, classes, stride);
}

// (softmax - one_hot) * g; g has one number per row, or one for all (g_stride 0). gradient may be logits.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_backward(const T* logits, const long long* targets, const float* lse, const float* g, T* gradient,
                           long long rows, int classes, int stride, int g_stride, long long ignore_index) {
    if (in_packs<WIDE<T>>(stride, logits, gradient))
        backward_row<WIDE<T>>(logits, targets, lse, g, gradient, classes, stride, g_stride, ignore_index);
    else
        backward_row<1>(logits, targets, lse, g, gradient, classes, stride, g_stride, ignore_index);
}

// count[0] = how many targets are classes, count[1] = 1 / count[0]; one block.
__global__ void count_targets(const long long* targets, float* count, long long rows, int classes,
                              long long ignore_index) {
    float sum[1] = {};
    for (long long row = threadIdx.x; row < rows; row += blockDim.x)
        sum[0] += is_counted(targets[row], classes, ignore_index, nullptr);
    block_sum(sum);
    if (threadIdx.x) return;
    count[0] = sum[0];
    count[1] = 1.0f / sum[0];
}

// mean[0] = the sum of loss / count[0], in a fixed order; one block. Nothing counted: 0 / 0.
__global__ void mean_loss(const float* loss, const float* count, float* mean, long long rows) {
    float sum[1] = {};
    for (long long row = threadIdx.x; row < rows; row += blockDim.x) sum[0] += loss[row];
    block_sum(sum);
    if (threadIdx.x == 0) *mean = sum[0] / count[0];
}
