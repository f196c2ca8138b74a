#include "cpu/kernels/declarations.h"

GEMMA2_FAST_BEGIN_ISA

#if defined(__AVX512F__)
constexpr InstructionSet kInstructionSet = InstructionSet::kAvx512Vnni;
#elif defined(__AVX2__)
constexpr InstructionSet kInstructionSet = InstructionSet::kAvx2;
#else
constexpr InstructionSet kInstructionSet = InstructionSet::kScalar;
#endif

extern const Kernels kernels;
const Kernels kernels{
    .instruction_set = kInstructionSet,
    .dequantize_row = dequantize_row,
    .matmul = matmul,
    .matmul_scratch_floats = matmul_scratch_floats,
    .quantize_rows = quantize_rows,
    .int8_matmul = int8_matmul,
    .int8_matmul_scratch_floats = int8_matmul_scratch_floats,
    .rms_norm = rms_norm,
    .rms_norm_add = rms_norm_add,
    .add = add,
    .scale = scale,
    .softcap = softcap,
    .geglu = geglu,
    .rope = rope,
    .conv1d = conv1d,
    .rg_lru = rg_lru,
    .write_kv = write_kv,
    .attention = attention,
    .attention_parts = attention_parts,
    .join_attention_parts = join_attention_parts,
    .attention_part_floats = attention_part_floats,
    .attention_scratch_floats = attention_scratch_floats,
    .attention_queries = attention_queries,
};

GEMMA2_FAST_END_ISA
