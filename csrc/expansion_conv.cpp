// SPDX-License-Identifier: Apache-2.0
// The submodule _C.expansion_conv: convolutions of tensors, not addresses. One call reads the tensors, has a workspace
// made by torch and runs the kernel of the asked level. Nothing is kept between calls. Where a tensor is unusual, or
// tensors do not fit each other, nothing is done and the answer is false: Python then goes another way.

#include "expansion_conv.h"

#include <utility>

#include "checks.h"
#include "tensors.h"

namespace pylearngene {

namespace {

constexpr int64_t kPanelBytes = 384 << 10;  // of W that is formed at a time
constexpr int64_t kSumBytes = 512 << 10;    // of sums that wait for the next channels
constexpr int64_t kBlockBytes = 1 << 20;    // of dW that is summed at a time
constexpr int64_t kMostDepth = 768;         // terms of a sum: patches of a tile of tokens stay in L1
constexpr int64_t kTogether = 96;           // tokens whose sums wait only to be turned
constexpr int64_t kSplitFrom = 128;         // columns of a panel that are worth making the patches for each thread
constexpr int64_t kLeastPart = 96;          // tokens of a part of them
constexpr int kPairsFrom = 3;               // level at which pairs of bfloat16 are multiplied
constexpr int64_t kMostSize = int64_t{1} << 31;

const ExpansionConvKernels& kernels(int level) {
    static const ExpansionConvKernels* const table[] = {
        &pylearngene_expansion_conv_DEFAULT,
#if PYLEARNGENE_LEVELS > 1
        &pylearngene_expansion_conv_AVX2,
        &pylearngene_expansion_conv_AVX512,
        &pylearngene_expansion_conv_AVX512_BF16,
#endif
    };
    check_level(level);
    return *table[level];
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }
int64_t up_to(int64_t value, int64_t step) { return pieces(value, step) * step; }

int64_t taps(const ConvImage& in) { return in.tap_rows * in.tap_columns; }
int64_t tokens(const ConvImage& in) { return in.images * in.rows * in.columns; }

// Terms of a sum that are multiplied together.
int64_t terms_of(int level, int dtype) { return level == kPairsFrom && dtype == kBFloat16 ? 2 : 1; }

// How a product is cut, and what a thread needs for it.
void plan(ConvProduct& a, int64_t terms) {
    const int64_t work_size = itemsize(work(a.dtype)), columns = up_to(a.n, kConvColumns), all = tokens(a.in);
    a.panel = columns >= kSplitFrom * a.threads ? pieces(columns, a.threads) : columns;
    a.panel = up_to(pieces(columns, pieces(columns, least(a.panel, kConvPanel))), kConvColumns);
    const int64_t panels = pieces(a.n, a.panel);
    a.parts = 1;
    while (panels * a.parts % a.threads && panels * a.parts < 4 * a.threads && all / (a.parts + 1) >= kLeastPart)
        ++a.parts;
    const int64_t depth = least(kMostDepth, kPanelBytes / (a.panel * work_size)) * terms / taps(a.in);
    const int64_t step = depth < 16 * terms ? 2 : 16 * terms, channels = most(step, depth / step * step);
    a.chunk = up_to(pieces(a.in.channels, pieces(a.in.channels, channels)), step);
    const int64_t part = pieces(all, a.parts), sums = most(kTogether, kSumBytes / (a.panel * work_size));
    a.tokens = a.chunk >= a.in.channels ? least(part, kTogether) : pieces(part, pieces(part, sums));
    const int64_t words = up_to(a.chunk, 2) * taps(a.in);
    a.room = up_to(
        (a.tokens * a.panel + words * a.panel + kConvLines * (words + kConvColumns) + kConvColumns) * work_size, 64);
}

void plan(ConvGradients& a) {
    const int64_t across = pieces(a.in.channels, kConvColumns), work_size = itemsize(work(a.dtype));
    const int64_t width = taps(a.in) * kConvColumns;
    int64_t groups = pieces(a.o, most(1, least(kConvRows, kBlockBytes / (width * work_size))));
    while (groups * across % a.threads && groups * across < 4 * a.threads && groups * kConvLines < a.o) ++groups;
    a.rows = pieces(a.o, groups);
    a.room = up_to(((a.rows + 8) * width + (a.rows + kConvColumns) * kConvTokens + 2 * kConvColumns) * work_size, 64);
}

// Bytes of workspace of a product, or of gradients, of so many tokens; arguments as those of a call.
int64_t room(int level, int threads, int dtype, int64_t channels, int64_t n, int64_t tap_count, int64_t token_count,
             bool gradients) {
    check_level(level);
    check_threads(threads);
    check_dtype("dtype", dtype);
    for (const auto& [name, size] :
         {std::make_pair("channels", channels), {"n", n}, {"taps", tap_count}, {"tokens", token_count}})
        if (size < 1 || size >= kMostSize) refuse(name, "1 to 2^31 - 1", std::to_string(size));
    ConvImage in = {};
    in.channels = channels, in.images = token_count;
    in.tap_rows = tap_count, in.tap_columns = in.rows = in.columns = 1;
    if (gradients) {
        ConvGradients a = {};
        a.in = in, a.o = n, a.dtype = dtype, a.threads = threads;
        plan(a);
        return a.room * threads;
    }
    ConvProduct a = {};
    a.in = in, a.n = n, a.dtype = dtype, a.threads = threads;
    plan(a, terms_of(level, dtype));
    return a.room * threads;
}

class ConvCalls {
 public:
    ConvCalls(int64_t threads_pay_from, const py::capsule& exchange, py::tuple classes)
        : threads_pay_from_(threads_pay_from), reader_(exchange, std::move(classes)) {}

    // y = conv(x, W) + b into y, or where `transposed` dx = conv(dy, W turned round); whether it was done. `steps` are
    // strides, dilations and paddings, of rows and columns.
    bool product(int level, int threads, py::handle y, py::handle x, py::handle gene_list, py::handle coeffs,
                 py::handle bias, const py::tuple& steps, bool transposed) const {
        const ExpansionConvKernels& run = kernels(level);
        const Tensors genes(gene_list);
        ConvProduct a = {};
        View in, out, gene, b;
        py::object pixels, workspace;
        if (!reader_.read(x, in) || !reader_.read(y, out) || in.ndim != 4 || out.ndim != 4) return false;
        if (out.dtype != in.dtype || out.shape[0] != in.shape[0]) return false;
        if (!read_genes(genes, coeffs, a.genes, gene, in.dtype) || !read_steps(steps, gene, out, a.in)) return false;
        const int64_t from = gene.shape[transposed ? 0 : 1], to = gene.shape[transposed ? 1 : 0];
        if (in.shape[1] != from || out.shape[1] != to || !(out.contiguous() || last(out))) return false;
        if (!bias.is_none()) {
            if (!reader_.read(bias, b) || b.dtype != in.dtype || b.ndim != 1 || b.last() != to || b.stride(0) != 1)
                return false;
            a.bias = b.data;
        }
        a.threads = paid(threads, gene, a.in);
        if (!read_image(run, x, in, a.threads, a.in, pixels)) return false;
        a.y = out.data, a.n = to, a.last = !out.contiguous(), a.transposed = transposed, a.dtype = in.dtype;
        plan(a, terms_of(level, in.dtype));
        workspace = make_room(x, in.dtype, a.threads, a.room, a.workspace);
        py::gil_scoped_release release;
        run.product(a);
        return true;
    }

    // Adds to the accumulators of genes, per gene a tensor or None, and writes dots [C / 32, O, K] unless it is None;
    // whether it was done.
    bool gradients(int level, int threads, py::handle dy, py::handle x, py::handle gene_list, py::handle coeffs,
                   py::handle buffers, py::handle dots, const py::tuple& steps) const {
        const ExpansionConvKernels& run = kernels(level);
        const Tensors genes(gene_list), gene_buffers(buffers);
        ConvGradients a = {};
        View in, up, gene, sums;
        py::object pixels, workspace;
        if (!reader_.read(x, in) || !reader_.read(dy, up) || in.ndim != 4 || up.ndim != 4) return false;
        if (up.dtype != in.dtype || up.shape[0] != in.shape[0] || !up.contiguous()) return false;
        if (!read_genes(genes, coeffs, a.genes, gene, in.dtype) || !read_steps(steps, gene, up, a.in)) return false;
        if (in.shape[1] != gene.shape[1] || up.shape[1] != gene.shape[0]) return false;
        if (!read_buffers(gene_buffers, a.genes.count, gene, a.grads)) return false;
        if (!dots.is_none()) {
            if (!reader_.read(dots, sums) || sums.ndim != 3 || sums.dtype != kFloat64 || !sums.contiguous())
                return false;
            if (sums.shape[0] != pieces(gene.shape[1], kConvColumns) || sums.shape[1] != gene.shape[0] ||
                sums.shape[2] != a.genes.count)
                return false;
            a.grads.dots = reinterpret_cast<double*>(sums.data);
        }
        a.threads = paid(threads, gene, a.in);
        if (!read_image(run, x, in, a.threads, a.in, pixels)) return false;
        a.dy = up.data, a.o = gene.shape[0], a.dtype = in.dtype;
        plan(a);
        workspace = make_room(x, in.dtype, a.threads, a.room, a.workspace);
        py::gil_scoped_release release;
        run.gradients(a);
        return true;
    }

 private:
    int paid(int threads, const View& gene, const ConvImage& in) const {
        check_threads(threads);
        const int64_t weights = gene.shape[0] * gene.shape[1] * taps(in);
        return weights < threads_pay_from_ / tokens(in) ? 1 : threads;
    }

    // Whether channels lie side by side.
    static bool last(const View& image) {
        const int64_t axes[] = {1, 3, 2, 0};
        int64_t expected = 1;
        for (int64_t axis : axes) {
            if (image.shape[axis] != 1 && image.strides[axis] != expected) return false;
            expected *= image.shape[axis];
        }
        return true;
    }

    // Pixels of an image that has those positions; they are made where it consists of planes.
    bool read_image(const ExpansionConvKernels& run, py::handle image, const View& view, int threads, ConvImage& in,
                    py::object& made) const {
        in.channels = view.shape[1], in.height = view.shape[2], in.width = view.shape[3];
        if (in.height >= kMostSize || in.width >= kMostSize) return false;
        if (!fits(in.rows, in.height, in.above, in.tap_rows, in.row_dilation, in.row_stride) ||
            !fits(in.columns, in.width, in.before, in.tap_columns, in.column_dilation, in.column_stride))
            return false;
        in.pixels = view.data;
        if (last(view)) return true;
        if (!view.contiguous()) return false;
        void* to = nullptr;
        made = reader_.empty_like(image, view, view.last(), to);
        in.pixels = to;
        const ConvPixels a = {
            view.data, to, in.images, in.channels, in.height * in.width, static_cast<int>(itemsize(view.dtype)),
            threads};
        py::gil_scoped_release release;
        run.pixels(a);
        return true;
    }

    // K tensors [O, C, kh, kw] whose rows are contiguous, and their coefficients in the work dtype.
    bool read_genes(const Tensors& tensors, py::handle coeffs, Genes& genes, View& first, int dtype) const {
        View c;
        if (tensors.count < 1 || tensors.count > kMaxGenes) return false;
        for (size_t k = 0; k < tensors.count; ++k) {
            View gene;
            if (!reader_.read(tensors[k], gene) || gene.ndim != 4 || (k && !gene.same(first))) return false;
            int64_t expected = 1;
            for (int axis = 3; axis > 0; expected *= gene.shape[axis--])
                if (gene.shape[axis] != 1 && gene.strides[axis] != expected) return false;
            if (!k) first = gene;
            genes.matrix[k] = {gene.data, gene.shape[0] == 1 ? expected : gene.strides[0], 1};
        }
        genes.count = static_cast<int>(tensors.count), genes.dtype = first.dtype;
        if (work(dtype) != work(first.dtype) || !reader_.read(coeffs, c)) return false;
        genes.coeffs = c.data;
        return c.ndim == 1 && c.last() == genes.count && c.stride(0) == 1 && c.dtype == work(first.dtype);
    }

    // Where the positions of `out` find their taps.
    static bool read_steps(const py::tuple& steps, const View& gene, const View& out, ConvImage& in) {
        in.tap_rows = gene.shape[2], in.tap_columns = gene.shape[3];
        in.images = out.shape[0], in.rows = out.shape[2], in.columns = out.shape[3];
        if (in.tap_rows > kConvTaps || in.tap_columns > kConvTaps || taps(in) > kConvTaps) return false;
        if (in.rows >= kMostSize || in.columns >= kMostSize || steps.size() != 6) return false;
        int64_t* const to[] = {&in.row_stride,      &in.column_stride, &in.row_dilation,
                               &in.column_dilation, &in.above,         &in.before};
        for (size_t j = 0; j < 6; ++j) {
            *to[j] = py::cast<int64_t>(steps[j]);
            if (*to[j] >= kMostSize || *to[j] <= (j < 4 ? 0 : -kMostSize)) return false;  // paddings may be negative
        }
        return true;
    }

    // Whether a side of an image has exactly so many positions.
    static bool fits(int64_t positions, int64_t side, int64_t padding, int64_t taps, int64_t dilation, int64_t stride) {
        const int64_t last = side + 2 * padding - dilation * (taps - 1) - 1;  // where the last patch may begin
        return last >= 0 && last / stride + 1 == positions;
    }

    // Per gene its contiguous accumulator in the work dtype, or None.
    bool read_buffers(const Tensors& buffers, int count, const View& gene, GeneGrads& grads) const {
        if (buffers.count != static_cast<size_t>(count)) return false;
        View wanted = gene;
        wanted.dtype = work(gene.dtype);
        for (int k = 0; k < count; ++k) {
            View buffer;
            grads.buffer_stride[k] = gene.shape[1] * gene.shape[2] * gene.shape[3];
            if (buffers[k].is_none()) continue;
            if (!reader_.read(buffers[k], buffer) || !buffer.same(wanted) || !buffer.contiguous()) return false;
            grads.buffer[k] = buffer.data;
        }
        return true;
    }

    // A tensor of torch that holds `room` bytes for each thread.
    py::object make_room(py::handle like, int dtype, int threads, int64_t room, void*& data) const {
        View line;
        line.ndim = 1;
        py::object made = reader_.empty_like(like, line, (threads * room + 64) / itemsize(dtype), data);
        data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64);
        return made;
    }

    const int64_t threads_pay_from_;
    const TensorReader reader_;
};

}  // namespace

void bind_expansion_conv(py::module_& parent) {
    py::module_ module = parent.def_submodule("expansion_conv", "conv(x, W), W = sum_k coeffs[k] * genes[k]");
    using py::arg;
    module.def("room", &room, arg("level"), arg("threads"), arg("dtype"), arg("channels"), arg("n"), arg("taps"),
               arg("tokens"), arg("gradients"));
    py::class_<ConvCalls>(module, "Calls", "Convolutions of tensors; False where they need to be looked at.")
        .def(py::init<int64_t, const py::capsule&, py::tuple>(), arg("threads_pay_from"), arg("exchange"),
             arg("classes"))
        .def("product", &ConvCalls::product, arg("level"), arg("threads"), arg("y"), arg("x"), arg("genes"),
             arg("coeffs"), arg("bias"), arg("steps"), arg("transposed"))
        .def("gradients", &ConvCalls::gradients, arg("level"), arg("threads"), arg("dy"), arg("x"), arg("genes"),
             arg("coeffs"), arg("buffers"), arg("dots"), arg("steps"));
}

}  // namespace pylearngene
