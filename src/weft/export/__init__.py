"""Networks for other runtimes: ONNX files and torch.export programs, neither of which needs weft to run."""

from weft.export.onnx import check_onnx, export_onnx
from weft.export.torch_export import export_torch

__all__ = ["check_onnx", "export_onnx", "export_torch"]
