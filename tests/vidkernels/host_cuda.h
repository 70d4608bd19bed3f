// CUDA C++ on a CPU: what host_cuda.py puts before a .cu file so that g++ compiles the same text that NVRTC compiles.
//
// Every CUDA thread is a fiber of one operating-system thread; it runs until it waits at a barrier (of its warp, block
// or cluster) or ends. The order in which waiting fibers go on is chosen by the caller: a barrier that is missing gives
// wrong results in one order or another, every time. Memory beyond a tensor's last byte is unreadable.

#pragma once
#define VIDKERNELS_HOST 1

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

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

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kCanaryBytes = 256;
constexpr int kWarp = 32;
constexpr int kSlotBytes = 64;

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;

    void release_if_full() {
        if (arrived && arrived >= expected) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Warp {
    Barrier barrier;
    // Two slots for each lane: a lane writes the next value while others still read the last one.
    alignas(16) unsigned char slots[2][kWarp][kSlotBytes];
};

struct Block {
    uint3 index{};
    unsigned rank = 0;
    unsigned live = 0;
    Barrier barrier;
    std::vector<Warp> warps;
    unsigned char* dynamic = nullptr;
    std::size_t dynamic_bytes = 0;
    std::vector<std::pair<const void*, std::unique_ptr<unsigned char[]>>> statics;
};

struct Fiber {
    ucontext_t start;
    jmp_buf place;
    std::unique_ptr<unsigned char[]> stack;
    bool begun = false;
    bool done = true;
    Block* block = nullptr;
    unsigned thread = 0;
    const Barrier* waiting = nullptr;
    unsigned seen = 0;
    unsigned cluster_seen = 0;
};

struct State {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Block> blocks;
    Barrier cluster;
    Fiber* running = nullptr;
    jmp_buf scheduler;
    sigjmp_buf fault;
    std::string error;
    void (*job)(void*) = nullptr;
    void* job_argument = nullptr;
};

static State state;

[[noreturn]] static void fail(const std::string& why) {
    state.error = why;
    _longjmp(state.scheduler, 2);
}

static void yield() {
    if (!_setjmp(state.running->place)) _longjmp(state.scheduler, 1);
}

static void wait_for(const Barrier& barrier, unsigned generation) {
    if (barrier.generation != generation) return;
    state.running->waiting = &barrier;
    state.running->seen = generation;
    yield();
    state.running->waiting = nullptr;
}

static void arrive_and_wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_full();
    wait_for(barrier, generation);
}

static Warp& warp() { return state.running->block->warps[state.running->thread / kWarp]; }
static unsigned lane() { return state.running->thread % kWarp; }

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
    Warp& mine = warp();
    if (mine.barrier.expected != kWarp) fail("a warp of less than 32 live threads exchanges values");
    const unsigned parity = mine.barrier.generation & 1;
    std::memcpy(mine.slots[parity][lane()], &value, sizeof(T));
    arrive_and_wait(mine.barrier);
    return {&mine, parity};
}

template <class T>
static T* dynamic_shared() {
    return reinterpret_cast<T*>(state.running->block->dynamic);
}

template <class T>
static T& static_shared(T& name) {
    constexpr std::size_t align = 128;
    auto& statics = state.running->block->statics;
    auto found = std::find_if(statics.begin(), statics.end(), [&](auto& one) { return one.first == &name; });
    if (found == statics.end()) {
        statics.emplace_back(&name, new unsigned char[sizeof(T) + align]);
        found = statics.end() - 1;
        std::memset(found->second.get(), 0xff, sizeof(T) + align);
    }
    auto address = reinterpret_cast<std::uintptr_t>(found->second.get());
    return *reinterpret_cast<T*>((address + align - 1) / align * align);
}

// barrier.cluster.arrive.release, barrier.cluster.wait.acquire, %cluster_ctarank and mapa.
static void cluster_arrive() {
    state.running->cluster_seen = state.cluster.generation;
    ++state.cluster.arrived;
    state.cluster.release_if_full();
}
static void cluster_wait() { wait_for(state.cluster, state.running->cluster_seen); }
static unsigned cluster_rank() { return state.running->block->rank; }
template <class T>
static T* remote_shared(T* own, unsigned rank) {
    if (rank >= state.blocks.size()) fail("shared memory of block " + std::to_string(rank) + ", beyond the cluster");
    const Block& other = state.blocks[rank];
    if (!other.live) fail("shared memory of a block that has ended");
    const auto offset = std::size_t(reinterpret_cast<const unsigned char*>(own) - state.running->block->dynamic);
    if (offset >= other.dynamic_bytes) fail("an address of another block that is not dynamic shared memory");
    return reinterpret_cast<T*>(other.dynamic + offset);
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
        operator unsigned() const { return state.running->thread; }
    } x;
    struct Zero {
        operator unsigned() const { return 0; }
    } y, z;
};
struct BlockIndex {
    struct X {
        operator unsigned() const { return state.running->block->index.x; }
    } x;
    struct Y {
        operator unsigned() const { return state.running->block->index.y; }
    } y;
    struct Z {
        operator unsigned() const { return state.running->block->index.z; }
    } z;
};

}  // namespace host_cuda

static const host_cuda::ThreadIndex threadIdx{};
static const host_cuda::BlockIndex blockIdx{};
static uint3 blockDim{}, gridDim{};
static const int warpSize = host_cuda::kWarp;

static inline void __syncthreads() { host_cuda::arrive_and_wait(host_cuda::state.running->block->barrier); }
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

static void leave(Fiber& fiber) {
    Block& block = *fiber.block;
    fiber.done = true;
    --block.live;
    for (Barrier* barrier : {&block.barrier, &block.warps[fiber.thread / kWarp].barrier, &state.cluster}) {
        --barrier->expected;
        barrier->release_if_full();
    }
}

static void fiber_main() {
    for (;;) {
        state.job(state.job_argument);
        leave(*state.running);
        yield();
    }
}

static void resume(Fiber& fiber) {
    state.running = &fiber;
    if (fiber.begun) _longjmp(fiber.place, 1);
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
    const Fiber& fiber = *state.running;
    const uint3 block = fiber.block->index;
    return "thread " + std::to_string(fiber.thread) + " of block (" + std::to_string(block.x) + ", " +
           std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
}

// Runs every fiber to its end. order: 0 first to last, 1 last to first, more: shuffled anew in every round, by this seed.
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
            Fiber& fiber = *state.fibers[places[at]];
            if (!ready(fiber)) continue;
            progressed = true;
            const int back = _setjmp(state.scheduler);
            if (back == 0) resume(fiber);
            if (back == 2) {
                state.error = where() + ": " + state.error;
                return;
            }
            remaining -= state.fibers[places[at]]->done;
        }
        if (remaining && !progressed) {
            state.error = std::to_string(remaining) + " of " + std::to_string(count) +
                          " threads wait at a barrier that the others never reach";
            return;
        }
    }
}

static void on_fault(int) { siglongjmp(state.fault, 1); }

// A copy of a tensor whose last byte (to 16) lies before an unreadable page.
struct Guarded {
    unsigned char* map = nullptr;
    std::size_t mapped = 0, bytes = 0;
    unsigned char* data = nullptr;
    void* original = nullptr;

    void open(void* pointer, std::size_t size) {
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
    }
    void close() {
        if (!map) return;
        std::memcpy(original, data, bytes);
        munmap(map, mapped);
    }
};

struct Argument {
    const void* value;    // of a number
    void* tensor;         // or the first element of a tensor
    std::size_t bytes;    // of the number, or of the tensor
    char kind;            // p, i or f
};

template <class T>
static T value_of(const Argument& argument, Guarded& guarded) {
    T value;
    if (argument.tensor) {
        void* pointer = guarded.data;
        std::memcpy(&value, &pointer, sizeof(T));
    } else {
        std::memcpy(&value, argument.value, sizeof(T));
    }
    return value;
}

template <class T>
static std::string mismatch(const Argument& argument, int number) {
    const char kind = std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : 'i';
    const bool fits = argument.kind == kind && (kind == 'p' || argument.bytes == sizeof(T));
    if (fits) return "";
    return "argument " + std::to_string(number) + " is " + argument.kind + std::to_string(argument.bytes) +
           ", the parameter " + kind + std::to_string(sizeof(T));
}

template <class... P, std::size_t... I>
static std::string launch_with(
    void (*kernel)(P...), const Argument* arguments, uint3 grid, unsigned block, unsigned cluster,
    std::size_t shared_bytes, unsigned order, std::index_sequence<I...>) {
    std::string wrong;
    (void)std::initializer_list<int>{(wrong.empty() ? (wrong = mismatch<P>(arguments[I], int(I)), 0) : 0)...};
    if (!wrong.empty()) return wrong;
    if (grid.x % cluster) return "the grid is no multiple of the cluster";

    std::vector<Guarded> guarded(sizeof...(P) + 1);
    (void)std::initializer_list<int>{
        (arguments[I].tensor ? (guarded[I].open(arguments[I].tensor, arguments[I].bytes), 0) : 0)...};
    std::tuple<P...> values{value_of<P>(arguments[I], guarded[I])...};
    struct Job {
        void (*kernel)(P...);
        std::tuple<P...>* values;
    } job{kernel, &values};
    state.job = [](void* argument) {
        auto& job = *static_cast<Job*>(argument);
        std::apply(job.kernel, *job.values);
    };
    state.job_argument = &job;
    state.error.clear();
    blockDim = {block, 1, 1};
    gridDim = grid;
    const unsigned count = block * cluster;
    while (state.fibers.size() < count) state.fibers.push_back(std::make_unique<Fiber>());
    std::vector<std::vector<unsigned char>> memory(cluster);

    struct sigaction handler {}, segv, bus;
    handler.sa_handler = on_fault;
    sigaction(SIGSEGV, &handler, &segv);
    sigaction(SIGBUS, &handler, &bus);
    static uint3 first;
    if (sigsetjmp(state.fault, 1)) {
        state.error = where() + " reaches beyond a tensor's memory";
    } else {
        for (first.z = 0; first.z < grid.z && state.error.empty(); ++first.z)
            for (first.y = 0; first.y < grid.y && state.error.empty(); ++first.y)
                for (first.x = 0; first.x < grid.x && state.error.empty(); first.x += cluster) {
                    state.blocks.clear();
                    state.blocks.resize(cluster);
                    state.cluster = Barrier{count, 0, 0};
                    for (unsigned rank = 0; rank < cluster; ++rank) {
                        Block& mine = state.blocks[rank];
                        mine.index = {first.x + rank, first.y, first.z};
                        mine.rank = rank;
                        mine.live = block;
                        mine.barrier.expected = block;
                        mine.warps.resize((block + kWarp - 1) / kWarp);
                        for (unsigned w = 0; w < mine.warps.size(); ++w)
                            mine.warps[w].barrier.expected = std::min<unsigned>(kWarp, block - w * kWarp);
                        // NaN in every format, so that what was never written is seen.
                        memory[rank].assign(shared_bytes + kCanaryBytes + 1024, 0xff);
                        auto address = reinterpret_cast<std::uintptr_t>(memory[rank].data());
                        mine.dynamic = memory[rank].data() + (1024 - address % 1024) % 1024;
                        mine.dynamic_bytes = shared_bytes;
                        for (unsigned thread = 0; thread < block; ++thread) {
                            Fiber& fiber = *state.fibers[rank * block + thread];
                            fiber.block = &mine;
                            fiber.thread = thread;
                            fiber.done = false;
                            fiber.waiting = nullptr;
                        }
                    }
                    schedule(count, order);
                    for (unsigned rank = 0; rank < cluster && state.error.empty(); ++rank)
                        for (std::size_t i = 0; i < kCanaryBytes; ++i)
                            if (state.blocks[rank].dynamic[shared_bytes + i] != 0xff)
                                state.error = "shared memory is written beyond shared_bytes";
                }
    }
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    // Fibers that a failure stopped half-way begin anew.
    if (!state.error.empty()) state.fibers.clear();
    for (auto& one : guarded) one.close();
    return state.error;
}

template <class... P>
static const char* launch(
    void (*kernel)(P...), const Argument* arguments, unsigned count, const unsigned* grid, unsigned block,
    unsigned cluster, std::size_t shared_bytes, unsigned order) {
    static std::string error;
    if (count != sizeof...(P))
        error = std::to_string(count) + " arguments for " + std::to_string(sizeof...(P)) + " parameters";
    else
        error = launch_with(kernel, arguments, uint3{grid[0], grid[1], grid[2]}, block, cluster, shared_bytes, order,
                            std::index_sequence_for<P...>{});
    return error.c_str();
}

}  // namespace host_cuda
