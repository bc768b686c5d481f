// Rows of a table (vocabulary, width) by their numbers, and the gradient of the table. An id that is not in the table
// gives zeros and no gradient.
#include "common.cuh"

// visit(row, column) for the packs of the rows (rows, width); one row per warp.
template <int N, typename F> __device__ inline void over_rows(long long rows, int width, F visit) {
    const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
    if (row < rows)
        for (int c = threadIdx.x % 32 * N; c < width; c += 32 * N) visit(row, c);
}

template <int N, typename T>
__device__ inline void gather_rows(const T* table, const long long* ids, T* out, long long rows, int width,
                                   int vocabulary) {
    over_rows<N>(rows, width, [&](long long row, int c) {
        const long long id = ids[row];
        Pack<T, N> pack{};
        if (id >= 0 && id < vocabulary) pack = load<N>(table + id * width + c);
        store<N>(out + row * width + c, pack);
    });
}

// out (rows, width) = table[ids].
template <typename T>
__global__ void embedding_forward(const T* table, const long long* ids, T* out, long long rows, int width,
                                  int vocabulary) {
    if (in_packs<WIDE<T>>(width, table, out))
        gather_rows<WIDE<T>>(table, ids, out, rows, width, vocabulary);
    else
        gather_rows<1>(table, ids, out, rows, width, vocabulary);
}

template <int N, typename T>
__device__ inline void scatter_rows(const long long* ids, const T* g, float* dtable, long long rows, int width,
                                    int vocabulary) {
    over_rows<N>(rows, width, [&](long long row, int c) {
        const long long id = ids[row];
        if (id < 0 || id >= vocabulary) return;
        const auto pack = load<N>(g + row * width + c);
#pragma unroll
        for (int i = 0; i < N; i++) atomicAdd(dtable + id * width + c + i, pack[i]);
    });
}

// dtable[ids] += g (rows, width), in the order in which it happens: sums of the same numbers differ in the last digits
// from run to run.
template <typename T>
__global__ void embedding_backward_atomic(const long long* ids, const T* g, float* dtable, long long rows, int width,
                                          int vocabulary) {
    if (in_packs<WIDE<T>>(width, g))
        scatter_rows<WIDE<T>>(ids, g, dtable, rows, width, vocabulary);
    else
        scatter_rows<1>(ids, g, dtable, rows, width, vocabulary);
}

template <int N, typename T>
__device__ inline void add_segments(const long long* sorted, const long long* order, const T* g, float* dtable,
                                    long long rows, int width, int vocabulary) {
    const long long first = blockIdx.x * 8LL + threadIdx.y;
    if (first >= rows) return;
    const long long id = sorted[first];
    if ((first && sorted[first - 1] == id) || id < 0 || id >= vocabulary) return;
    long long end = first + 1, beyond = rows;  // the first position behind this id's
    while (end < beyond) {
        const long long middle = (end + beyond) / 2;
        if (sorted[middle] == id) end = middle + 1;
        else beyond = middle;
    }
    for (int c = (blockIdx.y * 32 + threadIdx.x) * N; c < width; c += gridDim.y * 32 * N) {
        auto sum = load<N>(dtable + id * width + c);
#pragma unroll 4
        for (long long i = first; i < end; i++) {
            const auto pack = load<N>(g + order[i] * width + c);
#pragma unroll
            for (int j = 0; j < N; j++) sum.set(j, sum[j] + pack[j]);
        }
        store<N>(dtable + id * width + c, sum);
    }
}

// The same sums in a fixed order: `sorted` has the ids in ascending order, `order` where each one stood (a stable
// argsort). The warp at an id's first position adds up all its rows.
template <typename T>
__global__ void embedding_backward_sorted(const long long* sorted, const long long* order, const T* g, float* dtable,
                                          long long rows, int width, int vocabulary) {
    if (in_packs<WIDE<T>>(width, g, dtable))
        add_segments<WIDE<T>>(sorted, order, g, dtable, rows, width, vocabulary);
    else
        add_segments<1>(sorted, order, g, dtable, rows, width, vocabulary);
}
