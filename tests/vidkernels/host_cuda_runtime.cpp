// The fibers, barriers and guarded memory behind host_cuda.h: one library, which those of the kernels are linked to.

#include "host_cuda.h"

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
