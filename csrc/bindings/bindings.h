#pragma once

#include <pybind11/pybind11.h>

namespace gemma2_fast {

// One file each; together they are the whole of gemma2_fast._core.
void bind_errors(pybind11::module_& module);
void bind_machine(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_recurrent_ops(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);  // ThreadPool must be bound
void bind_model_step(pybind11::module_& module);
void bind_runtime(pybind11::module_& module);  // ModelStep must be bound
void bind_model(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);  // the model must be bound

}  // namespace gemma2_fast
