// The ops of recurrent layers on numpy arrays, for tests and benchmarks. What a sequence carries on comes back changed.
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cpu/kernels.h"

namespace gemma2_fast {
namespace {

class RecurrentOps {
  public:
    explicit RecurrentOps(const std::string& instruction_set)
        : kernels_(kernels_for(choose_instruction_set(instruction_set))) {}

    std::string instruction_set() const { return std::string(instruction_set_name(kernels_.instruction_set)); }

    py::tuple conv1d(const Floats& x, const Floats& weights, const Floats& bias, const Floats& tail) {
        require_dims(x, "x", 2);
        require_dims(weights, "weights", 2);
        const int64_t num_channels = x.shape(1), num_taps = weights.shape(0);
        require_shape(weights, "weights", {num_taps, num_channels});
        require_shape(bias, "bias", {num_channels});
        require_shape(tail, "tail", {num_taps - 1, num_channels});
        Floats out({x.shape(0), x.shape(1)}), next_tail = copy_of(tail);
        kernels_.conv1d({.x = x.data(),
                         .x_stride = num_channels,
                         .tail = next_tail.mutable_data(),
                         .tail_stride = num_channels,
                         .weights = weights.data(),
                         .weights_stride = num_channels,
                         .bias = bias.data(),
                         .num_taps = num_taps,
                         .num_tokens = x.shape(0),
                         .num_channels = num_channels,
                         .out = out.mutable_data(),
                         .out_stride = num_channels});
        return py::make_tuple(out, next_tail);
    }

    py::tuple rg_lru(const Floats& x, const Floats& input_gate, const Floats& recurrence_gate, const Floats& log_decay,
                     const Floats& state, bool starts) {
        require_dims(x, "x", 2);
        const int64_t num_channels = x.shape(1);
        require_shape(input_gate, "input_gate", {x.shape(0), num_channels});
        require_shape(recurrence_gate, "recurrence_gate", {x.shape(0), num_channels});
        require_shape(log_decay, "log_decay", {num_channels});
        require_shape(state, "state", {num_channels});
        Floats out({x.shape(0), x.shape(1)}), last = copy_of(state);
        kernels_.rg_lru({.x = x.data(),
                         .x_stride = num_channels,
                         .input_gate = input_gate.data(),
                         .recurrence_gate = recurrence_gate.data(),
                         .gate_stride = num_channels,
                         .log_decay = log_decay.data(),
                         .state = last.mutable_data(),
                         .starts = starts,
                         .num_tokens = x.shape(0),
                         .num_channels = num_channels,
                         .out = out.mutable_data(),
                         .out_stride = num_channels});
        return py::make_tuple(out, last);
    }

  private:
    const Kernels& kernels_;
};

}  // namespace

void bind_recurrent_ops(py::module_& module) {
    py::class_<RecurrentOps>(module, "RecurrentOps")
        .def(py::init<const std::string&>(), py::arg("instruction_set") = "auto")
        .def_property_readonly("instruction_set", &RecurrentOps::instruction_set)
        .def("conv1d", &RecurrentOps::conv1d, py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("tail"))
        .def("rg_lru", &RecurrentOps::rg_lru, py::arg("x"), py::arg("input_gate"), py::arg("recurrence_gate"),
             py::arg("log_decay"), py::arg("state"), py::arg("starts"));
}

}  // namespace gemma2_fast
