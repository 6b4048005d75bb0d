// The part of the CUDA runtime that docs/cpp/run_engine.cpp uses, on host memory; new memory is poisoned.
#pragma once

#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
using cudaStream_t = struct FakeStream*;
using cudaEvent_t = struct FakeEvent*;

inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA-capable device is detected"; }

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return std::getenv("FAKE_CAPABILITY") == nullptr ? cudaErrorNoDevice : cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const char* text = std::getenv("FAKE_CAPABILITY");
    *value = std::atoi(attribute == cudaDevAttrComputeCapabilityMajor ? text : std::strchr(text, '.') + 1);
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
    *data = std::memset(std::malloc(bytes), 0xAA, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* data) {
    std::free(data);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* target, const void* source, std::size_t bytes, cudaMemcpyKind) {
    std::memcpy(target, source, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreate(cudaStream_t*) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1.5F;
    return cudaSuccess;
}
