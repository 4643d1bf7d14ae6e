// SPDX-License-Identifier: Apache-2.0
// As much of the CUDA runtime as the kernels of csrc/cuda use, for the processor: a thread of a block is a fiber, the
// blocks run one after the other. Barriers and shuffles are meetings: who comes early waits, who never comes is an
// error. Races that need real time cannot be seen; PYLEARNGENE_EMULATED_ORDER=reverse runs the fibers the other way
// round.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define CUDART_VERSION 13000
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one after the other, so that one copy is enough.
#define __shared__ static

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};
typedef struct emulated_stream* cudaStream_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulation {

constexpr int kLanes = 32, kStack = 1 << 18;
enum Wait { kNothing, kBlock, kWarp, kEnd };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait = kNothing;
    int shuffles = 0;
};

// What the running block is; devices, and what the tests ask for and look at.
struct State {
    dim3 thread, block, block_size, grid_size;
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<float> passed[2];
    std::function<void()> body;
    cudaError_t fault = cudaSuccess, last = cudaSuccess;
    int devices = 2, current = 0, launches = 0, launched_on = -1, fail_in = 0;
    unsigned blocks = 0, threads = 0;
    cudaError_t fail_with = cudaSuccess;
    cudaStream_t stream = nullptr;
};
extern State state;

void meet(Wait wait);
cudaError_t run(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> body);
void aligned(const void* from, size_t size);

}  // namespace emulation

inline dim3 &threadIdx = emulation::state.thread, &blockIdx = emulation::state.block;
inline dim3 &blockDim = emulation::state.block_size, &gridDim = emulation::state.grid_size;

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
    return emulation::run(config->gridDim, config->blockDim, config->stream, [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::meet(emulation::kBlock); }
float __shfl_xor_sync(unsigned mask, float value, int apart);

template <class T>
T __ldg(const T* from) {
    emulation::aligned(from, sizeof(T));
    return *from;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
