#include "bindings/callback_step.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "base/errors.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

// A read-only view of numbers that live in the Python object `owner`.
py::array_t<int32_t> view(const int32_t* values, std::vector<py::ssize_t> shape, py::handle owner) {
    py::array_t<int32_t> array(std::move(shape), values, owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

template <std::vector<int32_t> StepBatch::* member>
py::array_t<int32_t> flat_view(const py::object& self) {
    const auto& values = self.cast<const StepBatch&>().*member;
    return view(values.data(), {static_cast<py::ssize_t>(values.size())}, self);
}

py::tuple block_tables(const py::object& self) {
    const auto& batch = self.cast<const StepBatch&>();
    py::tuple tables(batch.block_table.size());
    const auto num_sequences = static_cast<py::ssize_t>(batch.num_sequences());
    for (std::size_t g = 0; g < batch.block_table.size(); ++g) {
        const auto size = static_cast<py::ssize_t>(batch.block_table[g].size());
        tables[g] =
            view(batch.block_table[g].data(), {num_sequences, num_sequences > 0 ? size / num_sequences : 0}, self);
    }
    return tables;
}

py::array_t<int32_t> state_copies(const py::object& self) {
    const std::vector<StateCopy>& copies = self.cast<const StepBatch&>().state_copies;
    return view(copies.empty() ? nullptr : copies.front().data(), {static_cast<py::ssize_t>(copies.size()), 2}, self);
}

std::string describe(const py::object& value) {
    if (!py::isinstance<py::array>(value)) return "a " + py::type::of(value).attr("__name__").cast<std::string>();
    return py::str("{} {}").format(value.attr("dtype"), value.attr("shape")).cast<std::string>();
}

// float32 [num_rows, V]; V is any where it is not given.
py::array_t<float> rows_of(const py::object& returned, int64_t num_rows, std::optional<int64_t> vocab_size) {
    bool fits = py::isinstance<py::array_t<float>>(returned);
    if (fits) {
        const auto array = py::reinterpret_borrow<py::array>(returned);
        fits = array.ndim() == 2 && array.shape(0) == num_rows && array.shape(1) == vocab_size.value_or(array.shape(1));
    }
    if (!fits)
        throw Error("the step's callable must return a float32 numpy array of shape (" + std::to_string(num_rows) +
                    ", " + (vocab_size ? std::to_string(*vocab_size) : "V") + "), but returned " + describe(returned));
    auto contiguous = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(returned);
    if (!contiguous) throw py::error_already_set();
    return contiguous;
}

}  // namespace

CallbackStep::~CallbackStep() {
    const py::gil_scoped_acquire gil;
    callable_ = py::function();
    choose_.reset();
}

void CallbackStep::run(const StepBatch& batch, std::span<float> logits) {
    const py::gil_scoped_acquire gil;
    const int64_t num_rows = batch.num_logits();
    std::optional<int64_t> vocab_size;
    if (num_rows > 0) vocab_size = static_cast<int64_t>(logits.size()) / num_rows;
    try {
        std::ranges::copy_n(rows_of(callable_(py::cast(batch)), num_rows, vocab_size).data(), std::ssize(logits),
                            logits.begin());
    } catch (const py::error_already_set& error) {
        throw Error(error.what());
    }
}

void CallbackStep::start(const StepBatch& batch, std::span<const TokenChoice> choices) {
    StepBatch known = batch;
    for (int32_t& token_id : known.token_ids)
        if (token_id < 0) token_id = std::max(last_tokens_.at(row_of_chosen(token_id)), 0);
    const py::gil_scoped_acquire gil;
    Started step{.tokens = std::vector<int32_t>(choices.size(), kHostChooses), .error = std::nullopt};
    try {
        if (!started_.empty() && started_.back().error) throw Error(*started_.back().error);
        const py::array_t<float> logits = rows_of(callable_(py::cast(known)), batch.num_logits(), std::nullopt);
        last_logits_.assign(logits.data(), logits.data() + logits.size());
        step.tokens = chosen(logits, choices);
    } catch (const std::exception& error) {
        step.error = error.what();
    }
    last_tokens_ = step.tokens;
    started_.push_back(std::move(step));
}

std::vector<int32_t> CallbackStep::chosen(const py::array& logits, std::span<const TokenChoice> choices) const {
    py::list rules;
    for (const TokenChoice& choice : choices) rules.append(py::make_tuple(*choice.sampling, choice.token_index));
    auto tokens = (*choose_)(logits, rules).cast<std::vector<int32_t>>();
    if (tokens.size() != choices.size())
        throw Error("choose must return " + std::to_string(choices.size()) + " tokens, but returned " +
                    std::to_string(tokens.size()));
    return tokens;
}

void CallbackStep::finish(std::span<int32_t> tokens) {
    const Started step = std::move(started_.front());
    started_.pop_front();
    if (step.error) {
        started_.clear();
        throw Error(*step.error);
    }
    std::ranges::copy(step.tokens, tokens.begin());
}

void CallbackStep::copy_logits(std::span<float> logits) {
    if (last_logits_.size() != logits.size())
        throw Error("the step's callable returned " + std::to_string(last_logits_.size()) + " logits, expected " +
                    std::to_string(logits.size()));
    std::ranges::copy(last_logits_, logits.begin());
}

void bind_callback_step(py::module_& module) {
    py::class_<StepBatch>(module, "StepBatch",
                          "One step's work, with the fields of gemma2_fast.engine.step_batch.StepBatch. Arrays are "
                          "read-only views of this object.")
        .def_property_readonly("token_ids", &flat_view<&StepBatch::token_ids>)
        .def_property_readonly("positions", &flat_view<&StepBatch::positions>)
        .def_property_readonly("first_token", &flat_view<&StepBatch::first_token>)
        .def_property_readonly("context_tokens", &flat_view<&StepBatch::context_tokens>)
        .def_property_readonly("block_table", &block_tables)
        .def_property_readonly("state_slot", &flat_view<&StepBatch::state_slot>)
        .def_property_readonly("state_copies", &state_copies)
        .def_property_readonly("logits_token", &flat_view<&StepBatch::logits_token>);

    py::class_<CallbackStep, ModelStep, std::shared_ptr<CallbackStep>>(
        module, "CallbackStep",
        "Runs a Python callable(batch: StepBatch) -> float32 ndarray [L, V] as a model step. With choose(logits, "
        "rules) -> [L] token ids, where a rule is SamplingParams and the token's index among the generated ones, steps "
        "choose their tokens and run one ahead; an id of -1 leaves the choice to the sampler.")
        .def(py::init<py::function, std::optional<py::function>>(), py::arg("callable"),
             py::arg("choose") = py::none());
}

}  // namespace gemma2_fast
