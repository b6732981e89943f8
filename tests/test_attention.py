"""Attention of four linear layers: what PyTorch's module computes, and compressed as any layer."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.layers.attention import SplitAttention, split_attention
from weft.structures.low_rank import LowRank


def pair(**settings: object) -> tuple[nn.MultiheadAttention, nn.Module]:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **settings).eval()  # type: ignore[arg-type]
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)  # PyTorch starts with zeros
    return attention, split_attention(copy.deepcopy(attention))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("padding", [None, "boolean", "float"])
@pytest.mark.parametrize("mask", [None, "boolean", "float", "per head", "causal"])
@pytest.mark.parametrize("layout", ["batch first", "length first", "single"])
def test_results_are_those_of_pytorch(
    layout: str, mask: str | None, padding: str | None, needed: bool, average: bool
) -> None:
    theirs, ours = pair(batch_first=layout != "length first")
    query, key = torch.randn(2, 5, 12), torch.randn(2, 5 if mask == "causal" else 7, 12)
    given: dict[str, Tensor | bool] = {"need_weights": needed, "average_attn_weights": average}
    masks = {
        "boolean": torch.rand(5, 7) > 0.7,
        "float": torch.randn(5, 7),
        "per head": torch.randn(3 if layout == "single" else 6, 5, 7),
        "causal": nn.Transformer.generate_square_subsequent_mask(5),
    }
    if mask is not None:
        given |= {"attn_mask": masks[mask], "is_causal": mask == "causal"}
    if padding is not None:
        hidden = torch.zeros(key.shape[:2], dtype=torch.bool)
        hidden[1, 3:] = True
        hidden[:, 0] = False
        floats = torch.zeros(hidden.shape).masked_fill(hidden, -float("inf"))
        # Masks of two kinds at once are deprecated: there the other one's kind is taken.
        boolean = mask == "boolean" if mask is not None else padding == "boolean"
        given["key_padding_mask"] = hidden if boolean else floats
    if layout == "single":
        query, key = query[1], key[1]
        if "key_padding_mask" in given:
            given["key_padding_mask"] = given["key_padding_mask"][1]  # type: ignore[index]
    elif layout == "length first":
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    if padding == "boolean" and mask not in (
        None,
        "boolean",
    ):  # two kinds at once: PyTorch warns, and converts
        given["key_padding_mask"] = floats[1] if layout == "single" else floats
    with torch.no_grad():
        expected, expected_weights = theirs(query, key, key, **given)
        y, weights = ours(query, key, key, **given)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("settings", [{"kdim": 7, "vdim": 9}, {"bias": False}])
def test_other_sizes_and_no_biases(settings: dict) -> None:
    theirs, ours = pair(**settings)
    inputs = torch.randn(5, 2, 12), torch.randn(4, 2, theirs.kdim), torch.randn(4, 2, theirs.vdim)
    with torch.no_grad():
        for given, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal"):
        ours(*inputs, is_causal=True)


def test_gradients_and_dropout_are_trained_with() -> None:
    theirs, ours = pair(dropout=0.5)
    x = torch.randn(5, 2, 12)
    theirs(x, x, x)[0].square().sum().backward()
    ours(x, x, x)[0].square().sum().backward()
    assert isinstance(ours, SplitAttention)
    joint = torch.cat([ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    torch.testing.assert_close(joint, theirs.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    ours.train()
    for needed in (True, False):
        assert not torch.equal(ours(x, x, x, need_weights=needed)[0], ours(x, x, x, need_weights=needed)[0])


def test_those_that_compute_something_else_stay() -> None:
    class Own(nn.MultiheadAttention):
        """Of another forward, perhaps."""

    model = nn.ModuleList([Own(4, 2), nn.MultiheadAttention(4, 2, add_bias_kv=True)])
    model.append(nn.MultiheadAttention(4, 2, add_zero_attn=True))
    before = list(model)
    assert list(split_attention(model)) == before


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_transformers_run_and_are_compressed(tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).eval()
    model = split_attention(copy.deepcopy(dense))
    x, hidden = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    hidden[2, 4:] = True
    with torch.inference_mode():
        for given in ({}, {"src_key_padding_mask": hidden}):
            expected, y = dense(x, **given), model(x, **given)
            torch.testing.assert_close(y[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)
    survey = weft.survey(model, [torch.randn(8, 6, 32) for _ in range(4)], shown=False)
    assert len(survey.layers) == 12
    assert not survey.left_dense
    plan = weft.allocate(survey, "Quantized", weft.Budget(bytes=0.3), shown=False)
    small, _ = weft.compress(model, plan, survey)
    weft.save(small, tmp_path / "small.safetensors")
    loaded = weft.load(tmp_path / "small.safetensors", model=model)
    with torch.inference_mode():
        y = small(x)
        assert torch.equal(loaded(x), y)
        assert (y - model(x)).norm() < 0.1 * model(x).norm()


def test_a_decoder_with_a_causal_mask_compiles_and_exports_as_one_graph() -> None:
    """Whether the mask is causal is found out from its values, and must decide nothing."""
    torch.manual_seed(0)
    model = split_attention(nn.Transformer(12, 3, 1, 1, 16, batch_first=True)).eval()
    source, target = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad():
        expected = model(source, target, tgt_mask=mask)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(source, target, tgt_mask=mask), expected)
        # Without the hint torch's own decoder branches on the mask's values, which no export takes.
        options = {"tgt_mask": mask, "tgt_is_causal": True}
        program = torch.export.export(model, (source, target), options)
        torch.testing.assert_close(program.module()(source, target, **options), expected)


def test_an_attention_in_several_places_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(12, 3, batch_first=True)
            self.again = self.first
            self.held = nn.ModuleList([nn.ModuleDict({"attention": self.first})])

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.first, self.again, self.held[0]["attention"]):
                x = x + attention(x, x, x, need_weights=False)[0]
            return x

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 5, 12)
    expected = model(x)
    split = split_attention(model)
    assert split.first is split.again is split.held[0]["attention"]
    torch.testing.assert_close(split(x), expected)
    survey = weft.survey(split, [x])
    assert survey.layers["first.q_proj"].names == (
        "first.q_proj",
        "again.q_proj",
        "held.0.attention.q_proj",
    )
    assert not survey.left_dense
    assert survey.layers["first.q_proj"].applications == 15


def test_loading_into_a_network_that_is_not_split_says_so(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    small = weft.compress(split_attention(copy.deepcopy(model)), {"self_attn.q_proj": LowRank(2)}).model
    weft.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"got none; pass the network as weft\.split_attention\(model\)"):
        weft.load(tmp_path / "small.safetensors", model=model)
    again = weft.load(tmp_path / "small.safetensors", model=split_attention(copy.deepcopy(model)))
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(again.eval()(x), small.eval()(x))
