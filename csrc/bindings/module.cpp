#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

PYBIND11_MODULE(_core, module) {
    module.doc() =
        "The C++ engine of gemma2_fast: cache, scheduler, sampler, decode loop, CPU kernels and the launcher of GPU "
        "kernels.";
    gemma2_fast::bind_errors(module);
    gemma2_fast::bind_machine(module);
    gemma2_fast::bind_ops(module);
    gemma2_fast::bind_recurrent_ops(module);
    gemma2_fast::bind_quantize(module);
    gemma2_fast::bind_model_step(module);
    gemma2_fast::bind_runtime(module);
    gemma2_fast::bind_model(module);
    gemma2_fast::bind_cuda(module);
}
