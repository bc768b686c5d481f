// Faults for the tests to catch: nothing like this may stand in the kernels.
#include "common.cuh"

__global__ void planted_misaligned(float* x) { store<4>(x + 1, load<4>(x + 4)); }

// One lane waits for the block, the others for that lane.
__global__ void planted_deadlock(float* x) {
    if (threadIdx.x == 0) __syncthreads();
    x[threadIdx.x] = warp_sum(x[threadIdx.x]);
}
