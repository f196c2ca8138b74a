#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "cuda/device.h"

namespace gemma2_fast {

// One row of triton_kernels' manifest, with the machine code it names.
struct KernelImage {
    struct Parameter {
        std::string name;
        std::string type;  // "*" before what a pointer points to; "i32", "fp32"
        bool divisible_by_16 = false;
    };

    std::string op;
    std::string symbol;
    std::map<std::string, int64_t> constants;
    std::vector<Parameter> parameters;
    int64_t pointer_alignment_bytes = 0;
    int num_warps = 0;
    int dynamic_shared_bytes = 0;
    int hidden_pointers = 0;        // after the parameters: Triton's scratch, null
    bool dependent_launch = false;  // waits by itself for the kernel before it
    std::string code;               // cubin or PTX
};

struct KernelArgument {
    const char* name;
    std::variant<CUdeviceptr, int32_t, float> value;
};

struct LaunchGrid {
    int64_t x = 1, y = 1, z = 1;
};

// A loaded kernel. What was promised of its arguments when it was compiled is checked at every launch.
class Kernel {
  public:
    Kernel(const Device& device, const KernelImage& image);
    ~Kernel();
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    // Arguments by name, in any order; kernels that share arguments are given all of theirs. Throws Error where one is
    // missing, of another type or misaligned.
    void launch(Stream& stream, LaunchGrid grid, const std::vector<KernelArgument>& arguments) const;

    int64_t constant(const std::string& name) const;  // throws Error where the kernel has none of that name

  private:
    const Device& device_;
    const KernelImage& image_;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
};

// The kernels compiled for one device; each is loaded when it is first asked for.
class KernelSet {
  public:
    using Constants = std::map<std::string, int64_t>;
    using Types = std::map<std::string, std::string>;

    KernelSet(const Device& device, std::vector<KernelImage> images);

    // The kernel of an op that was compiled with these constants, and these types of parameters. Throws BackendError
    // that names what there is instead.
    const Kernel& find(const std::string& op, const Constants& constants, const Types& types = {});
    // All of them, at least one.
    std::vector<const Kernel*> find_all(const std::string& op, const Constants& constants);

  private:
    const Kernel& load(std::size_t index);
    [[noreturn]] void refuse(const std::string& op, const Constants& constants) const;

    const Device& device_;
    std::vector<KernelImage> images_;
    std::vector<std::unique_ptr<Kernel>> loaded_;  // at the place of its image
};

}  // namespace gemma2_fast
