#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "base/errors.h"
#include "weights/weight_view.h"

namespace gemma2_fast {

// A model's tensors by canonical name (gemma2_fast.weights.manifest). Vectors are matrices of one row.
struct ModelWeights {
    std::unordered_map<std::string, WeightView> tensors;
    std::shared_ptr<const void> owner;  // keeps the viewed memory alive

    // The tensor of that name and shape; throws Error that says what is there instead.
    const WeightView& at(const std::string& name, int64_t rows, int64_t cols) const {
        auto found = tensors.find(name);
        if (found == tensors.end()) throw Error("weights: " + name + " is missing");
        const WeightView& view = found->second;
        if (view.rows != rows || view.cols != cols)
            throw Error("weights: " + name + " is [" + std::to_string(view.rows) + ", " + std::to_string(view.cols) +
                        "], expected [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
        return view;
    }
};

}  // namespace gemma2_fast
