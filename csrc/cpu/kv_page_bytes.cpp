#include "cpu/kernels.h"

namespace gemma2_fast {

// Layouts: cpu/kernels/kv_page.h. The same count: python/gemma2_fast/engine/cache_plan.py.
int64_t kv_page_bytes(KvType type, int64_t head_dim) {
    const int64_t elements = 2 * ((head_dim + 31) / 32 * 32) * kPageTokens;
    switch (type) {
        case KvType::kF32:
            return 4 * elements;
        case KvType::kBF16:
            return 2 * elements;
        case KvType::kInt8:
            break;
    }
    return elements + 2 * kPageTokens * static_cast<int64_t>(sizeof(float));
}

}  // namespace gemma2_fast
