#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "base/errors.h"

namespace gemma2_fast {

namespace py = pybind11;

// Arrays as the ops' bindings take them, and what is said of one that does not fit.
using Floats = py::array_t<float, py::array::c_style>;

inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

inline void require(bool met, const std::string& what, const std::string& expected, const std::string& actual) {
    if (!met) throw RequestError(what + ": expected " + expected + ", got " + actual);
}

inline void require_shape(const py::array& array, const char* name, const std::vector<int64_t>& shape) {
    bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    std::string expected;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        same = same && array.shape(static_cast<py::ssize_t>(i)) == shape[i];
        expected += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    require(same, name, "shape (" + expected + ")", shape_text(array));
}

inline void require_dims(const py::array& array, const char* name, int dims) {
    require(array.ndim() == dims && array.size() > 0, name,
            "a non-empty array of " + std::to_string(dims) + " dimensions", "shape " + shape_text(array));
}

inline Floats copy_of(const Floats& array) {
    Floats copy(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
    std::copy_n(array.data(), array.size(), copy.mutable_data());
    return copy;
}

}  // namespace gemma2_fast
