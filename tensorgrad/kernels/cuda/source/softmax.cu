// Softmax of attention scores, in place between two batched products. The scores are rows of `keys` columns, one row per
// query, head and batch entry; row r belongs to query r % queries and sees the columns up to r % queries + offset
// (offset 0: causal; offset keys: all). Hidden columns are not read and become 0. One row per warp, kept in registers.
#include "common.cuh"

__device__ inline int visible_keys(long long row, int queries, int keys, int offset) {
    return min(keys, max(0, int(row % queries) + offset + 1));
}

template <int N, typename T>
__device__ inline void softmax_rows(T* scores, T* dropped, long long rows, int queries, int keys, int offset,
                                    float scale, unsigned int multiplier, unsigned int start, unsigned int threshold,
                                    float kept_scale) {
    constexpr int KEPT = 8;
    const int lane = threadIdx.x % 32;
    const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const int visible = visible_keys(row, queries, keys, offset);
    T* const at = scores + row * keys;
    Pack<T, N> kept[KEPT + 1];

    float top = minus_infinity();
    over_row<KEPT>(visible, lane * N, 32 * N, [&](int c, int k) {
        kept[k] = load<N>(at + c);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (c + i < visible) top = fmaxf(top, kept[k][i] * scale);
    });
    top = warp_max(top);
    if (top == minus_infinity()) top = 0.0f;  // nothing visible: a row of zeros
    float sum = 0.0f;
    over_row<KEPT>(visible, lane * N, 32 * N, [&](int c, int k) {
        if (k == KEPT) kept[k] = load<N>(at + c);
        stay_packed(kept[k]);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (c + i < visible) sum += expf(kept[k][i] * scale - top);
    });
    sum = warp_sum(sum);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    over_row<KEPT>(keys, lane * N, 32 * N, [&](int c, int k) {
        if (k == KEPT && c < visible) kept[k] = load<N>(at + c);
        stay_packed(kept[k]);
        Pack<T, N> result;
#pragma unroll
        for (int i = 0; i < N; i++)
            result.set(i, c + i < visible ? expf(kept[k][i] * scale - top) * inverse : 0.0f);
        store<N>(at + c, result);
        if (!dropped) return;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool stays = is_kept((unsigned int)(row * keys) + c + i, multiplier, start, threshold);
            result.set(i, stays ? result[i] * kept_scale : 0.0f);
        }
        store<N>(dropped + row * keys + c, result);
    });
}

// scores become softmax(scores * scale); dropped, unless null, those after dropout, scaled by kept_scale.
template <typename T>
__global__ void __launch_bounds__(256, 3)
    softmax_forward(T* scores, T* dropped, long long rows, int queries, int keys, int offset, float scale,
                                unsigned int multiplier, unsigned int start, unsigned int threshold,
                                float kept_scale) {
    if (in_packs<WIDE<T>>(keys, scores, dropped))
        softmax_rows<WIDE<T>>(scores, dropped, rows, queries, keys, offset, scale, multiplier, start, threshold,
                              kept_scale);
    else
        softmax_rows<1>(scores, dropped, rows, queries, keys, offset, scale, multiplier, start, threshold, kept_scale);
}

template <int N, typename T>
__device__ inline void softmax_rows_backward(const T* probabilities, T* gradient, long long rows, int queries,
                                             int keys, int offset, float scale, unsigned int multiplier,
                                             unsigned int start, unsigned int threshold, float kept_scale) {
    constexpr int KEPT = 4;
    const int lane = threadIdx.x % 32;
    const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const int visible = visible_keys(row, queries, keys, offset);
    const long long at = row * keys;
    Pack<T, N> p[KEPT + 1], g[KEPT + 1];
    const auto behind_dropout = [&](float d, int c) {
        return !threshold || is_kept((unsigned int)at + c, multiplier, start, threshold) ? d * kept_scale : 0.0f;
    };

    float sum = 0.0f;
    over_row<KEPT>(visible, lane * N, 32 * N, [&](int c, int k) {
        p[k] = load<N>(probabilities + at + c);
        g[k] = load<N>(gradient + at + c);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (c + i < visible) sum += p[k][i] * behind_dropout(g[k][i], c + i);
    });
    sum = warp_sum(sum);
    over_row<KEPT>(keys, lane * N, 32 * N, [&](int c, int k) {
        if (k == KEPT && c < visible) {
            p[k] = load<N>(probabilities + at + c);
            g[k] = load<N>(gradient + at + c);
        }
        stay_packed(p[k]);
        stay_packed(g[k]);
        Pack<T, N> result;
#pragma unroll
        for (int i = 0; i < N; i++)
            result.set(i, c + i < visible ? p[k][i] * (behind_dropout(g[k][i], c + i) - sum) * scale : 0.0f);
        store<N>(gradient + at + c, result);
    });
}

// gradient, of what softmax_forward made (of `dropped` with dropout; without it threshold is 0 and kept_scale 1),
// becomes that of the scores.
template <typename T>
__global__ void __launch_bounds__(256, 3)
    softmax_backward(const T* probabilities, T* gradient, long long rows, int queries, int keys, int offset,
                                 float scale, unsigned int multiplier, unsigned int start, unsigned int threshold,
                                 float kept_scale) {
    if (in_packs<WIDE<T>>(keys, probabilities, gradient))
        softmax_rows_backward<WIDE<T>>(probabilities, gradient, rows, queries, keys, offset, scale, multiplier, start,
                                       threshold, kept_scale);
    else
        softmax_rows_backward<1>(probabilities, gradient, rows, queries, keys, offset, scale, multiplier, start,
                                 threshold, kept_scale);
}
