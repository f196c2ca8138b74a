#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "bindings/callback_step.h"
#include "runtime/decode_loop.h"

namespace py = pybind11;
using namespace py::literals;

namespace gemma2_fast {
namespace {

int32_t to_token_id(int64_t id) {
    if (id < std::numeric_limits<int32_t>::min() || id > std::numeric_limits<int32_t>::max())
        throw RequestError("token id " + std::to_string(id) + " is outside every vocabulary");
    return static_cast<int32_t>(id);
}

std::vector<int32_t> to_token_ids(const std::vector<int64_t>& ids) {
    std::vector<int32_t> result(ids.size());
    std::ranges::transform(ids, result.begin(), to_token_id);
    return result;
}

// The array is released under the GIL, whichever thread ends the request.
std::shared_ptr<void> keep_alive(const py::object& object) {
    object.inc_ref();
    return std::shared_ptr<void>(object.ptr(), [](void* held) {
        const py::gil_scoped_acquire gil;
        Py_DECREF(static_cast<PyObject*>(held));
    });
}

std::span<float> writable_rows(const py::object& object, int64_t num_rows) {
    if (py::isinstance<py::array_t<float>>(object)) {
        auto array = py::reinterpret_borrow<py::array_t<float>>(object);
        const bool contiguous = (array.flags() & py::array::c_style) != 0;
        if (array.ndim() == 2 && array.shape(0) == num_rows && contiguous && array.writeable())
            return {array.mutable_data(), static_cast<std::size_t>(array.size())};
    }
    throw RequestError("logits_out must be a writable, C-contiguous float32 array of shape (" +
                       std::to_string(num_rows) + ", V), one row a prompt token");
}

Request make_request(const std::vector<int64_t>& token_ids, SamplingParams sampling,
                     std::optional<int64_t> num_logprobs, std::optional<int64_t> num_prompt_logprobs,
                     const py::object& logits_out) {
    Request request;
    request.token_ids = to_token_ids(token_ids);
    request.sampling = std::move(sampling);
    request.num_logprobs = num_logprobs;
    request.num_prompt_logprobs = num_prompt_logprobs;
    if (!logits_out.is_none()) {
        request.logits_out = writable_rows(logits_out, static_cast<int64_t>(request.token_ids.size()));
        request.logits_owner = keep_alive(logits_out);
    }
    return request;
}

SamplingParams make_sampling(int64_t max_tokens, float temperature, std::optional<int64_t> top_k, float top_p,
                             float min_p, float repetition_penalty, float presence_penalty, float frequency_penalty,
                             const std::vector<std::pair<int64_t, float>>& logit_bias, uint64_t seed,
                             int64_t min_tokens, const std::vector<int64_t>& stop_token_ids) {
    SamplingParams params;
    params.temperature = temperature;
    params.top_k = top_k;
    params.top_p = top_p;
    params.min_p = min_p;
    params.repetition_penalty = repetition_penalty;
    params.presence_penalty = presence_penalty;
    params.frequency_penalty = frequency_penalty;
    for (const auto& [id, bias] : logit_bias) params.logit_bias.emplace_back(to_token_id(id), bias);
    params.seed = seed;
    params.max_tokens = max_tokens;
    params.min_tokens = min_tokens;
    params.stop_token_ids = to_token_ids(stop_token_ids);
    return params;
}

// Threads that delete loops which were dropped on their own thread. Under the GIL.
std::vector<std::thread>& deleters() {
    static std::vector<std::thread> threads;
    return threads;
}

// The loop's thread may need the GIL before it can end, so nobody may wait for it with the GIL held.
void delete_loop(DecodeLoop* loop) {
    if (loop->on_own_thread()) {  // Python collected garbage inside a step's callback; the thread cannot join itself
        deleters().emplace_back([loop] { delete loop; });
        return;
    }
    if (PyGILState_Check() == 0) {
        delete loop;
        return;
    }
    const py::gil_scoped_release released;
    delete loop;
}

// Under the GIL. A loop that outlived the interpreter would ask it for the GIL.
std::vector<std::weak_ptr<DecodeLoop>>& open_loops() {
    static std::vector<std::weak_ptr<DecodeLoop>> loops;
    return loops;
}

void close_open_loops() {
    for (const auto& weak : std::exchange(open_loops(), {}))
        if (const std::shared_ptr<DecodeLoop> loop = weak.lock()) {
            const py::gil_scoped_release released;
            loop->close();
        }
    for (std::thread& deleter : std::exchange(deleters(), {})) {
        const py::gil_scoped_release released;
        deleter.join();
    }
}

std::shared_ptr<DecodeLoop> make_loop(std::shared_ptr<ModelStep> step, CachePlan plan, const Limits& limits) {
    std::shared_ptr<DecodeLoop> loop(new DecodeLoop(std::move(step), std::move(plan), limits), delete_loop);
    std::erase_if(open_loops(), [](const auto& weak) { return weak.expired(); });
    open_loops().push_back(loop);
    return loop;
}

// In slices, so that Ctrl-C gets through.
std::vector<TokenEvent> wait(DecodeLoop& loop, int64_t sequence_id, std::optional<double> timeout_s) {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::nanoseconds kSlice = std::chrono::milliseconds(100);
    constexpr double kLongestS = 1e9;
    if (timeout_s && !(*timeout_s >= 0))
        throw RequestError("timeout_s must be at least 0, or None to wait without end, got " +
                           std::to_string(*timeout_s));
    const auto timeout = std::chrono::duration<double>(std::min(timeout_s.value_or(kLongestS), kLongestS));
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
    while (true) {
        std::vector<TokenEvent> events;
        const auto left = std::max(std::chrono::nanoseconds(deadline - Clock::now()), std::chrono::nanoseconds(0));
        {
            const py::gil_scoped_release released;
            events = loop.wait(sequence_id, std::min(left, kSlice));
        }
        if (!events.empty()) return events;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (left.count() == 0) return events;
    }
}

py::dict stats(const DecodeLoop& loop) {
    LoopStats stats;
    {
        const py::gil_scoped_release released;
        stats = loop.stats();
    }
    py::list groups;
    for (const GroupStats& group : stats.groups)
        groups.append(py::dict("num_blocks"_a = group.num_blocks, "num_free"_a = group.num_free,
                               "peak_held"_a = group.peak_held));
    return py::dict("num_running"_a = stats.num_running, "num_waiting"_a = stats.num_waiting, "groups"_a = groups,
                    "num_steps"_a = stats.num_steps, "num_preemptions"_a = stats.num_preemptions,
                    "num_prefill_tokens"_a = stats.num_prefill_tokens, "num_decode_tokens"_a = stats.num_decode_tokens,
                    "last_step_age_s"_a = stats.last_step_age_s);
}

const char* finish_reason_name(FinishReason reason) {
    switch (reason) {
        case FinishReason::kStop:
            return "stop";
        case FinishReason::kLength:
            return "length";
        case FinishReason::kCancelled:
            return "cancelled";
        case FinishReason::kError:
            return "error";
    }
    throw Error("unknown finish reason");
}

void bind_plan(py::module_& module) {
    py::class_<PagedKvGroup>(module, "PagedKvGroup")
        .def(py::init<std::vector<int32_t>, int64_t, int64_t, std::optional<int64_t>, int64_t, int64_t>(),
             py::kw_only(), py::arg("layers"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("window_keys"),
             py::arg("num_blocks"), py::arg("table_width"))
        .def_readonly("layers", &PagedKvGroup::layers)
        .def_readonly("num_kv_heads", &PagedKvGroup::num_kv_heads)
        .def_readonly("head_dim", &PagedKvGroup::head_dim)
        .def_readonly("window_keys", &PagedKvGroup::window_keys)
        .def_readonly("num_blocks", &PagedKvGroup::num_blocks)
        .def_readonly("table_width", &PagedKvGroup::table_width);

    py::class_<RecurrentStateGroup>(module, "RecurrentStateGroup")
        .def(py::init<std::vector<int32_t>, int64_t, int64_t, int64_t, int64_t>(), py::kw_only(), py::arg("layers"),
             py::arg("width"), py::arg("conv_tail"), py::arg("num_slots"), py::arg("num_snapshots") = 0)
        .def_readonly("layers", &RecurrentStateGroup::layers)
        .def_readonly("width", &RecurrentStateGroup::width)
        .def_readonly("conv_tail", &RecurrentStateGroup::conv_tail)
        .def_readonly("num_slots", &RecurrentStateGroup::num_slots)
        .def_readonly("num_snapshots", &RecurrentStateGroup::num_snapshots);

    py::class_<CachePlan>(module, "CachePlan")
        .def(py::init<int64_t, std::vector<PagedKvGroup>, std::optional<RecurrentStateGroup>>(), py::kw_only(),
             py::arg("page_tokens"), py::arg("paged"), py::arg("recurrent") = py::none())
        .def_readonly("page_tokens", &CachePlan::page_tokens)
        .def_readonly("paged", &CachePlan::paged)
        .def_readonly("recurrent", &CachePlan::recurrent);

    py::class_<Limits>(module, "Limits")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, std::optional<float>>(), py::kw_only(),
             py::arg("max_running_sequences"), py::arg("max_step_tokens"), py::arg("max_seq_len"),
             py::arg("max_logits_rows"), py::arg("vocab_size"), py::arg("final_softcap") = py::none())
        .def_readonly("max_running_sequences", &Limits::max_running_sequences)
        .def_readonly("max_step_tokens", &Limits::max_step_tokens)
        .def_readonly("max_seq_len", &Limits::max_seq_len)
        .def_readonly("max_logits_rows", &Limits::max_logits_rows)
        .def_readonly("vocab_size", &Limits::vocab_size)
        .def_readonly("final_softcap", &Limits::final_softcap);
}

void bind_request(py::module_& module) {
    const SamplingParams plain;
    py::class_<SamplingParams>(module, "SamplingParams")
        .def(py::init(&make_sampling), py::kw_only(), py::arg("max_tokens"), py::arg("temperature") = plain.temperature,
             py::arg("top_k") = py::none(), py::arg("top_p") = plain.top_p, py::arg("min_p") = plain.min_p,
             py::arg("repetition_penalty") = plain.repetition_penalty,
             py::arg("presence_penalty") = plain.presence_penalty,
             py::arg("frequency_penalty") = plain.frequency_penalty, py::arg("logit_bias") = py::tuple(),
             py::arg("seed") = plain.seed, py::arg("min_tokens") = plain.min_tokens,
             py::arg("stop_token_ids") = py::tuple())
        .def_readonly("temperature", &SamplingParams::temperature)
        .def_readonly("top_k", &SamplingParams::top_k)
        .def_readonly("top_p", &SamplingParams::top_p)
        .def_readonly("min_p", &SamplingParams::min_p)
        .def_readonly("seed", &SamplingParams::seed);

    py::class_<Request>(module, "Request")
        .def(py::init(&make_request), py::kw_only(), py::arg("token_ids"), py::arg("sampling"),
             py::arg("num_logprobs") = py::none(), py::arg("num_prompt_logprobs") = py::none(),
             py::arg("logits_out") = py::none());
}

void bind_events(py::module_& module) {
    py::class_<TokenLogprob>(module, "TokenLogprob")
        .def_readonly("token_id", &TokenLogprob::token_id)
        .def_readonly("logprob", &TokenLogprob::logprob)
        .def_readonly("top", &TokenLogprob::top);

    py::class_<TokenEvent>(module, "TokenEvent")
        .def_readonly("sequence_id", &TokenEvent::sequence_id)
        .def_readonly("token_id", &TokenEvent::token_id)
        .def_readonly("logprob", &TokenEvent::logprob)
        .def_readonly("prompt_logprobs", &TokenEvent::prompt_logprobs)
        .def_property_readonly("finish_reason",
                               [](const TokenEvent& event) -> std::optional<std::string> {
                                   if (!event.finish_reason) return std::nullopt;
                                   return finish_reason_name(*event.finish_reason);
                               })
        .def_readonly("message", &TokenEvent::message)
        .def_readonly("time_ns", &TokenEvent::time_ns);
}

void bind_loop(py::module_& module) {
    py::class_<DecodeLoop, std::shared_ptr<DecodeLoop>>(module, "DecodeLoop")
        .def(py::init(&make_loop), py::arg("step").none(false), py::arg("plan"), py::arg("limits"))
        .def(
            "submit",
            [](DecodeLoop& loop, const Request& request) {
                Request copy = request;
                const py::gil_scoped_release released;
                return loop.submit(std::move(copy));
            },
            py::arg("request"))
        .def("cancel", &DecodeLoop::cancel, py::arg("sequence_id"), py::call_guard<py::gil_scoped_release>())
        .def("forget", &DecodeLoop::forget, py::arg("sequence_id"), py::call_guard<py::gil_scoped_release>())
        .def("wait", &wait, py::arg("sequence_id"), py::arg("timeout_s") = py::none())
        .def("close", &DecodeLoop::close, py::call_guard<py::gil_scoped_release>())
        .def("stats", &stats);
    py::module_::import("atexit").attr("register")(py::cpp_function(&close_open_loops));
}

}  // namespace

void bind_runtime(py::module_& module) {
    bind_plan(module);
    bind_request(module);
    bind_events(module);
    bind_callback_step(module);
    bind_loop(module);
}

}  // namespace gemma2_fast
