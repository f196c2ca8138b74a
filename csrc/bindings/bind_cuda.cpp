#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "cuda/graph_step.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

DeviceFormat device_format_from_name(const std::string& name) {
    if (name == "bfloat16") return DeviceFormat::kBF16;
    if (name == "int8") return DeviceFormat::kInt8;
    if (name == "int4") return DeviceFormat::kInt4;
    throw BackendError("weights as '" + name + "' have no GPU kernels; known: bfloat16, int8, int4");
}

std::map<std::string, DeviceFormat> device_formats(const std::map<std::string, std::string>& names) {
    std::map<std::string, DeviceFormat> formats;
    for (const auto& [tensor, name] : names) formats.emplace(tensor, device_format_from_name(name));
    return formats;
}

void upload(GraphStep& step, const std::string& name, const std::string& part,
            const py::array_t<uint8_t, py::array::c_style>& data) {
    const std::span bytes(reinterpret_cast<const std::byte*>(data.data()), static_cast<std::size_t>(data.nbytes()));
    const py::gil_scoped_release released;
    step.upload(name, part, bytes);
}

}  // namespace

void bind_cuda(py::module_& module) {
    py::class_<Device, std::shared_ptr<Device>>(module, "CudaDevice")
        .def(py::init<const std::string&, int>(), py::kw_only(), py::arg("driver_library"), py::arg("ordinal"),
             py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("name", &Device::name)
        .def_property_readonly("arch", &Device::arch)
        .def_property_readonly("free_bytes", &Device::free_bytes);
    py::class_<KernelImage>(module, "KernelImage")
        .def(py::init([](std::string op, std::string symbol, std::map<std::string, int64_t> constants,
                         const std::vector<std::tuple<std::string, std::string, bool>>& parameters,
                         int64_t pointer_alignment_bytes, int num_warps, int dynamic_shared_bytes, int hidden_pointers,
                         bool dependent_launch, const py::bytes& code) {
                 KernelImage image{.op = std::move(op),
                                   .symbol = std::move(symbol),
                                   .constants = std::move(constants),
                                   .parameters = {},
                                   .pointer_alignment_bytes = pointer_alignment_bytes,
                                   .num_warps = num_warps,
                                   .dynamic_shared_bytes = dynamic_shared_bytes,
                                   .hidden_pointers = hidden_pointers,
                                   .dependent_launch = dependent_launch,
                                   .code = code};
                 for (const auto& [name, type, divisible] : parameters)
                     image.parameters.push_back({name, type, divisible});
                 return image;
             }),
             py::kw_only(), py::arg("op"), py::arg("symbol"), py::arg("constants"), py::arg("parameters"),
             py::arg("pointer_alignment_bytes"), py::arg("num_warps"), py::arg("dynamic_shared_bytes"),
             py::arg("hidden_pointers"), py::arg("dependent_launch"), py::arg("code"));
    py::class_<GraphStep, ModelStep, std::shared_ptr<GraphStep>>(module, "GraphStep")
        .def(py::init([](std::shared_ptr<Device> device, const ModelSpec& spec, const CachePlan& plan,
                         const std::map<std::string, std::string>& formats, std::vector<KernelImage> kernels,
                         int64_t max_step_tokens, int64_t max_logits_rows, int64_t max_sequences, int64_t max_seq_len,
                         bool captures, bool allocates) {
                 const GraphStep::Options options{.limits = {.max_step_tokens = max_step_tokens,
                                                             .max_logits_rows = max_logits_rows,
                                                             .vocab_size = spec.vocab_size},
                                                  .max_sequences = max_sequences,
                                                  .max_seq_len = max_seq_len,
                                                  .captures = captures,
                                                  .allocates = allocates};
                 return std::make_shared<GraphStep>(std::move(device), spec, plan, device_formats(formats),
                                                    std::move(kernels), options);
             }),
             py::kw_only(), py::arg("device"), py::arg("spec"), py::arg("plan"), py::arg("formats"), py::arg("kernels"),
             py::arg("max_step_tokens"), py::arg("max_logits_rows"), py::arg("max_sequences"), py::arg("max_seq_len"),
             py::arg("captures") = true, py::arg("allocates") = true, py::call_guard<py::gil_scoped_release>())
        .def("upload", &upload, py::arg("name"), py::arg("part"), py::arg("data"))
        .def("finish_upload", &GraphStep::finish_upload, py::call_guard<py::gil_scoped_release>())
        .def("poison_cache", &GraphStep::poison_cache, py::call_guard<py::gil_scoped_release>(),
             "Fills every cache page with NaN, for tests.")
        .def_property_readonly("float32_tensors", &GraphStep::float32_tensors)
        .def_property_readonly("num_device_bytes", &GraphStep::num_device_bytes)
        .def_property_readonly("num_weight_bytes", &GraphStep::num_weight_bytes)
        .def_property_readonly("num_graphs", &GraphStep::num_graphs);
}

}  // namespace gemma2_fast
