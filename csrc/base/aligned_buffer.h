#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <utility>

namespace gemma2_fast {

// Uninitialised storage of trivially copyable elements on a cache line; moves, never copies.
template <typename T>
class AlignedBuffer {
  public:
    static constexpr std::size_t kAlignmentBytes = 64;

    AlignedBuffer() = default;
    explicit AlignedBuffer(std::size_t count) : size_(count) {
        if (count > SIZE_MAX / sizeof(T)) throw std::bad_array_new_length();
        if (count > 0) data_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignmentBytes}));
    }
    ~AlignedBuffer() { ::operator delete(data_, std::align_val_t{kAlignmentBytes}); }
    AlignedBuffer(AlignedBuffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    std::size_t size() const { return size_; }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }
    std::span<T> span() { return {data_, size_}; }
    std::span<const T> span() const { return {data_, size_}; }

  private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace gemma2_fast
