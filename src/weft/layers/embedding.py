"""An embedding whose table is a structured matrix."""

from torch import Tensor

from weft import checks
from weft.layers.base import StructuredLayer
from weft.structures.base import StructuredMatrix


class StructuredEmbedding(StructuredLayer):
    """Stands where an `nn.Embedding` stood: (*batch,) of integers -> (*batch, embedding_dim).

    Only the rows asked for are formed. The table may be the weight of a linear layer too.

    Args:
        matrix: the table, shape (num_embeddings, embedding_dim).
        padding_idx: the row that padding points to, kept for code that looks at it.

    Examples:
        >>> import torch
        >>> from weft.structures.low_rank import LowRank
        >>> layer = StructuredEmbedding(LowRank(rank=2).fit(torch.randn(6, 4)))
        >>> layer(torch.tensor([[0, 5, 5]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, matrix: StructuredMatrix, padding_idx: int | None = None) -> None:
        super().__init__(matrix)
        self.num_embeddings = matrix.outputs
        self.embedding_dim = matrix.inputs
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name, used as a keyword by callers)
        if input.is_floating_point() or input.is_complex():
            remedy = "pass the indices of rows"
            raise TypeError(checks.fault("input", "integers", input.dtype, remedy))
        return self.matrix.rows(input)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
