// A stand-in for NVIDIA's driver library: device memory is host memory, the one stream runs as late as it may, when
// something waits for it, graphs keep what was captured, and kernels are run by a callback. Every call is written down.
// Every thread has a stack of contexts, and what belongs to the device fails unless the device's own is on top.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/driver.h"

using namespace gemma2_fast;

namespace {

// Gives 0, or the error that the launch ends with. values: a slot of eight bytes for every parameter.
using RunKernel = int (*)(const char* symbol, const unsigned* grid, unsigned threads, unsigned shared_bytes,
                          int dependent, const uint64_t* values, int num_values);
using Work = std::function<int()>;

struct Function {
    std::string symbol;
    int num_parameters;
};

RunKernel run_kernel = nullptr;
std::string calls;
std::map<std::string, std::pair<int, int>> failures;  // of a function: calls that succeed before, and the error
std::map<CUdeviceptr, std::size_t> allocated;
std::vector<std::unique_ptr<Function>> functions;
std::vector<Work>* capturing = nullptr;
std::deque<Work> queue;                         // of the stream
uint64_t num_run = 0;                           // of all that was ever queued
std::vector<std::unique_ptr<uint64_t>> events;  // how much had been queued when one was recorded
int version = 13000, num_devices = 1;
std::size_t memory_limit = std::size_t{1} << 40;
int primary_context, num_retained = 0;
int num_living = 0;                  // allocations, streams, graphs, events and modules
std::atomic<int> calls_outside = 0;  // of the device's context
std::atomic<int> contexts_left = 0;  // by threads that have ended

struct ContextStack {
    std::vector<CUcontext> contexts;
    ~ContextStack() { contexts_left += static_cast<int>(contexts.size()); }
};
thread_local ContextStack stack;

int call(const std::string& name, const std::string& detail = "") {
    calls += name + (detail.empty() ? "" : " " + detail) + "\n";
    const auto failure = failures.find(name);
    if (failure == failures.end() || failure->second.first-- > 0) return CUDA_SUCCESS;
    failure->second.first = 0;
    return failure->second.second;
}

int call_inside(const std::string& name, const std::string& detail = "") {
    const bool inside = num_retained > 0 && !stack.contexts.empty() &&
                        stack.contexts.back() == reinterpret_cast<CUcontext>(&primary_context);
    if (inside) return call(name, detail);
    ++calls_outside;
    return CUDA_ERROR_INVALID_CONTEXT;
}

int make(const std::string& name, const std::string& detail = "") {
    const int error = call_inside(name, detail);
    if (!error) ++num_living;
    return error;
}

int destroy(const std::string& name) {
    const int error = call_inside(name);
    if (!error) --num_living;
    return error;
}

// A device copies only to and from what it was given.
bool inside(CUdeviceptr address, std::size_t num_bytes) {
    auto found = allocated.upper_bound(address);
    if (found == allocated.begin()) return false;
    --found;
    return address + num_bytes <= found->first + found->second;
}

int enqueue(Work work) {
    capturing ? capturing->push_back(std::move(work)) : queue.push_back(std::move(work));
    return CUDA_SUCCESS;
}

// After an error, the rest is dropped.
int run_until(uint64_t end) {
    int error = CUDA_SUCCESS;
    while (num_run < end && !queue.empty()) {
        const Work work = std::move(queue.front());
        queue.pop_front();
        ++num_run;
        if (error == CUDA_SUCCESS) error = work();
    }
    return error;
}

int run_all() { return run_until(num_run + queue.size()); }

}  // namespace

extern "C" {

void fake_recover() { failures.clear(); }
void fake_reset(RunKernel run) {
    run_kernel = run;
    calls.clear();
    fake_recover();
    queue.clear();
    version = 13000;
    num_devices = 1;
    memory_limit = std::size_t{1} << 40;
    calls_outside = 0;
    contexts_left = 0;
}
void fake_fail(const char* function, int after, int error) { failures[function] = {after, error}; }
void fake_set(int new_version, int new_num_devices, uint64_t new_memory_limit) {
    version = new_version;
    num_devices = new_num_devices;
    memory_limit = new_memory_limit;
}
const char* fake_calls() { return calls.c_str(); }
int fake_calls_outside() { return calls_outside; }
int fake_contexts_left() { return contexts_left; }
int fake_num_living() { return num_living; }
uint64_t fake_allocation_end(CUdeviceptr address) {  // of the allocation that it lies in; 0 if in none
    auto found = allocated.upper_bound(address);
    if (found == allocated.begin()) return 0;
    --found;
    return address < found->first + found->second ? found->first + found->second : 0;
}

CUresult cuInit(unsigned) { return num_devices == 0 ? CUDA_ERROR_NO_DEVICE : call("cuInit"); }
CUresult cuDriverGetVersion(int* result) {
    *result = version;
    return call("cuDriverGetVersion");
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == 700                    ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                              : nullptr;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
    *text = nullptr;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    *count = num_devices;
    return call("cuDeviceGetCount");
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return call("cuDeviceGet");
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    std::strncpy(name, "Imagined GPU", static_cast<std::size_t>(size));
    return call("cuDeviceGetName");
}
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR            ? 9
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR          ? 0
             : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
                                                                                  : 4;
    return call("cuDeviceGetAttribute");
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    if (const int error = call("cuDevicePrimaryCtxRetain")) return error;
    ++num_retained;
    *context = reinterpret_cast<CUcontext>(&primary_context);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    --num_retained;
    return call("cuDevicePrimaryCtxRelease");
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (const int error = call("cuCtxPushCurrent")) return error;
    stack.contexts.push_back(context);
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (stack.contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = stack.contexts.back();
    stack.contexts.pop_back();
    return call("cuCtxPopCurrent");
}
CUresult cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes) {
    *free_bytes = *total_bytes = memory_limit;
    return call_inside("cuMemGetInfo");
}
CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t num_bytes) {
    if (num_bytes > memory_limit) return CUDA_ERROR_OUT_OF_MEMORY;
    if (const int error = make("cuMemAlloc", std::to_string(num_bytes))) return error;
    void* memory = std::aligned_alloc(256, (num_bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, num_bytes);  // no number where nobody has written
    *address = reinterpret_cast<CUdeviceptr>(memory);
    allocated[*address] = num_bytes;
    return CUDA_SUCCESS;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
    run_all();
    if (const int error = destroy("cuMemFree")) return error;
    allocated.erase(address);
    std::free(reinterpret_cast<void*>(address));
    return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** pointer, std::size_t num_bytes, unsigned) {
    if (const int error = make("cuMemHostAlloc", std::to_string(num_bytes))) return error;
    *pointer = std::malloc(num_bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void* pointer) {
    run_all();
    if (const int error = destroy("cuMemFreeHost")) return error;
    std::free(pointer);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, std::size_t num_bytes, CUstream) {
    if (const int error = call_inside("cuMemcpyHtoDAsync", std::to_string(num_bytes))) return error;
    if (!inside(target, num_bytes)) return 700;
    return enqueue([=] {
        std::memcpy(reinterpret_cast<void*>(target), source, num_bytes);
        return 0;
    });
}
CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, std::size_t num_bytes, CUstream) {
    if (const int error = call_inside("cuMemcpyDtoHAsync", std::to_string(num_bytes))) return error;
    if (!inside(source, num_bytes)) return 700;
    return enqueue([=] {
        std::memcpy(target, reinterpret_cast<const void*>(source), num_bytes);
        return 0;
    });
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, std::size_t num_bytes, CUstream) {
    if (const int error = call_inside("cuMemcpyDtoDAsync", std::to_string(num_bytes))) return error;
    if (!inside(target, num_bytes) || !inside(source, num_bytes)) return 700;
    return enqueue([=] {
        std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), num_bytes);
        return 0;
    });
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, std::size_t num_bytes, CUstream) {
    if (const int error = call_inside("cuMemsetD8Async", std::to_string(num_bytes))) return error;
    if (!inside(target, num_bytes)) return 700;
    return enqueue([=] {
        std::memset(reinterpret_cast<void*>(target), value, num_bytes);
        return 0;
    });
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
    *stream = reinterpret_cast<CUstream>(&calls);
    return make("cuStreamCreate");
}
CUresult cuStreamDestroy_v2(CUstream) {
    run_all();
    return destroy("cuStreamDestroy");
}
CUresult cuStreamSynchronize(CUstream) {
    const int error = run_all();
    return error ? error : call_inside("cuStreamSynchronize");
}
CUresult cuStreamBeginCapture_v2(CUstream, int) {
    if (const int error = call_inside("cuStreamBeginCapture")) return error;
    capturing = new std::vector<Work>();
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
    const std::unique_ptr<std::vector<Work>> captured(std::exchange(capturing, nullptr));
    if (const int error = make("cuStreamEndCapture")) return error;
    *graph = reinterpret_cast<CUgraph>(new std::vector<Work>(*captured));
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    if (const int error = make("cuGraphInstantiate")) return error;
    *executable = reinterpret_cast<CUgraphExec>(new std::vector<Work>(*reinterpret_cast<std::vector<Work>*>(graph)));
    return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream) {
    if (const int error = call_inside("cuGraphLaunch")) return error;
    for (const Work& work : *reinterpret_cast<std::vector<Work>*>(executable)) queue.push_back(work);
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
    if (const int error = destroy("cuGraphExecDestroy")) return error;
    delete reinterpret_cast<std::vector<Work>*>(executable);
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    if (const int error = destroy("cuGraphDestroy")) return error;
    delete reinterpret_cast<std::vector<Work>*>(graph);
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
    if (const int error = make("cuEventCreate")) return error;
    events.push_back(std::make_unique<uint64_t>(0));
    *event = reinterpret_cast<CUevent>(events.back().get());
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream) {
    *reinterpret_cast<uint64_t*>(event) = num_run + queue.size();
    return call_inside("cuEventRecord");
}
CUresult cuEventSynchronize(CUevent event) {
    const int error = run_until(*reinterpret_cast<uint64_t*>(event));
    return error ? error : call_inside("cuEventSynchronize");
}
CUresult cuEventDestroy_v2(CUevent) { return destroy("cuEventDestroy"); }
// An image is the kernel's symbol, a space, and how many parameters it has.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    const std::string text(static_cast<const char*>(image));
    const std::size_t space = text.find(' ');
    if (capturing || space == std::string::npos) return capturing ? 900 : CUDA_ERROR_INVALID_IMAGE;
    if (const int error = make("cuModuleLoadData", text)) return error;
    functions.push_back(std::make_unique<Function>(text.substr(0, space), std::stoi(text.substr(space))));
    *module = reinterpret_cast<CUmodule>(functions.back().get());
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return destroy("cuModuleUnload"); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (reinterpret_cast<Function*>(module)->symbol != name) return 500;
    *function = reinterpret_cast<CUfunction>(module);
    return call_inside("cuModuleGetFunction", name);
}
CUresult cuFuncGetAttribute(int* value, int, CUfunction) {
    *value = 1024;  // of shared memory that is not asked for at launch
    return call_inside("cuFuncGetAttribute");
}
CUresult cuFuncSetAttribute(CUfunction, int, int value) {
    return call_inside("cuFuncSetAttribute", std::to_string(value));
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void**) {
    const auto* function = reinterpret_cast<const Function*>(handle);
    if (const int error = call_inside("cuLaunchKernelEx", function->symbol)) return error;
    std::vector<uint64_t> values;
    for (int i = 0; i < function->num_parameters; ++i) {
        uint64_t value = 0;
        // Where only four bytes count, the reader knows.
        std::memcpy(&value, parameters[i], sizeof(value));
        values.push_back(value);
    }
    const std::vector<unsigned> grid{config->grid_x, config->grid_y, config->grid_z};
    const unsigned threads = config->block_x, shared_bytes = config->dynamic_shared_bytes;
    const int dependent = config->num_attributes > 0 &&
                          config->attributes[0].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
                          config->attributes[0].programmatic_stream_serialization_allowed;
    return enqueue([=, symbol = function->symbol] {
        return run_kernel(symbol.c_str(), grid.data(), threads, shared_bytes, dependent, values.data(),
                          static_cast<int>(values.size()));
    });
}

}  // extern "C"
