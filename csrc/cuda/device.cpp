#include "cuda/device.h"

#include <iterator>

#include "base/errors.h"

namespace gemma2_fast {

Device::Device(const std::string& driver_library, int ordinal) : driver_(driver_library) {
    int count = 0;
    driver_.check(driver_.cuDeviceGetCount(&count), "counting GPUs");
    if (ordinal < 0 || ordinal >= count)
        throw BackendError("there is no GPU " + std::to_string(ordinal) + ": the CUDA driver finds " +
                           std::to_string(count) + "; use backend=\"cpu\"");
    driver_.check(driver_.cuDeviceGet(&device_, ordinal), "opening GPU " + std::to_string(ordinal));
    char name[256] = {};
    driver_.check(driver_.cuDeviceGetName(name, std::size(name), device_), "asking for the GPU's name");
    name_ = name;
    arch_ = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    num_multiprocessors_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    most_shared_bytes_ = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "making a context on " + name_);
}

Device::~Device() { driver_.cuDevicePrimaryCtxRelease_v2(device_); }

int64_t Device::free_bytes() const {
    const DeviceGuard guard(*this);
    std::size_t free = 0, total = 0;
    driver_.check(driver_.cuMemGetInfo_v2(&free, &total), "asking for free memory");
    return static_cast<int64_t>(free);
}

int Device::attribute(int which) const {
    int value = 0;
    driver_.check(driver_.cuDeviceGetAttribute(&value, which, device_), "asking for a property of " + name_);
    return value;
}

DeviceGuard::DeviceGuard(const Device& device) : device_(device) {
    device.driver().check(device.driver().cuCtxPushCurrent_v2(device.context()), "choosing " + device.name());
}

DeviceGuard::~DeviceGuard() {
    CUcontext ours = nullptr;
    device_.driver().cuCtxPopCurrent_v2(&ours);
}

DeviceMemory::DeviceMemory(const Device& device, int64_t num_bytes, const std::string& purpose) : device_(device) {
    const Driver& driver = device.driver();
    driver.check(driver.cuMemAlloc_v2(&address_, static_cast<std::size_t>(num_bytes)),
                 "taking " + std::to_string(num_bytes) + " bytes of device memory for " + purpose);
}

DeviceMemory::~DeviceMemory() { device_.driver().cuMemFree_v2(address_); }

PinnedMemory::PinnedMemory(const Device& device, int64_t num_bytes, const std::string& purpose) : device_(device) {
    const Driver& driver = device.driver();
    driver.check(driver.cuMemHostAlloc(&data_, static_cast<std::size_t>(num_bytes), 0),
                 "pinning " + std::to_string(num_bytes) + " bytes of host memory for " + purpose);
}

PinnedMemory::~PinnedMemory() { device_.driver().cuMemFreeHost(data_); }

Graph::~Graph() { device_.driver().cuGraphExecDestroy(executable_); }

Event::Event(const Device& device) : device_(device) {
    device.driver().check(device.driver().cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "making an event");
}

Event::~Event() { device_.driver().cuEventDestroy_v2(event_); }

void Event::wait() const {
    device_.driver().check(device_.driver().cuEventSynchronize(event_), "waiting for the device");
}

Stream::Stream(const Device& device) : device_(device) {
    device.driver().check(device.driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "making a stream");
}

Stream::~Stream() { device_.driver().cuStreamDestroy_v2(stream_); }

void Stream::copy_to_device(CUdeviceptr target, const void* source, int64_t num_bytes) {
    const Driver& driver = device_.driver();
    driver.check(driver.cuMemcpyHtoDAsync_v2(target, source, static_cast<std::size_t>(num_bytes), stream_),
                 "copying " + std::to_string(num_bytes) + " bytes to the device");
}

void Stream::copy_to_host(void* target, CUdeviceptr source, int64_t num_bytes) {
    const Driver& driver = device_.driver();
    driver.check(driver.cuMemcpyDtoHAsync_v2(target, source, static_cast<std::size_t>(num_bytes), stream_),
                 "copying " + std::to_string(num_bytes) + " bytes from the device");
}

void Stream::copy_on_device(CUdeviceptr target, CUdeviceptr source, int64_t num_bytes) {
    const Driver& driver = device_.driver();
    driver.check(driver.cuMemcpyDtoDAsync_v2(target, source, static_cast<std::size_t>(num_bytes), stream_),
                 "copying " + std::to_string(num_bytes) + " bytes on the device");
}

void Stream::fill(CUdeviceptr target, uint8_t value, int64_t num_bytes) {
    const Driver& driver = device_.driver();
    driver.check(driver.cuMemsetD8Async(target, value, static_cast<std::size_t>(num_bytes), stream_),
                 "filling " + std::to_string(num_bytes) + " bytes of device memory");
}

CUgraphExec Stream::capture(FunctionRef<void()> enqueue) {
    const Driver& driver = device_.driver();
    // Other threads may use the device in the meantime.
    driver.check(driver.cuStreamBeginCapture_v2(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "beginning a capture");
    CUgraph graph = nullptr;
    try {
        enqueue();
    } catch (...) {
        if (driver.cuStreamEndCapture(stream_, &graph) == CUDA_SUCCESS && graph) driver.cuGraphDestroy(graph);
        throw;
    }
    driver.check(driver.cuStreamEndCapture(stream_, &graph), "ending a capture");
    CUgraphExec executable = nullptr;
    const CUresult made = driver.cuGraphInstantiateWithFlags(&executable, graph, 0);
    driver.cuGraphDestroy(graph);
    driver.check(made, "making a graph of a step");
    return executable;
}

void Stream::launch(const Graph& graph) {
    const Driver& driver = device_.driver();
    driver.check(driver.cuGraphLaunch(graph.executable(), stream_), "launching a graph");
}

void Stream::record(const Event& event) {
    device_.driver().check(device_.driver().cuEventRecord(event.handle(), stream_), "recording an event");
}

void Stream::wait() { device_.driver().check(device_.driver().cuStreamSynchronize(stream_), "waiting for the device"); }

}  // namespace gemma2_fast
