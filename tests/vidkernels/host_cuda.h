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

#ifdef HOST_CUDA_RUNTIME  // one library, which those of the kernels are linked to

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

uint3 blockDim, gridDim;

namespace host_cuda {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kCanaryBytes = 256;
constexpr std::size_t kAlign = 1024;

struct Block {
    unsigned live = 0;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<unsigned char> memory;
    unsigned char* dynamic = nullptr;
    std::vector<std::pair<const void*, std::unique_ptr<unsigned char[]>>> statics;
};

struct Fiber {
    Place place;
    Block* block = nullptr;
    ucontext_t start;
    jmp_buf resumption;
    std::unique_ptr<unsigned char[]> stack;
    bool begun = false;
    bool done = true;
    const Barrier* waiting = nullptr;
    unsigned seen = 0;
    unsigned cluster_seen = 0;
};

static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Block> blocks;
static std::size_t dynamic_bytes;
static Barrier cluster_barrier;
static Fiber* running;
static jmp_buf scheduler;
static sigjmp_buf fault;
static std::string error;
static void (*current_job)(void*);
static void* current_argument;
const Place* here;

void fail(const char* why) {
    error = why;
    _longjmp(scheduler, 2);
}

static void yield() {
    if (!_setjmp(running->resumption)) _longjmp(scheduler, 1);
}

static void release_if_full(Barrier& barrier) {
    if (barrier.arrived && barrier.arrived >= barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
}

static void wait_for(const Barrier& barrier, unsigned generation) {
    if (barrier.generation != generation) return;
    running->waiting = &barrier;
    running->seen = generation;
    yield();
    running->waiting = nullptr;
}

void arrive_and_wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    release_if_full(barrier);
    wait_for(barrier, generation);
}

void cluster_arrive() {
    running->cluster_seen = cluster_barrier.generation;
    ++cluster_barrier.arrived;
    release_if_full(cluster_barrier);
}

void cluster_wait() { wait_for(cluster_barrier, running->cluster_seen); }

static unsigned char* aligned(unsigned char* bytes) {
    return bytes + (kAlign - reinterpret_cast<std::uintptr_t>(bytes) % kAlign) % kAlign;
}

// Shared memory begins as NaN in every format, so that what was never written is seen.
void* static_bytes(const void* name, std::size_t bytes) {
    auto& statics = running->block->statics;
    for (auto& [known, memory] : statics)
        if (known == name) return aligned(memory.get());
    statics.emplace_back(name, new unsigned char[bytes + kAlign]);
    std::memset(statics.back().second.get(), 0xff, bytes + kAlign);
    return aligned(statics.back().second.get());
}

unsigned char* remote_bytes(const void* own, unsigned rank) {
    if (rank >= blocks.size()) fail("shared memory of a block beyond the cluster");
    if (!blocks[rank].live) fail("shared memory of a block that has ended");
    const auto offset = std::size_t(static_cast<const unsigned char*>(own) - running->block->dynamic);
    if (offset >= dynamic_bytes) fail("an address of another block that is not dynamic shared memory");
    return blocks[rank].dynamic + offset;
}

static void fiber_main() {
    for (;;) {
        current_job(current_argument);
        running->done = true;
        --running->block->live;
        for (Barrier* barrier : {&running->block->barrier, &running->place.warp->barrier, &cluster_barrier}) {
            --barrier->expected;
            release_if_full(*barrier);
        }
        yield();
    }
}

static void resume(Fiber& fiber) {
    running = &fiber;
    here = &fiber.place;
    if (fiber.begun) _longjmp(fiber.resumption, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
}

static bool ready(const Fiber& fiber) {
    return !fiber.done && (!fiber.waiting || fiber.waiting->generation != fiber.seen);
}

static std::string where() {
    const uint3 block = here->block;
    return "thread " + std::to_string(here->thread) + " of block (" + std::to_string(block.x) + ", " +
           std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
}

// Runs every fiber to its end. order: 0 first to last, 1 last to first, more: shuffled in every round, by this seed.
// Locals are static: they must survive the jumps.
static void schedule(unsigned count, unsigned order) {
    static std::vector<unsigned> places;
    static std::mt19937 random;
    static unsigned at, remaining;
    static bool progressed;
    places.resize(count);
    for (unsigned i = 0; i < count; ++i) places[i] = order == 1 ? count - 1 - i : i;
    random.seed(order);
    remaining = count;
    while (remaining) {
        if (order > 1) std::shuffle(places.begin(), places.end(), random);
        progressed = false;
        for (at = 0; at < count; ++at) {
            if (!ready(*fibers[places[at]])) continue;
            progressed = true;
            const int back = _setjmp(scheduler);
            if (back == 0) resume(*fibers[places[at]]);
            if (back == 2) {
                error = where() + ": " + error;
                return;
            }
            remaining -= fibers[places[at]]->done;
        }
        if (remaining && !progressed) {
            error = std::to_string(remaining) + " of " + std::to_string(count) +
                    " threads wait at a barrier that the others never reach";
            return;
        }
    }
}

// The blocks of a cluster, from `first` on.
static void place(const Launch& how, uint3 first) {
    const unsigned count = how.block * how.cluster;
    blocks.clear();
    blocks.resize(how.cluster);
    cluster_barrier = Barrier{count, 0, 0};
    while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned rank = 0; rank < how.cluster; ++rank) {
        Block& block = blocks[rank];
        block.live = block.barrier.expected = how.block;
        block.warps.resize((how.block + kWarp - 1) / kWarp);
        for (unsigned w = 0; w < block.warps.size(); ++w)
            block.warps[w].barrier.expected = std::min<unsigned>(kWarp, how.block - w * kWarp);
        block.memory.assign(how.shared_bytes + kCanaryBytes + kAlign, 0xff);
        block.dynamic = aligned(block.memory.data());
        for (unsigned thread = 0; thread < how.block; ++thread) {
            Fiber& fiber = *fibers[rank * how.block + thread];
            fiber.block = &block;
            fiber.place = {{first.x + rank, first.y, first.z}, thread, rank, &block.warps[thread / kWarp],
                           &block.barrier, block.dynamic};
            fiber.done = false;
            fiber.waiting = nullptr;
        }
    }
}

static void check_shared(const Launch& how) {
    for (const Block& block : blocks)
        for (std::size_t i = 0; i < kCanaryBytes; ++i)
            if (block.dynamic[how.shared_bytes + i] != 0xff) error = "shared memory is written beyond shared_bytes";
}

// A copy of a tensor whose last byte (to 16) lies before an unreadable page.
struct Guarded {
    unsigned char* map = nullptr;
    std::size_t mapped = 0;
    unsigned char* data = nullptr;
    void* original = nullptr;
    std::size_t bytes = 0;

    void* open(void* pointer, std::size_t size) {
        const std::size_t page = sysconf(_SC_PAGESIZE);
        const std::size_t room = (size + 15) / 16 * 16;
        mapped = (room + page - 1) / page * page + 2 * page;
        map = static_cast<unsigned char*>(
            mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        bytes = size;
        original = pointer;
        data = map + mapped - page - room;
        std::memcpy(data, original, bytes);
        mprotect(map, page, PROT_NONE);
        mprotect(map + mapped - page, page, PROT_NONE);
        return data;
    }
    void close() {
        if (!map) return;
        std::memcpy(original, data, bytes);
        munmap(map, mapped);
    }
};

static void on_fault(int) { siglongjmp(fault, 1); }

// Every cluster of the grid, one after the other.
static void run_grid(const Launch& how) {
    static uint3 first;
    for (first.z = 0; first.z < how.grid.z; ++first.z)
        for (first.y = 0; first.y < how.grid.y; ++first.y)
            for (first.x = 0; first.x < how.grid.x; first.x += how.cluster) {
                place(how, first);
                schedule(how.block * how.cluster, how.order);
                if (error.empty()) check_shared(how);
                if (!error.empty()) return;
            }
}

static std::string mismatch(const Parameter* parameters, unsigned expected, const Argument* arguments, unsigned count) {
    if (count != expected) return std::to_string(count) + " arguments for " + std::to_string(expected) + " parameters";
    for (unsigned i = 0; i < count; ++i) {
        const Argument& given = arguments[i];
        const Parameter& wanted = parameters[i];
        if (given.kind != wanted.kind || (given.kind != 'p' && given.bytes != wanted.bytes))
            return "argument " + std::to_string(i) + " is " + given.kind + std::to_string(given.bytes) +
                   ", the parameter " + wanted.kind + std::to_string(wanted.bytes);
    }
    return "";
}

const char* execute(const Launch& how, const Parameter* parameters, unsigned expected, Argument* arguments,
                    unsigned count, void (*job)(void*), void* job_argument) {
    error = mismatch(parameters, expected, arguments, count);
    if (error.empty() && how.grid.x % how.cluster) error = "the grid is no multiple of the cluster";
    if (!error.empty()) return error.c_str();
    std::vector<Guarded> guarded(count);
    for (unsigned i = 0; i < count; ++i)
        if (arguments[i].tensor) arguments[i].tensor = guarded[i].open(arguments[i].tensor, arguments[i].bytes);
    current_job = job;
    current_argument = job_argument;
    blockDim = {how.block, 1, 1};
    gridDim = how.grid;
    dynamic_bytes = how.shared_bytes;
    struct sigaction handler {}, segv, bus;
    handler.sa_handler = on_fault;
    sigaction(SIGSEGV, &handler, &segv);
    sigaction(SIGBUS, &handler, &bus);
    if (sigsetjmp(fault, 1))
        error = where() + " reaches beyond a tensor's memory";
    else
        run_grid(how);
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    // Fibers that a failure stopped half-way begin anew.
    if (!error.empty()) fibers.clear();
    for (Guarded& one : guarded) one.close();
    return error.c_str();
}

}  // namespace host_cuda
#endif
