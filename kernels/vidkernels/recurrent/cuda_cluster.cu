// Recurrence over a cluster of thread blocks, W_hh on chip for all frames: README.md tells the design.
//
// A cluster computes 16 batch rows, each of its blocks UNITS hidden units of them. Products are mma.m16n8k16, the 16
// rows being M. The order of terms in a sum is free: a lane takes 8 neighbouring k of a row in one 16-byte load and
// spreads them over two instructions, the same way in both factors.
//
// Macros: BACKWARD (which of the two kernels it is), SCALAR (__half, __nv_bfloat16), GATES (4: LSTM, 1: RNN), HIDDEN,
// CLUSTER (blocks), KEPT (how many groups of 32 terms have their weights in registers; those of the others lie in
// shared memory).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int ROWS = 16;
constexpr int UNITS = HIDDEN / CLUSTER;
constexpr int WARPS = UNITS / 8;
constexpr int THREADS = 32 * WARPS;
constexpr int GATED = GATES * HIDDEN;
static_assert(UNITS * CLUSTER == HIDDEN && WARPS * 8 == UNITS, "a warp has 8 hidden units");

// Rows of 64 bytes modulo 128: eight lanes of a 16-byte load meet all banks once.
__device__ constexpr int pitch(int columns) { return (columns + 63) / 64 * 64 + 32; }

using Four = float[4];
// Of activated gates kept for the backward pass: within ±1, so that __half loses nothing of __nv_bfloat16's range.
using GATE = __half;

#ifdef VIDKERNELS_HOST
using host_cuda::cluster_arrive;
using host_cuda::cluster_rank;
using host_cuda::cluster_wait;

__device__ inline void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                           unsigned b1) {
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    host_cuda::mma_m16n8k16<SCALAR>(d, a, b);
}
template <class T>
__device__ inline void store_remote(T* own, unsigned rank, T value) {
    *host_cuda::remote_shared(own, rank) = value;
}
#else
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of the cluster, and all they have written to shared memory, here and elsewhere.
__device__ __forceinline__ void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class T>
struct Mma;
#define DEFINE_MMA(T, NAME)                                                                                            \
    template <>                                                                                                        \
    struct Mma<T> {                                                                                                    \
        static __device__ __forceinline__ void add(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,  \
                                                   unsigned b0, unsigned b1) {                                         \
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                        \
                         ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                      \
        }                                                                                                              \
    };
DEFINE_MMA(__half, "f16")
DEFINE_MMA(__nv_bfloat16, "bf16")
__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
    Mma<SCALAR>::add(d, a0, a1, a2, a3, b0, b1);
}

// The address in block `rank` of what lies at `own` here.
__device__ __forceinline__ unsigned remote(const void* own, unsigned rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
    return address;
}
__device__ __forceinline__ void store_remote(uint4* own, unsigned rank, uint4 value) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote(own, rank)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}
__device__ __forceinline__ void store_remote(float2* own, unsigned rank, float2 value) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote(own, rank)), "f"(value.x), "f"(value.y)
                 : "memory");
}
#endif

__device__ __forceinline__ float2 wide(unsigned pair, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float2 wide(unsigned pair, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
__device__ __forceinline__ unsigned rounded(float x, float y, __half) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned rounded(float x, float y, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// Two and four neighbours of a tensor.
__device__ __forceinline__ unsigned load_pair(const SCALAR* p) { return __ldg(reinterpret_cast<const unsigned*>(p)); }
template <class T>
__device__ __forceinline__ uint2 load_four(const T* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }
template <class T>
__device__ __forceinline__ void widen(float (&to)[4], uint2 from, T kind) {
    const float2 low = wide(from.x, kind), high = wide(from.y, kind);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}
__device__ __forceinline__ uint2 narrow(const float (&from)[4]) {
    return {rounded(from[0], from[1], SCALAR()), rounded(from[2], from[3], SCALAR())};
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
// No ∞/∞ for large |x|.
__device__ __forceinline__ float hyperbolic(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// Weights of TILES columns of 8 and GROUPS of 32 terms: `KEPT` groups in registers, the others in shared memory, where
// each lane finds its 16 bytes beside its neighbours'.
template <int TILES, int GROUPS>
struct Weights {
    static constexpr int IN_REGISTERS = KEPT < GROUPS ? KEPT : GROUPS;
    static constexpr int IN_SHARED = GROUPS - IN_REGISTERS;
    // Sums of each tile, to be added up: eight or so that do not wait for each other hide an instruction's latency.
    static constexpr int CHAINS = TILES >= 8 ? 1 : TILES >= 4 ? 2 : 4;
    using Sums = Four[TILES][CHAINS];

    uint4 kept[IN_REGISTERS][TILES];
    uint4* others;

    // `row(tile, chunk)` points at 8 weights of this lane's column: chunk 4·group + lane % 4.
    template <class Row>
    __device__ __forceinline__ void load(unsigned char* shared, int warp, int lane, Row row) {
        others = reinterpret_cast<uint4*>(shared) + warp * IN_SHARED * TILES * 32 + lane;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(row(tile, 4 * group + lane % 4)));
                if (group < IN_REGISTERS)
                    kept[group < IN_REGISTERS ? group : 0][tile] = chunk;
                else
                    others[((group - IN_REGISTERS) * TILES + tile) * 32] = chunk;
            }
    }

    __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4 * CHAINS; ++i) sums[tile][i / 4][i % 4] = 0.0f;
    }

    __device__ __forceinline__ static float total(const Sums& sums, int tile, int i) {
        float sum = sums[tile][0][i];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += sums[tile][chain][i];
        return sum;
    }

    // Adds a [16, 32·GROUPS] times the weights.
    __device__ __forceinline__ void multiply(Sums& sums, const SCALAR* a, int a_pitch, int lane) const {
        const SCALAR* top_row = a + lane / 4 * a_pitch + lane % 4 * 8;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const uint4 top = *reinterpret_cast<const uint4*>(top_row + 32 * group);
            const uint4 bottom = *reinterpret_cast<const uint4*>(top_row + 8 * a_pitch + 32 * group);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 w = group < IN_REGISTERS ? kept[group < IN_REGISTERS ? group : 0][tile]
                                                     : others[((group - IN_REGISTERS) * TILES + tile) * 32];
                mma(sums[tile][2 * group % CHAINS], top.x, bottom.x, top.y, bottom.y, w.x, w.y);
                mma(sums[tile][(2 * group + 1) % CHAINS], top.z, bottom.z, top.w, bottom.w, w.z, w.w);
            }
        }
    }
};

#if !BACKWARD
// y (N, T, H), h_n and c_n (N, H), gates (N, T, GATES·H), cells (N, T, H); y, gates and cells may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const SCALAR* __restrict__ products, const SCALAR* __restrict__ w_hh, const SCALAR* __restrict__ h_0,
            const SCALAR* __restrict__ c_0, SCALAR* __restrict__ y, SCALAR* __restrict__ h_n, SCALAR* __restrict__ c_n,
            GATE* __restrict__ gates, SCALAR* __restrict__ cells, int N, int T) {
    constexpr int PITCH = pitch(HIDDEN);
    extern __shared__ uint4 memory[];
    SCALAR* const h = reinterpret_cast<SCALAR*>(memory);  // [2, ROWS, PITCH]: read, and written by all blocks
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
    const int rank = cluster_rank(), first_row = blockIdx.x / CLUSTER * ROWS;
    const int unit = rank * UNITS + 8 * warp;  // the first of this warp's 8

    using W = Weights<GATES, HIDDEN / 32>;
    W weights;
    weights.load(reinterpret_cast<unsigned char*>(h + 2 * ROWS * PITCH), warp, lane, [&](int gate, int chunk) {
        return w_hh + (gate * HIDDEN + unit + quad) * HIDDEN + 8 * chunk;
    });
    for (int i = threadIdx.x; i < ROWS * HIDDEN / 8; i += THREADS) {
        const int row = i / (HIDDEN / 8), column = i % (HIDDEN / 8) * 8;
        const long long from = static_cast<long long>(first_row + row) * HIDDEN + column;
        uint4 chunk = {0, 0, 0, 0};
        if (h_0 && first_row + row < N) chunk = __ldg(reinterpret_cast<const uint4*>(h_0 + from));
        *reinterpret_cast<uint4*>(h + row * PITCH + column) = chunk;
    }

    // This lane's rows are quad and quad + 8, its units 2·pair and 2·pair + 1. Rows beyond N read the last one's.
    const int rows[2] = {first_row + quad, first_row + quad + 8};
    const bool inside[2] = {rows[0] < N, rows[1] < N};
    long long at[2];  // of frame 0 in (N, T, 1)
    float c[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const long long row = inside[r] ? rows[r] : N - 1;
        at[r] = row * T;
        if (GATES == 4 && c_0) {
            const float2 two = wide(load_pair(c_0 + row * HIDDEN + unit + 2 * pair), SCALAR());
            c[r][0] = two.x, c[r][1] = two.y;
        }
    }
    unsigned product[2][GATES];  // of this frame and, from the middle of it on, of the next
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate)
            product[r][gate] = load_pair(products + at[r] * GATED + gate * HIDDEN + unit + 2 * pair);

    // No block writes to another that has not begun.
    cluster_arrive();
    cluster_wait();

    for (int t = 0; t < T; ++t) {
        W::Sums sums;
        W::clear(sums);
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 two = wide(product[r][gate], SCALAR());
                sums[gate][0][2 * r] = two.x, sums[gate][0][2 * r + 1] = two.y;
            }
        // On its way while the matrices are multiplied; the last frame reads itself again.
        const int next = t + 1 < T ? t + 1 : t;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate)
                product[r][gate] = load_pair(products + (at[r] + next) * GATED + gate * HIDDEN + unit + 2 * pair);
        weights.multiply(sums, h + t % 2 * ROWS * PITCH, PITCH, lane);

        unsigned activated[2][GATES], before[2], word[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float a[GATES][2], out[2];
            before[r] = rounded(c[r][0], c[r][1], SCALAR());
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate) {
                    const float sum = W::total(sums, gate, 2 * r + e);
                    // In the order i, f, g, o.
                    a[gate][e] = GATES == 1 || gate == 2 ? hyperbolic(sum) : sigmoid(sum);
                }
                if constexpr (GATES == 4) {
                    c[r][e] = a[1][e] * c[r][e] + a[0][e] * a[2][e];
                    out[e] = a[3][e] * hyperbolic(c[r][e]);
                } else {
                    out[e] = a[0][e];
                }
            }
            word[r] = rounded(out[0], out[1], SCALAR());
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) activated[r][gate] = rounded(a[gate][0], a[gate][1], GATE());
        }

        // The four lanes of a row put their 8 units together: 16 bytes a store.
        uint4 chunk[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int first = lane - pair;
            chunk[r].x = __shfl_sync(~0u, word[r], first);
            chunk[r].y = __shfl_sync(~0u, word[r], first + 1);
            chunk[r].z = __shfl_sync(~0u, word[r], first + 2);
            chunk[r].w = __shfl_sync(~0u, word[r], first + 3);
        }
        if (t + 1 < T) {
            SCALAR* const to = h + (t + 1) % 2 * ROWS * PITCH + unit;
#pragma unroll
            for (int peer = pair; peer < CLUSTER; peer += 4)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    store_remote(reinterpret_cast<uint4*>(to + (quad + 8 * r) * PITCH), peer, chunk[r]);
            cluster_arrive();
        }
        // What nobody in the cluster waits for.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (pair != r || !inside[r]) continue;
            if (y) *reinterpret_cast<uint4*>(y + (at[r] + t) * HIDDEN + unit) = chunk[r];
            if (t + 1 == T) *reinterpret_cast<uint4*>(h_n + static_cast<long long>(rows[r]) * HIDDEN + unit) = chunk[r];
        }
        if (gates) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!inside[r]) continue;
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate)
                    *reinterpret_cast<unsigned*>(gates + (at[r] + t) * GATED + gate * HIDDEN + unit + 2 * pair) =
                        activated[r][gate];
                if (GATES == 4)
                    *reinterpret_cast<unsigned*>(cells + (at[r] + t) * HIDDEN + unit + 2 * pair) = before[r];
            }
        }
        // What was written to this block's other half of `h` is there, and the half just read is free.
        if (t + 1 < T) cluster_wait();
    }
    if (GATES == 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (inside[r])
                *reinterpret_cast<unsigned*>(c_n + static_cast<long long>(rows[r]) * HIDDEN + unit + 2 * pair) =
                    rounded(c[r][0], c[r][1], SCALAR());
    }
}

#else
// grad_products (N, T, GATES·H), grad_c_0 (N, H); w_t is W_hh's transpose, (H, GATES·H); grad_y, grad_h and grad_c may
// be null. A block has the gradients of its own units' gates and adds up what they give to every unit; the sums
// meet in the block of the unit.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(const SCALAR* __restrict__ grad_y, const SCALAR* __restrict__ grad_h, const SCALAR* __restrict__ grad_c,
             const SCALAR* __restrict__ w_t, const GATE* __restrict__ gates, const SCALAR* __restrict__ cells,
             SCALAR* __restrict__ grad_products, SCALAR* __restrict__ grad_c_0, int N, int T) {
    constexpr int TERMS = GATES * UNITS, PITCH = pitch(TERMS), PART = ROWS * UNITS;
    static_assert(TERMS % 32 == 0, "terms come in groups of 32");
    extern __shared__ uint4 memory[];
    float* const parts = reinterpret_cast<float*>(memory);  // [2, CLUSTER, ROWS, UNITS]: from each block, for dh
    SCALAR* const own = reinterpret_cast<SCALAR*>(parts + 2 * CLUSTER * PART);  // [ROWS, PITCH]: gradients of the gates
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
    const int rank = cluster_rank();

    // Tile j of warp w are units 8w to 8w + 7 of block j.
    using W = Weights<CLUSTER, TERMS / 32>;
    W weights;
    weights.load(reinterpret_cast<unsigned char*>(own + ROWS * PITCH), warp, lane, [&](int block, int chunk) {
        const int gate = 8 * chunk / UNITS, term = 8 * chunk % UNITS;
        return w_t + (block * UNITS + 8 * warp + quad) * GATED + gate * HIDDEN + rank * UNITS + term;
    });

    // Beside the matrix products, a thread has 4 neighbouring units of one row.
    const int local_row = threadIdx.x / (UNITS / 4), local_unit = threadIdx.x % (UNITS / 4) * 4;
    const int unit = rank * UNITS + local_unit, given = blockIdx.x / CLUSTER * ROWS + local_row;
    const bool inside = given < N;
    const long long row = inside ? given : N - 1, at = row * T;
    Four dh = {0.0f, 0.0f, 0.0f, 0.0f}, dc = {0.0f, 0.0f, 0.0f, 0.0f};
    if (grad_h) widen(dh, load_four(grad_h + row * HIDDEN + unit), SCALAR());
    if (GATES == 4 && grad_c) widen(dc, load_four(grad_c + row * HIDDEN + unit), SCALAR());
    uint2 gate_of[GATES], cell = {0, 0}, dy = {0, 0};  // of this frame and, from the middle of it on, of the one before
    auto fetch = [&](int t) {
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate)
            gate_of[gate] = load_four(gates + (at + t) * GATED + gate * HIDDEN + unit);
        if (GATES == 4) cell = load_four(cells + (at + t) * HIDDEN + unit);
        if (grad_y) dy = load_four(grad_y + (at + t) * HIDDEN + unit);
    };
    fetch(T - 1);

    // No block writes to another that has not begun.
    cluster_arrive();
    cluster_wait();

    for (int t = T - 1; t >= 0; --t) {
        Four a[GATES], d[GATES], c_before, dy_t;
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) widen(a[gate], gate_of[gate], GATE());
        widen(c_before, cell, SCALAR());
        widen(dy_t, dy, SCALAR());
        fetch(t > 0 ? t - 1 : 0);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float dh_t = dh[e] + dy_t[e];
            if constexpr (GATES == 4) {
                const float i = a[0][e], f = a[1][e], g = a[2][e], o = a[3][e];
                const float c = hyperbolic(f * c_before[e] + i * g);
                const float dc_t = dc[e] + dh_t * o * (1.0f - c * c);
                d[0][e] = dc_t * g * i * (1.0f - i);
                d[1][e] = dc_t * c_before[e] * f * (1.0f - f);
                d[2][e] = dc_t * i * (1.0f - g * g);
                d[3][e] = dh_t * c * o * (1.0f - o);
                dc[e] = dc_t * f;
            } else {
                d[0][e] = dh_t * (1.0f - a[0][e] * a[0][e]);
            }
        }
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            const uint2 four = narrow(d[gate]);
            *reinterpret_cast<uint2*>(own + local_row * PITCH + gate * UNITS + local_unit) = four;
            if (inside) *reinterpret_cast<uint2*>(grad_products + (at + t) * GATED + gate * HIDDEN + unit) = four;
        }
        if (t == 0) break;
        __syncthreads();

        W::Sums sums;
        W::clear(sums);
        weights.multiply(sums, own, PITCH, lane);
        float* const half = parts + t % 2 * CLUSTER * PART;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 two = {W::total(sums, block, 2 * r), W::total(sums, block, 2 * r + 1)};
                float* const to = half + rank * PART + (quad + 8 * r) * UNITS + 8 * warp + 2 * pair;
                store_remote(reinterpret_cast<float2*>(to), block, two);
            }
        cluster_arrive();
        cluster_wait();
        // Always in the same order.
#pragma unroll
        for (int e = 0; e < 4; ++e) dh[e] = 0.0f;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) {
            const float4 part = *reinterpret_cast<const float4*>(half + block * PART + local_row * UNITS + local_unit);
            dh[0] += part.x, dh[1] += part.y, dh[2] += part.z, dh[3] += part.w;
        }
    }
    if (GATES == 4 && inside) *reinterpret_cast<uint2*>(grad_c_0 + row * HIDDEN + unit) = narrow(dc);
}
#endif
