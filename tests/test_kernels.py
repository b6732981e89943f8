"""The primitives: native against reference, in eager, differentiated, compiled, exported, concurrent use."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from weft import kernels
from weft.kernels import dispatch, low_rank
from weft.structures.hierarchical import Hierarchical

needs_native = pytest.mark.skipif(dispatch.native is None, reason="this process runs the reference")

# One, primes, around the register widths 4, 8 and 16, and layers that are long in one direction.
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 64, 97, 257, 1031])
BATCHES = st.sampled_from([
    (),
    (1,),
    (2,),
    (3,),
    (5,),
    (7,),
    (16,),
    (17,),
    (129,),
    (2, 3),
    (0,),
    (4, 0),
    (1, 1, 5),
])


INSTRUCTIONS = ["portable", "NEON", "AVX2", "AVX-512"]


@contextmanager
def instructions(name):
    """Runs another copy of the leaf kernels; skips the test where build or processor lack it."""
    before = dispatch.native.instructions()
    if not dispatch.native.use_instructions(name):
        pytest.skip(f"{name} instructions are not to be had here")
    try:
        yield
    finally:
        dispatch.native.use_instructions(before)


def factors(batch, outputs, inputs, rank, *, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*batch, inputs), draw(outputs, rank), draw(rank, inputs), draw(outputs) if bias else None


def dense_product(x, left, right, bias):
    """In float64 with the dense matrix formed, which no route under test does."""
    y = x.double() @ (left.double() @ right.double()).T
    return y if bias is None else y + bias.double()


def assert_close_to_dense(y, x, left, right, bias, relative=1e-5):
    expected = dense_product(x, left, right, bias)
    assert y.shape == expected.shape
    # Rounding grows with the sum of absolute values, not with a result that may cancel.
    scale = dense_product(x.abs(), left.abs(), right.abs(), None if bias is None else bias.abs())
    assert ((y.double() - expected).abs() <= relative * scale).all()


@needs_native
@settings(deadline=None, max_examples=150)
@given(batch=BATCHES, outputs=SIZES, inputs=SIZES, rank=SIZES, bias=st.booleans(), threads=st.integers(1, 3))
def test_native_product_equals_the_dense_product(batch, outputs, inputs, rank, bias, threads):
    x, left, right, bias = factors(batch, outputs, inputs, rank, bias=bias)
    # The primitive itself, past the rule that hands large batches to the vendor's product.
    y = dispatch.native.low_rank_apply(x, left, right, bias, threads)
    if x.numel() == 0:
        assert y is None
        return
    assert_close_to_dense(y, x, left, right, bias)


@needs_native
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_copy_of_the_kernels_is_right(name):
    with instructions(name):
        assert dispatch.native.instructions() == name
        for sizes in [(1, 1, 1), (13, 7, 3), (97, 257, 17), (64, 64, 64), (5, 1031, 9)]:
            for batch in [(1,), (3,), (16,)]:
                arguments = factors(batch, *sizes)
                assert_close_to_dense(kernels.low_rank_apply(*arguments), *arguments)


@needs_native
def test_unknown_instructions_change_nothing():
    before = dispatch.native.instructions()
    assert not dispatch.native.use_instructions("MMX")
    assert dispatch.native.instructions() == before


@needs_native
def test_native_product_writes_nothing_outside_its_output(results_go_to):
    x, left, right, bias = factors((5,), 13, 17, 3)
    memory = torch.full((5 * 13 + 2 * 64,), 7.0)
    results_go_to(memory[64:-64].view(5, 13))
    assert dispatch.native.low_rank_apply(x, left, right, bias, 2) is not None
    assert (memory[64:-64] != 7).all()
    assert (memory[:64] == 7).all()
    assert (memory[-64:] == 7).all()


@settings(deadline=None, max_examples=60)
@given(batch=BATCHES, outputs=SIZES, inputs=SIZES, rank=SIZES, bias=st.booleans())
def test_public_function_equals_the_dense_product(batch, outputs, inputs, rank, bias):
    arguments = factors(batch, outputs, inputs, rank, bias=bias)
    assert_close_to_dense(kernels.low_rank_apply(*arguments), *arguments)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-13), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_other_dtypes(dtype, relative):
    arguments = factors((3,), 5, 7, 2, dtype=dtype)
    native = dispatch.native is not None and dtype == torch.bfloat16
    assert dispatch.takes_raw_pointers(*arguments) == native
    y = kernels.low_rank_apply(*arguments)
    assert y.dtype == dtype
    assert_close_to_dense(y, *arguments, relative=relative)


def test_strided_arguments_give_the_same_product():
    x, left, right, bias = factors((6,), 5, 7, 3)
    strided = (
        x.T.contiguous().T,
        left.T.contiguous().T,
        right.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_close_to_dense(kernels.low_rank_apply(*strided), x, left, right, bias)


def test_lazily_negated_input_keeps_its_sign():
    x, left, right, bias = factors((1,), 5, 1, 3)
    negated = torch.view_as_complex(torch.cat([torch.zeros(1, 1), x], dim=-1)).conj().imag.reshape(1, 1)
    assert negated.is_neg()
    assert negated.is_contiguous()
    assert_close_to_dense(kernels.low_rank_apply(negated, left, right, bias), -x, left, right, bias)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(4, 6)},
        {"x": torch.tensor(1.0)},
        {"left": torch.zeros(5, 4)},
        {"left": torch.zeros(5)},
        {"right": torch.zeros(3, 8)},
        {"right": torch.zeros(21)},
        {"bias": torch.zeros(4)},
        {"bias": torch.zeros(0)},
    ],
    ids=lambda wrong: "-".join(f"{name}{tuple(value.shape)}" for name, value in wrong.items()),
)
def test_shapes_that_do_not_fit_raise(wrong):
    x, left, right, bias = factors((4,), 5, 7, 3)
    with pytest.raises((RuntimeError, ValueError)):
        kernels.low_rank_apply(**{"x": x, "left": left, "right": right, "bias": bias, **wrong})


def with_gradients(arguments):
    return [None if tensor is None else tensor.clone().requires_grad_() for tensor in arguments]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "route", [low_rank.reference, kernels.low_rank_apply], ids=["reference", "operation"]
)
def test_gradients_equal_finite_differences(route, bias):
    arguments = with_gradients(factors((2, 3), 5, 4, 2, bias=bias, dtype=torch.float64))
    assert torch.autograd.gradcheck(route, arguments)
    assert torch.autograd.gradgradcheck(route, arguments)


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (40,), (0,)])
def test_operation_has_the_gradients_of_the_reference(batch, wanted):
    arguments = factors(batch, 11, 7, 3)
    ours, theirs = [[t.clone() for t in arguments] for _ in range(2)]
    ours[wanted].requires_grad_()
    theirs[wanted].requires_grad_()
    y = torch.ops.weft.low_rank_apply(*ours)
    expected = low_rank.reference(*theirs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(y, expected)
    y.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours[wanted].grad, theirs[wanted].grad)


def test_operation_obeys_the_dispatchers_rules():
    for batch in [(3,), (2, 3), (0,), ()]:
        for bias in (True, False):
            arguments = with_gradients(factors(batch, 5, 7, 2, bias=bias))
            torch.library.opcheck(torch.ops.weft.low_rank_apply.default, tuple(arguments))


def test_transforms_and_autocast_inside_a_compiled_graph():
    x, left, right, bias = factors((4,), 5, 7, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def mapped(rows):
        return torch.func.vmap(kernels.low_rank_apply, in_dims=(0, None, None, None))(rows, left, right, bias)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def cast(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kernels.low_rank_apply(rows, left, right, bias)

    assert_close_to_dense(mapped(x), x, left, right, bias)
    assert cast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("recording", [True, False])
def test_compiles_into_one_graph_that_holds_the_operation(recording):
    arguments = factors((3,), 5, 7, 2)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.set_grad_enabled(recording):
        torch.compile(kernels.low_rank_apply, fullgraph=True, backend=backend)(*arguments)
        y = torch.compile(kernels.low_rank_apply, fullgraph=True, backend="aot_eager")(*arguments)
    assert "torch.ops.weft.low_rank_apply" in graphs[0].code
    assert_close_to_dense(y, *arguments)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, left, right, bias = factors((), 5, 7, 2)
        self.left, self.right, self.bias = map(torch.nn.Parameter, (left, right, bias))

    def forward(self, x):
        return kernels.low_rank_apply(x, self.left, self.right, self.bias)


def test_compiled_backward_equals_the_eager_one():
    layer = Layer()
    x = factors((3,), 5, 7, 2)[0]
    functional.mse_loss(
        low_rank.reference(x, layer.left, layer.right, layer.bias), torch.zeros(3, 5)
    ).backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    functional.mse_loss(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x), torch.zeros(3, 5)
    ).backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_needs_no_operation_of_ours(strict):
    layer, x = Layer(), factors((3,), 5, 7, 2)[0]
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not [node for node in program.graph.nodes if "weft" in str(node.target)]
    larger = factors((9,), 5, 7, 2)[0]
    assert_close_to_dense(program.module()(larger), larger, layer.left, layer.right, layer.bias)


def test_traced_module_needs_no_operation_of_ours():
    layer, x = Layer(), factors((3,), 5, 7, 2)[0]
    traced = torch.jit.trace(layer.requires_grad_(False), x)
    assert "weft::" not in str(traced.graph)
    assert_close_to_dense(traced(x), x, layer.left, layer.right, layer.bias)


def test_function_transforms_see_pytorchs_own_operations():
    x, left, right, bias = factors((4,), 5, 7, 2)
    y = torch.func.vmap(kernels.low_rank_apply, in_dims=(0, None, None, None))(x, left, right, bias)
    assert_close_to_dense(y, x, left, right, bias)
    jacobian = torch.func.jacrev(kernels.low_rank_apply)(x[0], left, right, bias)
    torch.testing.assert_close(jacobian, left @ right)
    tangent = torch.func.jvp(lambda v: kernels.low_rank_apply(v, left, right, bias), (x,), (x,))[1]
    assert_close_to_dense(tangent, x, left, right, None)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        y = kernels.low_rank_apply(dual, left, right, bias)
        assert_close_to_dense(torch.autograd.forward_ad.unpack_dual(y).tangent, x, left, right, None)


def test_autocast_gives_the_dtype_that_a_dense_layer_gives():
    x, left, right, bias = factors((3,), 5, 7, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.low_rank_apply(x, left, right, bias).dtype == functional.linear(x, right).dtype


def test_modes_and_subclasses_keep_their_say():
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Recorder.seen += 1
            return func(*args, **(kwargs or {}))

    class Tagged(torch.Tensor):
        pass

    x, left, right, bias = factors((3,), 5, 7, 2)
    with Recorder():
        kernels.low_rank_apply(x, left, right, bias)
    assert Recorder.seen > 0
    assert type(kernels.low_rank_apply(x.as_subclass(Tagged), left, right, bias)) is Tagged
    with torch.device("meta"):
        assert kernels.low_rank_apply(x.to("meta"), left.to("meta"), right.to("meta")).device.type == "meta"


def test_default_dtype_does_not_change_the_result():
    arguments = factors((3,), 5, 7, 2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        y = kernels.low_rank_apply(*arguments)
    finally:
        torch.set_default_dtype(before)
    assert y.dtype == torch.float32
    assert_close_to_dense(y, *arguments)


@needs_native
def test_guard_admits_plain_inference_only():
    x, left, right, bias = factors((3,), 5, 7, 2)
    weight = torch.nn.Parameter(left)
    assert dispatch.takes_raw_pointers(x, left, right, bias)
    assert dispatch.takes_raw_pointers(x, left, right, None)
    assert not dispatch.takes_raw_pointers(x, weight, right, bias)
    with torch.no_grad():
        assert dispatch.takes_raw_pointers(x, weight, right, bias)
    with torch.inference_mode():
        assert dispatch.takes_raw_pointers(x, weight, right, bias)


@needs_native
def test_guard_without_the_exchange_of_descriptions_says_the_same():
    """Older versions of torch are asked for one attribute after the other."""
    x, left, right, bias = factors((3,), 5, 7, 2)
    tensors = [
        x,
        torch.nn.Parameter(left),
        x.T,
        x.double(),
        x.to("meta"),
        x.as_subclass(type("Tagged", (torch.Tensor,), {})),
        torch.zeros(0, 3).T,
        torch.tensor(1.0),
        torch.zeros(4, 1)[::2],
        x.to_sparse(),
    ]

    def answers():
        with torch.no_grad():
            admitted = [dispatch.takes_raw_pointers(tensor) for tensor in tensors]
            return admitted, kernels.low_rank_apply(x, left, right, bias)

    by_exchange, expected = answers()
    dispatch._introduce_torch(by_exchange=False)
    try:
        by_attributes, y = answers()
    finally:
        dispatch._introduce_torch()
    assert by_exchange == by_attributes
    assert by_exchange == [True, True, False, False, False, False, True, True, False, False]
    assert torch.equal(y, expected)


@needs_native
@pytest.mark.parametrize("empty_strided", [dispatch._empty_strided, dispatch._by_dispatcher])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0, 3)])
def test_a_native_result_is_a_tensor_like_any_other(batch, empty_strided):
    """That it is made past the dispatcher shows in no stride, mode or version."""
    matrix = Hierarchical(rank=1, leaf_size=2).initialise((5, 7)).requires_grad_(False)
    x = torch.randn(*batch, 7)
    usual = functional.linear(x, matrix.to_dense())
    dispatch._introduce_torch(empty_strided=empty_strided)
    try:
        assert dispatch.takes_raw_pointers(x, *matrix.parameters())
        y = matrix(x)
        with torch.inference_mode():
            assert matrix(x).is_inference()
    finally:
        dispatch._introduce_torch()
    assert type(y) is torch.Tensor
    assert (y.shape, y.stride(), y.dtype, y.device) == (
        usual.shape,
        usual.stride(),
        usual.dtype,
        usual.device,
    )
    assert not y.is_inference()
    assert not y.requires_grad
    assert y.is_leaf
    assert y.untyped_storage().nbytes() == usual.untyped_storage().nbytes()
    assert y._version == 0
    assert y.add_(1.0)._version == 1
    assert y.resize_(50, 40).untyped_storage().nbytes() == 8000
    assert y.requires_grad_().sum().backward() is None
    assert y.grad is not None


def test_eight_threads_at_once_get_their_own_results():
    cases = [factors((1 + seed % 5,), 300, 257, 31, seed=seed) for seed in range(8)]

    def work(arguments):
        return [kernels.low_rank_apply(*arguments) for _ in range(200)]

    with ThreadPoolExecutor(8) as executor:
        for arguments, results in zip(cases, executor.map(work, cases), strict=True):
            expected = kernels.low_rank_apply(*arguments)
            assert_close_to_dense(expected, *arguments)
            assert all(torch.equal(result, expected) for result in results)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_starts_threads_of_its_own():
    program = """
import os, torch
from weft import kernels
torch.set_num_threads(2)
x, left, right = torch.ones(1, 1024), torch.ones(1024, 256), torch.ones(256, 1024)
expected = kernels.low_rank_apply(x, left, right)
child = os.fork()
if child == 0:
    same = torch.equal(kernels.low_rank_apply(x, left, right), expected)
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def run_in_new_process(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_environment_variable_forces_the_reference_silently():
    program = "from weft import kernels; print(kernels.route())"
    result = run_in_new_process(program, WEFT_KERNELS="reference")
    assert result.stdout.strip() == "reference (WEFT_KERNELS=reference)"
    assert not result.stderr


def test_unknown_route_is_refused_by_name():
    result = run_in_new_process("from weft import kernels", WEFT_KERNELS="fast")
    assert result.returncode == 1
    assert "WEFT_KERNELS must be 'native' or 'reference', got 'fast'" in result.stderr


def test_a_native_library_of_another_version_is_not_used():
    program = """
import importlib, sys, types
module = types.ModuleType("weft.kernels._native")
module.interface = 1
module.instructions = lambda: "AVX2"
sys.modules["weft.kernels._native"] = module
from weft import kernels
print(kernels.route())
"""
    result = run_in_new_process(program, WEFT_KERNELS="native")
    assert result.stdout.strip() == "reference (native kernels are of another version)"
    assert len(result.stderr.strip().splitlines()) == 1
    assert "native kernels are from another version of weft" in result.stderr


def test_missing_native_library_is_said_in_one_line_and_nothing_else_changes():
    program = """
import sys
sys.modules["weft.kernels._native"] = None  # what an install without a compiler amounts to
import torch
from weft import kernels
import weft.kernels.low_rank
print(kernels.route())
print(kernels.low_rank_apply(torch.ones(2, 3), torch.ones(4, 2), torch.ones(2, 3)).sum().item())
"""
    result = run_in_new_process(program, WEFT_KERNELS="native")
    assert result.stdout.split("\n")[:2] == ["reference (native kernels are not installed)", "48.0"]
    assert len(result.stderr.strip().split("\n")) == 1
    assert "native kernels are missing" in result.stderr
