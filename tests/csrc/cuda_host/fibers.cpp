// Threads of a block as fibers on one thread of the machine. See include/cuda_runtime.h.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace cuda_host {

dim3 thread_index, block_index, grid_size, block_size;

namespace {

constexpr size_t kStack = 256 * 1024;
enum class State { ready, at_warp, at_block, done };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  State state = State::done;
  int line = 0;  // where it waits
};

std::vector<Fiber> fibers;
std::map<int, std::unique_ptr<char[]>> shared;  // one array per line that declares one: kernels do not share a header line
std::vector<std::pair<int, size_t>> declared;
alignas(16) char exchanged[1024 / 32][32][16];
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
const std::function<void()>* body = nullptr;
unsigned current = 0;
std::mt19937_64 random_source;

[[noreturn]] void fail(const char* what, unsigned thread, int line, unsigned other, int other_line) {
  fprintf(stderr, "cuda_host: %s: block %u, thread %u in line %d, thread %u in line %d (0: left the kernel)\n", what,
          block_index.x, thread, line, other, other_line);
  fflush(stderr);
  _exit(3);
}

void wait(State state, int line) {
  Fiber& self = fibers[current];
  self.state = state;
  self.line = line;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}

void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  (*body)();
  Fiber& self = fibers[current];
  self.state = State::done;
  self.line = 0;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
  setcontext(&scheduler);
}

void resume(unsigned thread) {
  current = thread;
  thread_index = {thread, 0, 0};
  fibers[thread].state = State::ready;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibers[thread].stack, kStack);
  swapcontext(&scheduler, &fibers[thread].context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// All of [first, last) wait in one line: true. All are done: false. Else it is an error.
bool meet(unsigned first, unsigned last, const char* what) {
  for (unsigned thread = first + 1; thread < last; ++thread)
    if (fibers[thread].state != fibers[first].state || fibers[thread].line != fibers[first].line)
      fail(what, first, fibers[first].line, thread, fibers[thread].line);
  return fibers[first].state != State::done;
}

void run_block(unsigned threads) {
  for (auto& [line, size] : declared) memset(shared[line].get(), 0xff, size);  // NaN
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    fiber.state = State::ready;
  }
  for (bool alive = true; alive;) {
    std::vector<unsigned> warps(threads / 32);
    for (unsigned warp = 0; warp < warps.size(); ++warp) warps[warp] = warp;
    std::shuffle(warps.begin(), warps.end(), random_source);
    for (const unsigned warp : warps) {  // up to its end or the block's next barrier
      for (bool more = true; more;) {
        unsigned order[32];
        for (unsigned lane = 0; lane < 32; ++lane) order[lane] = warp * 32 + lane;
        std::shuffle(order, order + 32, random_source);
        for (const unsigned thread : order) resume(thread);
        more = meet(warp * 32, warp * 32 + 32, "lanes of a warp part") && fibers[warp * 32].state == State::at_warp;
      }
    }
    alive = meet(0, threads, "a barrier that not all threads reach");
  }
}

}  // namespace

void* shared_memory(size_t bytes, int line) {
  auto& array = shared[line];
  if (!array) {
    array.reset(new char[bytes]);
    memset(array.get(), 0xff, bytes);
    declared.emplace_back(line, bytes);
  }
  return array.get();
}

void meet_warp(int line) { wait(State::at_warp, line); }
void meet_block(int line) { wait(State::at_block, line); }
void* exchange(int lane) { return exchanged[thread_index.x / 32][lane]; }
void seed(uint64_t value) { random_source.seed(value); }

void note(void (*kernel)()) {
  Dl_info found{};
  if (dladdr(reinterpret_cast<void*>(kernel), &found) != 0 && found.dli_sname != nullptr) puts(found.dli_sname);
}

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  while (fibers.size() < threads) {
    fibers.emplace_back();
    fibers.back().stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  shared.clear();  // arrays have the sizes of this kernel
  declared.clear();
  body = &kernel;
  grid_size = {blocks, 1, 1};
  block_size = {threads, 1, 1};
  std::vector<unsigned> order(blocks);
  for (unsigned block = 0; block < blocks; ++block) order[block] = block;
  std::shuffle(order.begin(), order.end(), random_source);
  for (const unsigned block : order) {
    block_index = {block, 0, 0};
    run_block(threads);
  }
}

}  // namespace cuda_host
