// What happens between the tokens of a batch of sequences, so that many turns run without the host: which token each
// sequence reads, which one it has chosen, and what it forgets. See src/gpu/decode/.
//
// given [turns, batch]: what sequence b reads in a turn: CHOSEN (the token it chose in the turn before), or a token,
// with the highest bit where a new text begins with it. `turn` counts on the device, so that a captured graph of one
// turn can be replayed.
#include "prims.cuh"

namespace turns {
constexpr uint32_t CHOSEN = 0xffffffffu, FRESH = 0x80000000u;
constexpr int THREADS = 256;
}  // namespace turns

// ids [batch]: the tokens of this turn; chance [batch]: this turn's of chances [turns, batch]. Where a text begins, by
// the host's word or by the token `separator` (−1: there is none), fresh [batch] is 1 and length [batch] 0.
// One block of 256: nobody else may move `turn`.
extern "C" __global__ void __launch_bounds__(turns::THREADS)
    decode_begin(const uint32_t* given, const float* chances, const int* turn, const uint32_t* chosen, uint32_t* ids,
                 float* chance, uint32_t* fresh, int* length, int separator, int batch) {
  size_t first = size_t(*turn) * batch;
  for (int b = threadIdx.x; b < batch; b += turns::THREADS) {
    uint32_t word = given[first + b];
    bool mine = word == turns::CHOSEN;
    uint32_t id = mine ? chosen[b] : word & ~turns::FRESH;
    bool begins = (!mine && (word & turns::FRESH)) || (separator >= 0 && id == uint32_t(separator));
    ids[b] = id;
    chance[b] = chances[first + b];
    fresh[b] = begins;
    if (begins) length[b] = 0;
  }
}
REGISTER(decode_begin)

// history [turns, batch] gets this turn's `chosen`; every length grows by one, and so does `turn`. One block of 256.
extern "C" __global__ void __launch_bounds__(turns::THREADS)
    decode_end(const uint32_t* chosen, uint32_t* history, int* length, int* turn, int batch) {
  int now = *turn;
  for (int b = threadIdx.x; b < batch; b += turns::THREADS) {
    history[size_t(now) * batch + b] = chosen[b];
    length[b] += 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) *turn = now + 1;
}
REGISTER(decode_end)

// Zeros what fresh sequences remember: window f32 [layers, batch, window_len], state f32 [layers, batch, state_len].
// Grid (any, batch, layers), block 256.
extern "C" __global__ void __launch_bounds__(turns::THREADS)
    decode_forget(const uint32_t* fresh, float* window, float* state, int window_len, int state_len) {
  if (!fresh[blockIdx.y]) return;
  size_t row = size_t(blockIdx.z) * gridDim.y + blockIdx.y;
  int first = blockIdx.x * turns::THREADS + threadIdx.x, step = gridDim.x * turns::THREADS;
  for (int i = first; i < window_len; i += step) window[row * window_len + i] = 0.0f;
  for (int i = first; i < state_len; i += step) state[row * state_len + i] = 0.0f;
}
REGISTER(decode_forget)
