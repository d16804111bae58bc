#include "emulation.h"

#include <sys/mman.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SEMKV_FIBER_LEAVE(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define SEMKV_FIBER_ENTER(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define SEMKV_FIBER_LEAVE(save, bottom, size)
#define SEMKV_FIBER_ENTER(saved, bottom, size)
#endif

#if defined(__x86_64__)
// swapcontext makes two system calls a switch, and a shuffle is a switch for every lane.
extern "C" void semkvEmulationSwitch(void** save, void* load);
asm(R"(
.text
.local semkvEmulationSwitch
.type semkvEmulationSwitch,@function
semkvEmulationSwitch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size semkvEmulationSwitch,.-semkvEmulationSwitch
)");
#else
#include <ucontext.h>
#endif

// The names of the coordinate macros are also names of fields here.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace semkv::emulation
{
namespace
{
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpSize = 32;
constexpr size_t kSharedBytesUnasked = 48 * 1024;

[[noreturn]] void fail(char const* what)
{
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

enum class State
{
    kReady,
    kAtBlockBarrier,
    kAtWarpBarrier,
    kDone,
};

struct Fiber
{
    Coordinates at{};
    Place place{"", 0};
    State state{State::kDone};
    unsigned exchanges{0};
    unsigned blockBarriers{0};
    unsigned char* stack{nullptr};
    void* fakeStack{nullptr};
#if defined(__x86_64__)
    void* pointer{nullptr};
#else
    ucontext_t context{};
#endif
};

struct Warp
{
    LaneWords words[2][kWarpSize];
    int arrived{0};
    int lanes{0};
    Place meeting{"", 0};
};

struct Machine
{
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Fiber* running{nullptr};
    Fiber scheduler;
    void const* schedulerStack{nullptr};
    size_t schedulerStackBytes{0};
    std::function<void()> const* kernel{nullptr};
    std::unique_ptr<unsigned char[]> shared;
    unsigned char* sharedBegin{nullptr};
    int threads{0};
    int atBlockBarrier{0};
    Place meeting{"", 0};
    std::vector<dim3> grids;
    int predicate[2]{0, 0};
    uint64_t seed{0};
};

Machine& machine()
{
    static Machine instance;
    return instance;
}

void switchTo(Fiber& from, Fiber& to)
{
    machine().running = &to;
#if defined(__x86_64__)
    semkvEmulationSwitch(&from.pointer, to.pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

void yield()
{
    Machine& m = machine();
    Fiber& self = *m.running;
    SEMKV_FIBER_LEAVE(&self.fakeStack, m.schedulerStack, m.schedulerStackBytes);
    switchTo(self, m.scheduler);
    SEMKV_FIBER_ENTER(self.fakeStack, nullptr, nullptr);
}

void fiberMain()
{
    Machine& m = machine();
    SEMKV_FIBER_ENTER(nullptr, &m.schedulerStack, &m.schedulerStackBytes);
    for (;;)
    {
        (*m.kernel)();
        m.running->state = State::kDone;
        yield();
    }
}

void resume(Fiber& fiber)
{
    Machine& m = machine();
    SEMKV_FIBER_LEAVE(&m.scheduler.fakeStack, fiber.stack, kStackBytes);
    switchTo(m.scheduler, fiber);
    SEMKV_FIBER_ENTER(m.scheduler.fakeStack, nullptr, nullptr);
}

std::unique_ptr<Fiber> makeFiber()
{
    auto fiber = std::make_unique<Fiber>();
    void* memory
        = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
    {
        fail("no memory for a thread's stack");
    }
    fiber->stack = static_cast<unsigned char*>(memory);
#if defined(__x86_64__)
    // The entry function must find the stack as after a call: 8 bytes below a multiple of 16.
    void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&fiberMain);
    for (int saved = 3; saved <= 8; ++saved)
    {
        top[-saved] = nullptr;
    }
    fiber->pointer = top - 8;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber->context, &fiberMain, 0);
#endif
    return fiber;
}

void releaseBlock()
{
    Machine& m = machine();
    m.atBlockBarrier = 0;
    for (int t = 0; t < m.threads; ++t)
    {
        m.fibers[static_cast<size_t>(t)]->state = State::kReady;
    }
}

// The first to arrive at a barrier says where it is; the others must be there, too.
void meet(Place& meeting, bool isFirst, char const* who)
{
    Place const& own = machine().running->place;
    meeting = isFirst ? own : meeting;
    if (own.line != meeting.line || std::strcmp(own.file, meeting.file) != 0)
    {
        std::fprintf(stderr, "emulation: %s meet at %s:%d and at %s:%d\n", who, meeting.file, meeting.line, own.file,
            own.line);
        std::abort();
    }
}

// Runs each lane of a warp that can, up to its next barrier: other warps get their turn between one collective and the
// next. Returns whether anything ran.
bool runWarp(int first, int last, std::vector<int> const& lanes)
{
    Machine& m = machine();
    bool ranAny = false;
    for (int const l : lanes)
    {
        if (first + l < last && m.fibers[static_cast<size_t>(first + l)]->state == State::kReady)
        {
            resume(*m.fibers[static_cast<size_t>(first + l)]);
            ranAny = true;
        }
    }
    return ranAny;
}

void runBlock(std::mt19937_64& random)
{
    Machine& m = machine();
    std::vector<int> lanes(kWarpSize);
    std::iota(lanes.begin(), lanes.end(), 0);
    std::vector<int> warps(m.warps.size());
    std::iota(warps.begin(), warps.end(), 0);
    for (;;)
    {
        if (m.seed != 0)
        {
            std::shuffle(lanes.begin(), lanes.end(), random);
            std::shuffle(warps.begin(), warps.end(), random);
        }
        bool ranAny = false;
        for (int const w : warps)
        {
            ranAny |= runWarp(w * kWarpSize, std::min((w + 1) * kWarpSize, m.threads), lanes);
        }
        if (!ranAny)
        {
            break;
        }
    }
    for (int t = 0; t < m.threads; ++t)
    {
        State const state = m.fibers[static_cast<size_t>(t)]->state;
        if (state == State::kAtBlockBarrier)
        {
            fail("__syncthreads was not reached by every thread of the block");
        }
        if (state == State::kAtWarpBarrier)
        {
            fail("a warp operation was not reached by every lane of the warp");
        }
    }
}
} // namespace

void setSchedule(uint64_t seed)
{
    machine().seed = seed;
}

Coordinates const& here()
{
    return machine().running->at;
}

unsigned char* sharedMemory()
{
    return machine().sharedBegin;
}

void enter(Place place)
{
    machine().running->place = place;
}

void blockBarrier()
{
    Machine& m = machine();
    meet(m.meeting, m.atBlockBarrier == 0, "threads of a block");
    m.running->state = State::kAtBlockBarrier;
    if (++m.atBlockBarrier == m.threads)
    {
        releaseBlock();
        return;
    }
    yield();
}

int blockBarrierOr(int predicate)
{
    Machine& m = machine();
    int& slot = m.predicate[m.running->blockBarriers++ & 1U];
    slot |= predicate != 0 ? 1 : 0;
    blockBarrier();
    int const result = slot;
    blockBarrier();
    slot = 0;
    return result;
}

void warpBarrier()
{
    Machine& m = machine();
    int const warpIndex = static_cast<int>(m.running->at.thread.x) / kWarpSize;
    Warp& warp = m.warps[static_cast<size_t>(warpIndex)];
    meet(warp.meeting, warp.arrived == 0, "lanes of a warp");
    m.running->state = State::kAtWarpBarrier;
    if (++warp.arrived == warp.lanes)
    {
        warp.arrived = 0;
        for (int l = 0; l < warp.lanes; ++l)
        {
            m.fibers[static_cast<size_t>(warpIndex * kWarpSize + l)]->state = State::kReady;
        }
        return;
    }
    yield();
}

LaneWords const* warpShare(LaneWords const& own)
{
    Machine& m = machine();
    Fiber& self = *m.running;
    Warp& warp = m.warps[self.at.thread.x / kWarpSize];
    // Two buffers: a lane can be one exchange ahead of the slowest reader, never two.
    LaneWords* const words = warp.words[self.exchanges++ & 1U];
    words[self.at.thread.x % kWarpSize] = own;
    warpBarrier();
    return words;
}

unsigned warpBallot(bool predicate)
{
    LaneWords const* const words = warpShare({{predicate ? 1U : 0U}});
    int const lanes = machine().warps[machine().running->at.thread.x / kWarpSize].lanes;
    unsigned ballot = 0;
    for (int l = 0; l < lanes; ++l)
    {
        ballot |= words[l].word[0] << l;
    }
    return ballot;
}

std::vector<dim3> takeGrids()
{
    std::vector<dim3> grids;
    grids.swap(machine().grids);
    return grids;
}

void launch(dim3 grid, dim3 block, size_t sharedBytes, std::function<void()> const& kernel)
{
    Machine& m = machine();
    if (block.y != 1 || block.z != 1 || block.x == 0 || block.x > 1024)
    {
        fail("block sizes are one-dimensional, 1 to 1024");
    }
    if (grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 || grid.z == 0)
    {
        fail("the grid is empty or larger than the hardware allows");
    }
    if (sharedBytes > kSharedBytesUnasked)
    {
        fail("more than 48 KiB of dynamic shared memory, which a kernel must ask for");
    }
    m.grids.push_back(grid);
    m.threads = static_cast<int>(block.x);
    m.kernel = &kernel;
    while (m.fibers.size() < block.x)
    {
        m.fibers.push_back(makeFiber());
    }
    m.warps.assign((block.x + kWarpSize - 1) / kWarpSize, Warp{});
    std::mt19937_64 random(m.seed);
    std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    if (m.seed != 0)
    {
        std::shuffle(order.begin(), order.end(), random);
    }
    for (uint64_t const index : order)
    {
        // A fresh exact allocation for each block: the address sanitizer sees an access past the end.
        m.shared.reset(new unsigned char[sharedBytes + 16]);
        auto const address = reinterpret_cast<uintptr_t>(m.shared.get());
        m.sharedBegin = m.shared.get() + (16 - address % 16) % 16;
        std::memset(m.shared.get(), 0xFF, sharedBytes + 16);
        for (unsigned t = 0; t < block.x; ++t)
        {
            Fiber& fiber = *m.fibers[t];
            fiber.at.thread = {t, 0, 0};
            fiber.at.block = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
            fiber.at.blockDim = block;
            fiber.at.gridDim = grid;
            fiber.state = State::kReady;
            fiber.exchanges = fiber.blockBarriers = 0;
        }
        for (size_t w = 0; w < m.warps.size(); ++w)
        {
            m.warps[w].arrived = 0;
            m.warps[w].lanes = std::min<int>(kWarpSize, m.threads - static_cast<int>(w) * kWarpSize);
        }
        m.atBlockBarrier = 0;
        m.predicate[0] = m.predicate[1] = 0;
        runBlock(random);
    }
    m.shared.reset();
}
} // namespace semkv::emulation
