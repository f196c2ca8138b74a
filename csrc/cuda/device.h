#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/function_ref.h"
#include "cuda/driver.h"

namespace gemma2_fast {

// One GPU and its primary context, which libraries in the same process share. All that follows, the device's own
// functions aside, needs a DeviceGuard in its thread.
class Device {
  public:
    Device(const std::string& driver_library, int ordinal);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    int64_t free_bytes() const;

    const Driver& driver() const { return driver_; }
    CUcontext context() const { return context_; }
    const std::string& name() const { return name_; }
    int arch() const { return arch_; }  // compute capability, 90 for 9.0
    int num_multiprocessors() const { return num_multiprocessors_; }
    int most_shared_bytes() const { return most_shared_bytes_; }  // of a program that asks for them

  private:
    int attribute(int which) const;

    Driver driver_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    std::string name_;
    int arch_ = 0;
    int num_multiprocessors_ = 0;
    int most_shared_bytes_ = 0;
};

// While it lives, the device's context is the current one of its thread; afterwards that which was current before.
class DeviceGuard {
  public:
    explicit DeviceGuard(const Device& device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    const Device& device_;
};

// Memory of the device, or of the host where the device can copy from it on its own.
class DeviceMemory {
  public:
    DeviceMemory(const Device& device, int64_t num_bytes, const std::string& purpose);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    CUdeviceptr address() const { return address_; }

  private:
    const Device& device_;
    CUdeviceptr address_ = 0;
};

class PinnedMemory {
  public:
    PinnedMemory(const Device& device, int64_t num_bytes, const std::string& purpose);
    ~PinnedMemory();
    PinnedMemory(const PinnedMemory&) = delete;
    PinnedMemory& operator=(const PinnedMemory&) = delete;
    std::byte* data() const { return static_cast<std::byte*>(data_); }

  private:
    const Device& device_;
    void* data_ = nullptr;
};

// Work recorded once and replayed whole.
class Graph {
  public:
    Graph(const Device& device, CUgraphExec executable) : device_(device), executable_(executable) {}
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    CUgraphExec executable() const { return executable_; }

  private:
    const Device& device_;
    CUgraphExec executable_;
};

// A place in a stream.
class Event {
  public:
    explicit Event(const Device& device);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void wait() const;  // until what stood before it when it was recorded is done
    CUevent handle() const { return event_; }

  private:
    const Device& device_;
    CUevent event_ = nullptr;
};

// A queue of work. Functions return before the work is done, unless they say otherwise.
class Stream {
  public:
    explicit Stream(const Device& device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    void copy_to_device(CUdeviceptr target, const void* source, int64_t num_bytes);
    void copy_to_host(void* target, CUdeviceptr source, int64_t num_bytes);
    void copy_on_device(CUdeviceptr target, CUdeviceptr source, int64_t num_bytes);
    void fill(CUdeviceptr target, uint8_t value, int64_t num_bytes);
    CUgraphExec capture(FunctionRef<void()> enqueue);  // what `enqueue` puts here is recorded and not run
    void launch(const Graph& graph);
    void record(const Event& event);
    void wait();  // until all of it is done

    const Device& device() const { return device_; }
    CUstream handle() const { return stream_; }

  private:
    const Device& device_;
    CUstream stream_ = nullptr;
};

}  // namespace gemma2_fast
