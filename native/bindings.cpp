// The only file that knows Python. Tensors arrive as addresses and sizes: converting them to arrays of
// nanobind's would cost more than a small product. weft.kernels checks them before it calls.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <exception>
#include <vector>

#include "block_sequence.hpp"
#include "low_rank.hpp"
#include "processor.hpp"
#include "quantized.hpp"
#include "sparse_chain.hpp"

namespace nb = nanobind;

namespace {

template <typename T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

// What the Python side of torch is asked for before every product. Asked from here it costs half as much, and
// without torch's headers one build serves all versions of torch.
struct Torch {
    // Objects, taken from weft.kernels.dispatch.
    PyObject *tensor, *parameter, *float32;
    PyObject *is_grad_enabled, *intercepted;
    // Questions, and each one's answer in a plain eager call.
    PyObject *questions, *answers;
    PyObject *forward_mode, *no_level;  // a module, and its level where forward-mode differentiation is off
    // Names.
    PyObject *dtype, *is_cpu, *requires_grad, *is_contiguous, *is_neg, *data_ptr, *numel, *shape, *new_empty, *level;
};

Torch torch;  // nothing is known until know_torch

void know_torch(nb::object tensor, nb::object parameter, nb::object float32, nb::object is_grad_enabled,
                nb::object intercepted, nb::tuple questions, nb::tuple answers, nb::object forward_mode) {
    torch.tensor = tensor.release().ptr();
    torch.parameter = parameter.release().ptr();
    torch.float32 = float32.release().ptr();
    torch.is_grad_enabled = is_grad_enabled.release().ptr();
    torch.intercepted = intercepted.release().ptr();
    torch.questions = questions.release().ptr();
    torch.answers = answers.release().ptr();
    torch.forward_mode = forward_mode.release().ptr();
    torch.no_level = PyLong_FromLong(-1);
    torch.level = PyUnicode_InternFromString("_current_level");
    torch.dtype = PyUnicode_InternFromString("dtype");
    torch.is_cpu = PyUnicode_InternFromString("is_cpu");
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.is_contiguous = PyUnicode_InternFromString("is_contiguous");
    torch.is_neg = PyUnicode_InternFromString("is_neg");
    torch.data_ptr = PyUnicode_InternFromString("data_ptr");
    torch.numel = PyUnicode_InternFromString("numel");
    torch.shape = PyUnicode_InternFromString("shape");
    torch.new_empty = PyUnicode_InternFromString("new_empty");
}

// 1 where `found`, whose reference it takes, is `wanted`, 0 where it is not, -1 with an exception set.
int is(PyObject *found, PyObject *wanted) {
    if (found == nullptr) return -1;
    Py_DECREF(found);
    return found == wanted ? 1 : 0;
}

// 1 where a tensor is one of PyTorch's own, contiguous float32 in host memory and needs no gradient that is
// recorded; 0 where it is not, -1 with an exception set.
int is_plain(PyObject *tensor, bool recording) {
    PyObject *type = reinterpret_cast<PyObject *>(Py_TYPE(tensor));
    if (type != torch.tensor && type != torch.parameter) return 0;  // a subclass may keep its values elsewhere
    int yes = is(PyObject_GetAttr(tensor, torch.dtype), torch.float32);
    if (yes == 1) yes = is(PyObject_GetAttr(tensor, torch.is_cpu), Py_True);
    if (yes == 1) yes = is(PyObject_CallMethodNoArgs(tensor, torch.is_contiguous), Py_True);
    // A lazy sign, which the memory does not show.
    if (yes == 1) yes = is(PyObject_CallMethodNoArgs(tensor, torch.is_neg), Py_False);
    if (yes == 1 && recording) yes = is(PyObject_GetAttr(tensor, torch.requires_grad), Py_False);
    return yes;
}

// The guard that weft.kernels.dispatch.takes_raw_pointers describes; -1 with an exception set.
int takes_raw_pointers(PyObject *const *tensors, Py_ssize_t count) {
    if (torch.tensor == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "know_torch must be called first");
        return -1;
    }
    int yes = is(PyObject_Vectorcall(torch.intercepted, tensors, static_cast<std::size_t>(count), nullptr), Py_False);
    // None, False and small numbers are the same objects everywhere.
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.questions) && yes == 1; ++i)
        yes = is(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.questions, i)), PyTuple_GET_ITEM(torch.answers, i));
    if (yes == 1) yes = is(PyObject_GetAttr(torch.forward_mode, torch.level), torch.no_level);
    if (yes != 1) return yes;
    PyObject *recording = PyObject_CallNoArgs(torch.is_grad_enabled);
    if (recording == nullptr) return -1;
    Py_DECREF(recording);
    for (Py_ssize_t i = 0; i < count && yes == 1; ++i)
        if (tensors[i] != Py_None) yes = is_plain(tensors[i], recording == Py_True);
    return yes;
}

PyObject *takes_raw_pointers_function(PyObject *, PyObject *const *tensors, Py_ssize_t count) {
    const int yes = takes_raw_pointers(tensors, count);
    return yes < 0 ? nullptr : PyBool_FromLong(yes);
}

// A method's whole number; -1 with an exception set.
long long number(PyObject *tensor, PyObject *method) {
    PyObject *found = PyObject_CallMethodNoArgs(tensor, method);
    if (found == nullptr) return -1;
    const long long value = PyLong_AsLongLong(found);
    Py_DECREF(found);
    return value;
}

// Addresses may use all bits; null and an exception set on failure.
bool address(PyObject *tensor, std::uintptr_t &out) {
    PyObject *found = PyObject_CallMethodNoArgs(tensor, torch.data_ptr);
    if (found == nullptr) return false;
    out = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(found));
    Py_DECREF(found);
    return PyErr_Occurred() == nullptr;
}

// A reference that is given back at the end of its scope.
class Owned {
public:
    explicit Owned(PyObject *object) : object_(object) {}
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    ~Owned() { Py_XDECREF(object_); }
    explicit operator bool() const { return object_ != nullptr; }
    PyObject *get() const { return object_; }
    PyObject *release() {
        PyObject *object = object_;
        object_ = nullptr;
        return object;
    }

private:
    PyObject *object_;
};

// A tensor's shape; only valid while it is not null, which means an exception is set.
struct Shape {
    Owned sizes;

    explicit Shape(PyObject *tensor) : sizes(PyObject_GetAttr(tensor, torch.shape)) {}
    Py_ssize_t axes() const { return PyTuple_GET_SIZE(sizes.get()); }
    PyObject *object(Py_ssize_t axis) const { return PyTuple_GET_ITEM(sizes.get(), axis); }
    long long extent(Py_ssize_t axis) const { return PyLong_AsLongLong(object(axis)); }
};

constexpr Py_ssize_t most_axes = 16;

long long batch_of(const Shape &x) {
    long long batch = 1;
    for (Py_ssize_t axis = 0; axis + 1 < x.axes(); ++axis) batch *= x.extent(axis);
    return batch;
}

// A new tensor of the input's shape but for the last extent; null and an exception set on failure.
PyObject *new_result(PyObject *x, const Shape &shape, PyObject *outputs) {
    PyObject *call[most_axes + 1] = {x};
    for (Py_ssize_t axis = 0; axis + 1 < shape.axes(); ++axis) call[axis + 1] = shape.object(axis);
    call[shape.axes()] = outputs;
    return PyObject_VectorcallMethod(torch.new_empty, call, static_cast<std::size_t>(shape.axes() + 1), nullptr);
}

// 1 and its address where a bias is absent (0) or has `outputs` numbers, 0 where it has not, -1 on failure.
int bias_address(PyObject *bias, long long outputs, std::uintptr_t &place) {
    place = 0;
    if (bias == Py_None) return 1;
    const Shape shape(bias);
    if (!shape.sizes) return -1;
    if (shape.axes() != 1 || shape.extent(0) != outputs) return 0;
    return address(bias, place) ? 1 : -1;
}

// Runs a product without Python's lock; the result, or null and MemoryError where scratch memory was missing.
template <typename Product>
PyObject *run_unlocked(Owned &out, Product &&product) {
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        product();
    } catch (const std::exception &) {  // of the scratch memory: nothing else throws
        enough = false;
    }
    Py_END_ALLOW_THREADS
    return enough ? out.release() : PyErr_NoMemory();
}

// low_rank_apply(x, left, right, bias, largest_batch, threads)
PyObject *low_rank_apply(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "expected x, left, right, bias, largest_batch, threads");
        return nullptr;
    }
    PyObject *x = arguments[0], *left = arguments[1], *right = arguments[2], *bias = arguments[3];
    const int yes = takes_raw_pointers(arguments, 4);
    if (yes < 0) return nullptr;
    if (yes == 0) Py_RETURN_NONE;
    const long long largest_batch = PyLong_AsLongLong(arguments[4]);
    const long threads = PyLong_AsLong(arguments[5]);
    if (PyErr_Occurred() != nullptr) return nullptr;

    const Shape shape(x), left_shape(left), right_shape(right);
    if (!shape.sizes || !left_shape.sizes || !right_shape.sizes) return nullptr;
    const Py_ssize_t axes = shape.axes();
    if (axes < 1 || axes > most_axes || left_shape.axes() != 2 || right_shape.axes() != 2) Py_RETURN_NONE;
    const long long batch = batch_of(shape), inputs = shape.extent(axes - 1);
    const long long outputs = left_shape.extent(0), rank = left_shape.extent(1);
    if (batch < 1 || batch > largest_batch || right_shape.extent(0) != rank || right_shape.extent(1) != inputs)
        Py_RETURN_NONE;
    std::uintptr_t x_at = 0, left_at = 0, right_at = 0, bias_at = 0, out_at = 0;
    const int fits = bias_address(bias, outputs, bias_at);
    if (fits < 0) return nullptr;
    if (fits == 0) Py_RETURN_NONE;
    Owned out(new_result(x, shape, left_shape.object(0)));
    if (!out || !address(x, x_at) || !address(left, left_at) || !address(right, right_at) ||
        !address(out.get(), out_at))
        return nullptr;
    return run_unlocked(out, [&] {
        weft::low_rank_apply({at<const float>(x_at), at<const float>(left_at), at<const float>(right_at),
                              at<const float>(bias_at), at<float>(out_at), batch, inputs, rank, outputs},
                             static_cast<int>(threads));
    });
}

constexpr Py_ssize_t most_matrices = 8;

// block_sequence_apply(x, bias, matrices, sizes, code, inputs, outputs, threads): the whole eager call, from the
// guard to the result, as one function; None where the arrays are not what the program reads.
PyObject *block_sequence_apply(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 8 || !PyList_Check(arguments[2]) || !PyList_Check(arguments[3])) {
        PyErr_SetString(PyExc_TypeError, "expected x, bias, matrices, sizes, code, inputs, outputs, threads");
        return nullptr;
    }
    PyObject *x = arguments[0], *bias = arguments[1], *code = arguments[4];
    const Py_ssize_t matrices = PyList_GET_SIZE(arguments[2]);
    if (matrices > most_matrices || matrices != PyList_GET_SIZE(arguments[3])) {
        PyErr_SetString(PyExc_ValueError, "expected as many matrices as sizes, at most 8");
        return nullptr;
    }
    PyObject *tensors[most_matrices + 2] = {x, bias};
    for (Py_ssize_t i = 0; i < matrices; ++i) tensors[i + 2] = PyList_GET_ITEM(arguments[2], i);
    const int yes = takes_raw_pointers(tensors, matrices + 2);
    if (yes < 0) return nullptr;
    if (yes == 0) Py_RETURN_NONE;

    const long long inputs = PyLong_AsLongLong(arguments[5]), outputs = PyLong_AsLongLong(arguments[6]);
    const long threads = PyLong_AsLong(arguments[7]);
    if (PyErr_Occurred() != nullptr) return nullptr;
    const float *addresses[most_matrices];
    std::uintptr_t place = 0;
    for (Py_ssize_t i = 0; i < matrices; ++i) {
        const long long size = PyLong_AsLongLong(PyList_GET_ITEM(arguments[3], i));
        const long long got = tensors[i + 2] == Py_None ? -2 : number(tensors[i + 2], torch.numel);
        if (PyErr_Occurred() != nullptr) return nullptr;
        if (got != size) Py_RETURN_NONE;
        if (!address(tensors[i + 2], place)) return nullptr;
        addresses[i] = at<const float>(place);
    }

    std::uintptr_t x_at = 0, bias_at = 0, out_at = 0, code_at = 0;
    const int fits = bias_address(bias, outputs, bias_at);
    if (fits < 0) return nullptr;
    if (fits == 0) Py_RETURN_NONE;
    const Shape shape(x);
    if (!shape.sizes) return nullptr;
    const Py_ssize_t axes = shape.axes();
    if (axes < 1 || axes > most_axes || shape.extent(axes - 1) != inputs) Py_RETURN_NONE;
    Owned out(new_result(x, shape, arguments[6]));
    if (!out || !address(x, x_at) || !address(out.get(), out_at) || !address(code, code_at)) return nullptr;
    return run_unlocked(out, [&] {
        weft::block_sequence_apply({at<const std::int64_t>(code_at), addresses, at<const float>(x_at),
                                    at<const float>(bias_at), at<float>(out_at), batch_of(shape)},
                                   static_cast<int>(threads));
    });
}

weft::QuantizedMatrix quantized_matrix(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                                       std::uintptr_t codebook, std::int64_t book_stride, std::int64_t inputs,
                                       std::int64_t outputs, std::int64_t group, int bits) {
    return {at<const std::uint8_t>(codes), at<const float>(scales), at<const float>(zeros),
            at<const float>(codebook), book_stride, inputs, outputs, group, bits};
}

void quantized_apply(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                     std::uintptr_t bias, std::uintptr_t out, std::int64_t batch, std::int64_t inputs,
                     std::int64_t outputs, std::int64_t group, int bits, bool int8, int threads) {
    nb::gil_scoped_release release;
    const weft::QuantizedProduct product = {
        quantized_matrix(codes, scales, zeros, 0, 0, inputs, outputs, group, bits), at<const float>(x),
        at<const float>(bias), at<float>(out), batch};
    if (int8) weft::quantized_int8(product, threads);
    else weft::quantized_float(product, threads);
}

void codebook_apply(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t codebook, std::int64_t book_stride,
                    std::uintptr_t bias, std::uintptr_t out, std::int64_t batch, std::int64_t inputs,
                    std::int64_t outputs, int bits, int threads) {
    nb::gil_scoped_release release;
    weft::quantized_float({quantized_matrix(codes, 0, 0, codebook, book_stride, inputs, outputs, inputs, bits),
                           at<const float>(x), at<const float>(bias), at<float>(out), batch},
                          threads);
}

void quantized_write(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t codebook,
                     std::int64_t book_stride, std::uintptr_t out, std::int64_t inputs, std::int64_t outputs,
                     std::int64_t group, int bits, int threads) {
    nb::gil_scoped_release release;
    weft::quantized_write(
        quantized_matrix(codes, scales, zeros, codebook, book_stride, inputs, outputs, group, bits),
        at<float>(out), threads);
}

// `supports`: five numbers per matrix: rows, columns, the addresses of its column indices and row starts, and
// whether the indices have 16 bits.
void sparse_chain_apply(std::uintptr_t x, std::uintptr_t values, std::uintptr_t supports, std::int64_t count,
                        std::uintptr_t bias, std::uintptr_t out, std::int64_t batch, int threads) {
    nb::gil_scoped_release release;
    std::vector<weft::SparseSupport> matrices;
    const auto *row = at<const std::int64_t>(supports);
    for (std::int64_t i = 0; i < count; ++i, row += 5)
        matrices.push_back({row[0], row[1], at<const void>(static_cast<std::uintptr_t>(row[2])),
                            at<const std::int64_t>(static_cast<std::uintptr_t>(row[3])), row[4] != 0});
    weft::sparse_chain_apply({at<const float>(x), at<const float>(values), matrices.data(), count,
                              at<const float>(bias), at<float>(out), batch},
                             threads);
}

// Bound without nanobind, whose variable arguments would become a tuple on every call.
template <PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)>
PyMethodDef fast(const char *name, const char *description) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, description};
}

PyMethodDef fast_functions[] = {
    fast<takes_raw_pointers_function>("takes_raw_pointers", "The guard of weft.kernels.dispatch, in one call."),
    fast<low_rank_apply>("low_rank_apply",
                         "(x, left, right, bias, largest_batch, threads) to (x rightᵀ) leftᵀ + bias, or None where it "
                         "cannot be had here."),
    fast<block_sequence_apply>("block_sequence_apply",
                               "(x, bias, matrices, sizes, code, inputs, outputs, threads) to the program's product, or "
                               "None where it cannot be had here."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

NB_MODULE(_native, module) {
    PyModule_AddFunctions(module.ptr(), fast_functions);
    module.def("know_torch", &know_torch, "Takes what the guard asks torch for.");
    module.def("instructions", &weft::instructions_name, "Name of the instruction set in use.");
    module.def("use_instructions", &weft::use_instructions,
               "Uses the leaf kernels' copy of this name from now on; False where build or processor lack it.");
    module.def("quantized_apply", &quantized_apply,
               "out = x Ŵᵀ + bias for uniform codes, on float32 arrays given by their addresses (zeros and bias "
               "may be 0); with vectors rounded to whole numbers where `int8`.");
    module.def("codebook_apply", &codebook_apply, "The same for codes of a codebook (book_stride 0: one for all).");
    module.def("quantized_write", &quantized_write, "out = Ŵ: the weights that codes stand for.");
    module.def("sparse_chain_apply", &sparse_chain_apply,
               "out = x (S_1 ... S_count)ᵀ + bias on float32 arrays given by their addresses (bias may be 0).");
}
