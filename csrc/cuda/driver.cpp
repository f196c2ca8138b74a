#include "cuda/driver.h"

#include <dlfcn.h>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int kOldestVersion = 12030;  // captures launches that depend on one another

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// After these nothing works in the process any more.
bool loses_context(CUresult result) {
    return result == CUDA_ERROR_ILLEGAL_ADDRESS || result == CUDA_ERROR_LAUNCH_TIMEOUT || result == CUDA_ERROR_ASSERT ||
           (result >= CUDA_ERROR_HARDWARE_STACK_ERROR && result <= CUDA_ERROR_LAUNCH_FAILED);
}

}  // namespace

// The library stays mapped for good: threads that used it call into it when they end.
Driver::Driver(const std::string& library)
    : library_(library), handle_(dlopen(library.c_str(), RTLD_NOW | RTLD_NODELETE)) {
    if (!handle_)
        throw BackendError("no CUDA driver: " + std::string(dlerror()) +
                           "; install NVIDIA's driver, or use backend=\"cpu\"");
    const auto load = [this](auto& function, const char* name) {
        void* symbol = dlsym(handle_, name);
        if (!symbol) {
            dlclose(handle_);
            throw BackendError(library_ + " has no " + name + ": update NVIDIA's driver to CUDA " +
                               version_text(kOldestVersion) + " or later, or use backend=\"cpu\"");
        }
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
#define LOAD(function) load(function, #function)
    LOAD(cuInit);
    LOAD(cuDriverGetVersion);
    LOAD(cuGetErrorName);
    LOAD(cuGetErrorString);
    LOAD(cuDeviceGetCount);
    LOAD(cuDeviceGet);
    LOAD(cuDeviceGetName);
    LOAD(cuDeviceGetAttribute);
    LOAD(cuDevicePrimaryCtxRetain);
    LOAD(cuDevicePrimaryCtxRelease_v2);
    LOAD(cuCtxPushCurrent_v2);
    LOAD(cuCtxPopCurrent_v2);
    LOAD(cuMemGetInfo_v2);
    LOAD(cuMemAlloc_v2);
    LOAD(cuMemFree_v2);
    LOAD(cuMemHostAlloc);
    LOAD(cuMemFreeHost);
    LOAD(cuMemcpyHtoDAsync_v2);
    LOAD(cuMemcpyDtoHAsync_v2);
    LOAD(cuMemcpyDtoDAsync_v2);
    LOAD(cuMemsetD8Async);
    LOAD(cuStreamCreate);
    LOAD(cuStreamDestroy_v2);
    LOAD(cuStreamSynchronize);
    LOAD(cuStreamBeginCapture_v2);
    LOAD(cuStreamEndCapture);
    LOAD(cuGraphInstantiateWithFlags);
    LOAD(cuGraphLaunch);
    LOAD(cuGraphExecDestroy);
    LOAD(cuGraphDestroy);
    LOAD(cuEventCreate);
    LOAD(cuEventRecord);
    LOAD(cuEventSynchronize);
    LOAD(cuEventDestroy_v2);
    LOAD(cuModuleLoadData);
    LOAD(cuModuleUnload);
    LOAD(cuModuleGetFunction);
    LOAD(cuFuncGetAttribute);
    LOAD(cuFuncSetAttribute);
    LOAD(cuLaunchKernelEx);
#undef LOAD
    try {
        int version = 0;
        check(cuDriverGetVersion(&version), "asking the driver for its version");
        if (version < kOldestVersion)
            throw BackendError("the CUDA driver knows CUDA " + version_text(version) + ", kernels need " +
                               version_text(kOldestVersion) + ": update NVIDIA's driver, or use backend=\"cpu\"");
        const CUresult started = cuInit(0);
        if (started == CUDA_ERROR_NO_DEVICE) throw BackendError("the CUDA driver finds no GPU; use backend=\"cpu\"");
        check(started, "starting the driver");
    } catch (...) {
        dlclose(handle_);
        throw;
    }
}

Driver::~Driver() { dlclose(handle_); }

void Driver::check(CUresult result, const std::string& doing) const {
    if (result == CUDA_SUCCESS) return;
    const char *name = nullptr, *text = nullptr;
    cuGetErrorName(result, &name);
    cuGetErrorString(result, &text);
    const std::string what = "CUDA: " + std::string(name ? name : "unknown error " + std::to_string(result)) +
                             (text ? " (" + std::string(text) + ")" : "") + " while " + doing;
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        throw CapacityError(
            what +
            "; lower max_seq_len, max_batch_size, max_step_tokens or kv_cache_gib, or load the model as "
            "int8 or int4");
    throw BackendError(what + (loses_context(result) ? "; the GPU's context is lost: start the process anew" : ""));
}

}  // namespace gemma2_fast
