// One row per block, read once: what softmax, log-softmax and cross-entropy need of it. Include it behind common.cuh.
#pragma once

constexpr int THREADS = 512;  // at most, of a block

// The beginning of the row in registers, its largest element, and sum(exp(x - largest)). A row with NaN or +infinity has
// the sum NaN; a row of -infinity has the sum 0.
template <int N, typename T> struct Row {
    static constexpr int KEPT = 4;
    Pack<T, N> kept[KEPT + 1];
    float top, sum;

    __device__ void read(const T* row, int width) {
        float own = -3.402823466e38f, part[1] = {};  // this thread's largest element so far; finite, so that NaN counts
        over_row<KEPT>(width, threadIdx.x * N, blockDim.x * N, [&](int c, int k) {
            kept[k] = load<N>(row + c);
            float larger = own;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (c + i < width) larger = fmaxf(larger, kept[k][i]);
            part[0] *= expf(own - larger);
            own = larger;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (c + i < width) part[0] += expf(kept[k][i] - own);
        });
        top = block_max(own);
        part[0] *= expf(own - top);
        block_sum(part);
        sum = part[0];
    }
};
