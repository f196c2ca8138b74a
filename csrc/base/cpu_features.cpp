#include "base/cpu_features.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/errors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemma2_fast {
namespace {

struct X86Features {
    bool avx2 = false;
    bool avx_vnni = false;
    bool avx512_vnni = false;
    bool avx512_amx = false;
};

#if defined(__x86_64__)

bool bit(unsigned value, int index) { return (value >> index & 1u) != 0; }

// Which register states the operating system saves; an instruction whose state it does not save must not be used.
uint64_t saved_states() {
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux lets a process use the matrix tiles once it has asked.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

X86Features x86_features() {
    X86Features features;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
    const bool fma = bit(c, 12), xsave_enabled = bit(c, 27), f16c = bit(c, 29);
    if (!xsave_enabled || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;  // xmm, ymm; and the mask registers with both halves of zmm
    constexpr uint64_t kTiles = 0x60000;
    const uint64_t states = saved_states();
    features.avx2 = (states & kYmm) == kYmm && bit(b, 5) && fma && f16c;
    const bool foundation = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31), vnni = bit(c, 11);
    features.avx512_vnni = features.avx2 && (states & kZmm) == kZmm && foundation && dq && bw && vl && vnni;
    const bool tiles = bit(d, 24) && bit(d, 25) && (states & kTiles) == kTiles;
    features.avx512_amx = features.avx512_vnni && tiles && may_use_tiles();
    features.avx_vnni = features.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4);
    return features;
}

std::string brand_string() {
    constexpr unsigned kFirst = 0x80000002, kLast = 0x80000004;
    std::string name;
    for (unsigned leaf = kFirst; leaf <= kLast; ++leaf) {
        unsigned registers[4] = {};
        if (!__get_cpuid(leaf, &registers[0], &registers[1], &registers[2], &registers[3])) return "";
        char text[sizeof registers + 1] = {};
        std::memcpy(text, registers, sizeof registers);
        name += text;
    }
    const std::size_t begin = name.find_first_not_of(' ');
    return begin == std::string::npos ? "" : name.substr(begin, name.find_last_not_of(' ') + 1 - begin);
}

#else

X86Features x86_features() { return {}; }
std::string brand_string() { return ""; }

#endif

std::string listed(const std::vector<InstructionSet>& sets) {
    std::string names;
    for (InstructionSet set : sets) names.append(names.empty() ? "" : ", ").append(instruction_set_name(set));
    return names;
}

}  // namespace

std::string_view instruction_set_name(InstructionSet set) {
    switch (set) {
        case InstructionSet::kScalar:
            return "scalar";
        case InstructionSet::kAvx2:
            return "avx2";
        case InstructionSet::kAvxVnni:
            return "avx_vnni";
        case InstructionSet::kAvx512Vnni:
            return "avx512_vnni";
        case InstructionSet::kAvx512Amx:
            return "avx512_amx";
    }
    throw Error("instruction_set_name: not an instruction set");
}

std::vector<InstructionSet> available_instruction_sets() {
    static const X86Features features = x86_features();
    std::vector<InstructionSet> sets = {InstructionSet::kScalar};
    if (features.avx2) sets.push_back(InstructionSet::kAvx2);
    if (features.avx_vnni) sets.push_back(InstructionSet::kAvxVnni);
    if (features.avx512_vnni) sets.push_back(InstructionSet::kAvx512Vnni);
    if (features.avx512_amx) sets.push_back(InstructionSet::kAvx512Amx);
    return sets;
}

InstructionSet choose_instruction_set(std::string_view name) {
    const std::vector<InstructionSet> available = available_instruction_sets();
    if (name == "auto") return available.back();
    for (InstructionSet set : available)
        if (instruction_set_name(set) == name) return set;
    for (InstructionSet set :
         {InstructionSet::kAvx2, InstructionSet::kAvxVnni, InstructionSet::kAvx512Vnni, InstructionSet::kAvx512Amx})
        if (instruction_set_name(set) == name)
            throw BackendError("this machine cannot run instruction_set \"" + std::string(name) + "\"; it has " +
                               listed(available) + ": choose one of these, or \"auto\" for the widest");
    throw BackendError("unknown instruction_set \"" + std::string(name) +
                       "\"; expected \"auto\", \"scalar\", \"avx2\", \"avx_vnni\", \"avx512_vnni\" or \"avx512_amx\"; "
                       "this machine has " +
                       listed(available));
}

std::string processor_name() {
    std::string name = brand_string();
    return name.empty() ? "unknown" : name;
}

}  // namespace gemma2_fast
