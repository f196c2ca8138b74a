#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "cpu/cpu_step.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

WeightView view_of(const std::string& name, py::handle tensor) try {
    auto [format_name, shape, array] = tensor.cast<std::tuple<std::string, std::vector<int64_t>, py::object>>();
    const WeightFormat& format = weight_format(format_name);
    if (!py::isinstance<Bytes>(array)) throw Error("weights: " + name + " must be a contiguous uint8 array");
    auto data = py::reinterpret_borrow<Bytes>(array);
    int64_t num_weights = 1;
    for (int64_t size : shape)
        if (size < 1 || __builtin_mul_overflow(num_weights, size, &num_weights))
            throw Error("weights: " + name + " has an impossible shape");
    WeightView view{.type = format.type, .rows = 1, .cols = shape.empty() ? 1 : shape.back(), .data = nullptr};
    view.rows = num_weights / view.cols;
    view.data = reinterpret_cast<const std::byte*>(data.data());
    const bool whole_blocks = view.cols % format.block_weights == 0 || format.block_rows > 1;
    if (!whole_blocks || data.nbytes() != view.num_bytes())
        throw Error("weights: " + name + " has " + std::to_string(data.nbytes()) +
                    " bytes, which is not its shape as " + format_name);
    return view;
} catch (const py::cast_error&) {
    throw Error("weights: " + name + " must be (format name, shape, uint8 array)");
}

// Weights come as {canonical name: (format name, shape, bytes)}. Views keep the arrays alive until the last step ends,
// which may be in a thread without the GIL.
ModelWeights weights_from_dict(const py::dict& tensors) {
    ModelWeights weights;
    for (auto [key, value] : tensors) {
        auto name = py::str(key).cast<std::string>();
        weights.tensors.emplace(name, view_of(name, value));
    }
    weights.owner = std::shared_ptr<const void>(new py::dict(tensors.attr("copy")()), [](const void* dict) {
        py::gil_scoped_acquire gil;
        delete static_cast<const py::dict*>(dict);
    });
    return weights;
}

Activations activations_from_name(const std::string& name) {
    if (name == "float32") return Activations::kF32;
    if (name == "int8") return Activations::kInt8;
    throw BackendError("activations '" + name + "' are not available on the CPU; known: float32, int8");
}

KvType kv_type_from_name(const std::string& name) {
    if (name == "float32") return KvType::kF32;
    if (name == "bfloat16") return KvType::kBF16;
    if (name == "int8") return KvType::kInt8;
    throw BackendError("kv_dtype '" + name + "' is not available on the CPU; known: float32, bfloat16, int8");
}

}  // namespace

void bind_model(py::module_& module) {
    py::class_<AttentionSpec>(module, "AttentionSpec")
        .def(py::init([](int64_t num_query_heads, int64_t num_kv_heads, int64_t head_dim, float query_scale,
                         std::optional<float> score_softcap, std::optional<int64_t> window_keys, bool qk_norm,
                         bool output_bias, std::vector<float> inverse_frequencies) {
                 return AttentionSpec{num_query_heads, num_kv_heads,  head_dim,
                                      query_scale,     score_softcap, window_keys,
                                      qk_norm,         output_bias,   {std::move(inverse_frequencies)}};
             }),
             py::kw_only(), py::arg("num_query_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
             py::arg("query_scale"), py::arg("score_softcap"), py::arg("window_keys"), py::arg("qk_norm"),
             py::arg("output_bias"), py::arg("inverse_frequencies"));
    py::class_<RecurrentSpec>(module, "RecurrentSpec")
        .def(py::init([](int64_t width, int64_t num_gate_blocks, int64_t conv_width) {
                 return RecurrentSpec{width, num_gate_blocks, conv_width};
             }),
             py::kw_only(), py::arg("width"), py::arg("num_gate_blocks"), py::arg("conv_width"));
    py::class_<LayerSpec>(module, "LayerSpec")
        .def(py::init([](std::variant<AttentionSpec, RecurrentSpec> mixer, int64_t mlp_width, bool mlp_bias,
                         bool norm_after_mixer, bool norm_after_mlp) {
                 return LayerSpec{std::move(mixer), mlp_width, mlp_bias, norm_after_mixer, norm_after_mlp};
             }),
             py::kw_only(), py::arg("mixer"), py::arg("mlp_width"), py::arg("mlp_bias"), py::arg("norm_after_mixer"),
             py::arg("norm_after_mlp"));
    py::class_<ModelSpec>(module, "ModelSpec")
        .def(py::init([](int64_t model_width, int64_t vocab_size, float embedding_scale, float norm_epsilon,
                         std::optional<float> final_softcap, std::vector<LayerSpec> layers) {
                 return ModelSpec{model_width,  vocab_size,    embedding_scale,
                                  norm_epsilon, final_softcap, std::move(layers)};
             }),
             py::kw_only(), py::arg("model_width"), py::arg("vocab_size"), py::arg("embedding_scale"),
             py::arg("norm_epsilon"), py::arg("final_softcap"), py::arg("layers"));
    py::class_<CpuStep, ModelStep, std::shared_ptr<CpuStep>>(module, "CpuStep")
        .def(
            py::init([](const ModelSpec& spec, const py::dict& weights, const CachePlan& plan,
                        const std::string& activations, const std::string& kv_dtype, const std::string& instruction_set,
                        int num_threads, int64_t max_step_tokens, int64_t max_logits_rows) {
                CpuStep::Options options{.activations = activations_from_name(activations),
                                         .kv_type = kv_type_from_name(kv_dtype),
                                         .instruction_set = choose_instruction_set(instruction_set),
                                         .num_threads = num_threads,
                                         .max_step_tokens = max_step_tokens,
                                         .max_logits_rows = max_logits_rows};
                return std::make_shared<CpuStep>(spec, weights_from_dict(weights), plan, options);
            }),
            py::kw_only(), py::arg("spec"), py::arg("weights"), py::arg("plan"), py::arg("activations"),
            py::arg("kv_dtype"), py::arg("instruction_set"), py::arg("num_threads"), py::arg("max_step_tokens"),
            py::arg("max_logits_rows"))
        .def("poison_cache", &CpuStep::poison_cache, "Fills every cache page and state with NaN, for tests.");
}

}  // namespace gemma2_fast
