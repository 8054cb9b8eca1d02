// Runs a kernel's grid on one CPU thread. Every CUDA thread is a fiber that gives way only where it waits for others,
// at a barrier or a shuffle. Of the warps that can go on, in a few blocks at a time, the one of the highest priority does:
// random priorities make orders that a GPU may make and seldom does (Burckhardt et al., "A randomized scheduler with
// probabilistic guarantees of finding bugs", ASPLOS 2010). What is undefined on a GPU ends the process with a message.
//
//   CUDA_EMULATION_MULTIPROCESSORS   what the device says it has; the launchers size their grids to it
//   CUDA_EMULATION_ORDER             forward: one block, warp, thread after the other; reverse; or a seed, from which
//                                    every launch draws priorities and orders of its own
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;  // of which a kernel touches a few pages; sanitizers make frames large
constexpr size_t kGuardBytes = 64 * 1024;   // a multiple of every page size
constexpr size_t kResidentBlocks = 4;       // blocks that take turns
constexpr size_t kSharedBytes = 48 * 1024;  // the most a block may have without asking for more

// ---- fibers ---------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
// swapcontext without its two system calls: keeps the registers that a call must keep on the stack it leaves.
using Context = void*;
extern "C" void cuda_emulation_switch(Context* from, Context to);
asm(R"(
  .text
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_emulation_switch, .-cuda_emulation_switch
)");

void switch_to(Context& from, Context& to) { cuda_emulation_switch(&from, to); }

void prepare(Context& context, char* stack, size_t bytes, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where start would return to; and a call leaves the stack so aligned
  *--top = reinterpret_cast<void*>(start);
  context = std::fill_n(top - 6, 6, nullptr) - 6;
}
#else
using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, size_t bytes, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}
#endif

struct Stack {
  char* memory;
  Stack() {
    memory = static_cast<char*>(
        mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      fail("no memory for the threads' stacks", Where::current());
    }
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(memory, kGuardBytes + kStackBytes); }
};

enum class State { ready, at_barrier, at_exchange, ended };

struct Wait {
  const char* what;
  Where where;
  unsigned int mask;
  int source;
  void* value;
  size_t bytes;
};

struct Thread {
  uint3 index;
  int lane;
  State state = State::ready;
  Wait wait{};
  Context context;
  std::unique_ptr<Stack> stack;
};

struct Warp {
  std::vector<Thread*> lanes;
  uint64_t priority = 0;
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
  size_t shared_bytes = 0;
};

// ---- the launch that runs -------------------------------------------------------------------------------------------

const char* kernel_name = "no kernel";
const Config* config = nullptr;
const std::function<void()>* body = nullptr;
Block* block = nullptr;
Thread* thread = nullptr;
Context scheduler;
std::mutex one_launch;
cudaError_t last_error = cudaSuccess;
std::map<std::string, std::pair<int64_t, int64_t>> counts;  // launches and most blocks of each kernel

std::vector<std::unique_ptr<Stack>> stacks;  // of threads that have ended

std::string place(const Where& where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

std::string name_of(const Block& b, const Thread& t) {
  char text[160];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", b.index.x, b.index.y, b.index.z,
                t.index.x, t.index.y, t.index.z);
  return text;
}

[[noreturn]] void stop(const std::string& text) {
  std::fprintf(stderr, "CUDA emulation: %s: %s\n", kernel_name, text.c_str());
  std::fflush(stderr);
  std::abort();
}

void give_way() { switch_to(thread->context, scheduler); }

void start() {
  (*body)();
  thread->state = State::ended;
  give_way();
}

void run(Block& b, Thread& t) {
  block = &b;
  thread = &t;
  blockIdx = b.index;
  threadIdx = t.index;
  switch_to(scheduler, t.context);
  block = nullptr;
  thread = nullptr;
  if (t.state == State::ended) stacks.push_back(std::move(t.stack));
}

// ---- orders ---------------------------------------------------------------------------------------------------------

struct Order {
  enum { forward, reverse, random } kind;
  std::mt19937_64 draw;

  Order() {
    const char* wish = std::getenv("CUDA_EMULATION_ORDER");
    const std::string text = wish == nullptr ? "forward" : wish;
    kind = text == "forward" ? forward : text == "reverse" ? reverse : random;
    if (kind == random) draw.seed(std::strtoull(text.c_str(), nullptr, 10));
  }

  template <class T>
  void arrange(std::vector<T>& items) {
    if (kind == reverse) std::reverse(items.begin(), items.end());
    if (kind == random) std::shuffle(items.begin(), items.end(), draw);
  }

  // For the warps of the n-th block to start, then again behind each barrier. The largest runs first.
  void set_priorities(Block& b, int64_t n) {
    for (size_t w = 0; w < b.warps.size(); ++w) {
      const uint64_t last = ~static_cast<uint64_t>(n) << 10;
      b.warps[w].priority = kind == random ? draw() : kind == reverse ? last + w : last + 1023 - w;
    }
  }
};

Order& order() {
  static Order one;
  return one;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

// Whether two waits are one in the source, what a barrier or shuffle needs.
bool same_place(const Wait& a, const Wait& b) {
  return a.what == b.what && a.where.line() == b.where.line() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

std::string state_of(const Block& b, const Thread& t) {
  if (t.state == State::ended) return name_of(b, t) + " has ended";
  return name_of(b, t) + " is at " + t.wait.what + ", " + place(t.wait.where);
}

// Lets the lanes go that wait in an exchange for which every lane named in the mask is there.
void finish_exchanges(Block& b, Warp& warp) {
  for (Thread* first : warp.lanes) {
    if (first->state != State::at_exchange) continue;
    const Wait wait = first->wait;
    std::vector<Thread*> members;
    bool all = true;  // are there
    for (int i = 0; i < kWarp; ++i) {
      if ((wait.mask >> i & 1u) == 0) continue;
      if (i >= static_cast<int>(warp.lanes.size())) {
        stop(state_of(b, *first) + ", whose mask names lanes that the block does not have");
      }
      Thread* t = warp.lanes[i];
      all = all && t->state == State::at_exchange && t->wait.mask == wait.mask && same_place(t->wait, wait);
      members.push_back(t);
    }
    if (!all) continue;
    uint64_t values[kWarp] = {};
    for (const Thread* t : members) std::memcpy(&values[t->lane], t->wait.value, t->wait.bytes);
    for (Thread* t : members) {
      if ((wait.mask >> t->wait.source & 1u) == 0) {
        stop(state_of(b, *t) + ", and reads a lane that its mask does not name");
      }
      std::memcpy(t->wait.value, &values[t->wait.source], t->wait.bytes);
      t->state = State::ready;
    }
  }
}

bool is_ready(const Warp& warp) {
  return std::any_of(warp.lanes.begin(), warp.lanes.end(), [](const Thread* t) { return t->state == State::ready; });
}

// Runs a warp until each of its threads waits for another warp or has ended.
void run_warp(Block& b, Warp& warp) {
  std::vector<Thread*> lanes = warp.lanes;
  order().arrange(lanes);
  while (is_ready(warp)) {
    for (Thread* t : lanes) {
      if (t->state == State::ready) run(b, *t);
    }
    finish_exchanges(b, warp);
  }
}

// Lets the threads go where all of the block's have reached the same barrier; true where all have ended.
bool finish_barrier(Block& b, int64_t n) {
  if (std::any_of(b.warps.begin(), b.warps.end(), is_ready)) return false;
  const Thread* some = nullptr;
  for (const Thread& t : b.threads) {
    if (t.state != State::ended) some = &t;
  }
  if (some == nullptr) return true;
  for (const Thread& t : b.threads) {
    if (t.state != State::at_barrier || !same_place(t.wait, some->wait)) {
      stop("threads wait for each other in vain: " + state_of(b, *some) + ", " + state_of(b, t));
    }
  }
  for (Thread& t : b.threads) t.state = State::ready;
  order().set_priorities(b, n);
  return false;
}

std::unique_ptr<Block> make_block(uint3 index, int64_t n) {
  auto b = std::make_unique<Block>();
  b->index = index;
  const dim3 size = config->block;
  b->threads.resize(static_cast<size_t>(size.x) * size.y * size.z);
  for (size_t i = 0; i < b->threads.size(); ++i) {
    Thread& t = b->threads[i];
    const unsigned int at = static_cast<unsigned int>(i);
    t.index = {at % size.x, at / size.x % size.y, at / size.x / size.y};
    t.lane = static_cast<int>(i % kWarp);
    if (i % kWarp == 0) b->warps.emplace_back();
    b->warps.back().lanes.push_back(&t);
    if (stacks.empty()) stacks.push_back(std::make_unique<Stack>());
    t.stack = std::move(stacks.back());
    stacks.pop_back();
    prepare(t.context, t.stack->memory + kGuardBytes, kStackBytes, start);
  }
  order().set_priorities(*b, n);
  return b;
}

void run_grid() {
  const dim3 grid = config->grid;
  std::vector<int64_t> waiting(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(waiting.begin(), waiting.end(), int64_t{0});
  order().arrange(waiting);

  struct Resident {
    std::unique_ptr<Block> block;
    int64_t n;
  };
  std::vector<Resident> resident;
  size_t next = 0;
  while (next < waiting.size() || !resident.empty()) {
    while (resident.size() < kResidentBlocks && next < waiting.size()) {
      const int64_t at = waiting[next], n = static_cast<int64_t>(next++);
      const uint3 index{static_cast<unsigned int>(at % grid.x), static_cast<unsigned int>(at / grid.x % grid.y),
                        static_cast<unsigned int>(at / grid.x / grid.y)};
      resident.push_back({make_block(index, n), n});
    }
    Resident* chosen = nullptr;
    Warp* warp = nullptr;
    for (Resident& r : resident) {
      for (Warp& w : r.block->warps) {
        if (is_ready(w) && (warp == nullptr || w.priority > warp->priority)) chosen = &r, warp = &w;
      }
    }
    run_warp(*chosen->block, *warp);
    if (!finish_barrier(*chosen->block, chosen->n)) continue;
    resident.erase(resident.begin() + (chosen - resident.data()));
  }
}

}  // namespace

void launch(const char* name, const Config& with, const std::function<void()>& each) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const dim3 g = with.grid, b = with.block;
  const uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535 || threads == 0 ||
      threads > 1024 || b.z > 64) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  kernel_name = name;
  config = &with;
  body = &each;
  blockDim = b;
  gridDim = g;
  auto& [launches, most] = counts[name];
  ++launches;
  most = std::max(most, static_cast<int64_t>(g.x) * g.y * g.z);
  run_grid();
  kernel_name = "no kernel";
}

void fail(const char* what, Where where) {
  stop((thread == nullptr ? "" : name_of(*block, *thread) + ": ") + what + ", " + place(where));
}

void barrier(Where where) {
  thread->wait = {"__syncthreads", where, 0, 0, nullptr, 0};
  thread->state = State::at_barrier;
  give_way();
}

int lane() { return thread->lane; }

void exchange(unsigned int mask, void* value, size_t bytes, int source, const char* what, Where where) {
  if ((mask >> lane() & 1u) == 0) fail("a shuffle whose mask does not name its own lane", where);
  thread->wait = {what, where, mask, source, value, bytes};
  thread->state = State::at_exchange;
  give_way();
}

void* shared_memory(const void* key, size_t bytes) {
  auto& memory = block->shared[key];
  if (memory == nullptr) {
    block->shared_bytes += bytes;
    if (block->shared_bytes > kSharedBytes) fail("more shared memory than a block may have", Where::current());
    memory.reset(new char[bytes]);  // aligned for 16 bytes, as any memory from new
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

void* dynamic_shared_memory() { return shared_memory(nullptr, config->shared_bytes); }

}  // namespace cuda_emulation

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  const char* wish = std::getenv("CUDA_EMULATION_MULTIPROCESSORS");
  *value = wish == nullptr ? 132 : std::atoi(wish);
  return device == 0 && *value > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

// One line a kernel: its name, launches, the most blocks of one.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulation_report() {
  static std::string text;
  text.clear();
  for (const auto& [name, count] : cuda_emulation::counts) {
    text += name + " " + std::to_string(count.first) + " " + std::to_string(count.second) + "\n";
  }
  return text.c_str();
}
