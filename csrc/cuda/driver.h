#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gemma2_fast {

// The part of the CUDA driver's ABI that is used here, declared anew so that nothing needs a toolkit to build. Names
// and values are those of cuda.h.
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = uint64_t;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;

struct CUlaunchAttribute {
    int id;
    char padding[4];
    union {
        char size[64];
        int programmatic_stream_serialization_allowed;
    };
};
struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned dynamic_shared_bytes;
    CUstream stream;
    CUlaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(CUlaunchAttribute) == 72 && sizeof(CUlaunchConfig) == 56);

enum : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_TIMEOUT = 702,
    CUDA_ERROR_ASSERT = 710,
    CUDA_ERROR_HARDWARE_STACK_ERROR = 714,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
    CU_STREAM_NON_BLOCKING = 1,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_EVENT_DISABLE_TIMING = 2,
};

// The driver's functions, found in its library when the object is made: no link to CUDA, so that one build serves
// machines with a GPU and without.
class Driver {
  public:
    // Throws BackendError where the library, one of the functions or a device is missing, or the driver is too old.
    explicit Driver(const std::string& library);
    ~Driver();
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    // Throws unless the call succeeded: CapacityError where device memory ran out, else BackendError. `doing` completes
    // "... while".
    void check(CUresult result, const std::string& doing) const;

    CUresult (*cuInit)(unsigned flags);
    CUresult (*cuDriverGetVersion)(int* version);
    CUresult (*cuGetErrorName)(CUresult, const char** name);
    CUresult (*cuGetErrorString)(CUresult, const char** text);
    CUresult (*cuDeviceGetCount)(int* count);
    CUresult (*cuDeviceGet)(CUdevice*, int ordinal);
    CUresult (*cuDeviceGetName)(char* name, int size, CUdevice);
    CUresult (*cuDeviceGetAttribute)(int* value, int attribute, CUdevice);
    CUresult (*cuDevicePrimaryCtxRetain)(CUcontext*, CUdevice);
    CUresult (*cuDevicePrimaryCtxRelease_v2)(CUdevice);
    CUresult (*cuCtxPushCurrent_v2)(CUcontext);
    CUresult (*cuCtxPopCurrent_v2)(CUcontext*);
    CUresult (*cuMemGetInfo_v2)(std::size_t* free_bytes, std::size_t* total_bytes);
    CUresult (*cuMemAlloc_v2)(CUdeviceptr*, std::size_t num_bytes);
    CUresult (*cuMemFree_v2)(CUdeviceptr);
    CUresult (*cuMemHostAlloc)(void** pointer, std::size_t num_bytes, unsigned flags);
    CUresult (*cuMemFreeHost)(void* pointer);
    CUresult (*cuMemcpyHtoDAsync_v2)(CUdeviceptr, const void* source, std::size_t num_bytes, CUstream);
    CUresult (*cuMemcpyDtoHAsync_v2)(void* target, CUdeviceptr, std::size_t num_bytes, CUstream);
    CUresult (*cuMemcpyDtoDAsync_v2)(CUdeviceptr target, CUdeviceptr source, std::size_t num_bytes, CUstream);
    CUresult (*cuMemsetD8Async)(CUdeviceptr, unsigned char value, std::size_t num_bytes, CUstream);
    CUresult (*cuStreamCreate)(CUstream*, unsigned flags);
    CUresult (*cuStreamDestroy_v2)(CUstream);
    CUresult (*cuStreamSynchronize)(CUstream);
    CUresult (*cuStreamBeginCapture_v2)(CUstream, int mode);
    CUresult (*cuStreamEndCapture)(CUstream, CUgraph*);
    CUresult (*cuGraphInstantiateWithFlags)(CUgraphExec*, CUgraph, unsigned long long flags);
    CUresult (*cuGraphLaunch)(CUgraphExec, CUstream);
    CUresult (*cuGraphExecDestroy)(CUgraphExec);
    CUresult (*cuGraphDestroy)(CUgraph);
    CUresult (*cuEventCreate)(CUevent*, unsigned flags);
    CUresult (*cuEventRecord)(CUevent, CUstream);
    CUresult (*cuEventSynchronize)(CUevent);
    CUresult (*cuEventDestroy_v2)(CUevent);
    CUresult (*cuModuleLoadData)(CUmodule*, const void* image);
    CUresult (*cuModuleUnload)(CUmodule);
    CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, const char* name);
    CUresult (*cuFuncGetAttribute)(int* value, int attribute, CUfunction);
    CUresult (*cuFuncSetAttribute)(CUfunction, int attribute, int value);
    CUresult (*cuLaunchKernelEx)(const CUlaunchConfig*, CUfunction, void** parameters, void** extra);

  private:
    std::string library_;
    void* handle_;
};

}  // namespace gemma2_fast
