#include "cuda/uploader.h"

#include <algorithm>
#include <cstring>

namespace gemma2_fast {
namespace {

constexpr int64_t kBufferBytes = 16 << 20;

}  // namespace

Uploader::Uploader(Stream& stream) : stream_(stream) {
    const Device& device = stream.device();
    for (Buffer& buffer : buffers_) {
        buffer.memory = std::make_unique<PinnedMemory>(device, kBufferBytes, "copying weights");
        device.driver().check(device.driver().cuEventCreate(&buffer.read, CU_EVENT_DISABLE_TIMING), "making an event");
    }
}

Uploader::~Uploader() {
    const Driver& driver = stream_.device().driver();
    driver.cuStreamSynchronize(stream_.handle());  // buffers may still be read
    for (Buffer& buffer : buffers_)
        if (buffer.read) driver.cuEventDestroy_v2(buffer.read);
}

void Uploader::copy(CUdeviceptr target, const std::byte* source, int64_t num_bytes) {
    const Driver& driver = stream_.device().driver();
    for (int64_t done = 0; done < num_bytes; done += kBufferBytes) {
        Buffer& buffer = buffers_[next_++ % buffers_.size()];
        const int64_t count = std::min(kBufferBytes, num_bytes - done);
        driver.check(driver.cuEventSynchronize(buffer.read), "waiting for a copy of weights");
        std::memcpy(buffer.memory->data(), source + done, static_cast<std::size_t>(count));
        stream_.copy_to_device(target + static_cast<CUdeviceptr>(done), buffer.memory->data(), count);
        driver.check(driver.cuEventRecord(buffer.read, stream_.handle()), "recording a copy of weights");
    }
}

}  // namespace gemma2_fast
