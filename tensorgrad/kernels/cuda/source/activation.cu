// Activations and the bias of the linear layer before them. Where columns of (rows, width) are summed, blocks are 32 x 8
// threads: x along a row, one pack each, y along the column. What is summed over the rows leaves one partial sum per
// gridDim.y, a strip of rows; column_sum_finish adds those up, always in the same order.
#include "common.cuh"

// ---- the functions and their derivatives -----------------------------------------------------------------------------

// 1 / (1 + e^-x); __fdividef gives 0 where e^-x is infinite
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

struct Identity {
    static __device__ float slope(float) { return 1.0f; }
};
struct Gelu {  // x Phi(x), Phi the normal distribution
    static __device__ float phi(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }
    static __device__ float value(float x) { return x * phi(x); }
    static __device__ float slope(float x) { return phi(x) + x * 0.39894228f * expf(-0.5f * x * x); }
};
struct GeluTanh {  // x (1 + tanh(u)) / 2 = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)
    static __device__ float gate(float x) { return sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x)); }
    static __device__ float value(float x) { return x * gate(x); }
    static __device__ float slope(float x) {
        const float s = gate(x);
        const float t = s * (1.0f - s);  // 0 far out, where the factor beside it overflows
        return t == 0.0f ? s : s + x * t * 1.59576912f * (1.0f + 0.134145f * x * x);
    }
};
struct Silu {  // x sigmoid(x)
    static __device__ float value(float x) { return x * sigmoid(x); }
    static __device__ float slope(float x) {
        const float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
};
struct Relu2 {  // max(x, 0)^2
    static __device__ float value(float x) { return x > 0.0f ? x * x : 0.0f; }
    static __device__ float slope(float x) { return x > 0.0f ? 2.0f * x : 0.0f; }
};

// ---- y = f(x) --------------------------------------------------------------------------------------------------------

template <typename F, typename T> __device__ inline void forward(const T* x, T* y, long long n) {
    over_flat<WIDE<T>>(n, in_packs<1>(0, x, y), [&](long long i, auto count) {
        constexpr int N = decltype(count)::value;
        auto pack = load<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; j++) pack.set(j, F::value(pack[j]));
        store<N>(y + i, pack);
    });
}

// ---- dx = g f'(x), and its column sums, the gradient of the bias of the layer before ---------------------------------

// What the eight rows of threads have summed of columns c .. c + N - 1 goes to partial[c] and behind, a row of this
// strip. All threads of a block come here, those beyond the width with `inside` unset.
template <int N> __device__ inline void store_sums(const float (&sum)[N], float* partial, bool inside) {
    __shared__ float sums[8][N][32];
#pragma unroll
    for (int i = 0; i < N; i++) sums[threadIdx.y][i][threadIdx.x] = sum[i];
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            float total = 0.0f;
#pragma unroll
            for (int y = 0; y < 8; y++) total += sums[y][i][threadIdx.x];
            partial[i] = total;
        }
    }
    __syncthreads();  // before the next sums are written there
}

template <typename F, int N, typename T>
__device__ inline void backward_tiles(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    for (int tile = blockIdx.x * 32 * N; tile < width; tile += gridDim.x * 32 * N) {
        const int c = tile + threadIdx.x * N;
        float sum[N] = {};
        if (c < width)
            for (long long row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
                auto pack = load<N>(g + row * width + c);
                Pack<T, N> input{};
                if (x) input = load<N>(x + row * width + c);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const float d = pack[i] * F::slope(input[i]);
                    sum[i] += d;
                    pack.set(i, d);
                }
                if (dx) store<N>(dx + row * width + c, pack);
            }
        if (partial) store_sums(sum, partial + (long long)blockIdx.y * width + c, c < width);
    }
}

template <typename F, typename T>
__device__ inline void backward(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    if (in_packs<WIDE<T>>(width, x, g, dx))
        backward_tiles<F, WIDE<T>>(x, g, dx, partial, rows, width);
    else
        backward_tiles<F, 1>(x, g, dx, partial, rows, width);
}

// ---- kernels: y may be x, dx may be g; partial (strips, width), or null ----------------------------------------------

template <typename T> __global__ void gelu_forward(const T* x, T* y, long long n) { forward<Gelu>(x, y, n); }
template <typename T> __global__ void gelu_tanh_forward(const T* x, T* y, long long n) { forward<GeluTanh>(x, y, n); }
template <typename T> __global__ void silu_forward(const T* x, T* y, long long n) { forward<Silu>(x, y, n); }
template <typename T> __global__ void relu2_forward(const T* x, T* y, long long n) { forward<Relu2>(x, y, n); }

template <typename T>
__global__ void gelu_backward(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    backward<Gelu>(x, g, dx, partial, rows, width);
}
template <typename T>
__global__ void gelu_tanh_backward(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    backward<GeluTanh>(x, g, dx, partial, rows, width);
}
template <typename T>
__global__ void silu_backward(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    backward<Silu>(x, g, dx, partial, rows, width);
}
template <typename T>
__global__ void relu2_backward(const T* x, const T* g, T* dx, float* partial, long long rows, int width) {
    backward<Relu2>(x, g, dx, partial, rows, width);
}

// ---- the bias of a linear layer --------------------------------------------------------------------------------------

template <int N, typename T>
__device__ inline void add_bias(const T* x, const float* bias, T* y, long long rows, int width) {
    for (int c = (blockIdx.x * 32 + threadIdx.x) * N; c < width; c += gridDim.x * 32 * N) {
        const auto shift = load<N>(bias + c);
        for (long long row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
            auto pack = load<N>(x + row * width + c);
#pragma unroll
            for (int i = 0; i < N; i++) pack.set(i, pack[i] + shift[i]);
            store<N>(y + row * width + c, pack);
        }
    }
}

// y = x + bias; y may be x.
template <typename T> __global__ void bias_add(const T* x, const float* bias, T* y, long long rows, int width) {
    if (in_packs<WIDE<T>>(width, x, bias, y))
        add_bias<WIDE<T>>(x, bias, y, rows, width);
    else
        add_bias<1>(x, bias, y, rows, width);
}

// partial (strips, width): sums of the rows of g that belong to each strip.
template <typename T>
__global__ void column_sum(const T* g, float* partial, long long rows, int width) {
    backward<Identity>((const T*)nullptr, g, (T*)nullptr, partial, rows, width);
}

// out = the sum of partial over its strips. There are few blocks, so each has many threads: they wait for loads in turn.
__global__ void __launch_bounds__(1024)
    column_sum_finish(const float* partial, float* out, int strips, int width) {
    __shared__ float sums[32][33];
    const int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (c < width)
        for (int strip = threadIdx.y; strip < strips; strip += 32) sum += partial[(long long)strip * width + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= width) return;
    sum = 0.0f;
#pragma unroll
    for (int y = 0; y < 32; y++) sum += sums[y][threadIdx.x];
    out[c] = sum;
}

// ---- y = silu(gate) * up, the two of row stride `stride` (2 * width where they lie side by side) ---------------------

template <int N, typename T>
__device__ inline void swiglu_rows(const T* gate, const T* up, T* y, long long rows, int width, int stride) {
    for (int c = (blockIdx.x * 32 + threadIdx.x) * N; c < width; c += gridDim.x * 32 * N)
        for (long long row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
            auto a = load<N>(gate + row * stride + c);
            const auto b = load<N>(up + row * stride + c);
#pragma unroll
            for (int i = 0; i < N; i++) a.set(i, Silu::value(a[i]) * b[i]);
            store<N>(y + row * width + c, a);
        }
}

template <typename T>
__global__ void swiglu_forward(const T* gate, const T* up, T* y, long long rows, int width, int stride) {
    if (in_packs<WIDE<T>>(width, gate, up, y) && stride % WIDE<T> == 0)
        swiglu_rows<WIDE<T>>(gate, up, y, rows, width, stride);
    else
        swiglu_rows<1>(gate, up, y, rows, width, stride);
}

template <int N, typename T>
__device__ inline void swiglu_rows_backward(const T* gate, const T* up, const T* g, T* dgate, T* dup, float* partial,
                                            long long rows, int width, int stride) {
    for (int tile = blockIdx.x * 32 * N; tile < width; tile += gridDim.x * 32 * N) {
        const int c = tile + threadIdx.x * N;
        float of_gate[N] = {}, of_up[N] = {};
        if (c < width)
            for (long long row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
                auto a = load<N>(gate + row * stride + c);
                auto b = load<N>(up + row * stride + c);
                const auto d = load<N>(g + row * width + c);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const float value = a[i];
                    const float da = d[i] * b[i] * Silu::slope(value), db = d[i] * Silu::value(value);
                    of_gate[i] += da;
                    of_up[i] += db;
                    a.set(i, da);
                    b.set(i, db);
                }
                store<N>(dgate + row * stride + c, a);
                store<N>(dup + row * stride + c, b);
            }
        if (!partial) continue;
        float* const strip = partial + 2LL * blockIdx.y * width + c;
        store_sums(of_gate, strip, c < width);
        store_sums(of_up, strip + width, c < width);
    }
}

// dgate and dup have the stride of gate and up, and may be them. partial (strips, 2 * width), or null: the sums of the
// rows of dgate and dup.
template <typename T>
__global__ void swiglu_backward(const T* gate, const T* up, const T* g, T* dgate, T* dup, float* partial,
                                long long rows, int width, int stride) {
    if (in_packs<WIDE<T>>(width, gate, up, g, dgate, dup) && stride % WIDE<T> == 0)
        swiglu_rows_backward<WIDE<T>>(gate, up, g, dgate, dup, partial, rows, width, stride);
    else
        swiglu_rows_backward<1>(gate, up, g, dgate, dup, partial, rows, width, stride);
}
