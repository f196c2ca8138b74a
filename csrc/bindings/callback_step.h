#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/model_step.h"

namespace gemma2_fast {

// A backend written in Python: calls callable(batch) -> float32 [L, V] under the GIL, from the decode loop's thread.
// With choose(logits, rules) -> int32 [L], where rules are pairs of sampling parameters and token index, it chooses
// tokens itself; -1 leaves one to the host.
class CallbackStep : public ModelStep {
  public:
    CallbackStep(pybind11::function callable, std::optional<pybind11::function> choose)
        : callable_(std::move(callable)), choose_(std::move(choose)) {}
    ~CallbackStep() override;

    // What the callables raise becomes an Error, so that no Python object leaves the GIL's protection.
    void run(const StepBatch& batch, std::span<float> logits) override;

    bool can_choose() const override { return choose_.has_value(); }
    // All is computed at once, but errors come with `finish`, as from a device.
    void start(const StepBatch& batch, std::span<const TokenChoice> choices) override;
    void finish(std::span<int32_t> tokens) override;
    void copy_logits(std::span<float> logits) override;

  private:
    struct Started {
        std::vector<int32_t> tokens;
        std::optional<std::string> error;
    };
    std::vector<int32_t> chosen(const pybind11::array& logits, std::span<const TokenChoice> choices) const;

    pybind11::function callable_;
    std::optional<pybind11::function> choose_;
    std::deque<Started> started_;
    std::vector<int32_t> last_tokens_;  // of the step started last, with its logits
    std::vector<float> last_logits_;
};

void bind_callback_step(pybind11::module_& module);  // ModelStep must be bound

}  // namespace gemma2_fast
