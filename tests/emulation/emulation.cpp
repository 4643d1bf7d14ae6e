// SPDX-License-Identifier: Apache-2.0
// The scheduler of emulated blocks, the devices that are pretended, and what tests ask of them.

#include <cuda_runtime.h>

#include "memory.cuh"

namespace emulation {

State state;

namespace {

void begin() {
    state.body();
    meet(kEnd);
}

// Fibers [first, last) may go on if all of them wait for the same.
bool release(size_t first, size_t last, Wait wait) {
    for (size_t n = first; n < last; ++n)
        if (state.fibers[n].wait != wait) return false;
    for (size_t n = first; n < last; ++n) state.fibers[n].wait = kNothing;
    return true;
}

void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.wait = kNothing;
    fiber.shuffles = 0;
    makecontext(&fiber.context, begin, 0);
}

void run_block() {
    const size_t count = state.fibers.size();
    const char* const order = getenv("PYLEARNGENE_EMULATED_ORDER");
    const bool reverse = order && !strcmp(order, "reverse");
    for (Fiber& fiber : state.fibers) start(fiber);
    for (;;) {
        bool moved = false, ended = true;
        for (size_t step = 0; step < count; ++step) {
            const size_t n = reverse ? count - 1 - step : step;
            if (state.fibers[n].wait != kNothing) continue;
            state.thread = dim3(static_cast<unsigned>(n), 0, 0);
            swapcontext(&state.scheduler, &state.fibers[n].context);
            moved = true;
        }
        for (size_t n = 0; n < count; n += kLanes) moved |= release(n, n + kLanes, kWarp);
        moved |= release(0, count, kBlock);
        for (const Fiber& fiber : state.fibers) ended &= fiber.wait == kEnd;
        if (ended) return;
        if (!moved) {  // some wait for others that wait elsewhere or are gone
            state.fault = cudaErrorLaunchFailure;
            return;
        }
    }
}

cudaError_t asked_to_fail() {
    if (!state.fail_in || --state.fail_in) return cudaSuccess;
    return state.last = state.fail_with;
}

}  // namespace

void meet(Wait wait) {
    const dim3 thread = state.thread;
    Fiber& fiber = state.fibers[thread.x];
    fiber.wait = wait;
    swapcontext(&fiber.context, &state.scheduler);
    state.thread = thread;
}

void aligned(const void* from, size_t size) {
    if (reinterpret_cast<uintptr_t>(from) % size) state.fault = cudaErrorMisalignedAddress;
}

cudaError_t run(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> body) {
    if (const cudaError_t error = asked_to_fail()) return error;
    if (!grid.x || !block.x || block.x > 1024 || block.x % kLanes) return state.last = cudaErrorInvalidConfiguration;
    state.launches += 1, state.launched_on = state.current, state.stream = stream;
    state.blocks = grid.x, state.threads = block.x;
    state.body = std::move(body), state.fault = cudaSuccess;
    state.block_size = block, state.grid_size = grid;
    state.fibers.resize(block.x);
    for (auto& passed : state.passed) passed.assign(block.x, 0.0f);
    for (unsigned n = 0; n < grid.x && !state.fault; ++n) {
        state.block = dim3(n, 0, 0);
        run_block();
    }
    return state.last = state.fault;
}

}  // namespace emulation

using emulation::state;

float __shfl_xor_sync(unsigned mask, float value, int apart) {
    emulation::Fiber& fiber = state.fibers[threadIdx.x];
    if (mask != 0xffffffffu) state.fault = cudaErrorLaunchFailure;
    std::vector<float>& passed = state.passed[fiber.shuffles++ % 2];  // of two in turn: the next one may come early
    passed[threadIdx.x] = value;
    emulation::meet(emulation::kWarp);
    return passed[threadIdx.x ^ apart];
}

cudaError_t cudaGetDeviceCount(int* count) {
    if (const cudaError_t error = emulation::asked_to_fail()) return error;
    *count = state.devices;
    return state.last = state.devices ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) {
    *device = state.current;
    return emulation::asked_to_fail();
}
cudaError_t cudaSetDevice(int device) {
    if (const cudaError_t error = emulation::asked_to_fail()) return error;
    if (device < 0 || device >= state.devices) return state.last = cudaErrorInvalidDevice;
    state.current = device;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t last = state.last;
    state.last = cudaSuccess;
    return last;
}
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorNoDevice:
            return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorMisalignedAddress:
            return "cudaErrorMisalignedAddress";
        case cudaErrorLaunchFailure:
            return "cudaErrorLaunchFailure";
        default:
            return "cudaErrorOther";
    }
}
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace pylearngene {
namespace gpu {

uint64_t keep_in_l2() { return 0x1234; }
int64_t opaque(int64_t value) { return value; }
void load_gene(const void* from, uint64_t policy, uint32_t (&words)[kGeneWords]) {
    if (policy != keep_in_l2()) state.fault = cudaErrorLaunchFailure;
    emulation::aligned(from, sizeof words);
    memcpy(words, from, sizeof words);
}

}  // namespace gpu
}  // namespace pylearngene

// For tests, which find them in the module by name.
extern "C" {
__attribute__((visibility("default"))) int emulated_state(int what) {
    const int values[] = {state.launches,
                          state.launched_on,
                          state.current,
                          static_cast<int>(state.blocks),
                          static_cast<int>(state.threads),
                          static_cast<int>(reinterpret_cast<intptr_t>(state.stream))};
    return values[what];
}
__attribute__((visibility("default"))) void emulated_devices(int count) { state.devices = count; }
__attribute__((visibility("default"))) void emulated_failure(int in_calls, int error) {
    state.fail_in = in_calls, state.fail_with = static_cast<cudaError_t>(error);
}
}
