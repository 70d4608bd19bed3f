// CUDA C++ on a CPU: what host_cuda.py puts before a .cu file so that g++ compiles the same text that NVRTC compiles.
//
// Every CUDA thread is a fiber of one operating-system thread; it runs until it waits at a barrier (of its warp, block
// or cluster) or ends. The order in which waiting fibers go on is chosen by the caller: a barrier that is missing gives
// wrong results in one order or another, every time. Memory beyond a tensor's last byte is unreadable.

#pragma once
#define VIDKERNELS_HOST 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#undef __device__
#undef __global__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __global__
#define __host__
#define __constant__
// host_cuda.py rewrites `extern __shared__ T name[];` to `host_cuda::dynamic_shared<T>()`, and `__shared__ T name[n];`
// to a `static` whose address names a copy of it in each block: `host_cuda::static_shared(…)`.
#define __launch_bounds__(...)

namespace host_cuda {

constexpr int kWarp = 32;
constexpr int kSlotBytes = 64;

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    // Two slots for each lane: a lane writes the next value while others still read the last one.
    alignas(16) unsigned char slots[2][kWarp][kSlotBytes];
};

// Where the running thread is.
struct Place {
    uint3 block{};
    unsigned thread = 0;
    unsigned rank = 0;
    Warp* warp = nullptr;
    Barrier* block_barrier = nullptr;
    unsigned char* dynamic = nullptr;
};

struct Argument {
    const void* value;   // of a number
    void* tensor;        // or the first element of a tensor
    std::size_t bytes;   // of the number, or of the tensor
    char kind;           // p, i or f
};

struct Parameter {
    std::size_t bytes;
    char kind;
};

struct Launch {
    uint3 grid;
    unsigned block, cluster;
    std::size_t shared_bytes;
    unsigned order;
};

extern const Place* here;
[[noreturn]] void fail(const char* why);
void arrive_and_wait(Barrier& barrier);
void* static_bytes(const void* name, std::size_t bytes);
void cluster_arrive();
void cluster_wait();
unsigned char* remote_bytes(const void* own, unsigned rank);
const char* execute(const Launch& launch, const Parameter* parameters, unsigned expected, Argument* arguments,
                    unsigned count, void (*job)(void*), void* job_argument);

inline unsigned lane() { return here->thread % kWarp; }

// Every lane shows a value to its warp; `read(i)` gives that of lane i.
template <class T>
struct Shown {
    const Warp* warp;
    unsigned parity;
    T operator()(unsigned lane) const {
        T value;
        std::memcpy(&value, warp->slots[parity][lane], sizeof(T));
        return value;
    }
};

template <class T>
static Shown<T> show(const T& value) {
    static_assert(sizeof(T) <= kSlotBytes);
    Warp& mine = *here->warp;
    if (mine.barrier.expected != kWarp) fail("a warp of less than 32 live threads exchanges values");
    const unsigned parity = mine.barrier.generation & 1;
    std::memcpy(mine.slots[parity][lane()], &value, sizeof(T));
    arrive_and_wait(mine.barrier);
    return {&mine, parity};
}

template <class T>
static T* dynamic_shared() {
    return reinterpret_cast<T*>(here->dynamic);
}
template <class T>
static T& static_shared(T& name) {
    return *static_cast<T*>(static_bytes(&name, sizeof(T)));
}

// Beside cluster_arrive (barrier.cluster.arrive.release) and cluster_wait (barrier.cluster.wait.acquire):
// %cluster_ctarank and mapa.
inline unsigned cluster_rank() { return here->rank; }
template <class T>
static T* remote_shared(T* own, unsigned rank) {
    return reinterpret_cast<T*>(remote_bytes(own, rank));
}

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: fragments as in the PTX manual, §9.7.14.5.8.
template <class T>
static void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    static_assert(sizeof(T) == 2);
    struct Fragments {
        T a[8], b[4];
    } own;
    std::memcpy(own.a, a, sizeof(own.a));
    std::memcpy(own.b, b, sizeof(own.b));
    const auto shown = show(own);
    const unsigned group = lane() / 4, pair = lane() % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = group + 8 * (i / 2), column = 2 * pair + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
            const T x = shown(4 * (row % 8) + (k % 8) / 2).a[(k / 8) * 4 + (row / 8) * 2 + k % 2];
            const T y = shown(4 * column + (k % 8) / 2).b[(k / 8) * 2 + k % 2];
            sum += static_cast<float>(x) * static_cast<float>(y);
        }
        d[i] += sum;
    }
}

struct ThreadIndex {
    struct X {
        operator unsigned() const { return here->thread; }
    } x;
    struct Zero {
        operator unsigned() const { return 0; }
    } y, z;
};
struct BlockIndex {
    struct X {
        operator unsigned() const { return here->block.x; }
    } x;
    struct Y {
        operator unsigned() const { return here->block.y; }
    } y;
    struct Z {
        operator unsigned() const { return here->block.z; }
    } z;
};

}  // namespace host_cuda

static const host_cuda::ThreadIndex threadIdx{};
static const host_cuda::BlockIndex blockIdx{};
extern uint3 blockDim, gridDim;
static const int warpSize = host_cuda::kWarp;

static inline void __syncthreads() { host_cuda::arrive_and_wait(*host_cuda::here->block_barrier); }
static inline void __syncwarp(unsigned = ~0u) { host_cuda::show(0); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <class T>
static inline T __shfl_sync(unsigned, T value, int source, int width = 32) {
    const unsigned base = host_cuda::lane() / width * width;
    return host_cuda::show(value)(base + unsigned(source) % width);
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    const unsigned other = host_cuda::lane() ^ unsigned(mask);
    const auto shown = host_cuda::show(value);
    return other / width <= host_cuda::lane() / width ? shown(other) : value;
}
template <class T>
static inline T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
    const unsigned own = host_cuda::lane(), other = own + by;
    const auto shown = host_cuda::show(value);
    return other / width == own / width ? shown(other) : value;
}
template <class T>
static inline T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
    const unsigned own = host_cuda::lane();
    const auto shown = host_cuda::show(value);
    return own % width >= by ? shown(own - by) : value;
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    const auto shown = host_cuda::show(predicate);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i) bits |= unsigned(shown(i) != 0) << i;
    return bits;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline void __stcs(T* p, T value) { *p = value; }
template <class T> static inline void __stcg(T* p, T value) { *p = value; }

template <class A, class B>
static constexpr auto min(A a, B b) -> std::common_type_t<A, B> { return b < a ? b : a; }
template <class A, class B>
static constexpr auto max(A a, B b) -> std::common_type_t<A, B> { return a < b ? b : a; }

// The C library has private functions of these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
[[noreturn]] static inline void __trap() { host_cuda::fail("__trap"); }

namespace host_cuda {

template <class T>
static T value_of(const Argument& argument) {
    T value;
    std::memcpy(&value, argument.tensor ? static_cast<const void*>(&argument.tensor) : argument.value, sizeof(T));
    return value;
}

template <class... P, std::size_t... I>
static const char* launch(void (*kernel)(P...), const Launch& how, Argument* arguments, unsigned count,
                          std::index_sequence<I...>) {
    const Parameter parameters[] = {
        {sizeof(P), std::is_pointer_v<P> ? 'p' : std::is_floating_point_v<P> ? 'f' : 'i'}...};
    struct Job {
        void (*kernel)(P...);
        const Argument* arguments;
    } job{kernel, arguments};
    const auto call = [](void* argument) {
        const Job& job = *static_cast<Job*>(argument);
        job.kernel(value_of<P>(job.arguments[I])...);
    };
    return execute(how, parameters, sizeof...(P), arguments, count, call, &job);
}

template <class... P>
static const char* launch(void (*kernel)(P...), const Launch& how, Argument* arguments, unsigned count) {
    return launch(kernel, how, arguments, count, std::index_sequence_for<P...>{});
}

}  // namespace host_cuda
