// LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of the sum of
// the residual stream and a branch.
#include "common.cuh"

// ---- forward: one row per warp, read once, kept in registers up to a width of 1024 -----------------------------------

template <bool CENTRED, int N, typename T>
__device__ inline void norm_rows(const T* x, const T* branch, const float* weight, const float* bias, T* total, T* y,
                                 float* mean, float* rstd, long long rows, int width, float eps) {
    constexpr int KEPT = N == 1 ? 8 : 128 / (N * sizeof(T));  // 32 registers
    const int lane = threadIdx.x % 32;
    const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long at = row * width;
    const T* memory = branch ? total : x;  // where the row can be read again
    Pack<T, N> kept[KEPT + 1];

    float sum = 0.0f;
    over_row<KEPT>(width, lane * N, 32 * N, [&](int c, int k) {
        kept[k] = load<N>(x + at + c);
        if (branch) {
            const auto other = load<N>(branch + at + c);
#pragma unroll
            for (int i = 0; i < N; i++) kept[k].set(i, kept[k][i] + other[i]);
            store<N>(total + at + c, kept[k]);
        }
#pragma unroll
        for (int i = 0; i < N; i++) sum += kept[k][i];
    });
    const float centre = CENTRED ? warp_sum(sum) / width : 0.0f;
    float squares = 0.0f;
    over_row<KEPT>(width, lane * N, 32 * N, [&](int c, int k) {
        if (k == KEPT) kept[k] = load<N>(memory + at + c);
        stay_packed(kept[k]);
#pragma unroll
        for (int i = 0; i < N; i++) squares += (kept[k][i] - centre) * (kept[k][i] - centre);
    });
    const float factor = rsqrtf(warp_sum(squares) / width + eps);
    over_row<KEPT>(width, lane * N, 32 * N, [&](int c, int k) {
        if (k == KEPT) kept[k] = load<N>(memory + at + c);
        stay_packed(kept[k]);
        Pack<float, N> scale, shift{};
        if (weight) scale = load<N>(weight + c);
        if (bias) shift = load<N>(bias + c);
        Pack<T, N> result;
#pragma unroll
        for (int i = 0; i < N; i++)
            result.set(i, (kept[k][i] - centre) * factor * (weight ? scale[i] : 1.0f) + shift[i]);
        store<N>(y + at + c, result);
    });
    if (lane) return;
    if (CENTRED) mean[row] = centre;
    rstd[row] = factor;
}

// total = x + branch (rounded to T; both null without a branch), y = (total - mean) * rstd * weight + bias.
template <typename T>
__global__ void layer_norm_forward(const T* x, const T* branch, const float* weight, const float* bias, T* total, T* y,
                                   float* mean, float* rstd, long long rows, int width, float eps) {
    if (in_packs<WIDE<T>>(width, x, branch, weight, bias, total, y))
        norm_rows<true, WIDE<T>>(x, branch, weight, bias, total, y, mean, rstd, rows, width, eps);
    else
        norm_rows<true, 1>(x, branch, weight, bias, total, y, mean, rstd, rows, width, eps);
}

// total = x + branch, y = total * rstd * weight.
template <typename T>
__global__ void rms_norm_forward(const T* x, const T* branch, const float* weight, T* total, T* y, float* rstd,
                                 long long rows, int width, float eps) {
    if (in_packs<WIDE<T>>(width, x, branch, weight, total, y))
        norm_rows<false, WIDE<T>>(x, branch, weight, nullptr, total, y, nullptr, rstd, rows, width, eps);
    else
        norm_rows<false, 1>(x, branch, weight, nullptr, total, y, nullptr, rstd, rows, width, eps);
}

// ---- backward: one row per block at a time, so that each column's sums over the rows belong to one thread ------------

constexpr int SHARED_COLUMNS = 5888;  // two sums for each are 46 KiB: 48 KiB is all, with what block_sum keeps

template <bool CENTRED, int N, typename T>
__device__ inline void norm_rows_backward(const T* total, const float* weight, const float* mean, const float* rstd,
                                          const T* g, const T* dtotal, T* dx, float* partial_weight,
                                          float* partial_bias, long long rows, int width) {
    constexpr int KEPT = 2;
    const bool in_shared = width <= SHARED_COLUMNS;
    DYNAMIC_SHARED(shared);
    const int first = threadIdx.x * N, step = blockDim.x * N;
    // this block's sums for weight and bias: in shared memory, for very wide rows right where they go
    float* of_weight = in_shared ? shared : partial_weight + (long long)blockIdx.x * width;
    float* of_bias = in_shared ? shared + width : partial_bias + (long long)blockIdx.x * width;
    if (partial_weight)
        for (int c = first; c < width; c += step)
#pragma unroll
            for (int i = 0; i < N; i++) {
                of_weight[c + i] = 0.0f;
                if (CENTRED) of_bias[c + i] = 0.0f;
            }

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long at = row * width;
        const float centre = CENTRED ? mean[row] : 0.0f, factor = rstd[row];
        Pack<T, N> x[KEPT + 1];
        Pack<T, N> dy[KEPT + 1];
        float sums[2] = {};  // with h = g * weight: of h * xhat and of h
        over_row<KEPT>(width, first, step, [&](int c, int k) {
            x[k] = load<N>(total + at + c);
            dy[k] = load<N>(g + at + c);
            Pack<float, N> scale;
            if (weight) scale = load<N>(weight + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float xhat = (x[k][i] - centre) * factor, h = weight ? dy[k][i] * scale[i] : dy[k][i];
                sums[0] += h * xhat;
                sums[1] += h;
                if (partial_weight) {
                    of_weight[c + i] += dy[k][i] * xhat;
                    if (CENTRED) of_bias[c + i] += dy[k][i];
                }
            }
        });
        block_sum(sums);
        const float along = sums[0] / width, level = CENTRED ? sums[1] / width : 0.0f;
        over_row<KEPT>(width, first, step, [&](int c, int k) {
            if (k == KEPT) {
                x[k] = load<N>(total + at + c);
                dy[k] = load<N>(g + at + c);
            }
            stay_packed(x[k]);
            stay_packed(dy[k]);
            Pack<float, N> scale;
            if (weight) scale = load<N>(weight + c);
            Pack<T, N> result{};
            if (dtotal) result = load<N>(dtotal + at + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float xhat = (x[k][i] - centre) * factor, h = weight ? dy[k][i] * scale[i] : dy[k][i];
                result.set(i, (h - level - xhat * along) * factor + result[i]);
            }
            store<N>(dx + at + c, result);
        });
    }
    if (!partial_weight || !in_shared) return;
    for (int c = first; c < width; c += step)
#pragma unroll
        for (int i = 0; i < N; i++) {
            partial_weight[(long long)blockIdx.x * width + c + i] = of_weight[c + i];
            if (CENTRED) partial_bias[(long long)blockIdx.x * width + c + i] = of_bias[c + i];
        }
}

// From total = x + branch and the gradients g of y and dtotal (or null) of total: dx, the gradient of x and of branch,
// and sums of strips of rows for the gradients of weight and bias, (strips, width) each, or null.
template <typename T>
__global__ void __launch_bounds__(256, 3)
    layer_norm_backward(const T* total, const float* weight, const float* mean, const float* rstd, const T* g,
                        const T* dtotal, T* dx, float* partial_weight, float* partial_bias, long long rows, int width) {
    if (in_packs<WIDE<T>>(width, total, weight, g, dtotal, dx))
        norm_rows_backward<true, WIDE<T>>(total, weight, mean, rstd, g, dtotal, dx, partial_weight, partial_bias, rows,
                                          width);
    else
        norm_rows_backward<true, 1>(total, weight, mean, rstd, g, dtotal, dx, partial_weight, partial_bias, rows,
                                    width);
}

template <typename T>
__global__ void __launch_bounds__(256, 3)
    rms_norm_backward(const T* total, const float* weight, const float* rstd, const T* g, const T* dtotal, T* dx,
                      float* partial_weight, long long rows, int width) {
    if (in_packs<WIDE<T>>(width, total, weight, g, dtotal, dx))
        norm_rows_backward<false, WIDE<T>>(total, weight, nullptr, rstd, g, dtotal, dx, partial_weight, nullptr, rows,
                                           width);
    else
        norm_rows_backward<false, 1>(total, weight, nullptr, rstd, g, dtotal, dx, partial_weight, nullptr, rows, width);
}
