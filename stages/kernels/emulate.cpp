// What Rust calls of the emulator.
#include "emulate.h"

namespace {
struct Run {
  emulate::Entry entry;
  void** arguments;
};
}  // namespace

// 0: done; 1: there is no such kernel.
extern "C" int pipe_emulate_launch(const char* name, const unsigned* grid, const unsigned* block, uint64_t shared,
                                   void** arguments, int order) {
  auto& all = emulate::kernels();
  auto found = all.find(name);
  if (found == all.end()) return 1;
  Run run{found->second, arguments};
  auto body = [](void* p) {
    auto run = static_cast<Run*>(p);
    run->entry(run->arguments);
  };
  emulate::order = order;
  emulate::launch(body, &run, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared);
  return 0;
}
