// Steps that Python plans itself, without a scheduler.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "runtime/model_step.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

// Every sequence has tokens, and they follow one another, which steps take for granted.
bool is_flat(const StepBatch& batch) {
    const std::vector<int32_t>& first = batch.first_token;
    if (batch.positions.size() != batch.token_ids.size() || first.size() != batch.context_tokens.size() + 1 ||
        first.front() != 0 || first.back() != batch.num_tokens() ||
        std::ranges::adjacent_find(first, std::greater_equal{}) != first.end())
        return false;
    for (int64_t s = 0; s < batch.num_sequences(); ++s)
        for (int32_t token = first[s]; token < first[s + 1]; ++token)
            if (batch.positions[token] < 0 || batch.positions[token] != batch.context_tokens[s] + token - first[s])
                return false;
    return std::ranges::all_of(batch.logits_token,
                               [&](int32_t token) { return token >= 0 && token < batch.num_tokens(); });
}

// The same fields as gemma2_fast.engine.step_batch.StepBatch, of which it is made.
StepBatch batch_from(const py::object& source) {
    using Ints = std::vector<int32_t>;
    const auto ints = [&](const char* name) { return source.attr(name).cast<Ints>(); };
    StepBatch batch{.token_ids = ints("token_ids"),
                    .positions = ints("positions"),
                    .first_token = ints("first_token"),
                    .context_tokens = ints("context_tokens"),
                    .block_table = {},
                    .state_slot = ints("state_slot"),
                    .state_copies = source.attr("state_copies").cast<std::vector<StateCopy>>(),
                    .logits_token = ints("logits_token")};
    for (const py::handle table : source.attr("block_table"))
        batch.block_table.push_back(table.attr("ravel")().cast<Ints>());
    if (!is_flat(batch))
        throw Error(
            "a step's batch must have the tokens of one sequence after another, as first_token says, and their "
            "positions from context_tokens on");
    return batch;
}

py::array_t<float> run(ModelStep& step, const py::object& source, int64_t vocab_size) {
    const StepBatch batch = batch_from(source);
    py::array_t<float> logits({batch.num_logits(), vocab_size});
    const std::span values(logits.mutable_data(), static_cast<std::size_t>(logits.size()));
    const py::gil_scoped_release released;
    step.run(batch, values);
    return logits;
}

}  // namespace

void bind_model_step(py::module_& module) {
    py::class_<ModelStep, std::shared_ptr<ModelStep>>(module, "ModelStep", "What a backend is to the decode loop.")
        .def("run", &run, py::arg("batch"), py::arg("vocab_size"));
}

}  // namespace gemma2_fast
