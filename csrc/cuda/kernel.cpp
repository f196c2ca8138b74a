#include "cuda/kernel.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr std::size_t kMostParameters = 32;
constexpr int kPlainSharedBytes = 48 * 1024;  // what a kernel has without asking
constexpr int64_t kMostPrograms = 65535;      // along y and z

bool has_type(const KernelArgument& argument, const std::string& type) {
    if (std::holds_alternative<CUdeviceptr>(argument.value)) return type.starts_with('*');
    return type == (std::holds_alternative<int32_t>(argument.value) ? "i32" : "fp32");
}

std::string list(const KernelSet::Constants& constants) {
    std::string text;
    for (const auto& [name, value] : constants) text += (text.empty() ? "" : ", ") + name + "=" + std::to_string(value);
    return text;
}

bool matches(const KernelImage& image, const std::string& op, const KernelSet::Constants& constants,
             const KernelSet::Types& types) {
    const auto has_constant = [&](const auto& wanted) {
        const auto found = image.constants.find(wanted.first);
        return found != image.constants.end() && found->second == wanted.second;
    };
    const auto has_parameter = [&](const auto& wanted) {
        return std::ranges::any_of(image.parameters, [&](const KernelImage::Parameter& parameter) {
            return parameter.name == wanted.first && parameter.type == wanted.second;
        });
    };
    return image.op == op && std::ranges::all_of(constants, has_constant) && std::ranges::all_of(types, has_parameter);
}

}  // namespace

Kernel::Kernel(const Device& device, const KernelImage& image) : device_(device), image_(image) {
    if (image.parameters.size() + image.hidden_pointers > kMostParameters)
        throw BackendError("kernel " + image.symbol + " has more than " + std::to_string(kMostParameters) +
                           " parameters");
    const Driver& driver = device.driver();
    const CUresult loaded = driver.cuModuleLoadData(&module_, image.code.c_str());
    if (loaded == CUDA_ERROR_INVALID_IMAGE || loaded == CUDA_ERROR_NO_BINARY_FOR_GPU ||
        loaded == CUDA_ERROR_UNSUPPORTED_PTX_VERSION)
        throw BackendError("the driver of " + device.name() + " cannot load the kernel " + image.symbol +
                           ": update NVIDIA's driver, or compile the kernels with an older Triton");
    driver.check(loaded, "loading the kernel " + image.symbol);
    try {
        driver.check(driver.cuModuleGetFunction(&function_, module_, image.symbol.c_str()),
                     "looking for the kernel " + image.symbol);
        int fixed_shared_bytes = 0;
        driver.check(driver.cuFuncGetAttribute(&fixed_shared_bytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function_),
                     "asking for the shared memory of " + image.symbol);
        if (image.dynamic_shared_bytes + fixed_shared_bytes > device.most_shared_bytes())
            throw BackendError("kernel " + image.symbol + " takes " +
                               std::to_string(image.dynamic_shared_bytes + fixed_shared_bytes) +
                               " bytes of shared memory, " + device.name() + " has " +
                               std::to_string(device.most_shared_bytes()) + "; use backend=\"cpu\"");
        if (image.dynamic_shared_bytes + fixed_shared_bytes > kPlainSharedBytes)
            driver.check(
                driver.cuFuncSetAttribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          image.dynamic_shared_bytes),
                "taking " + std::to_string(image.dynamic_shared_bytes) + " bytes of shared memory for " + image.symbol);
    } catch (...) {
        driver.cuModuleUnload(module_);
        throw;
    }
}

Kernel::~Kernel() { device_.driver().cuModuleUnload(module_); }

void Kernel::launch(Stream& stream, LaunchGrid grid, const std::vector<KernelArgument>& arguments) const {
    const auto refuse = [&](const std::string& what) { throw Error("kernel " + image_.symbol + ": " + what); };
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > std::numeric_limits<int32_t>::max() ||
        grid.y > kMostPrograms || grid.z > kMostPrograms)
        refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
    CUdeviceptr none = 0;
    std::array<void*, kMostParameters> values;
    std::size_t num_values = 0;
    for (const KernelImage::Parameter& parameter : image_.parameters) {
        const auto found = std::ranges::find_if(
            arguments, [&](const KernelArgument& argument) { return parameter.name == argument.name; });
        if (found == arguments.end()) refuse("no argument " + parameter.name);
        if (!has_type(*found, parameter.type)) refuse(parameter.name + " must be " + parameter.type);
        if (const auto* pointer = std::get_if<CUdeviceptr>(&found->value);
            pointer && *pointer % image_.pointer_alignment_bytes != 0)
            refuse(parameter.name + " must be aligned to " + std::to_string(image_.pointer_alignment_bytes) + " bytes");
        if (const auto* number = std::get_if<int32_t>(&found->value);
            number && parameter.divisible_by_16 && *number % 16 != 0)
            refuse(parameter.name + " must be a multiple of 16, got " + std::to_string(*number));
        values[num_values++] = std::visit(
            [](const auto& value) { return const_cast<void*>(static_cast<const void*>(&value)); }, found->value);
    }
    for (int i = 0; i < image_.hidden_pointers; ++i) values[num_values++] = &none;

    CUlaunchAttribute dependent{};
    dependent.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    dependent.programmatic_stream_serialization_allowed = 1;
    const CUlaunchConfig config{
        .grid_x = static_cast<unsigned>(grid.x),
        .grid_y = static_cast<unsigned>(grid.y),
        .grid_z = static_cast<unsigned>(grid.z),
        .block_x = static_cast<unsigned>(32 * image_.num_warps),
        .block_y = 1,
        .block_z = 1,
        .dynamic_shared_bytes = static_cast<unsigned>(image_.dynamic_shared_bytes),
        .stream = stream.handle(),
        .attributes = &dependent,
        .num_attributes = image_.dependent_launch ? 1u : 0u,
    };
    const Driver& driver = device_.driver();
    driver.check(driver.cuLaunchKernelEx(&config, function_, values.data(), nullptr), "launching " + image_.symbol);
}

int64_t Kernel::constant(const std::string& name) const {
    const auto found = image_.constants.find(name);
    if (found == image_.constants.end()) throw Error("kernel " + image_.symbol + " has no constant " + name);
    return found->second;
}

KernelSet::KernelSet(const Device& device, std::vector<KernelImage> images)
    : device_(device), images_(std::move(images)), loaded_(images_.size()) {}

const Kernel& KernelSet::find(const std::string& op, const Constants& constants, const Types& types) {
    for (std::size_t index = 0; index < images_.size(); ++index)
        if (matches(images_[index], op, constants, types)) return load(index);
    refuse(op, constants);
}

std::vector<const Kernel*> KernelSet::find_all(const std::string& op, const Constants& constants) {
    std::vector<const Kernel*> found;
    for (std::size_t index = 0; index < images_.size(); ++index)
        if (matches(images_[index], op, constants, {})) found.push_back(&load(index));
    if (found.empty()) refuse(op, constants);
    return found;
}

const Kernel& KernelSet::load(std::size_t index) {
    std::unique_ptr<Kernel>& kernel = loaded_[index];
    if (!kernel) kernel = std::make_unique<Kernel>(device_, images_[index]);
    return *kernel;
}

void KernelSet::refuse(const std::string& op, const Constants& constants) const {
    std::string there;
    for (const KernelImage& image : images_)
        if (image.op == op) there += "\n  " + list(image.constants);
    throw BackendError("no kernel " + op + " is compiled for " + list(constants) + " on sm_" +
                       std::to_string(device_.arch()) + "; there is" + (there.empty() ? " none of that op" : there));
}

}  // namespace gemma2_fast
