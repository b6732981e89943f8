// The only file that knows Python. Tensors arrive as addresses and sizes: converting them to arrays of
// nanobind's would cost more than a small product. weft.kernels checks them before it calls.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "bfloat16.hpp"
#include "block_sequence.hpp"
#include "codewords.hpp"
#include "low_rank.hpp"
#include "processor.hpp"
#include "quantized.hpp"
#include "sparse_chain.hpp"
#include "table_sums.hpp"

namespace nb = nanobind;

namespace {

// What weft.kernels.dispatch expects of this library. Raised, in both places, by every change after which one of them
// as it was before would make the other compute something else.
constexpr int interface = 4;

template <typename T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
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

// How DLPack, version 1, lays out a tensor's description, and the table of functions that a class of tensors
// shares through it. One call then tells all that torch's attributes tell one by one.
namespace dlpack {

struct Tensor {
    void *data;
    std::int32_t device_type, device_id;
    std::int32_t axes;
    std::uint8_t type, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

struct Exchange {
    std::uint32_t major, minor;
    Exchange *previous;
    void *allocate, *give_away, *take;
    int (*describe)(void *tensor, Tensor *out);  // null where the library does not offer it
    void *current_stream;
};

constexpr std::int32_t host = 1;
enum Type : std::uint8_t { unsigned_integer = 1, floating = 2, brain_floating = 4 };

}  // namespace dlpack

// What the Python side of torch is asked for before every product. Asked from here it costs half as much, and
// without torch's headers one build serves all versions of torch.
struct Torch {
    // Objects, taken from weft.kernels.dispatch.
    PyObject *tensor, *parameter, *float32, *bfloat16, *uint8;
    PyObject *is_grad_enabled, *get_num_threads;
    // Questions, and each one's answer in a plain eager call.
    PyObject *questions, *answers;
    PyObject *forward_mode, *no_level;  // a module, and its level where forward-mode differentiation is off
    const dlpack::Exchange *exchange;   // null in versions of torch before 2.10: its attributes are asked instead
    PyObject *empty_strided;            // (sizes, strides, dtype) to a new tensor in host memory
    // Names.
    PyObject *dtype, *is_cpu, *requires_grad, *is_contiguous, *is_neg, *data_ptr, *shape, *level;
    PyObject *modules, *parameters, *buffers, *matrix, *native_call;
};

Torch torch;  // nothing is known until know_torch

const dlpack::Exchange *exchange_of(PyObject *tensor) {
    const Owned capsule(PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__"));
    void *found = capsule ? PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api") : nullptr;
    PyErr_Clear();
    auto *exchange = static_cast<dlpack::Exchange *>(found);
    while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
    return exchange != nullptr && exchange->describe != nullptr ? exchange : nullptr;
}

void know_torch(nb::object tensor, nb::object parameter, nb::object float32, nb::object bfloat16, nb::object uint8,
                nb::object is_grad_enabled, nb::object get_num_threads, nb::tuple questions, nb::tuple answers,
                nb::object forward_mode, nb::object empty_strided, bool by_exchange) {
    torch.exchange = by_exchange ? exchange_of(tensor.ptr()) : nullptr;
    torch.tensor = tensor.release().ptr();
    torch.parameter = parameter.release().ptr();
    torch.float32 = float32.release().ptr();
    torch.bfloat16 = bfloat16.release().ptr();
    torch.uint8 = uint8.release().ptr();
    torch.is_grad_enabled = is_grad_enabled.release().ptr();
    torch.get_num_threads = get_num_threads.release().ptr();
    torch.questions = questions.release().ptr();
    torch.answers = answers.release().ptr();
    torch.forward_mode = forward_mode.release().ptr();
    torch.empty_strided = empty_strided.release().ptr();
    torch.no_level = PyLong_FromLong(-1);
    torch.level = PyUnicode_InternFromString("_current_level");
    torch.dtype = PyUnicode_InternFromString("dtype");
    torch.is_cpu = PyUnicode_InternFromString("is_cpu");
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.is_contiguous = PyUnicode_InternFromString("is_contiguous");
    torch.is_neg = PyUnicode_InternFromString("is_neg");
    torch.data_ptr = PyUnicode_InternFromString("data_ptr");
    torch.shape = PyUnicode_InternFromString("shape");
    torch.modules = PyUnicode_InternFromString("_modules");
    torch.parameters = PyUnicode_InternFromString("_parameters");
    torch.buffers = PyUnicode_InternFromString("_buffers");
    torch.matrix = PyUnicode_InternFromString("matrix");
    torch.native_call = PyUnicode_InternFromString("native_call");
}

// 1 where `found`, whose reference it takes, is `wanted`, 0 where it is not, -1 with an exception set.
int is(PyObject *found, PyObject *wanted) {
    if (found == nullptr) return -1;
    Py_DECREF(found);
    return found == wanted ? 1 : 0;
}

// Whether an eager call stands alone, without tracer, transform or mode; -1 with an exception set. `recording` says
// whether gradients are.
int in_plain_eager(bool &recording) {
    if (torch.tensor == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "know_torch must be called first");
        return -1;
    }
    int yes = 1;
    // None, False and small numbers are the same objects everywhere.
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.questions) && yes == 1; ++i)
        yes = is(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.questions, i)), PyTuple_GET_ITEM(torch.answers, i));
    if (yes == 1) yes = is(PyObject_GetAttr(torch.forward_mode, torch.level), torch.no_level);
    if (yes != 1) return yes;
    PyObject *grad = PyObject_CallNoArgs(torch.is_grad_enabled);
    if (grad == nullptr) return -1;
    recording = grad == Py_True;
    Py_DECREF(grad);
    return 1;
}

// `floating` is float32 or bfloat16.
enum class Numbers { float32, floating, uint8 };

constexpr Py_ssize_t most_axes = 16;

// A tensor that the kernels may read: contiguous in host memory.
struct Plain {
    std::uintptr_t data = 0;
    bool half = false;  // bfloat16
    Py_ssize_t axes = 0;
    std::int64_t shape[most_axes];

    std::int64_t last() const { return shape[axes - 1]; }
    std::int64_t count() const { return before(axes); }
    std::int64_t batch() const { return before(axes - 1); }
    bool has_shape(std::int64_t rows, std::int64_t columns) const {
        return axes == 2 && shape[0] == rows && shape[1] == columns;
    }

private:
    std::int64_t before(Py_ssize_t end) const {
        std::int64_t product = 1;
        for (Py_ssize_t axis = 0; axis < end; ++axis) product *= shape[axis];
        return product;
    }
};

// Fills `out` by one call of torch's; 1, or 0 where the tensor is not as wanted.
int describe(PyObject *tensor, Numbers wanted, Plain &out) {
    dlpack::Tensor found;
    if (torch.exchange->describe(tensor, &found) != 0) {
        PyErr_Clear();  // nothing that DLPack can tell, hence nothing that the kernels can read
        return 0;
    }
    out.half = wanted == Numbers::floating && found.type == dlpack::brain_floating;
    const bool bytes = wanted == Numbers::uint8;
    const auto type = out.half ? dlpack::brain_floating : bytes ? dlpack::unsigned_integer : dlpack::floating;
    if (found.type != type || found.bits != (out.half ? 16 : bytes ? 8 : 32) || found.lanes != 1 ||
        found.device_type != dlpack::host || found.axes > most_axes)
        return 0;
    out.axes = found.axes;
    std::int64_t count = 1;
    bool contiguous = true;
    for (Py_ssize_t axis = out.axes - 1; axis >= 0; --axis) {
        const std::int64_t extent = found.shape[axis];
        out.shape[axis] = extent;
        if (extent != 1 && found.strides != nullptr && found.strides[axis] != count) contiguous = false;
        count *= extent;
    }
    out.data = reinterpret_cast<std::uintptr_t>(found.data) + static_cast<std::uintptr_t>(found.byte_offset);
    return contiguous || count == 0;
}

// The same by torch's attributes one after the other; -1 with an exception set.
int describe_by_attributes(PyObject *tensor, Numbers wanted, Plain &out) {
    int yes = 0;
    if (wanted == Numbers::floating) {
        yes = is(PyObject_GetAttr(tensor, torch.dtype), torch.bfloat16);
        out.half = yes == 1;
    }
    if (yes == 0) yes = is(PyObject_GetAttr(tensor, torch.dtype), wanted == Numbers::uint8 ? torch.uint8 : torch.float32);
    if (yes == 1) yes = is(PyObject_GetAttr(tensor, torch.is_cpu), Py_True);
    if (yes == 1) yes = is(PyObject_CallMethodNoArgs(tensor, torch.is_contiguous), Py_True);
    if (yes != 1) return yes;
    const Owned sizes(PyObject_GetAttr(tensor, torch.shape)), place(PyObject_CallMethodNoArgs(tensor, torch.data_ptr));
    if (!sizes || !place) return -1;
    out.axes = PyTuple_GET_SIZE(sizes.get());
    if (out.axes > most_axes) return 0;
    for (Py_ssize_t axis = 0; axis < out.axes; ++axis)
        out.shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.get(), axis));
    out.data = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(place.get()));  // addresses may use all bits
    return PyErr_Occurred() == nullptr ? 1 : -1;
}

int describe_either_way(PyObject *tensor, Numbers wanted, Plain &out) {
    return torch.exchange != nullptr ? describe(tensor, wanted, out) : describe_by_attributes(tensor, wanted, out);
}

// 1 where a tensor is one of PyTorch's own, contiguous in host memory, of the wanted numbers, and needs no gradient
// that is recorded; 0 where it is not, -1 with an exception set.
int look_at(PyObject *tensor, Numbers wanted, bool recording, Plain &out) {
    PyObject *type = reinterpret_cast<PyObject *>(Py_TYPE(tensor));
    if (type != torch.tensor && type != torch.parameter) return 0;  // a subclass may keep its values elsewhere
    int yes = describe_either_way(tensor, wanted, out);
    // A lazy sign, which the memory does not show. Only views of complex numbers have it, every other one of their
    // floats: no parameter of more than one number both has it and is contiguous.
    const bool may_be_negated = wanted != Numbers::uint8 && (type != torch.parameter || out.count() <= 1);
    if (yes == 1 && may_be_negated) yes = is(PyObject_CallMethodNoArgs(tensor, torch.is_neg), Py_False);
    if (yes == 1 && recording) yes = is(PyObject_GetAttr(tensor, torch.requires_grad), Py_False);
    return yes;
}

// What one product reads: asks the guard that weft.kernels.dispatch.takes_raw_pointers describes, then tensor after
// tensor, until one of them does not serve.
class Arguments {
public:
    Arguments() : state_(in_plain_eager(recording_)) {}

    // A tensor, as `Plain` says; without meaning once `serve` is false.
    Plain tensor(PyObject *object, Numbers wanted = Numbers::float32) {
        Plain out;
        if (state_ == 1) state_ = look_at(object, wanted, recording_, out);
        return out;
    }
    // The address of a vector of `extent` numbers, halves or floats, or 0 for None.
    std::uintptr_t optional(PyObject *object, std::int64_t extent, bool half = false) {
        if (object == Py_None) return 0;
        const Plain found = tensor(object, half ? Numbers::floating : Numbers::float32);
        if (state_ == 1 && (found.axes != 1 || found.shape[0] != extent || found.half != half)) state_ = 0;
        return found.data;
    }
    void require(bool condition) {
        if (state_ == 1 && !condition) state_ = 0;
    }
    bool serve() const { return state_ == 1; }
    // What a call returns that does not compute: None, or null with an exception set.
    PyObject *declined() const {
        if (state_ < 0) return nullptr;
        Py_RETURN_NONE;
    }

private:
    bool recording_ = false;
    int state_;
};

PyObject *takes_raw_pointers(PyObject *, PyObject *const *tensors, Py_ssize_t count) {
    Arguments arguments;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (tensors[i] != Py_None) arguments.tensor(tensors[i], Numbers::floating);
    if (arguments.serve()) Py_RETURN_TRUE;
    const Owned none(arguments.declined());
    if (!none) return nullptr;
    Py_RETURN_FALSE;
}

// A tuple of whole numbers; null and an exception set where memory was missing.
PyObject *tuple_of(const std::int64_t *numbers, Py_ssize_t count) {
    Owned tuple(PyTuple_New(count));
    for (Py_ssize_t i = 0; tuple && i < count; ++i) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (number == nullptr) return nullptr;
        PyTuple_SET_ITEM(tuple.get(), i, number);
    }
    return tuple.release();
}

// A new tensor of the input's shape but for the last extent, and its address; null and an exception set on failure.
PyObject *new_result(const Plain &shape, std::int64_t outputs, std::uintptr_t &place) {
    std::int64_t extents[most_axes], strides[most_axes];
    std::int64_t stride = 1;
    for (Py_ssize_t axis = shape.axes - 1; axis >= 0; --axis) {
        extents[axis] = axis + 1 < shape.axes ? shape.shape[axis] : outputs;
        strides[axis] = stride;
        stride *= std::max<std::int64_t>(extents[axis], 1);
    }
    const Owned sizes(tuple_of(extents, shape.axes));
    if (!sizes) return nullptr;
    const Owned steps(tuple_of(strides, shape.axes));
    if (!steps) return nullptr;
    PyObject *call[] = {sizes.get(), steps.get(), shape.half ? torch.bfloat16 : torch.float32};
    Owned result(PyObject_Vectorcall(torch.empty_strided, call, 3, nullptr));
    if (!result) return nullptr;
    Plain made;  // fresh, so that nothing but its place is in question
    const int yes = describe_either_way(result.get(), Numbers::floating, made);
    if (yes < 0) return nullptr;
    if (yes == 0 || made.half != shape.half || made.count() != shape.batch() * outputs) {
        PyErr_SetString(PyExc_RuntimeError, "empty_strided gave another tensor than was asked for");
        return nullptr;
    }
    place = made.data;
    return result.release();
}

// Runs product(address of the result) without Python's lock. Returns the result; null and an exception set where
// memory was missing.
template <typename Product>
PyObject *run(const Plain &shape, std::int64_t outputs, Product &&product) {
    std::uintptr_t place = 0;
    Owned out(new_result(shape, outputs, place));
    if (!out) return nullptr;
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        product(at<float>(place));
    } catch (const std::exception &) {  // of the scratch memory: nothing else throws
        enough = false;
    }
    Py_END_ALLOW_THREADS
    return enough ? out.release() : PyErr_NoMemory();
}

// Halves as floats, in memory that the calling thread keeps between its calls: one piece for each of the arrays of a
// product. Floats as they are.
enum Piece { vectors_piece, bias_piece, result_piece, first_piece, second_piece, pieces };

float *scratch(Piece piece, std::int64_t count) {
    thread_local std::vector<float> memory[pieces];
    if (memory[piece].size() < static_cast<std::size_t>(count)) memory[piece].resize(static_cast<std::size_t>(count));
    return memory[piece].data();
}

const float *as_floats(std::uintptr_t place, std::int64_t count, bool half, Piece piece) {
    if (!half || place == 0) return at<const float>(place);
    float *wide = scratch(piece, count);
    weft::widen(at<const weft::Bfloat16>(place), count, wide);
    return wide;
}

const float *as_floats(const Plain &tensor, Piece piece) {
    return as_floats(tensor.data, tensor.count(), tensor.half, piece);
}

// As `run`, by product(x, bias, result) in floats whatever the tensors hold; the bias null where there is none.
template <typename Product>
PyObject *run_in_floats(const Plain &shape, std::uintptr_t bias, std::int64_t outputs, Product &&product) {
    return run(shape, outputs, [&](float *out) {
        const float *vectors = as_floats(shape, vectors_piece), *added = as_floats(bias, outputs, shape.half, bias_piece);
        if (!shape.half) {
            product(vectors, added, out);
            return;
        }
        const std::int64_t count = shape.batch() * outputs;
        float *result = scratch(result_piece, count);
        product(vectors, added, result);
        weft::narrow(result, count, reinterpret_cast<weft::Bfloat16 *>(out));
    });
}

// Whole numbers among the arguments.
template <std::size_t count>
bool whole_numbers(PyObject *const *from, std::int64_t (&out)[count]) {
    for (std::size_t i = 0; i < count; ++i) out[i] = PyLong_AsLongLong(from[i]);
    return PyErr_Occurred() == nullptr;
}

bool wrong_count(Py_ssize_t got, Py_ssize_t wanted, const char *names) {
    if (got != wanted) PyErr_Format(PyExc_TypeError, "expected %s", names);
    return got != wanted;
}

// For more vectors of halves the vendor's products of halves measure faster.
constexpr std::int64_t most_half_vectors = 8;

// low_rank_apply(x, left, right, bias, threads)
PyObject *low_rank_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    std::int64_t threads[1];
    if (wrong_count(count, 5, "x, left, right, bias, threads") || !whole_numbers(given + 4, threads)) return nullptr;
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating), left = arguments.tensor(given[1], Numbers::floating);
    const Plain right = arguments.tensor(given[2], Numbers::floating);
    if (!arguments.serve()) return arguments.declined();
    arguments.require(x.axes >= 1 && left.axes == 2 && right.axes == 2 && left.half == x.half && right.half == x.half);
    if (!arguments.serve()) return arguments.declined();
    const std::int64_t batch = x.batch(), outputs = left.shape[0], rank = left.shape[1];
    const std::uintptr_t bias = arguments.optional(given[3], outputs, x.half);
    arguments.require(batch >= 1 && right.has_shape(rank, x.last()) && (!x.half || batch <= most_half_vectors));
    if (!arguments.serve()) return arguments.declined();
    const auto apply = [&](auto weights, const float *vectors, const float *added, float *out) {
        using Weight = decltype(weights);
        weft::low_rank_apply(weft::LowRankProductOf<Weight>{vectors, at<const Weight>(left.data),
                                                            at<const Weight>(right.data), added, out, batch, x.last(),
                                                            rank, outputs},
                             static_cast<int>(threads[0]));
    };
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        if (x.half) apply(weft::Bfloat16(), vectors, added, out);
        else apply(0.0f, vectors, added, out);
    });
}

constexpr Py_ssize_t most_matrices = 8;

// References to a product's matrices, given back at the end of its scope.
class Held {
public:
    Held() = default;
    Held(const Held &) = delete;
    Held &operator=(const Held &) = delete;
    ~Held() {
        while (count_ > 0) Py_DECREF(objects_[--count_]);
    }
    void hold(PyObject *object) { objects_[count_++] = Py_NewRef(object); }

private:
    PyObject *objects_[most_matrices];
    Py_ssize_t count_ = 0;
};

// The matrix at a place of `matrices`: a list or tuple of them, or a dictionary and the names in it. Borrowed; null
// where there is none.
PyObject *matrix_at(PyObject *matrices, PyObject *names, Py_ssize_t place) {
    if (PyDict_Check(matrices)) return PyDict_GetItemWithError(matrices, PyTuple_GET_ITEM(names, place));
    return PyList_Check(matrices) ? PyList_GET_ITEM(matrices, place) : PyTuple_GET_ITEM(matrices, place);
}

Py_ssize_t matrices_given(PyObject *matrices, PyObject *names) {
    if (PyDict_Check(matrices)) return PyTuple_GET_SIZE(names);
    return PyList_Check(matrices) ? PyList_GET_SIZE(matrices) : PyTuple_GET_SIZE(matrices);
}

// The numbers of a program: bytes, which nothing moves or changes, or the tensor of a compiled graph. Null and an
// exception set where it is neither.
const std::int64_t *program_at(PyObject *code) {
    if (PyBytes_Check(code)) return reinterpret_cast<const std::int64_t *>(PyBytes_AS_STRING(code));
    const Owned address(PyObject_CallMethodNoArgs(code, torch.data_ptr));
    if (!address) return nullptr;
    const auto place = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(address.get()));
    return PyErr_Occurred() == nullptr ? at<const std::int64_t>(place) : nullptr;
}

// block_sequence_apply(x, bias, matrices, names, code): the whole eager call, from the guard to the result, as one
// function; None where the arrays are not what the program reads. Threads are asked for where they are worth it only:
// the question costs as much as many a step.
PyObject *block_sequence_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    if (wrong_count(count, 5, "x, bias, matrices, names, code")) return nullptr;
    PyObject *matrices = given[2], *names = given[3];
    if (!PyTuple_Check(names) || !(PyDict_Check(matrices) || PyList_Check(matrices) || PyTuple_Check(matrices))) {
        PyErr_SetString(PyExc_TypeError, "expected matrices in a list, tuple or dict, and names in a tuple");
        return nullptr;
    }
    const std::int64_t *code = program_at(given[4]);
    if (code == nullptr) return nullptr;
    const std::int64_t inputs = code[weft::program::inputs], outputs = code[weft::program::outputs];
    const std::int64_t *sizes = code + code[weft::program::sizes];
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating);
    const std::uintptr_t bias = arguments.optional(given[1], outputs, x.half);
    const void *addresses[most_matrices] = {};
    Held held;  // another thread may exchange what a dictionary keeps while the product runs
    const Py_ssize_t matrix_count = matrices_given(matrices, names);
    arguments.require(matrix_count == code[weft::program::matrices] && matrix_count <= most_matrices);
    for (Py_ssize_t i = 0; i < matrix_count; ++i) {
        if (!arguments.serve()) return arguments.declined();
        PyObject *found = matrix_at(matrices, names, i);
        if (found == nullptr && PyErr_Occurred() != nullptr) return nullptr;
        arguments.require(found != nullptr);  // a parametrisation computes it
        if (!arguments.serve()) return arguments.declined();
        held.hold(found);
        const Plain matrix = arguments.tensor(found, Numbers::floating);
        arguments.require(matrix.count() == sizes[i] && matrix.half == x.half);
        addresses[i] = at<const void>(matrix.data);
    }
    arguments.require(x.axes >= 1 && x.axes <= most_axes && x.last() == inputs);
    if (!arguments.serve()) return arguments.declined();
    std::int64_t threads = 1;
    if (code[weft::program::multiply_adds] * x.batch() >= 2 * weft::worth_a_thread) {
        const Owned asked(PyObject_CallNoArgs(torch.get_num_threads));
        if (!asked) return nullptr;
        threads = PyLong_AsLongLong(asked.get());
        if (PyErr_Occurred() != nullptr) return nullptr;
    }
    const auto apply = [&](auto weights, const float *vectors, const float *added, float *out) {
        using Weight = decltype(weights);
        const Weight *weights_at[most_matrices] = {};
        for (Py_ssize_t i = 0; i < matrix_count; ++i) weights_at[i] = static_cast<const Weight *>(addresses[i]);
        weft::block_sequence_apply(weft::BlockSequenceOf<Weight>{code, weights_at, vectors, added, out, x.batch()},
                                   static_cast<int>(threads));
    };
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        if (x.half) apply(weft::Bfloat16(), vectors, added, out);
        else apply(0.0f, vectors, added, out);
    });
}

// sparse_chain_apply(x, values, bias, table, count, entries, inputs, outputs, threads). `table`: the address of five
// numbers per matrix: rows, columns, the addresses of its column indices and row starts, and whether the indices
// have 16 bits. weft.kernels.sparse keeps it alive and in order.
PyObject *sparse_chain_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    std::int64_t numbers[5];
    if (wrong_count(count, 9, "x, values, bias, table, count, entries, inputs, outputs, threads") ||
        !whole_numbers(given + 4, numbers))
        return nullptr;
    const auto [matrices, entries, inputs, outputs, threads] = numbers;
    const auto table = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(given[3]));
    if (PyErr_Occurred() != nullptr) return nullptr;
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating), values = arguments.tensor(given[1], Numbers::floating);
    const std::uintptr_t bias = arguments.optional(given[2], outputs, x.half);
    if (!arguments.serve()) return arguments.declined();
    arguments.require(x.axes >= 1 && x.last() == inputs && values.count() == entries && values.half == x.half);
    if (!arguments.serve()) return arguments.declined();
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        std::vector<weft::SparseSupport> supports;
        const auto *row = at<const std::int64_t>(table);
        for (std::int64_t i = 0; i < matrices; ++i, row += 5)
            supports.push_back({row[0], row[1], at<const void>(static_cast<std::uintptr_t>(row[2])),
                                at<const std::int64_t>(static_cast<std::uintptr_t>(row[3])), row[4] != 0});
        weft::sparse_chain_apply({vectors, as_floats(values, first_piece), supports.data(), matrices, added, out,
                                  x.batch()},
                                 static_cast<int>(threads));
    });
}

// Rows of packed codes that are what the sizes say, else zero of them.
std::int64_t rows_of_codes(Arguments &arguments, const Plain &codes, std::int64_t bits, std::int64_t inputs) {
    arguments.require(bits >= 1 && bits <= 8 && inputs >= 1 && codes.axes == 2 &&
                      codes.shape[1] == inputs / 8 * bits + (inputs % 8 * bits + 7) / 8);
    return arguments.serve() ? codes.shape[0] : 0;
}

// quantized_apply(x, codes, scales, zeros, bias, bits, group, inputs, int8, threads)
PyObject *quantized_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    std::int64_t numbers[5];
    if (wrong_count(count, 10, "x, codes, scales, zeros, bias, bits, group, inputs, int8, threads") ||
        !whole_numbers(given + 5, numbers))
        return nullptr;
    const auto [bits, group, inputs, int8, threads] = numbers;
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating), codes = arguments.tensor(given[1], Numbers::uint8);
    const Plain scales = arguments.tensor(given[2], Numbers::floating);
    const std::int64_t outputs = rows_of_codes(arguments, codes, bits, inputs);
    const std::uintptr_t bias = arguments.optional(given[4], outputs, x.half);
    arguments.require(group >= 1 && group <= inputs && inputs % group == 0);
    if (!arguments.serve()) return arguments.declined();
    arguments.require(x.axes >= 1 && x.last() == inputs && scales.has_shape(outputs, inputs / group) &&
                      scales.half == x.half);
    Plain zeros;
    if (given[3] != Py_None) {
        zeros = arguments.tensor(given[3], Numbers::floating);
        if (!arguments.serve()) return arguments.declined();
        arguments.require(zeros.has_shape(outputs, inputs / group) && zeros.half == x.half);
    }
    if (!arguments.serve()) return arguments.declined();
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        const weft::QuantizedProduct product = {
            {at<const std::uint8_t>(codes.data), as_floats(scales, first_piece), as_floats(zeros, second_piece),
             nullptr, 0, inputs, outputs, group, static_cast<int>(bits)},
            vectors, added, out, x.batch()};
        if (int8 != 0) weft::quantized_int8(product, static_cast<int>(threads));
        else weft::quantized_float(product, static_cast<int>(threads));
    });
}

// codebook_apply(x, codes, codebook, bias, bits, inputs, threads)
PyObject *codebook_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    std::int64_t numbers[3];
    if (wrong_count(count, 7, "x, codes, codebook, bias, bits, inputs, threads") || !whole_numbers(given + 4, numbers))
        return nullptr;
    const auto [bits, inputs, threads] = numbers;
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating), codes = arguments.tensor(given[1], Numbers::uint8);
    const Plain book = arguments.tensor(given[2], Numbers::floating);
    const std::int64_t outputs = rows_of_codes(arguments, codes, bits, inputs);
    const std::uintptr_t bias = arguments.optional(given[3], outputs, x.half);
    if (!arguments.serve()) return arguments.declined();
    const std::int64_t values = std::int64_t{1} << bits;
    arguments.require(x.axes >= 1 && x.last() == inputs && book.half == x.half &&
                      (book.has_shape(1, values) || book.has_shape(outputs, values)));
    if (!arguments.serve()) return arguments.declined();
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        weft::quantized_float({{at<const std::uint8_t>(codes.data), nullptr, nullptr, as_floats(book, first_piece),
                                book.shape[0] == 1 ? 0 : values, inputs, outputs, inputs, static_cast<int>(bits)},
                               vectors, added, out, x.batch()},
                              static_cast<int>(threads));
    });
}

// codewords_apply(x, codes, words, scales, bias, subspaces, threads)
PyObject *codewords_apply(PyObject *, PyObject *const *given, Py_ssize_t count) {
    std::int64_t numbers[2];
    if (wrong_count(count, 7, "x, codes, words, scales, bias, subspaces, threads") ||
        !whole_numbers(given + 5, numbers))
        return nullptr;
    const auto [subspaces, threads] = numbers;
    Arguments arguments;
    const Plain x = arguments.tensor(given[0], Numbers::floating), codes = arguments.tensor(given[1], Numbers::uint8);
    const Plain words = arguments.tensor(given[2], Numbers::floating);
    arguments.require(subspaces >= 1);
    if (!arguments.serve()) return arguments.declined();
    arguments.require(codes.axes == 2 && words.axes == 3 && words.half == x.half);
    if (!arguments.serve()) return arguments.declined();
    const std::int64_t outputs = codes.shape[0], books = words.shape[0], width = words.shape[1];
    const std::int64_t codewords = words.shape[2];
    const std::uintptr_t scales = arguments.optional(given[3], outputs, x.half);
    const std::uintptr_t bias = arguments.optional(given[4], outputs, x.half);
    arguments.require(books >= 1 && books <= subspaces && codewords >= 1 && codewords <= weft::table_entries &&
                      codes.shape[1] == (codewords <= 16 ? (subspaces + 1) / 2 : subspaces));
    arguments.require(x.axes >= 1 && x.last() == subspaces * width);
    if (!arguments.serve()) return arguments.declined();
    return run_in_floats(x, bias, outputs, [&](const float *vectors, const float *added, float *out) {
        const weft::CodewordMatrix matrix = {
            at<const std::uint8_t>(codes.data), as_floats(words, first_piece),
            as_floats(scales, outputs, x.half, second_piece), outputs, subspaces, books, codewords, width};
        weft::codewords_apply({matrix, vectors, added, out, x.batch()}, static_cast<int>(threads));
    });
}

PyObject *functions;  // this module's, by name

// What an instance of nn.Module keeps itself, at a fraction of what attributes of such a class cost. Borrowed; null
// where there is none, or with an exception set.
class Kept {
public:
    explicit Kept(PyObject *module) : own_(module == nullptr ? nullptr : PyObject_GenericGetDict(module, nullptr)) {
        parameters_ = in(own_.get(), torch.parameters);
        buffers_ = in(own_.get(), torch.buffers);
    }
    PyObject *attribute(PyObject *name) const { return in(own_.get(), name); }
    PyObject *module(PyObject *name) const { return in(attribute(torch.modules), name); }
    PyObject *first_parameter() const {
        PyObject *name = nullptr, *first = nullptr;
        Py_ssize_t place = 0;
        if (parameters_ == nullptr || !PyDict_Check(parameters_)) return nullptr;
        return PyDict_Next(parameters_, &place, &name, &first) ? first : nullptr;
    }
    // What a parametrisation computes is in none of them.
    PyObject *kept(PyObject *name) const {
        for (PyObject *place : {parameters_, buffers_, own_.get()})
            if (PyObject *found = in(place, name)) return found;
        return nullptr;
    }

private:
    static PyObject *in(PyObject *place, PyObject *name) {
        return place != nullptr && PyDict_Check(place) ? PyDict_GetItemWithError(place, name) : nullptr;
    }
    Owned own_;
    PyObject *parameters_, *buffers_;
};

template <std::size_t size>
bool is_word(PyObject *text, const char (&word)[size]) {
    return PyUnicode_GET_LENGTH(text) == size - 1 && PyUnicode_IS_ASCII(text) &&
           std::memcmp(PyUnicode_DATA(text), word, size - 1) == 0;
}

constexpr Py_ssize_t most_arguments = 12;  // x and the name of the function included

// apply_layer(layer, x): what weft.layers.linear computes, by the matrix's `native_call`: a function of this module
// and its arguments after x, where a name stands for what the matrix keeps under it, "bias" for the layer's and
// "threads" for their number. None where the matrix has no such call or something stands between it and its tensors.
PyObject *apply_layer(PyObject *, PyObject *const *given, Py_ssize_t count) {
    if (wrong_count(count, 2, "layer, x")) return nullptr;
    const Kept layer(given[0]);
    const Kept matrix(layer.module(torch.matrix));
    PyObject *call = matrix.attribute(torch.native_call);
    if (call == nullptr || call == Py_None) {
        if (PyErr_Occurred() != nullptr) return nullptr;
        Py_RETURN_NONE;
    }
    if (!PyTuple_Check(call) || PyTuple_GET_SIZE(call) < 1 || PyTuple_GET_SIZE(call) > most_arguments) {
        PyErr_SetString(PyExc_TypeError, "expected native_call to be a function's name and its arguments after x");
        return nullptr;
    }
    PyObject *function = PyDict_GetItemWithError(functions, PyTuple_GET_ITEM(call, 0));
    if (function == nullptr) {
        if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, PyTuple_GET_ITEM(call, 0));
        return nullptr;
    }
    // In training the function would decline only after many questions, which a small layer feels.
    const int recording = is(PyObject_CallNoArgs(torch.is_grad_enabled), Py_True);
    if (recording < 0) return nullptr;
    if (PyObject *first = matrix.first_parameter(); recording == 1 && first != nullptr && first != Py_None) {
        const int needed = is(PyObject_GetAttr(first, torch.requires_grad), Py_True);
        if (needed < 0) return nullptr;
        if (needed == 1) Py_RETURN_NONE;
    }
    // Held: while the product runs, another thread may exchange what the modules keep.
    PyObject *arguments[most_arguments] = {Py_NewRef(given[1])};
    Py_ssize_t taken = 1;
    bool found = true;
    for (; found && taken < PyTuple_GET_SIZE(call); ++taken) {
        PyObject *argument = PyTuple_GET_ITEM(call, taken);
        if (!PyUnicode_Check(argument)) arguments[taken] = Py_NewRef(argument);
        else if (is_word(argument, "threads")) arguments[taken] = PyObject_CallNoArgs(torch.get_num_threads);
        else arguments[taken] = Py_XNewRef((is_word(argument, "bias") ? layer : matrix).kept(argument));
        found = arguments[taken] != nullptr;
    }
    PyObject *result = found ? PyObject_Vectorcall(function, arguments, static_cast<std::size_t>(taken), nullptr)
                       : PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_None);
    for (Py_ssize_t i = 0; i < taken; ++i) Py_XDECREF(arguments[i]);
    return result;
}

// Bound without nanobind, whose variable arguments would become a tuple on every call.
template <PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)>
PyMethodDef fast(const char *name, const char *description) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, description};
}

PyMethodDef fast_functions[] = {
    fast<takes_raw_pointers>("takes_raw_pointers", "The guard of weft.kernels.dispatch, in one call."),
    fast<low_rank_apply>("low_rank_apply",
                         "(x, left, right, bias, threads) to (x rightᵀ) leftᵀ + bias; this and the "
                         "following check all tensors and sizes, and give None where the call is not theirs."),
    fast<block_sequence_apply>("block_sequence_apply",
                               "(x, bias, matrices, names, code) to the program's product."),
    fast<sparse_chain_apply>("sparse_chain_apply",
                             "(x, values, bias, table, count, entries, inputs, outputs, threads) to "
                             "x (S_1 ... S_count)ᵀ + bias."),
    fast<quantized_apply>("quantized_apply",
                          "(x, codes, scales, zeros, bias, bits, group, inputs, int8, threads) to "
                          "x Ŵᵀ + bias for uniform codes; with vectors rounded to whole numbers where int8."),
    fast<codebook_apply>("codebook_apply",
                         "(x, codes, codebook, bias, bits, inputs, threads) to the same for codes of a "
                         "codebook."),
    fast<codewords_apply>("codewords_apply",
                          "(x, codes, words, scales, bias, subspaces, threads) to x Ŵᵀ + bias for rows "
                          "put together from codewords."),
    fast<apply_layer>("apply_layer", "(layer, x) to the layer's result by its matrix's native_call, or None."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

NB_MODULE(_native, module) {
    PyModule_AddFunctions(module.ptr(), fast_functions);
    functions = PyModule_GetDict(module.ptr());
    module.def("know_torch", &know_torch, "Takes what the guard asks torch for.");
    module.attr("interface") = interface;
    module.def("instructions", &weft::instructions_name, "Name of the instruction set in use.");
    module.def("use_instructions", &weft::use_instructions,
               "Uses the leaf kernels' copy of this name from now on; False where build or processor lack it.");
}
