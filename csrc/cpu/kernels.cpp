#include "cpu/kernels.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/errors.h"
#include "cpu/ceilings.h"

namespace gemma2_fast {

// Defined by cpu/kernels/table.cpp and ceilings.cpp, once per instruction set.
namespace isa_scalar {
extern const Kernels kernels;
extern const Ceilings ceilings;
}  // namespace isa_scalar
namespace isa_avx2 {
extern const Kernels kernels;
extern const Ceilings ceilings;
}  // namespace isa_avx2
namespace isa_avx512_vnni {
extern const Kernels kernels;
extern const Ceilings ceilings;
}  // namespace isa_avx512_vnni

// What they add to the AVX2 and to the AVX-512 kernels.
namespace isa_avx_vnni {
void int8_matmul(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                 int64_t num_tokens, float* out, int64_t out_stride, float* scratch);
void attention(const AttentionTask& task, float* scratch);
extern const Ceilings ceilings;
}  // namespace isa_avx_vnni
namespace isa_avx512_amx {
void int8_matmul(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                 int64_t num_tokens, float* out, int64_t out_stride, float* scratch);
int64_t int8_matmul_scratch_floats(int64_t num_tokens);
void attention(const AttentionTask& task, float* scratch);
extern const Ceilings ceilings;
}  // namespace isa_avx512_amx

namespace {

Kernels avx_vnni_kernels() {
    Kernels kernels = isa_avx2::kernels;
    kernels.instruction_set = InstructionSet::kAvxVnni;
    kernels.int8_matmul = isa_avx_vnni::int8_matmul;
    kernels.attention = isa_avx_vnni::attention;
    return kernels;
}

Kernels avx512_amx_kernels() {
    Kernels kernels = isa_avx512_vnni::kernels;
    kernels.instruction_set = InstructionSet::kAvx512Amx;
    kernels.int8_matmul = isa_avx512_amx::int8_matmul;
    kernels.int8_matmul_scratch_floats = isa_avx512_amx::int8_matmul_scratch_floats;
    kernels.attention = isa_avx512_amx::attention;
    return kernels;
}

struct Compiled {
    Kernels kernels;
    const Ceilings& ceilings;
};

const Compiled& compiled_for(InstructionSet set) {
    static const Compiled scalar{isa_scalar::kernels, isa_scalar::ceilings};
    static const Compiled avx2{isa_avx2::kernels, isa_avx2::ceilings};
    static const Compiled avx_vnni{avx_vnni_kernels(), isa_avx_vnni::ceilings};
    static const Compiled avx512_amx{avx512_amx_kernels(), isa_avx512_amx::ceilings};
    static const Compiled avx512_vnni{isa_avx512_vnni::kernels, isa_avx512_vnni::ceilings};

    const std::vector<InstructionSet> available = available_instruction_sets();
    if (std::find(available.begin(), available.end(), set) == available.end())
        throw BackendError("this machine cannot run the kernels for " + std::string(instruction_set_name(set)) +
                           ": choose one of the sets that instruction_sets() lists, or \"auto\"");
    switch (set) {
        case InstructionSet::kScalar:
            return scalar;
        case InstructionSet::kAvx2:
            return avx2;
        case InstructionSet::kAvxVnni:
            return avx_vnni;
        case InstructionSet::kAvx512Vnni:
            return avx512_vnni;
        case InstructionSet::kAvx512Amx:
            return avx512_amx;
    }
    throw BackendError("unknown instruction set");
}

}  // namespace

const Kernels& kernels_for(InstructionSet set) { return compiled_for(set).kernels; }

const Ceilings& ceilings_for(InstructionSet set) { return compiled_for(set).ceilings; }

}  // namespace gemma2_fast
