#include "bindings/callback_step.h"

#include <pybind11/numpy.h>

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

void copy_rows(const py::object& returned, int64_t num_rows, std::span<float> logits) {
    const auto vocab_size = num_rows > 0 ? static_cast<int64_t>(logits.size()) / num_rows : 0;
    bool fits = py::isinstance<py::array_t<float>>(returned);
    if (fits) {
        const auto array = py::reinterpret_borrow<py::array>(returned);
        fits = array.ndim() == 2 && array.shape(0) == num_rows && (num_rows == 0 || array.shape(1) == vocab_size);
    }
    if (!fits)
        throw Error("the step's callable must return a float32 numpy array of shape (" + std::to_string(num_rows) +
                    ", " + (num_rows > 0 ? std::to_string(vocab_size) : "V") + "), but returned " + describe(returned));
    const auto contiguous = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(returned);
    if (!contiguous) throw py::error_already_set();
    std::copy_n(contiguous.data(), logits.size(), logits.data());
}

}  // namespace

CallbackStep::~CallbackStep() {
    const py::gil_scoped_acquire gil;
    callable_ = py::function();
}

void CallbackStep::run(const StepBatch& batch, std::span<float> logits) {
    const py::gil_scoped_acquire gil;
    try {
        copy_rows(callable_(py::cast(batch)), batch.num_logits(), logits);
    } catch (const py::error_already_set& error) {
        throw Error(error.what());
    }
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
        module, "CallbackStep", "Runs a Python callable(batch: StepBatch) -> float32 ndarray [L, V] as a model step.")
        .def(py::init<py::function>(), py::arg("callable"));
}

}  // namespace gemma2_fast
