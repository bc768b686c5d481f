// Softmax and log-softmax of rows (rows, width), and their gradients. One row per block; the beginning of a row stays in
// registers between the passes, the rest of a long one is read again.
#include "common.cuh"
#include "row.cuh"

template <bool LOG, int N, typename T> __device__ inline void forward_row(const T* x, T* y, int width) {
    Row<N, T> row;
    row.read(x, width);
    const float rest = LOG ? logf(row.sum) : 1.0f / row.sum;
    over_row<row.KEPT>(width, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
        if (k == row.KEPT) row.kept[k] = load<N>(x + c);
        stay_packed(row.kept[k]);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float z = row.kept[k][i] - row.top;
            row.kept[k].set(i, LOG ? z - rest : expf(z) * rest);
        }
        store<N>(y + c, row.kept[k]);
    });
}

// softmax: dx = y (g - sum(g y)); log-softmax: dx = g - exp(y) sum(g)
template <bool LOG, int N, typename T>
__device__ inline void backward_row(const T* y, const T* g, T* dx, int width) {
    constexpr int KEPT = 3;
    Pack<T, N> out[KEPT + 1], d[KEPT + 1];
    float sum[1] = {};
    over_row<KEPT>(width, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
        out[k] = load<N>(y + c);
        d[k] = load<N>(g + c);
#pragma unroll
        for (int i = 0; i < N; i++) sum[0] += LOG ? d[k][i] : d[k][i] * out[k][i];
    });
    block_sum(sum);
    over_row<KEPT>(width, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
        if (k == KEPT) {
            out[k] = load<N>(y + c);
            d[k] = load<N>(g + c);
        }
        stay_packed(out[k]);
        stay_packed(d[k]);
#pragma unroll
        for (int i = 0; i < N; i++)
            d[k].set(i, LOG ? d[k][i] - expf(out[k][i]) * sum[0] : out[k][i] * (d[k][i] - sum[0]));
        store<N>(dx + c, d[k]);
    });
}

template <bool LOG, typename T> __device__ inline void forward(const T* x, T* y, int width) {
    const long long at = (long long)blockIdx.x * width;
    if (in_packs<WIDE<T>>(width, x, y))
        forward_row<LOG, WIDE<T>>(x + at, y + at, width);
    else
        forward_row<LOG, 1>(x + at, y + at, width);
}

template <bool LOG, typename T> __device__ inline void backward(const T* y, const T* g, T* dx, int width) {
    const long long at = (long long)blockIdx.x * width;
    if (in_packs<WIDE<T>>(width, y, g, dx))
        backward_row<LOG, WIDE<T>>(y + at, g + at, dx + at, width);
    else
        backward_row<LOG, 1>(y + at, g + at, dx + at, width);
}

// ---- kernels: `rows` blocks ------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    row_softmax_forward(const T* x, T* y, long long rows, int width) {
    forward<false>(x, y, width);
}
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    row_softmax_backward(const T* y, const T* g, T* dx, long long rows, int width) {
    backward<false>(y, g, dx, width);
}
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    row_log_softmax_forward(const T* x, T* y, long long rows, int width) {
    forward<true>(x, y, width);
}
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    row_log_softmax_backward(const T* y, const T* g, T* dx, long long rows, int width) {
    backward<true>(y, g, dx, width);
}
