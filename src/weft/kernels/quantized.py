"""Matrices of few bits per weight, applied to a batch of vectors without forming them: y = x Ŵᵀ + b.

Storage: `codes` is a uint8 tensor (outputs, ⌈inputs · bits / 8⌉). Each row is a little-endian stream of bits:
code j takes the bits j·bits … (j+1)·bits − 1, the least significant first (of 4-bit codes the even input is
the low half of its byte), and the row's last byte is filled up with zeros.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from weft import checks
from weft.kernels import dispatch

__all__ = [
    "codebook_apply",
    "dequantize",
    "look_up",
    "pack",
    "quantize_activations",
    "quantized_apply",
    "row_bytes",
    "unpack",
]

Activations = Literal["float", "int8"]
_INT8 = {"float": False, "int8": True}

# Bound once, as looking names up costs more than calling them.
_native_quantized: Any = None if dispatch.native is None else dispatch.native.quantized_apply
_native_codebook: Any = None if dispatch.native is None else dispatch.native.codebook_apply
_get_num_threads = torch.get_num_threads
_is_compiling = torch.compiler.is_compiling

# Vectors whose largest entry is below this are rounded as if it were this: its inverse stays finite.
_SMALLEST_ACTIVATION = 1e-30


# ------------------------------------------------------------------------------------------------------------
# Storage


def row_bytes(inputs: int, bits: int) -> int:
    """The bytes that one row of codes takes.

    Args:
        inputs: codes per row.
        bits: bits per code.

    Returns:
        ⌈inputs · bits / 8⌉.

    Examples:
        >>> row_bytes(1280, 4), row_bytes(7, 3)
        (640, 3)
    """
    return (inputs * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into the bytes that are stored.

    Args:
        codes: whole numbers from 0 to 2^bits − 1, shape (outputs, inputs), any integer dtype.
        bits: bits per code, 1 to 8.

    Returns:
        The bytes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).

    Raises:
        ValueError: a code does not fit, or the tensor is no matrix.

    Examples:
        >>> pack(torch.tensor([[1, 2, 3]]), 4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    checks.integer_between("bits", bits, 1, 8)
    if codes.ndim != 2:
        raise ValueError(
            checks.fault("codes", "of shape (outputs, inputs)", tuple(codes.shape), "reshape to a matrix")
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        got = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(checks.fault("codes", f"from 0 to {(1 << bits) - 1}", got, "clamp or use more bits"))
    outputs, inputs = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.to(torch.uint8)[..., None] >> shifts) & 1).reshape(outputs, inputs * bits)
    stream = functional.pad(stream, (0, 8 * row_bytes(inputs, bits) - inputs * bits))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (stream.reshape(outputs, -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack(codes: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes of the stored bytes, one per entry.

    Args:
        codes: the bytes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).
        bits: bits per code, 1 to 8.
        inputs: codes per row.

    Returns:
        Whole numbers from 0 to 2^bits − 1, uint8, shape (outputs, inputs).

    Examples:
        >>> unpack(pack(torch.tensor([[1, 2, 3]]), 4), 4, 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    checks.integer_between("bits", bits, 1, 8)
    checks.integer_between("inputs", inputs, 1, None)
    _check_codes(codes, bits, inputs)
    return _unpack(codes, bits, inputs)


def _unpack(codes: Tensor, bits: int, inputs: int) -> Tensor:
    if bits == 8:
        return codes
    if dispatch.needs_plain_operations():
        return _unpack_by_arithmetic(codes, bits, inputs)
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        return ((codes[..., None] >> shifts) & mask).flatten(-2)[..., :inputs]
    # Eight codes fill `bits` bytes. Code i of them begins in byte ⌊i·bits / 8⌋ and ends in that or the next.
    whole = functional.pad(codes, (0, -codes.shape[-1] % bits)).unflatten(-1, (-1, bits))
    parts = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        part = whole[..., byte] >> shift
        if shift + bits > 8:
            part = part | (whole[..., byte + 1] << (8 - shift))
        parts.append(part & mask)
    return torch.stack(parts, -1).flatten(-2)[..., :inputs]


def _unpack_by_arithmetic(codes: Tensor, bits: int, inputs: int) -> Tensor:
    """The same as floats, without shifts and masks, which ONNX knows for some types of integers only."""
    period = 1 if 8 % bits == 0 else bits  # bytes that hold whole codes
    whole = functional.pad(codes.float(), (0, -codes.shape[-1] % period)).unflatten(-1, (-1, period))
    whole = functional.pad(whole, (0, 1))
    parts = []
    for i in range(8 * period // bits):
        byte, shift = divmod(i * bits, 8)
        two_bytes = whole[..., byte] + 256 * whole[..., byte + 1]
        part = torch.floor(two_bytes * 2.0**-shift)
        parts.append(part - 2.0**bits * torch.floor(part * 2.0**-bits))
    return torch.stack(parts, -1).flatten(-2)[..., :inputs]


# ------------------------------------------------------------------------------------------------------------
# Uniform levels


def quantized_apply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    inputs: int,
    bias: Tensor | None = None,
    activations: Activations = "float",
) -> Tensor:
    """Apply a matrix of uniformly quantised weights to a batch of vectors: y = x Ŵᵀ + b.

    Entry (o, j) of Ŵ is scales[o, j // group] · (code[o, j] − zero), where zero is zeros[o, j // group], or
    2^(bits − 1) without `zeros`.

    With `activations="int8"` every vector is first rounded to 255 levels of its own, q = round(127x / max|x|)
    with halves to the even number: y is that of x̂ = q · max|x| / 127. The gradient to x passes the rounding
    unchanged.

    Args:
        x: The vectors, shape (*batch, inputs).
        codes: The packed codes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).
        scales: The widths of the levels, shape (outputs, inputs / group).
        zeros: The codes that stand for zero, shape (outputs, inputs / group), fractions allowed; or None.
        bits: Bits per code, 1 to 8.
        group: Neighbouring inputs that share a scale; `inputs` for one scale per row.
        inputs: Codes per row.
        bias: b, shape (outputs,), or None.
        activations: "float", or "int8" for rounded vectors and products of integers.

    Returns:
        The products, shape (*batch, outputs). Half precision is computed in float32 and rounded at the end.
        Sizes that do not fit together raise a ValueError, codes that are no bytes a TypeError.

    Examples:
        >>> codes, scales = pack(torch.tensor([[0, 8, 15]]), 4), torch.tensor([[0.5]])
        >>> quantized_apply(torch.eye(3), codes, scales, None, 4, 3, 3).T
        tensor([[-4.0000,  0.0000,  3.5000]])
    """
    if activations in _INT8 and not _is_compiling():
        y = _apply_in_memory(x, codes, scales, zeros, bits, group, inputs, bias, _INT8[activations])
        if y is not None:
            return y
    _check_quantized(x, codes, scales, zeros, bits, group, inputs, bias, activations)
    if dispatch.calls_operation(x):
        return _operation(x, codes, scales, zeros, bits, group, inputs, bias, activations == "int8")
    return reference(x, codes, scales, zeros, bits, group, inputs, bias, activations)


def reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    inputs: int,
    bias: Tensor | None = None,
    activations: Activations = "float",
) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype, with every gradient."""
    rows = _widened(x)
    if activations == "int8":
        rounded = _rounded(rows)
        # x + (x̂ − x) is x̂ but for the last bit; without a gradient to pass on it is not needed.
        rows = rows + (rounded - rows).detach() if rows.requires_grad else rounded
    weight = dequantize(
        codes, _widened(scales), None if zeros is None else _widened(zeros), bits, group, inputs
    )
    y = functional.linear(rows, weight, None if bias is None else _widened(bias))
    return y if rows.dtype == x.dtype else y.to(x.dtype)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, inputs: int
) -> Tensor:
    """The weights that uniform codes stand for.

    Args:
        codes: The packed codes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).
        scales: The widths of the levels, shape (outputs, inputs / group).
        zeros: The codes that stand for zero, shape (outputs, inputs / group), or None for 2^(bits − 1).
        bits: Bits per code, 1 to 8.
        group: Neighbouring inputs that share a scale.
        inputs: Codes per row.

    Returns:
        The weights, shape (outputs, inputs), in the dtype of the scales.
    """
    levels = _unpack(codes, bits, inputs).to(scales.dtype).unflatten(1, (-1, group))
    levels = levels - (1 << (bits - 1) if zeros is None else zeros[..., None])
    return (levels * scales[..., None]).flatten(1)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every vector to whole numbers from −127 to 127 of its own width.

    Args:
        x: The vectors, shape (*batch, inputs).

    Returns:
        The whole numbers q as floats, shape (*batch, inputs), and the widths max|x| / 127, shape (*batch, 1).

    Examples:
        >>> quantize_activations(torch.tensor([[0.0, 1.27, -0.5]]))[0]
        tensor([[  0., 127., -50.]])
    """
    largest = x.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST_ACTIVATION)
    return torch.round(x * (127 / largest)), largest / 127


def _rounded(x: Tensor) -> Tensor:
    if not x.shape[-1]:
        return x
    whole, width = quantize_activations(x.detach())
    return whole * width


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32; everything else as it is."""
    return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor


# ------------------------------------------------------------------------------------------------------------
# Codebooks


def codebook_apply(
    x: Tensor, codes: Tensor, codebook: Tensor, bits: int, inputs: int, bias: Tensor | None = None
) -> Tensor:
    """Apply a matrix whose entries come from a codebook to a batch of vectors: y = x Ŵᵀ + b.

    Entry (o, j) of Ŵ is codebook[o, code[o, j]], or codebook[0, code[o, j]] where one book serves all rows.

    Args:
        x: The vectors, shape (*batch, inputs).
        codes: The packed codes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).
        codebook: The values, shape (1, 2^bits) or (outputs, 2^bits).
        bits: Bits per code, 1 to 8.
        inputs: Codes per row.
        bias: b, shape (outputs,), or None.

    Returns:
        The products, shape (*batch, outputs). Half precision is computed in float32 and rounded at the end.
        Sizes that do not fit together raise a ValueError, codes that are no bytes a TypeError.

    Examples:
        >>> codes, book = pack(torch.tensor([[0, 1, 1]]), 1), torch.tensor([[-0.5, 2.0]])
        >>> codebook_apply(torch.ones(3), codes, book, 1, 3)
        tensor([3.5000])
    """
    if not _is_compiling():
        y = _look_up_in_memory(x, codes, codebook, bits, inputs, bias)
        if y is not None:
            return y
    _check_codebook(x, codes, codebook, bits, inputs, bias)
    if dispatch.calls_operation(x):
        return _codebook_operation(x, codes, codebook, bits, inputs, bias)
    return codebook_reference(x, codes, codebook, bits, inputs, bias)


def codebook_reference(
    x: Tensor, codes: Tensor, codebook: Tensor, bits: int, inputs: int, bias: Tensor | None = None
) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype, with every gradient."""
    rows = _widened(x)
    weight = look_up(codes, _widened(codebook), bits, inputs)
    y = functional.linear(rows, weight, None if bias is None else _widened(bias))
    return y if rows.dtype == x.dtype else y.to(x.dtype)


def look_up(codes: Tensor, codebook: Tensor, bits: int, inputs: int) -> Tensor:
    """The weights that a codebook's codes stand for.

    Args:
        codes: The packed codes, uint8, shape (outputs, ⌈inputs · bits / 8⌉).
        codebook: The values, shape (1, 2^bits) or (outputs, 2^bits).
        bits: Bits per code, 1 to 8.
        inputs: Codes per row.

    Returns:
        The weights, shape (outputs, inputs), in the dtype of the codebook.
    """
    indices = _unpack(codes, bits, inputs).long()
    return codebook.expand(codes.shape[0], -1).gather(1, indices)


# ------------------------------------------------------------------------------------------------------------
# Checks


def _check_codes(codes: Tensor, bits: int, inputs: int) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(checks.fault("codes", "of dtype torch.uint8", codes.dtype, "use pack(codes, bits)"))
    expected = row_bytes(inputs, bits)
    if codes.ndim != 2 or codes.shape[1] != expected:
        raise ValueError(
            checks.fault(
                "codes",
                f"of shape (outputs, {expected}) for {inputs} codes of {bits} bits per row",
                tuple(codes.shape),
                "use pack(codes, bits)",
            )
        )


def _check_common(x: Tensor, codes: Tensor, bits: int, inputs: int, bias: Tensor | None) -> None:
    checks.integer_between("bits", bits, 1, 8)
    checks.integer_between("inputs", inputs, 1, None)
    _check_codes(codes, bits, inputs)
    checks.last_dimension(x, inputs)
    if bias is not None:
        checks.shape("bias", bias.shape, (codes.shape[0],), "pass one number per output")


def _check_quantized(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    inputs: int,
    bias: Tensor | None,
    activations: str,
) -> None:
    checks.one_of("activations", activations, tuple(_INT8))
    _check_common(x, codes, bits, inputs, bias)
    checks.integer_between("group", group, 1, inputs)
    if inputs % group:
        raise ValueError(
            checks.fault("group", f"a divisor of {inputs} inputs", group, "use one that divides")
        )
    expected = (codes.shape[0], inputs // group)
    checks.shape("scales", scales.shape, expected, "pass one scale per row and group")
    if zeros is not None:
        checks.shape("zeros", zeros.shape, expected, "pass one zero per row and group, or None")


def _check_codebook(
    x: Tensor, codes: Tensor, codebook: Tensor, bits: int, inputs: int, bias: Tensor | None
) -> None:
    _check_common(x, codes, bits, inputs, bias)
    if tuple(codebook.shape) not in {(1, 1 << bits), (codes.shape[0], 1 << bits)}:
        raise ValueError(
            checks.fault(
                "codebook",
                f"of shape (1, {1 << bits}) or ({codes.shape[0]}, {1 << bits})",
                tuple(codebook.shape),
                f"pass 2^{bits} values, once or per row",
            )
        )


# ------------------------------------------------------------------------------------------------------------
# In memory


def _apply_in_memory(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    inputs: int,
    bias: Tensor | None,
    int8: bool,
) -> Tensor | None:
    """The product by native code; None where the guard forbids it or sizes do not fit together."""
    if _native_quantized is None:
        return None
    return _native_quantized(x, codes, scales, zeros, bias, bits, group, inputs, int8, _get_num_threads())


def _look_up_in_memory(
    x: Tensor, codes: Tensor, codebook: Tensor, bits: int, inputs: int, bias: Tensor | None
) -> Tensor | None:
    """The product by native code; None where the guard forbids it or sizes do not fit together."""
    if _native_codebook is None:
        return None
    return _native_codebook(x, codes, codebook, bias, bits, inputs, _get_num_threads())


# ------------------------------------------------------------------------------------------------------------
# The operations that compiled graphs hold. Their backward is made of differentiable operations.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "quantized_apply(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int inputs, "
    "Tensor? bias, bool int8) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "codebook_apply(Tensor x, Tensor codes, Tensor codebook, int bits, int inputs, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.quantized_apply.default
_codebook_operation = torch.ops.weft.codebook_apply.default


def _anywhere(x, codes, scales, zeros, bits, group, inputs, bias, int8) -> Tensor:
    return reference(x, codes, scales, zeros, bits, group, inputs, bias, "int8" if int8 else "float")


def _on_host(x, codes, scales, zeros, bits, group, inputs, bias, int8) -> Tensor:
    y = _apply_in_memory(x, codes, scales, zeros, bits, group, inputs, bias, int8)
    if y is not None:
        return y
    _check_quantized(x, codes, scales, zeros, bits, group, inputs, bias, "int8" if int8 else "float")
    return _anywhere(x, codes, scales, zeros, bits, group, inputs, bias, int8)


def _codebook_on_host(x, codes, codebook, bits, inputs, bias) -> Tensor:
    y = _look_up_in_memory(x, codes, codebook, bits, inputs, bias)
    if y is not None:
        return y
    _check_codebook(x, codes, codebook, bits, inputs, bias)
    return codebook_reference(x, codes, codebook, bits, inputs, bias)


_library.impl("quantized_apply", _anywhere, "CompositeExplicitAutograd")
_library.impl("codebook_apply", codebook_reference, "CompositeExplicitAutograd")
_library.impl("quantized_apply", _on_host, "CPU")
_library.impl("codebook_apply", _codebook_on_host, "CPU")


@torch.library.register_fake("weft::quantized_apply", lib=_library)
def _(x, codes, scales, zeros, bits, group, inputs, bias, int8) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("weft::codebook_apply", lib=_library)
def _(x, codes, codebook, bits, inputs, bias) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _remember(ctx, inputs, output: Tensor) -> None:
    x, codes, scales, zeros, ctx.bits, ctx.group, ctx.inputs, bias, ctx.int8 = inputs
    ctx.save_for_backward(x, codes, scales, zeros)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, gradient: Tensor):
    """∂x = g Ŵ; with G = gᵀ x̂ summed over each group: ∂scale = Σ G (code − zero), ∂zero = −scale Σ G."""
    x, codes, scales, zeros = ctx.saved_tensors
    needs = ctx.needs_input_grad
    rows = _widened(gradient).reshape(-1, gradient.shape[-1])
    wide_scales, wide_zeros = _widened(scales), None if zeros is None else _widened(zeros)
    to_x = to_scales = to_zeros = None
    if needs[0]:
        weight = dequantize(codes, wide_scales, wide_zeros, ctx.bits, ctx.group, ctx.inputs)
        to_x = (rows @ weight).reshape(x.shape).to(x.dtype)
    if needs[2] or needs[3]:
        inputs = _widened(x).reshape(-1, x.shape[-1])
        inputs = _rounded(inputs) if ctx.int8 else inputs
        to_weight = (rows.T @ inputs).unflatten(1, (-1, ctx.group))
        if needs[2]:
            levels = _unpack(codes, ctx.bits, ctx.inputs).to(rows.dtype).unflatten(1, (-1, ctx.group))
            levels = levels - (1 << (ctx.bits - 1) if wide_zeros is None else wide_zeros[..., None])
            to_scales = (to_weight * levels).sum(-1).to(scales.dtype)
        if zeros is not None and needs[3]:
            to_zeros = (-wide_scales * to_weight.sum(-1)).to(zeros.dtype)
    to_bias = rows.sum(0).to(ctx.bias_dtype) if needs[7] else None
    return to_x, None, to_scales, to_zeros, None, None, None, to_bias, None


torch.library.register_autograd("weft::quantized_apply", _backward, setup_context=_remember, lib=_library)


def _remember_codebook(ctx, inputs, output: Tensor) -> None:
    x, codes, codebook, ctx.bits, ctx.inputs, bias = inputs
    ctx.save_for_backward(x, codes, codebook)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _codebook_backward(ctx, gradient: Tensor):
    """∂x = g Ŵ; ∂codebook adds up (gᵀ x)[o, j] at the place of code[o, j]."""
    x, codes, codebook = ctx.saved_tensors
    needs = ctx.needs_input_grad
    rows = _widened(gradient).reshape(-1, gradient.shape[-1])
    to_x = to_codebook = None
    if needs[0]:
        weight = look_up(codes, _widened(codebook), ctx.bits, ctx.inputs)
        to_x = (rows @ weight).reshape(x.shape).to(x.dtype)
    if needs[2]:
        to_weight = rows.T @ _widened(x).reshape(-1, x.shape[-1])
        indices = _unpack(codes, ctx.bits, ctx.inputs).long()
        to_rows = to_weight.new_zeros(codes.shape[0], codebook.shape[1]).scatter_add(1, indices, to_weight)
        to_codebook = to_rows.sum(0, keepdim=True) if codebook.shape[0] == 1 else to_rows
        to_codebook = to_codebook.to(codebook.dtype)
    to_bias = rows.sum(0).to(ctx.bias_dtype) if needs[5] else None
    return to_x, None, to_codebook, None, None, to_bias


torch.library.register_autograd(
    "weft::codebook_apply", _codebook_backward, setup_context=_remember_codebook, lib=_library
)
