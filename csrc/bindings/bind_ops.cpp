// The ops of one instruction set on numpy arrays, for tests and benchmarks. Outputs are new arrays unless named.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/errors.h"
#include "base/thread_pool.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cpu/attention_run.h"
#include "cpu/ceilings.h"
#include "cpu/kernels.h"
#include "cpu/quantized_buffer.h"

namespace gemma2_fast {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

constexpr int64_t kRowsPerTask = 64;  // weight rows of a matmul claimed at once, as in cpu/cpu_step.cpp

// A view of stored bytes; they may be unaligned, and must be exactly `rows` whole rows.
WeightView view_of(const std::string& format_name, const Bytes& data, int64_t rows, int64_t cols) {
    const WeightFormat& format = weight_format(format_name);
    require(rows > 0 && cols > 0 && (cols % format.block_weights == 0 || format.block_rows > 1), "weight shape",
            "positive rows and a positive multiple of " + std::to_string(format.block_weights) + " columns",
            std::to_string(rows) + " x " + std::to_string(cols));
    const WeightView view{format.type, rows, cols, reinterpret_cast<const std::byte*>(data.data())};
    require(data.nbytes() == view.num_bytes(), "weight data", std::to_string(view.num_bytes()) + " bytes",
            std::to_string(data.nbytes()));
    return view;
}

// pages: float32, uint16 that holds bfloat16, or uint8 that holds int8 pages; [N, K, a page in any shape].
KvPages pages_of(const py::array& pages, int64_t head_dim) {
    const bool is_f32 = py::isinstance<Floats>(pages), is_int8 = py::isinstance<Bytes>(pages),
               is_bf16 = py::isinstance<py::array_t<uint16_t, py::array::c_style>>(pages);
    require(is_f32 || is_bf16 || is_int8, "pages", "a contiguous array of float32, uint16 or uint8",
            py::str(pages.dtype()).cast<std::string>());
    require(pages.ndim() >= 3 && pages.size() > 0, "pages", "a non-empty array of at least 3 dimensions",
            "shape " + shape_text(pages));
    const KvType type = is_f32 ? KvType::kF32 : is_bf16 ? KvType::kBF16 : KvType::kInt8;
    const int64_t page_bytes = kv_page_bytes(type, head_dim);
    require(pages.nbytes() == pages.shape(0) * pages.shape(1) * page_bytes, "pages",
            std::to_string(page_bytes) + " bytes a page for head_dim " + std::to_string(head_dim), shape_text(pages));
    return {static_cast<std::byte*>(const_cast<void*>(pages.data())), type, pages.shape(1), head_dim, page_bytes};
}

class Ops {
  public:
    Ops(const std::string& instruction_set, int num_threads)
        : set_(choose_instruction_set(instruction_set)),
          kernels_(kernels_for(set_)),
          ceilings_(ceilings_for(set_)),
          threads_(num_threads) {}

    // What the last call spent in the kernel itself.
    double kernel_seconds() const { return kernel_seconds_; }

    std::string instruction_set() const { return std::string(instruction_set_name(kernels_.instruction_set)); }

    Floats dequantize_row(const std::string& format, const Bytes& data, int64_t cols, int64_t rows, int64_t row) {
        const WeightView view = view_of(format, data, rows, cols);
        require(row >= 0 && row < rows, "row", "0.." + std::to_string(rows - 1), std::to_string(row));
        Floats out(cols);
        timed([&, result = out.mutable_data()] { kernels_.dequantize_row(view, row, result); });
        return out;
    }

    // Rows outside [row_begin, row_end) of a new `out` are NaN.
    Floats matmul(const std::string& format, const Bytes& data, int64_t rows, const Floats& x, int64_t row_begin,
                  std::optional<int64_t> row_end, std::optional<Floats> given_out) {
        require_dims(x, "x", 2);
        const int64_t num_tokens = x.shape(0), cols = x.shape(1);
        const WeightView view = view_of(format, data, rows, cols);
        const int64_t end = row_end.value_or(rows);
        require(0 <= row_begin && row_begin < end && end <= rows, "row range",
                "0 <= row_begin < row_end <= " + std::to_string(rows),
                std::to_string(row_begin) + " to " + std::to_string(end));
        Floats out = given_out ? *given_out : Floats({num_tokens, rows});
        require_shape(out, "out", {num_tokens, rows});
        const float* activations = x.data();
        float* result = out.mutable_data();
        if (!given_out) std::fill_n(result, out.size(), std::numeric_limits<float>::quiet_NaN());

        const int64_t scratch_floats = (kernels_.matmul_scratch_floats(cols) + 15) / 16 * 16;
        reserve_scratch(scratch_floats * threads_.num_threads());
        py::gil_scoped_release no_gil;
        timed([&] {
            threads_.parallel_for((end - row_begin + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int thread) {
                const int64_t first = row_begin + task * kRowsPerTask;
                kernels_.matmul(view, first, std::min(first + kRowsPerTask, end), activations, num_tokens, result, rows,
                                scratch_.data() + thread * scratch_floats);
            });
        });
        return out;
    }

    // The matrix in the strips that int8_matmul reads; a copy where the format is stored so.
    static Bytes pack_strips(const std::string& format, const Bytes& data, int64_t rows, int64_t cols) {
        const WeightView view = view_of(format, data, rows, cols);
        require(has_strips(view.type), "format", "a quantised format", format);
        const StripView strips{view.type, rows, cols, nullptr};
        const int64_t bytes = strip_bytes(view.type, cols);
        Bytes packed(strips.num_strips() * bytes);
        auto* out = reinterpret_cast<std::byte*>(packed.mutable_data());
        if (weight_format(view.type).block_rows > 1)
            std::copy_n(view.data, packed.nbytes(), out);
        else
            for (int64_t strip = 0; strip < strips.num_strips(); ++strip) pack_strip(view, strip, out + strip * bytes);
        return packed;
    }

    // scales [groups, T] and int32 [groups, T, 128] with x = scale * integer; the sums of these [groups, T]
    py::tuple quantize_rows(const Floats& x) {
        require_dims(x, "x", 2);
        const int64_t num_tokens = x.shape(0), cols = x.shape(1), groups = (cols + kQuantizedCols - 1) / kQuantizedCols;
        std::vector<int8_t> codes(static_cast<std::size_t>(groups * num_tokens * kQuantizedCols));
        std::vector<Outliers> outliers(static_cast<std::size_t>(groups * num_tokens));
        std::vector<uint8_t> has_outliers(outliers.size() + 8);
        Floats scales({groups, num_tokens});
        std::vector<int32_t> part_sums(outliers.size() * 8);
        Ints sums({groups, num_tokens});
        const QuantizedRows rows{codes.data(),        outliers.data(),  has_outliers.data(), scales.mutable_data(),
                                 sums.mutable_data(), part_sums.data(), num_tokens};
        timed([&] { kernels_.quantize_rows(x.data(), cols, num_tokens, cols, 0, 0, rows); });
        Ints integers({groups, num_tokens, kQuantizedCols});
        int32_t* out = integers.mutable_data();
        std::copy(codes.begin(), codes.end(), out);
        for (std::size_t group = 0; group < outliers.size(); ++group, out += kQuantizedCols)
            for (int i = 0; has_outliers[group] && i < 2; ++i)
                for (int j = 0; j < 4; ++j) out[4 * outliers[group].step[i] + j] += 128 * outliers[group].upper[i][j];
        return py::make_tuple(scales, integers, sums);
    }

    // Quantises x and multiplies; kernel_seconds counts the multiplication. Rows of other strips of a new `out` are
    // NaN.
    Floats int8_matmul(const std::string& format, const Bytes& strips, int64_t rows, const Floats& x,
                       int64_t first_strip, std::optional<int64_t> end_strip, std::optional<Floats> given_out,
                       int64_t strips_at_once) {
        require_dims(x, "x", 2);
        const int64_t num_tokens = x.shape(0), cols = x.shape(1);
        require(1 <= strips_at_once && strips_at_once <= kMostStripsAtOnce, "strips_at_once",
                "1 to " + std::to_string(kMostStripsAtOnce), std::to_string(strips_at_once));
        const WeightFormat& stored = weight_format(format);
        require(has_strips(stored.type), "format", "a quantised format", format);
        require(rows > 0 && (stored.block_rows > 1 || cols % stored.block_weights == 0), "weight shape",
                "positive rows and whole blocks of columns", std::to_string(rows) + " x " + std::to_string(cols));
        const StripView view{stored.type, rows, cols, reinterpret_cast<const std::byte*>(strips.data())};
        require(strips.nbytes() == view.num_strips() * strip_bytes(stored.type, cols), "strips",
                std::to_string(view.num_strips() * strip_bytes(stored.type, cols)) + " bytes",
                std::to_string(strips.nbytes()));
        const int64_t end = end_strip.value_or(view.num_strips());
        require(0 <= first_strip && first_strip < end && end <= view.num_strips(), "strips",
                "0 <= first_strip < end_strip <= " + std::to_string(view.num_strips()),
                std::to_string(first_strip) + " to " + std::to_string(end));
        Floats out = given_out ? *given_out : Floats({num_tokens, rows});
        require_shape(out, "out", {num_tokens, rows});
        const float* activations = x.data();
        float* result = out.mutable_data();
        if (!given_out) std::fill_n(result, out.size(), std::numeric_limits<float>::quiet_NaN());

        const int64_t scratch_floats = (kernels_.int8_matmul_scratch_floats(num_tokens) + 15) / 16 * 16;
        reserve_scratch(scratch_floats * threads_.num_threads());
        QuantizedBuffer buffer(num_tokens, cols);
        const QuantizedRows quantized = buffer.rows(num_tokens);
        py::gil_scoped_release no_gil;
        kernels_.quantize_rows(activations, cols, num_tokens, cols, 0, 0, quantized);
        timed([&] {
            threads_.parallel_for(
                (end - first_strip + strips_at_once - 1) / strips_at_once, [&](int64_t task, int thread) {
                    const int64_t strip = first_strip + strips_at_once * task;
                    kernels_.int8_matmul(view, strip, std::min(strips_at_once, end - strip), quantized, num_tokens,
                                         result + strip * kStripRows, rows, scratch_.data() + thread * scratch_floats);
                });
        });
        return out;
    }

    Floats rms_norm(const Floats& x, const Floats& gain, float epsilon) {
        require_dims(x, "x", 2);
        require_shape(gain, "gain", {x.shape(1)});
        Floats out({x.shape(0), x.shape(1)});
        timed([&, result = out.mutable_data()] {
            kernels_.rms_norm(x.data(), gain.data(), epsilon, x.shape(0), x.shape(1), result);
        });
        return out;
    }

    Floats rms_norm_add(const Floats& x, const Floats& gain, float epsilon, const Floats& residual) {
        require_dims(x, "x", 2);
        require_shape(gain, "gain", {x.shape(1)});
        require_shape(residual, "residual", {x.shape(0), x.shape(1)});
        Floats out = copy_of(residual);
        timed([&, result = out.mutable_data()] {
            kernels_.rms_norm_add(x.data(), gain.data(), epsilon, x.shape(0), x.shape(1), result);
        });
        return out;
    }

    Floats add(const Floats& x, const Floats& residual) {
        require(x.size() == residual.size(), "residual", shape_text(x), shape_text(residual));
        Floats out = copy_of(residual);
        timed([&, result = out.mutable_data()] { kernels_.add(x.data(), x.size(), result); });
        return out;
    }

    Floats scale(const Floats& x, float factor) {
        Floats out = copy_of(x);
        timed([&, result = out.mutable_data()] { kernels_.scale(result, out.size(), factor); });
        return out;
    }

    Floats softcap(const Floats& x, float cap) {
        Floats out = copy_of(x);
        timed([&, result = out.mutable_data()] { kernels_.softcap(result, out.size(), cap); });
        return out;
    }

    Floats geglu(const Floats& gate, const Floats& up) {
        require(gate.size() == up.size(), "up", shape_text(gate), shape_text(up));
        Floats out = copy_of(gate);
        timed([&, result = out.mutable_data()] { kernels_.geglu(gate.data(), up.data(), gate.size(), result); });
        return out;
    }

    Floats rope(const Floats& x, const Floats& cos, const Floats& sin) {
        require_dims(x, "x", 3);
        require_dims(cos, "cos", 2);
        const int64_t num_tokens = x.shape(0), head_dim = x.shape(2), num_pairs = cos.shape(1);
        require(2 * num_pairs <= head_dim, "cos", "at most " + std::to_string(head_dim / 2) + " pairs",
                std::to_string(num_pairs));
        require_shape(cos, "cos", {num_tokens, num_pairs});
        require_shape(sin, "sin", {num_tokens, num_pairs});
        Floats out = copy_of(x);
        timed([&, result = out.mutable_data()] {
            kernels_.rope(result, cos.data(), sin.data(), num_tokens, x.shape(1), head_dim, num_pairs);
        });
        return out;
    }

    // Changes `pages`.
    void write_kv(const py::array& pages, int64_t block_index, int64_t slot_in_page, const Floats& keys,
                  const Floats& values) {
        require_dims(keys, "keys", 2);
        const KvPages view = pages_of(pages, keys.shape(1));
        require(pages.writeable(), "pages", "a writable array", "a read-only one");
        require(0 <= block_index && block_index < pages.shape(0), "block_index", "a page of the array",
                std::to_string(block_index));
        require(0 <= slot_in_page && slot_in_page < kPageTokens, "slot_in_page", "a slot of the page",
                std::to_string(slot_in_page));
        require_shape(keys, "keys", {view.num_kv_heads, view.head_dim});
        require_shape(values, "values", {view.num_kv_heads, view.head_dim});
        timed([&] { kernels_.write_kv(view, block_index, slot_in_page, keys.data(), values.data()); });
    }

    Floats attention(const Floats& queries, const py::array& pages, const Ints& block_table, int64_t first_position,
                     int64_t kv_head, float query_scale, std::optional<float> score_softcap,
                     std::optional<int64_t> window_keys) {
        require_dims(queries, "queries", 3);
        require_dims(block_table, "block_table", 1);
        const KvPages view = pages_of(pages, queries.shape(2));
        require(0 <= kv_head && kv_head < view.num_kv_heads, "kv_head", "a head of the pages", std::to_string(kv_head));
        require(first_position >= 0, "first_position", "at least 0", std::to_string(first_position));
        require(!window_keys || *window_keys > 0, "window_keys", "at least 1", std::to_string(window_keys.value_or(1)));
        const int64_t group_heads = queries.shape(1), stride = group_heads * view.head_dim;
        Floats out({queries.shape(0), queries.shape(1), queries.shape(2)});
        AttentionTask task;
        task.queries = queries.data();
        task.query_stride = stride;
        task.out = out.mutable_data();
        task.out_stride = stride;
        task.num_queries = queries.shape(0);
        task.first_position = first_position;
        task.group_heads = group_heads;
        task.kv_head = kv_head;
        task.pages = view;
        task.block_table = block_table.data();
        task.table_width = block_table.shape(0);
        task.query_scale = query_scale;
        task.score_softcap = score_softcap;
        task.window_keys = window_keys;
        AttentionRun run(kernels_, threads_.num_threads(), 1,
                         AttentionRun::part_floats(kernels_, group_heads, view.head_dim, first_position + 1),
                         kernels_.attention_scratch_floats(group_heads, view.head_dim));
        timed([&] { run.run({&task, 1}, threads_); });
        return out;
    }

    // The ceilings run the same loop in every thread and return the work done by all: bytes, or multiplications.
    int64_t read(const Bytes& data) {
        const auto* bytes = reinterpret_cast<const std::byte*>(data.data());
        const int64_t share = data.nbytes() / threads_.num_threads() / 1024 * 1024;
        return in_every_thread([&](int64_t task) {
            ceilings_.read(bytes + task * share, share);
            return share;
        });
    }
    int64_t multiply_add(int64_t wanted) {
        return in_every_thread([&](int64_t) { return ceilings_.multiply_add(wanted / threads_.num_threads()); });
    }
    int64_t multiply_add_bytes(int64_t wanted) {
        return in_every_thread([&](int64_t) { return ceilings_.multiply_add_bytes(wanted / threads_.num_threads()); });
    }

  private:
    template <typename Body>
    void timed(const Body& body) {
        const auto start = std::chrono::steady_clock::now();
        body();
        kernel_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

    void reserve_scratch(int64_t floats) {
        if (static_cast<int64_t>(scratch_.size()) < floats)
            scratch_ = AlignedBuffer<float>(static_cast<std::size_t>(floats));
    }

    template <typename Body>
    int64_t in_every_thread(const Body& body) {
        std::vector<int64_t> done(static_cast<std::size_t>(threads_.num_threads()));
        py::gil_scoped_release no_gil;
        timed([&] {
            threads_.parallel_for(threads_.num_threads(),
                                  [&](int64_t task, int) { done[static_cast<std::size_t>(task)] = body(task); });
        });
        int64_t sum = 0;
        for (const int64_t part : done) sum += part;
        return sum;
    }

    InstructionSet set_;
    const Kernels& kernels_;
    const Ceilings& ceilings_;
    ThreadPool threads_;
    AlignedBuffer<float> scratch_;
    double kernel_seconds_ = 0;
};

}  // namespace

void bind_ops(py::module_& module) {
    py::class_<Ops>(module, "Ops")
        .def(py::init<const std::string&, int>(), py::arg("instruction_set") = "auto", py::arg("num_threads") = 1)
        .def_property_readonly("instruction_set", &Ops::instruction_set)
        .def_property_readonly("kernel_seconds", &Ops::kernel_seconds)
        .def("dequantize_row", &Ops::dequantize_row, py::arg("format"), py::arg("data"), py::arg("cols"),
             py::arg("rows") = 1, py::arg("row") = 0)
        .def("matmul", &Ops::matmul, py::arg("format"), py::arg("data"), py::arg("rows"), py::arg("x"),
             py::arg("row_begin") = 0, py::arg("row_end") = py::none(), py::arg("out") = py::none())
        .def_static("pack_strips", &Ops::pack_strips, py::arg("format"), py::arg("data"), py::arg("rows"),
                    py::arg("cols"))
        .def("quantize_rows", &Ops::quantize_rows, py::arg("x"))
        .def("int8_matmul", &Ops::int8_matmul, py::arg("format"), py::arg("strips"), py::arg("rows"), py::arg("x"),
             py::arg("first_strip") = 0, py::arg("end_strip") = py::none(), py::arg("out") = py::none(),
             py::arg("strips_at_once") = 2)
        .def("rms_norm", &Ops::rms_norm, py::arg("x"), py::arg("gain"), py::arg("epsilon"))
        .def("rms_norm_add", &Ops::rms_norm_add, py::arg("x"), py::arg("gain"), py::arg("epsilon"), py::arg("residual"))
        .def("add", &Ops::add, py::arg("x"), py::arg("residual"))
        .def("scale", &Ops::scale, py::arg("x"), py::arg("factor"))
        .def("softcap", &Ops::softcap, py::arg("x"), py::arg("cap"))
        .def("geglu", &Ops::geglu, py::arg("gate"), py::arg("up"))
        .def("rope", &Ops::rope, py::arg("x"), py::arg("cos"), py::arg("sin"))
        .def("write_kv", &Ops::write_kv, py::arg("pages"), py::arg("block_index"), py::arg("slot_in_page"),
             py::arg("keys"), py::arg("values"))
        .def("attention", &Ops::attention, py::arg("queries"), py::arg("pages"), py::arg("block_table"),
             py::arg("first_position"), py::arg("kv_head"), py::arg("query_scale"),
             py::arg("score_softcap") = py::none(), py::arg("window_keys") = py::none())
        .def("read", &Ops::read, py::arg("data"))
        .def("multiply_add", &Ops::multiply_add, py::arg("wanted"))
        .def("multiply_add_bytes", &Ops::multiply_add_bytes, py::arg("wanted"));
}

}  // namespace gemma2_fast
