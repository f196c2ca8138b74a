#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "base/cpu_features.h"
#include "base/errors.h"
#include "bindings/bindings.h"
#include "quant/quantize.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

int64_t count_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

std::optional<int64_t> quantize_into(const std::string& source, const Bytes& data, int64_t cols,
                                     const std::string& target, Bytes out, ThreadPool& pool,
                                     const std::string& instruction_set) {
    const WeightFormat& from = weight_format(source);
    const WeightFormat& to = weight_format(target);
    if (cols < 1 || cols > INT32_MAX || data.nbytes() % (cols * from.block_bytes) != 0)
        throw RequestError("quantize: " + std::to_string(data.nbytes()) + " bytes are not rows of " +
                           std::to_string(cols) + " weights stored as " + source);
    const UnquantizedRows rows{from.type, data.nbytes() / (cols * from.block_bytes), cols,
                               reinterpret_cast<const std::byte*>(data.data())};
    const int64_t needed =
        count_blocks(rows.rows, to.block_rows) * count_blocks(cols, to.block_weights) * to.block_bytes;
    if (out.nbytes() != needed)
        throw RequestError("quantize: out must have " + std::to_string(needed) + " bytes, got " +
                           std::to_string(out.nbytes()));
    auto* bytes = reinterpret_cast<std::byte*>(out.mutable_data());
    const InstructionSet set = choose_instruction_set(instruction_set);
    py::gil_scoped_release no_gil;
    return quantize_strips(rows, to.type, bytes, set, pool);
}

}  // namespace

void bind_quantize(py::module_& module) {
    module.def("quantize_into", &quantize_into, py::kw_only(), py::arg("source"), py::arg("data").noconvert(),
               py::arg("cols"), py::arg("target"), py::arg("out").noconvert(), py::arg("pool"),
               py::arg("instruction_set") = "auto");
}

}  // namespace gemma2_fast
