// The gradients of weight and bias from the partial sums that cuda_rolling.cu leaves.
//
// Macro: SCALAR (float, __half, __nv_bfloat16).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int ELEMENTS = 32, SLICES = 8;

__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(__half& y, float x) { y = __float2half_rn(x); }
__device__ inline void round_to(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

// partial (splits, taps and bias, C) → weight (C, taps), and bias (C) unless it is null. Always in the same order.
extern "C" __global__ void __launch_bounds__(ELEMENTS * SLICES) sum(
    const float* __restrict__ partial, SCALAR* __restrict__ weight, SCALAR* __restrict__ bias, int splits, int taps,
    int channels) {
    __shared__ float kept[SLICES][ELEMENTS];
    const int size = (taps + (bias ? 1 : 0)) * channels;
    const int lane = threadIdx.x % ELEMENTS, slice = threadIdx.x / ELEMENTS;
    const int element = blockIdx.x * ELEMENTS + lane;
    float total = 0.0f;
    if (element < size) {
#pragma unroll 8
        for (int split = slice; split < splits; split += SLICES) total += partial[(long long)split * size + element];
    }
    kept[slice][lane] = total;
    __syncthreads();
    if (slice || element >= size) return;
    for (int other = 1; other < SLICES; ++other) total += kept[other][lane];
    const int tap = element / channels, channel = element % channels;
    round_to(tap < taps ? weight[channel * taps + tap] : bias[channel], total);
}
