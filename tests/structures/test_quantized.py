"""What `Quantized` promises beyond the contract: its kinds, its bytes, its bounds, training and storage."""

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from tests.test_structure_contract import random_gram, random_weight
from torch import Tensor, nn

import weft
from weft.export import check_onnx, export_onnx, export_torch
from weft.layers.linear import StructuredLinear
from weft.structures import from_json
from weft.structures.base import DenseGram, DiagonalGram, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.sparse_product import SparseProduct

SHAPE = (24, 30)
KINDS = [
    *(Quantized(bits) for bits in (1, 3, 5, 8)),
    Quantized(3, zero="free", group=10),
    Quantized(2, zero="between", group=15),
    Quantized(3, codebook="kmeans"),
    Quantized(7, codebook="kmeans"),  # decoded once
    Quantized(2, codebook="kmeans_rows"),
    Quantized(1, codebook="binary"),
    Quantized(1, codebook="sign"),
    Quantized(2, codebook="ternary", group=6),
    Quantized(3, rounding="nearest"),
    Quantized(3, activation_order=True),
    Quantized(4, of=LowRank(6), zero="between"),
    Quantized(3, of=Pruned(0.4), codebook="kmeans"),
    Quantized(6, of=SparseProduct(2, 4, "splitting")),
]
each_kind = pytest.mark.parametrize("structure", KINDS, ids=str)


@each_kind
def test_forward_rows_storage_and_json_agree(structure: Quantized) -> None:
    member = structure.fit(random_weight(SHAPE))
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    dense = member.to_dense()
    torch.testing.assert_close(member(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(member.rows(torch.tensor([3, 0])), dense[[3, 0]])
    again = from_json(structure.to_json()).from_tensors(SHAPE, member.stored())
    assert torch.equal(again(x), member(x))
    assert torch.equal(again.to_dense(), dense)


@each_kind
def test_relaxed_and_hardened_at_once_it_is_bitwise_the_same(structure: Quantized) -> None:
    member = structure.fit(random_weight(SHAPE))
    relaxed = member.relax()
    assert sum(parameter.numel() for parameter in relaxed.parameters() if parameter.requires_grad) > 0
    torch.testing.assert_close(relaxed.to_dense(), member.to_dense(), rtol=1e-5, atol=1e-6)
    hard = relaxed.harden()
    assert type(hard) is type(member)
    assert torch.equal(hard.to_dense(), member.to_dense())
    assert hard.stored().keys() == member.stored().keys()
    for name, tensor in member.stored().items():
        assert torch.equal(hard.stored()[name], tensor), name


@each_kind
def test_training_the_relaxed_member_lowers_the_loss_of_the_hardened_one(structure: Quantized) -> None:
    if structure.codebook == "sign" or structure.bits == 8:
        pytest.skip("there is no room for a gain with fixed levels, nor with 256 of them")
    weight, target = random_weight(SHAPE), random_weight(SHAPE, seed=7)
    relaxed = structure.fit(weight).relax().train()
    before = relative_error(target, relaxed.to_dense())
    optimiser = torch.optim.Adam(relaxed.parameters(), lr=5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        (relaxed(torch.eye(30)).T - target).square().sum().backward()
        optimiser.step()
    hard = relaxed.harden()
    after = relative_error(target, hard.to_dense())
    assert after < 0.9 * before
    torch.testing.assert_close(hard.to_dense(), relaxed.to_dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (Quantized(4), 24 * 15 + 24 * 4),
        (Quantized(3), 24 * 12 + 24 * 4),
        (Quantized(5, zero="free", group=10), 24 * 19 + 2 * 24 * 3 * 4),
        (Quantized(2, codebook="kmeans_rows"), 24 * 8 + 24 * 4 * 4),
        (Quantized(2, codebook="kmeans"), 24 * 8 + 4 * 4),
        (Quantized(1, codebook="sign"), 24 * 4),
        (Quantized(2, codebook="ternary"), 24 * 6 + 24 * 4),
        (Quantized(8, of=LowRank(5)), 24 * 5 + 24 * 4 + 5 * 30 + 5 * 4),
    ],
    ids=str,
)
def test_bytes_are_those_of_packed_codes(structure: Quantized, expected: int) -> None:
    member = structure.fit(random_weight(SHAPE))
    assert member.cost().bytes == expected
    assert member.cost().parameters == structure.parameter_count(SHAPE)


@pytest.mark.parametrize(
    ("structure", "levels"),
    [
        (Quantized(1, codebook="sign"), {-1.0, 1.0}),
        (Quantized(1, codebook="binary"), None),
        (Quantized(2, codebook="ternary"), None),
    ],
    ids=str,
)
def test_closed_forms_have_their_levels(structure: Quantized, levels: set[float] | None) -> None:
    dense = structure.fit(random_weight(SHAPE)).to_dense()
    for row in dense.detach():
        found = set(row.tolist())
        if levels is not None:
            assert found <= levels
        else:
            scale = float(row.abs().max())
            assert {round(abs(value) / scale, 5) for value in found} <= {0.0, 1.0}
            assert len(found) == structure.level_count


@pytest.mark.parametrize(
    "structure",
    [
        Quantized(2, zero="between"),
        Quantized(3),
        Quantized(2, codebook="kmeans_rows"),
        Quantized(2, codebook="kmeans"),
        Quantized(1, codebook="binary"),
        Quantized(3, of=LowRank(48)),
    ],
    ids=str,
)
def test_choosing_together_beats_nearest_levels_in_the_metric(structure: Quantized) -> None:
    weight, gram = random_weight((64, 96)), random_gram(96)
    nearest = dataclasses.replace(structure, rounding="nearest").fit(weight, input_gram=gram)
    together = structure.fit(weight, input_gram=gram)
    errors = [relative_error(weight, one.to_dense(), input_gram=gram) for one in (together, nearest)]
    assert errors[0] < 0.95 * errors[1]


def test_quantising_the_factors_together_loses_less_than_one_by_one() -> None:
    weight = random_weight((64, 96))
    inner = LowRank(12).fit(weight)
    apart = [Quantized(4).fit(inner.stored()[name]).to_dense() for name in ("left", "right")]
    together = Quantized(4, of=LowRank(12)).fit(weight)
    assert relative_error(weight, together.to_dense()) < relative_error(weight, apart[0] @ apart[1])


def test_a_product_runs_on_its_packed_factors() -> None:
    member = Quantized(8, of=LowRank(5)).fit(random_weight(SHAPE))
    assert {name: str(tensor.dtype) for name, tensor in member.stored().items()} == {
        "of.left.codes": "torch.uint8",
        "of.left.scales": "torch.float32",
        "of.right.codes": "torch.uint8",
        "of.right.scales": "torch.float32",
    }
    floats = [buffer for buffer in member.buffers() if buffer.is_floating_point()]
    assert sum(tensor.numel() for tensor in (*floats, *member.parameters())) == 24 + 5


def test_other_families_keep_their_indices_and_pack_their_values() -> None:
    structure = Quantized(4, of=Pruned(0.3), codebook="kmeans")
    weight = random_weight((40, 50))
    member = structure.fit(weight)
    plain = Pruned(0.3).fit(weight)
    assert member.stored()["of.values_packed.codes"].shape == (1, 300)
    assert member.cost().bytes == plain.cost().bytes - 600 * 4 + 300 + 16 * 4 + 4
    assert torch.equal(member.to_dense() != 0, plain.to_dense() != 0)
    error = relative_error(weight, member.to_dense())
    assert error < 1.05 * relative_error(weight, plain.to_dense())


def test_trained_scales_of_packed_tensors_are_used_at_once() -> None:
    member = Quantized(4, of=Pruned(0.3), codebook="kmeans").fit(random_weight(SHAPE)).eval()
    x = torch.randn(3, 30)
    with torch.no_grad():
        before = member(x)
        for parameter in member.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(member(x), 2 * before)


def test_whole_number_activations_stay_near() -> None:
    weight, x = random_weight((32, 64)), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain, rounded = (Quantized(8, activations=kind).fit(weight) for kind in ("float", "int8"))
    assert torch.equal(plain.to_dense(), rounded.to_dense())
    difference = (plain(x) - rounded(x)).norm() / plain(x).norm()
    assert 0 < float(difference) < 0.02
    torch.testing.assert_close(rounded.relax()(x), rounded(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be between 1 and 8, got 0; use bits >= 1"),
        ({"bits": 17}, "bits must be between 1 and 8, got 17; use bits <= 8"),
        ({"bits": 4, "group": 0}, "group must be at least 1, got 0"),
        ({"bits": 4, "codebook": "cosine"}, "codebook must be one of 'uniform'"),
        ({"bits": 4, "zero": "other"}, "zero must be one of"),
        ({"bits": 2, "codebook": "binary"}, 'bits must be 1 with the codebook "binary", got 2'),
        ({"bits": 4, "codebook": "kmeans", "group": 8}, 'group must be None with the codebook "kmeans"'),
        ({"bits": 4, "codebook": "kmeans", "activations": "int8"}, 'activations must be "float" with'),
        ({"bits": 1, "codebook": "binary", "zero": "free"}, 'zero must be "level" with the codebook'),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantized(**arguments)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="bits must be a whole number"):
        Quantized(4.0)
    with pytest.raises(TypeError, match="of must be a structure, got str"):
        Quantized(4, of="LowRank")
    with pytest.raises(TypeError, match="activation_order must be True or False"):
        Quantized(4, activation_order=1)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group must be a divisor of 30, .* got 7; use e\.g\. 6"):
        Quantized(4, group=7).fit(random_weight(SHAPE))
    with pytest.raises(ValueError, match="group must be a divisor of 5, the inputs of a"):
        Quantized(4, of=LowRank(5), group=3).fit(random_weight(SHAPE))
    with pytest.raises(ValueError, match="group must be None for the tensors of Pruned"):
        Quantized(4, of=Pruned(0.5), group=3).fit(random_weight(SHAPE))


def test_candidates_build_on_other_families_two_deep() -> None:
    inner = [LowRank(3), Pruned(0.2), Quantized(4), Pruned(0.5, of=LowRank(3))]
    found = list(Quantized.candidates((40, 48), inner))
    nested = {(str(one.of), one.bits) for one in found if str(one.of) != "Dense()"}
    assert nested == {("LowRank(rank=3)", 4), ("LowRank(rank=3)", 8), ("Pruned(density=0.2)", 8)}


def test_four_bits_of_a_classifier_are_saved_in_an_eighth_and_load_bitwise(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(1280, 1000, bias=False)
    weight = torch.randn(1000, 1280, generator=generator) / 36
    with torch.no_grad():
        dense.weight.copy_(weight)
    small, _ = weft.compress(dense, {"": Quantized(4)}, correct_biases=False)
    path = weft.save(small, tmp_path / "small.safetensors")
    assert path.stat().st_size <= 0.13 * weight.nbytes
    again = weft.load(path, model=nn.Linear(1280, 1000, bias=False))
    x = torch.randn(3, 1280, generator=generator)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("structure", [KINDS[4], KINDS[6], KINDS[13], KINDS[14]], ids=str)
def test_networks_are_saved_and_loaded_bitwise(structure: Quantized, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 4))
    small, _ = weft.compress(model, {"0": structure}, correct_biases=False)
    path = weft.save(small, tmp_path / "small.safetensors")
    again = weft.load(path, model=nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 4)))
    x = torch.randn(3, 30)
    small.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_damaged_codes_are_refused() -> None:
    structure = Quantized(4)
    stored = structure.fit(random_weight(SHAPE)).stored()
    with pytest.raises(TypeError, match="codes must be of dtype torch.uint8"):
        structure.from_tensors(SHAPE, {**stored, "codes": stored["codes"].int()})
    with pytest.raises(ValueError, match="codes must be of shape"):
        structure.from_tensors(SHAPE, {**stored, "codes": stored["codes"][:, 1:]})


def test_an_embedding_reads_only_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    member = Quantized(4, group=8).fit(random_weight((50, 16)))
    seen: list[Tensor] = []
    original = type(member).integers

    def watched(self: object, chosen: Tensor | None = None) -> Tensor:
        codes = original(self, chosen)
        seen.append(codes)
        return codes

    monkeypatch.setattr(type(member), "integers", watched)
    member.rows(torch.tensor([[1, 2], [49, 1]]))
    assert [tuple(codes.shape) for codes in seen] == [(4, 16)]


@pytest.mark.parametrize(
    "structure",
    [
        Quantized(8),
        Quantized(4),
        Quantized(3, zero="free", group=19),
        Quantized(2, codebook="ternary"),
        Quantized(4, codebook="kmeans"),
        Quantized(4, of=LowRank(8)),
    ],
    ids=str,
)
def test_exported_files_hold_packed_codes(structure: Quantized, tmp_path: Path) -> None:
    layer = StructuredLinear(structure.fit(random_weight((256, 304))), torch.randn(256))
    x = torch.randn(4, 304, generator=torch.Generator().manual_seed(0))
    path = export_onnx(layer, x, tmp_path / "layer.onnx")
    assert check_onnx(path, layer, x) <= 1e-4
    initializers = onnx.load(path).graph.initializer
    numbers = [tensor for tensor in initializers if tensor.data_type == onnx.TensorProto.FLOAT]
    assert all(len(tensor.raw_data) < 256 * 304 for tensor in numbers)
    assert path.stat().st_size < layer.matrix.cost().bytes + 256 * 304 // 4 + 20_000
    program = torch.export.load(export_torch(layer, x, tmp_path / "layer.pt2"))
    assert not [node for node in program.graph.nodes if "weft" in str(node.target)]
    torch.testing.assert_close(program.module()(x), layer(x))


def test_candidates_span_bits_and_groups() -> None:
    found = {structure for structure in Quantized.candidates((96, 384)) if structure.codebook == "uniform"}
    assert {(structure.bits, structure.group) for structure in found} == {
        *((bits, None) for bits in range(2, 9)),
        *((bits, group) for bits in range(2, 6) for group in (128, 64, 32)),
    }
    assert all(structure.group is None for structure in Quantized.candidates((96, 31)))


@pytest.mark.parametrize("rows", [96, 1500])
def test_the_curve_of_part_of_the_rows_is_that_of_the_fits(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(rows, 1, generator=generator) ** 2
    weight = spread * torch.randn(rows, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    grams = {
        "input_gram": DenseGram(mixing @ mixing.T),
        "output_gram": DiagonalGram(torch.rand(rows, generator=generator) ** 8),
    }
    curve = Quantized.error_curve(weight, **grams)
    assert [point.structure for point in curve] == list(Quantized.candidates((rows, 64)))
    for point in curve[::5]:
        member = point.structure.fit(weight, **grams)
        assert point.cost == member.cost()
        assert relative_error(weight, member.to_dense(), **grams) == pytest.approx(point.error, rel=0.03)


def test_costs_of_quantised_products_are_predicted() -> None:
    structure = Quantized(4, of=LowRank(8))
    assert structure.predicted_cost((40, 48), 4) == structure.fit(torch.randn(40, 48)).cost()
    with pytest.raises(ValueError, match="does not depend on the weight"):
        Quantized(4, of=SparseProduct(1, 4)).predicted_cost((40, 48), 4)
