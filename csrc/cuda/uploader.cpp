#include "cuda/uploader.h"

#include <algorithm>
#include <cstring>

namespace gemma2_fast {
namespace {

constexpr int64_t kBufferBytes = 16 << 20;

}  // namespace

Uploader::Buffer::Buffer(const Device& device) : memory(device, kBufferBytes, "copying weights"), read(device) {}

Uploader::Uploader(Stream& stream) : stream_(stream), buffers_{Buffer(stream.device()), Buffer(stream.device())} {}

Uploader::~Uploader() {
    stream_.device().driver().cuStreamSynchronize(stream_.handle());  // buffers may still be read
}

void Uploader::copy(CUdeviceptr target, const std::byte* source, int64_t num_bytes) {
    for (int64_t done = 0; done < num_bytes; done += kBufferBytes) {
        Buffer& buffer = buffers_[next_++ % buffers_.size()];
        const int64_t count = std::min(kBufferBytes, num_bytes - done);
        buffer.read.wait();
        std::memcpy(buffer.memory.data(), source + done, static_cast<std::size_t>(count));
        stream_.copy_to_device(target + static_cast<CUdeviceptr>(done), buffer.memory.data(), count);
        stream_.record(buffer.read);
    }
}

}  // namespace gemma2_fast
