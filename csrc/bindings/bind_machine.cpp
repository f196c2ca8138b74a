#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace gemma2_fast {
namespace {

// Python threads may run while the pool works. The first exception of a task is raised once all tasks are done.
void parallel_for(ThreadPool& pool, int64_t num_tasks, const std::function<void(int64_t, int)>& body) {
    std::mutex mutex;
    std::exception_ptr failure;
    {
        py::gil_scoped_release no_gil;
        pool.parallel_for(num_tasks, [&](int64_t task_index, int thread_index) {
            try {
                body(task_index, thread_index);
            } catch (...) {
                std::lock_guard lock(mutex);
                if (!failure) failure = std::current_exception();
            }
        });
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace

void bind_machine(py::module_& module) {
    module.def("processor_name", &processor_name);
    module.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (InstructionSet set : available_instruction_sets()) names.emplace_back(instruction_set_name(set));
        return names;
    });
    module.def(
        "choose_instruction_set",
        [](const std::string& name) { return std::string(instruction_set_name(choose_instruction_set(name))); },
        py::arg("name"));

    py::class_<ThreadPool>(module, "ThreadPool")
        .def(py::init<int>(), py::arg("num_threads"))
        .def_property_readonly("num_threads", &ThreadPool::num_threads)
        .def("parallel_for", &parallel_for, py::arg("num_tasks"), py::arg("body"));
}

}  // namespace gemma2_fast
