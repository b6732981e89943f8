"""The fast primitives: one module each, a PyTorch reference and its native twin behind one function.

`route` says which of the two this process runs. Where the native library is missing the reference does the
same work, and one line on standard error says so when this package is imported.
"""

from weft.kernels.dispatch import route
from weft.kernels.low_rank import low_rank_apply
from weft.kernels.quantized import codebook_apply, quantized_apply
from weft.kernels.sparse import SparseChain, sparse_chain_apply

__all__ = [
    "SparseChain",
    "codebook_apply",
    "low_rank_apply",
    "quantized_apply",
    "route",
    "sparse_chain_apply",
]
