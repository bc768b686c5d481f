// Heads of attention, (batch, heads, length, dim) in any layout whose last dimension is contiguous: strides, in
// elements, say where a batch entry, a head, a position begin; packed projections (batch, length, 3, heads, dim) are
// read and written where they lie.
#include "common.cuh"

// visit(position, column, offset in x, offset in y) for packs of N in the first `columns` columns of every row.
template <int N, typename F>
__device__ inline void over_heads(int batch, int heads, int length, int columns, long long x_batch, long long x_head,
                                  long long x_position, long long y_batch, long long y_head, long long y_position,
                                  F visit) {
    const unsigned int packs = columns / N;
    const long long count = (long long)batch * heads * length * packs;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * (long long)blockDim.x) {
        // neighbouring threads take neighbouring columns, then heads, as packed projections have them
        const unsigned int row = i / packs, c = (i - (long long)row * packs) * N;
        const unsigned int h = row % heads, bt = row / heads, t = bt % length, b = bt / length;
        visit(t, c, b * x_batch + h * x_head + t * x_position + c, b * y_batch + h * y_head + t * y_position + c);
    }
}

// May rows of `columns` at these strides be moved in packs of N?
template <int N, typename... P>
__device__ inline bool heads_in_packs(int columns, long long strides, const P*... pointers) {
    return columns % N == 0 && in_packs<N>(strides, pointers...);
}

// y = x in another layout.
template <typename T>
__global__ void copy_heads(const T* x, T* y, int batch, int heads, int length, int dim, long long x_batch,
                           long long x_head, long long x_position, long long y_batch, long long y_head,
                           long long y_position) {
    constexpr int N = WIDE<T>;
    // strides are multiples of N where no low bit of any is set
    if (heads_in_packs<N>(dim, x_batch | x_head | x_position | y_batch | y_head | y_position, x, y))
        over_heads<N>(batch, heads, length, dim, x_batch, x_head, x_position, y_batch, y_head, y_position,
                      [&](int, int, long long from, long long to) { store<N>(y + to, load<N>(x + from)); });
    else
        over_heads<1>(batch, heads, length, dim, x_batch, x_head, x_position, y_batch, y_head, y_position,
                      [&](int, int, long long from, long long to) { y[to] = x[from]; });
}

template <int N, typename T>
__device__ inline void rotate_heads(const T* x, const float* cos, const float* sin, T* y, int batch, int heads,
                                    int length, int dim, long long x_batch, long long x_head, long long x_position,
                                    long long y_batch, long long y_head, long long y_position, float sign) {
    const int half = dim / 2;
    over_heads<N>(batch, heads, length, half, x_batch, x_head, x_position, y_batch, y_head, y_position,
                  [&](int t, int c, long long from, long long to) {
                      const auto low = load<N>(x + from), high = load<N>(x + from + half);
                      const auto cos_low = load<N>(cos + t * dim + c), cos_high = load<N>(cos + t * dim + c + half);
                      const auto sin_low = load<N>(sin + t * dim + c), sin_high = load<N>(sin + t * dim + c + half);
                      Pack<T, N> new_low, new_high;
#pragma unroll
                      for (int i = 0; i < N; i++) {
                          const float from_high = sign > 0.0f ? -sin_low[i] : sin_high[i];  // the transpose, backward
                          const float from_low = sign > 0.0f ? sin_high[i] : -sin_low[i];
                          new_low.set(i, low[i] * cos_low[i] + high[i] * from_high);
                          new_high.set(i, high[i] * cos_high[i] + low[i] * from_low);
                      }
                      store<N>(y + to, new_low);
                      store<N>(y + to + half, new_high);
                  });
}

// Rotary positions (Su et al. 2021, arXiv:2104.09864): each pair (x[i], x[i + dim/2]) turned by the angle of its
// position, cos and sin (length, dim) as gpt/model/positions.py makes them. sign 1: forward; -1: the gradient. y may be
// x where the layouts are equal.
template <typename T>
__global__ void rotary(const T* x, const float* cos, const float* sin, T* y, int batch, int heads, int length, int dim,
                       long long x_batch, long long x_head, long long x_position, long long y_batch, long long y_head,
                       long long y_position, float sign) {
    constexpr int N = WIDE<T>;
    if (heads_in_packs<N>(dim / 2, x_batch | x_head | x_position | y_batch | y_head | y_position, x, y, cos, sin))
        rotate_heads<N>(x, cos, sin, y, batch, heads, length, dim, x_batch, x_head, x_position, y_batch, y_head,
                        y_position, sign);
    else
        rotate_heads<1>(x, cos, sin, y, batch, heads, length, dim, x_batch, x_head, x_position, y_batch, y_head,
                        y_position, sign);
}
