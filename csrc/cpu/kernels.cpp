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

namespace {

struct Compiled {
    const Kernels& kernels;
    const Ceilings& ceilings;
};

const Compiled& compiled_for(InstructionSet set) {
    static const Compiled scalar{isa_scalar::kernels, isa_scalar::ceilings};
    static const Compiled avx2{isa_avx2::kernels, isa_avx2::ceilings};
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
        case InstructionSet::kAvx512Vnni:
            return avx512_vnni;
    }
    throw BackendError("unknown instruction set");
}

}  // namespace

const Kernels& kernels_for(InstructionSet set) { return compiled_for(set).kernels; }

const Ceilings& ceilings_for(InstructionSet set) { return compiled_for(set).ceilings; }

}  // namespace gemma2_fast
