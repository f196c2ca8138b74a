#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arena.h"
#include "cuda/product.h"

namespace gemma2_fast {

// Where each weight is to lie on the device. Tensors arrive one at a time by their canonical names; those that are read
// together, as queries, keys and values, lie together.
class DeviceWeights {
  public:
    struct Part {
        std::string name;  // of the tensor
        int64_t rows;
    };

    // formats: of every matrix, by canonical name.
    DeviceWeights(std::map<std::string, DeviceFormat> formats, Arena& arena);

    // Throw BackendError for a mixture of formats or a size that has no kernels, Error for a missing tensor.
    DeviceMatrix matrix(const std::vector<Part>& parts, int64_t cols, bool biased = false);
    Arena::Slice vector(const std::string& name, int64_t size);       // float32
    Arena::Slice rows(const std::string& name, int64_t num_weights);  // bfloat16, whatever its shape

    // What a tensor's part ("weight", "scales", "factors") is to be copied to. Throws Error for unknown names.
    Arena::Slice place(const std::string& name, const std::string& part) const;
    std::vector<std::pair<std::string, std::string>> parts() const;    // all of them, tensor and part
    int64_t num_bytes() const;                                         // of them
    const std::set<std::string>& vectors() const { return vectors_; }  // tensors that are float32 here

  private:
    DeviceFormat format_of(const std::string& name) const;

    std::map<std::string, DeviceFormat> formats_;
    Arena& arena_;
    std::map<std::string, std::map<std::string, Arena::Slice>> places_;
    std::set<std::string> vectors_;
};

}  // namespace gemma2_fast
