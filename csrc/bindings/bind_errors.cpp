#include <pybind11/pybind11.h>

#include "base/errors.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

void raise_python(const char* class_name, const Error& error) {
    // Looked up when needed: the package may still be importing itself when the extension is loaded.
    const py::object type = py::module_::import("gemma2_fast.errors").attr(class_name);
    PyErr_SetString(type.ptr(), error.what());
}

}  // namespace

void bind_errors(py::module_& /*module*/) {
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const RequestError& error) {
            raise_python("RequestError", error);
        } catch (const CapacityError& error) {
            raise_python("CapacityError", error);
        } catch (const BackendError& error) {
            raise_python("BackendError", error);
        } catch (const Error& error) {
            raise_python("Gemma2FastError", error);
        }
    });
}

}  // namespace gemma2_fast
