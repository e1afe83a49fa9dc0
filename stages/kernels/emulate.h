// Runs CUDA kernels on the CPU, one block after the other, so that their arithmetic, indexing and
// barriers can be tested where there is no GPU. Slow; x86-64 and aarch64 through ucontext elsewhere.
//
// Every thread of a block is a fiber. Fibers run one at a time, a warp as far as it can get, and change at
// barriers, shuffles and matrix instructions only. After every barrier they start anew from the first, so that
// two threads that no barrier orders come one way round in rising order and the other way round in falling
// order (emulate::Order): tests run several orders and ask for equal bits. Shared memory starts poisoned (NaN
// in every type). Asynchronous copies happen as late as the program allows, or at once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>
#include <sys/mman.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static const
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

namespace emulate {

struct Barrier {
  int count = 0;  // who waits
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  int live = 0;
  // What lanes hand in to a collective, and get back.
  const void* given[32] = {};
  void* wanted[32] = {};
};

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  int linear = 0;
  bool done = false;
  Warp* warp = nullptr;
  // The barrier it waits at, and that barrier's generation then.
  Barrier* barrier = nullptr;
  uint64_t generation = 0;
  const char* place = "";
  std::deque<std::vector<Copy>> copies;
  std::vector<Copy> open;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int live = 0;
  dim3 index, dims, grid;
  char* shared = nullptr;
  void* main = nullptr;
  Fiber* current = nullptr;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  int step = 1;
};

inline thread_local Block* block = nullptr;
// How a launch runs, a sum of these. 0: threads in rising order, copies as late as can be.
enum Order { FALLING = 1, COPY_AT_ONCE = 2, ORDERS = 4 };
inline thread_local int order = 0;

// Saves the callee's registers on the old stack, takes those of the new one.
#if defined(__x86_64__)
extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.text
.weak emulate_switch
.type emulate_switch,@function
emulate_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulate_switch, .-emulate_switch
)");
#else
#error "the emulator of kernels needs x86-64"
#endif

constexpr size_t STACK = 256 << 10;

inline void leave_to(Fiber* next) {
  Fiber* self = block->current;
  if (next == self) return;
  block->current = next;
  emulate_switch(&self->stack_pointer, next->stack_pointer);
}

inline bool can_run(const Fiber& fiber) {
  return !fiber.done && (!fiber.barrier || fiber.barrier->generation != fiber.generation);
}

// The first of fibers `from`..`to` that can run, in the order of this launch.
inline Fiber* first_of(int from, int to) {
  bool rising = block->step > 0;
  for (int i = rising ? from : to - 1; i >= from && i < to; i += block->step)
    if (can_run(block->fibers[i])) return &block->fibers[i];
  return nullptr;
}

// Who goes on when `self` waits or is done: after a barrier of the block its first thread; else lanes of the
// same warp, then the first warp that can. Null when all are done. Where nobody can go on a barrier is missing
// a thread: says so.
inline Fiber* following(Fiber* self, bool anew) {
  int all = int(block->fibers.size()), first = self->linear / 32 * 32, neighbour = self->linear + block->step;
  Fiber* next = nullptr;
  if (!anew && !can_run(*self) && neighbour / 32 * 32 == first && neighbour >= 0 && neighbour < all &&
      can_run(block->fibers[neighbour]))
    return &block->fibers[neighbour];
  if (!anew) next = first_of(first, first + 32 < all ? first + 32 : all);
  if (!next) next = first_of(0, all);
  if (!next && block->live > 0) {
    for (auto& fiber : block->fibers)
      if (!fiber.done) fprintf(stderr, "emulated kernel: thread %d waits for ever at %s\n", fiber.linear, fiber.place);
    abort();
  }
  return next;
}

// Lets the barrier's threads go if all have come.
inline bool release(Barrier& barrier, int live) {
  if (live == 0 || barrier.count != live) return false;
  barrier.count = 0;
  barrier.generation++;
  return true;
}

inline void wait(Barrier& barrier, int& live, const char* what) {
  Fiber* self = block->current;
  self->barrier = &barrier;
  self->generation = barrier.generation;
  self->place = what;
  barrier.count++;
  bool released = release(barrier, live);
  leave_to(following(self, released && &barrier == &block->barrier));
}

// All live lanes of a warp hand in `in` and get `out`; the last to come does the work of all at once.
template <class Work> void collective(const void* in, void* out, Work work) {
  Fiber* self = block->current;
  Warp& warp = *self->warp;
  int lane = self->linear % 32;
  warp.given[lane] = in;
  warp.wanted[lane] = out;
  if (warp.barrier.count + 1 == warp.live) work(warp.given, warp.wanted);
  wait(warp.barrier, warp.live, "a warp's collective");
}

inline void finish(Fiber* self) {
  for (auto& group : self->copies)
    for (auto& copy : group) (void)copy;
  self->done = true;
  block->live--;
  self->warp->live--;
  bool anew = release(block->barrier, block->live);
  release(self->warp->barrier, self->warp->live);
  Fiber* next = following(self, anew);
  void* to = next ? next->stack_pointer : block->main;
  block->current = next;
  void* dead;
  emulate_switch(&dead, to);
}

inline void enter() {
  block->body(block->arguments);
  finish(block->current);
  abort();
}

inline char* stack_of(int i) {
  static thread_local std::vector<char*> stacks;
  while (int(stacks.size()) <= i) {
    void* at = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks.push_back(static_cast<char*>(at));
  }
  return stacks[i];
}

inline void run_block(Block& b) {
  block = &b;
  int n = int(b.fibers.size());
  for (int i = 0; i < n; i++) {
    Fiber& fiber = b.fibers[i];
    fiber.linear = i;
    fiber.thread = {unsigned(i) % b.dims.x, unsigned(i) / b.dims.x % b.dims.y, unsigned(i) / (b.dims.x * b.dims.y)};
    fiber.warp = &b.warps[i / 32];
    fiber.warp->live++;
    fiber.stack = stack_of(i);
    auto top = reinterpret_cast<void**>(fiber.stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int r = 0; r < 6; r++) *--top = nullptr;
    fiber.stack_pointer = top;
  }
  b.live = n;
  b.current = &b.fibers[b.step > 0 ? 0 : n - 1];
  emulate_switch(&b.main, b.current->stack_pointer);
  block = nullptr;
}

inline void launch(void (*body)(void*), void* arguments, dim3 grid, dim3 dims, size_t shared) {
  static thread_local std::vector<char> memory;
  memory.assign(shared + 1024, 0);
  auto at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) & ~uintptr_t(1023));
  unsigned n = dims.x * dims.y * dims.z;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        Block b;
        b.fibers.resize(n);
        b.warps.resize((n + 31) / 32);
        b.index = {x, y, z};
        b.dims = dims;
        b.grid = grid;
        memset(at, 0xff, shared);
        b.shared = at;
        b.body = body;
        b.arguments = arguments;
        b.step = order & FALLING ? -1 : 1;
        run_block(b);
      }
}

using Entry = void (*)(void**);
inline std::map<std::string, Entry>& kernels() {
  static std::map<std::string, Entry> all;
  return all;
}
template <auto F> struct Call;
template <class... A, void (*F)(A...)> struct Call<F> {
  template <size_t... I> static void invoke(void** args, std::index_sequence<I...>) {
    F(*static_cast<std::remove_const_t<A>*>(args[I])...);
  }
  static void entry(void** args) { invoke(args, std::index_sequence_for<A...>{}); }
};
struct Registration {
  Registration(const char* name, Entry entry) { kernels()[name] = entry; }
};

}  // namespace emulate

#define threadIdx (emulate::block->current->thread)
#define blockIdx (emulate::block->index)
#define blockDim (emulate::block->dims)
#define gridDim (emulate::block->grid)

inline void __syncthreads() { emulate::wait(emulate::block->barrier, emulate::block->live, "__syncthreads"); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  auto& warp = *emulate::block->current->warp;
  emulate::wait(warp.barrier, warp.live, "__syncwarp");
}
inline void __threadfence() {}

namespace emulate {
template <class T, class Pick> T shuffle(T value, Pick pick) {
  T result = value;
  int lane = block->current->linear % 32;
  int source = pick(lane);
  struct In { T value; int source; } in{value, source};
  collective(&in, &result, [](const void** given, void** wanted) {
    int live = 32;
    for (int l = 0; l < live; l++) {
      if (!given[l]) continue;
      auto own = static_cast<const In*>(given[l]);
      auto from = own->source >= 0 && own->source < 32 ? given[own->source] : nullptr;
      if (from) *static_cast<T*>(wanted[l]) = static_cast<const In*>(from)->value;
    }
  });
  return result;
}
}  // namespace emulate
template <class T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulate::shuffle(value, [=](int lane) { return lane ^ mask; });
}
template <class T> T __shfl_down_sync(unsigned, T value, int delta, int = 32) {
  return emulate::shuffle(value, [=](int lane) { return lane + delta < 32 ? lane + delta : lane; });
}
template <class T> T __shfl_up_sync(unsigned, T value, int delta, int = 32) {
  return emulate::shuffle(value, [=](int lane) { return lane >= delta ? lane - delta : lane; });
}
template <class T> T __shfl_sync(unsigned, T value, int source, int = 32) {
  return emulate::shuffle(value, [=](int) { return source & 31; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned bits = 0;
  int given = predicate != 0;
  emulate::collective(&given, &bits, [](const void** in, void** out) {
    unsigned all = 0;
    for (int l = 0; l < 32; l++)
      if (in[l] && *static_cast<const int*>(in[l])) all |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (out[l]) *static_cast<unsigned*>(out[l]) = all;
  });
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  int no = __ballot_sync(mask, !predicate) != 0;
  return !no;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
inline int max(int a, unsigned b) { return a > int(b) ? a : int(b); }
