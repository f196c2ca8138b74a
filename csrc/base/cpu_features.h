#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gemma2_fast {

// Ordered from the plainest to the widest. Another architecture adds its sets here and in cpu/kernels.cpp.
enum class InstructionSet { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Amx };

std::string_view instruction_set_name(InstructionSet set);  // "scalar", "avx2", "avx_vnni", "avx512_vnni", "avx512_amx"

// Sets this processor and operating system can run, plainest first; never empty.
std::vector<InstructionSet> available_instruction_sets();

// "auto" gives the widest available set; a set that is unknown or not available throws BackendError.
InstructionSet choose_instruction_set(std::string_view name);

// What the processor calls itself; a virtual machine may give a vague answer. "unknown" where it cannot be asked.
std::string processor_name();

}  // namespace gemma2_fast
