"""Data sets by name: digits, MNIST, CIFAR-10, image folders, npz files, Hugging Face, the user's own file."""

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from weft import checks
from weft.checks import fault
from weft.sources.archive import numeric_tensor, read_arrays
from weft.sources.reference import (
    FILE_PREFIX,
    Reference,
    call_function,
    existing_file,
    existing_folder,
    first_line,
    optional_package,
    parse,
)
from weft.sources.splits import (
    Batches,
    DatasetSplit,
    InputBatches,
    Inputs,
    Scaling,
    Split,
    TensorSplit,
    as_split,
    held_out_indices,
    hold_out,
)

CALIBRATION_EXAMPLES = 4096
"""How many training examples the calibration split draws where no limit is named."""

HELD_OUT = 0.2
"""The share held out for testing where a data set brings no test part of its own."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Data:
    """A data set with a training and a test part.

    The calibration split is drawn from the training part at random with a fixed seed; it needs no labels.

    Attributes:
        name: what the data set is called.
        source: where it came from, for `load_data`.
        train: the training part; None where there is none.
        test: the held-out part; None where there is none.
        classes: the names of the classes in the order of their numbers; None where they are not known.

    Examples:
        >>> data = load_data("digits")
        >>> inputs, targets = next(iter(data.batches("test", batch_size=100)))
        >>> inputs.shape, targets.shape
        (torch.Size([100, 1, 8, 8]), torch.Size([100]))
        >>> sum(len(images) for images in data.inputs("calibration", limit=256))
        256
    """

    name: str
    source: str
    train: Split | None
    test: Split | None
    classes: tuple[str, ...] | None = None

    def split(self, name: str) -> Split:
        """Gives a part by name.

        Args:
            name: "train", "test" or "calibration" (the training part, of which `batches` draws the examples).

        Returns:
            The part.

        Raises:
            ValueError: the name is unknown, or the data set has no such part.
        """
        checks.one_of("split", name, ("train", "test", "calibration"))
        split = self.test if name == "test" else self.train
        if split is None:
            other = "train" if name == "test" else "test"
            remedy = f"use split={other!r}, or give data that has both"
            raise ValueError(fault("split", f"one that {self.source} has ({other!r})", repr(name), remedy))
        return split

    def batches(
        self,
        split: str = "train",
        *,
        batch_size: int = 128,
        limit: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> Batches:
        """Gives batches of (inputs, targets) that can be iterated over again and again.

        Args:
            split: "train", "test" or "calibration".
            batch_size: examples per batch; the last one may be smaller.
            limit: the largest number of examples, drawn at random with `seed`; None for all, for calibration
                `CALIBRATION_EXAMPLES`.
            shuffle: whether every pass has its own order.
            seed: decides the draw and the orders.

        Returns:
            A re-iterable; its length is the number of batches unless the data is a stream. Targets are None
            where there are no labels.
        """
        if split == "calibration" and limit is None:
            limit = CALIBRATION_EXAMPLES
        return self.split(split).batches(batch_size, limit=limit, shuffle=shuffle, seed=seed)

    def inputs(
        self,
        split: str = "calibration",
        *,
        batch_size: int = 128,
        limit: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> InputBatches:
        """Gives batches of inputs alone, as `batches` does with their targets.

        Args:
            split: "train", "test" or "calibration".
            batch_size: examples per batch; the last one may be smaller.
            limit: the largest number of examples.
            shuffle: whether every pass has its own order.
            seed: decides the draw and the orders.

        Returns:
            A re-iterable of tensors for model(x), tuples for model(*x) or dicts for model(**x).
        """
        return InputBatches(
            self.batches(split, batch_size=batch_size, limit=limit, shuffle=shuffle, seed=seed)
        )

    @cached_property
    def sample_input(self) -> Inputs:
        """A batch of one input, for tracing and for measuring costs."""
        split = "test" if self.train is None else "train"
        return next(iter(self.inputs(split, batch_size=1, limit=1)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input without the batch axis; a TypeError where an input is no single tensor."""
        sample = self.sample_input
        if not isinstance(sample, Tensor):
            remedy = "look at sample_input"
            raise TypeError(
                fault(f"an input of {self.name}", "a single tensor", type(sample).__name__, remedy)
            )
        return tuple(sample.shape[1:])


def load_data(source: str) -> Data:
    """Loads a data set from its source.

    Sources (options follow a `?` and are joined by `&`):

    - `digits`: scikit-learn's 1797 images of handwritten digits, shape (1, 8, 8), scaled to [0, 1]; a fixed,
      stratified fifth is the test part.
    - `mnist:DIR`: `DIR/mnist.npz` with the unsigned bytes x_train, y_train, x_test, y_test, or the four idx
      files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-...`, also gzipped, in DIR, DIR/raw or
      DIR/MNIST/raw. Images have the shape (1, 28, 28), scaled to [0, 1].
    - `cifar10:DIR`: the binary version's `data_batch_1.bin` ... and `test_batch.bin` in DIR or
      DIR/cifar-10-batches-bin, or one `train*.npz` and one `test*.npz` with x (examples, 3, 32, 32), unsigned
      bytes, and y. The Python version consists of pickles and is refused. Scaled to [0, 1], then normalised
      per channel with the data set's usual mean and standard deviation.
    - `imagefolder:DIR`: one folder of images per class, directly in DIR (a fixed, stratified fifth is the
      test part) or in DIR/train and DIR/val (or valid, validation, test). The shorter side is resized to 256
      pixels, the central 224 × 224 are cut out, and normalised with ImageNet's mean and standard deviation.
      No augmentation. Options: `size`, `resize`, `workers` (reading processes). Needs Pillow.
    - `npz:FILE`: x and, where there are labels, y (a fixed fifth is the test part), or x_train, y_train,
      x_test, y_test; optionally `classes`, the classes' names. Unsigned bytes are scaled to [0, 1], floats
      are taken as they are, other integers stay integers. Other arrays' names as options:
      `npz:features.npz?x=f&y=label`.
    - `hf:NAME_OR_DIR`: a data set of the Hugging Face hub, or a folder of one. Images are prepared as by
      imagefolder; text needs `tokenizer=NAME` and comes as a dict of tensors. Options: `config`, `train`,
      `test` (the names of the parts), `input`, `target` (columns), `tokenizer`, `length` (tokens), `size`,
      `resize`, `workers`.
    - `path/to/file.py:function`: called without arguments, returns a `Data`, or a pair (train, test), either
      of which may be None, of what `weft.sources.splits.as_split` takes: a tensor of inputs, a pair (inputs,
      labels), a torch Dataset or DataLoader.

    `mnist`, `cifar10`, `imagefolder`, `npz` and `hf` take `mean` and `std`, one number or one per channel
    joined by commas: `cifar10:DIR?mean=0.485,0.456,0.406&std=0.229,0.224,0.225`. Where a part is held out
    here, `held_out` is its share: 1 makes everything the test part, 0 nothing.

    Labels must be integers from 0 on, or floating for a regression, inputs finite, no part empty.

    Args:
        source: where the data comes from.

    Returns:
        The data set.
    """
    reference = parse("data", source, DATA_SOURCES)
    return DATA_SOURCES[reference.prefix](reference)


def _digits(reference: Reference) -> Data:
    from sklearn.datasets import load_digits  # half a second, needed by this source alone

    options = reference.options({"held_out": _share})
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # stored as 0 ... 16
    train, test = hold_out(
        TensorSplit(images, torch.from_numpy(bunch.target), name="digits"), options.get("held_out", HELD_OUT)
    )
    return Data("digits", reference.source, train, test, tuple(str(digit) for digit in range(10)))


def _mnist(reference: Reference) -> Data:
    scaling = _scaling(reference.options(NORMALISATION))
    folder = existing_folder("MNIST folder", reference.place)
    if (folder / "mnist.npz").is_file():
        arrays = _required_arrays(folder / "mnist.npz", ("x_train", "y_train", "x_test", "y_test"))
        pairs = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    else:
        pairs = [
            (
                _idx_array(folder, f"{part}-images", "idx3-ubyte"),
                _idx_array(folder, f"{part}-labels", "idx1-ubyte"),
            )
            for part in ("train", "t10k")
        ]
    train, test = (
        TensorSplit(
            torch.from_numpy(x).unsqueeze(1), numeric_tensor("y", y), scaling=scaling, name=f"MNIST {part}"
        )
        for (x, y), part in zip(pairs, ("train", "test"), strict=True)
    )
    return Data("mnist", reference.source, train, test, tuple(str(digit) for digit in range(10)))


def _idx_array(folder: Path, stem: str, kind: str) -> np.ndarray:
    # The format: two zero bytes, the type's code (8 for unsigned bytes), the number of axes, each axis's
    # length as a big-endian 32-bit integer, then the values.
    names = [f"{stem}{mark}{kind}{ending}" for mark in "-." for ending in ("", ".gz")]
    places = [folder / inner / name for inner in ("", "raw", "MNIST/raw") for name in names]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        got = f"neither mnist.npz nor {names[0]} in {folder}"
        raise FileNotFoundError(
            fault("MNIST folder", "one with mnist.npz or the idx files", got, "check the folder")
        )
    complete = "a complete idx file of unsigned bytes"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        got = f"{path} ({first_line(error)})"
        raise ValueError(fault("MNIST file", complete, got, "copy or download it again")) from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if axes == 0 or len(shape) != axes or len(content) - start != np.prod(shape, dtype=int):
        got = f"{path} with {len(content)} bytes"
        raise ValueError(fault("MNIST file", complete, got, "copy or download it again"))
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(shape)


def _cifar10(reference: Reference) -> Data:
    options = reference.options(NORMALISATION)
    scaling = _scaling({"mean": CIFAR10_MEAN, "std": CIFAR10_STD} | options)
    given = existing_folder("CIFAR-10 folder", reference.place)
    inner = given / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else given
    splits = [
        TensorSplit(*_cifar10_part(folder, part, pattern), scaling=scaling, name=f"CIFAR-10 {part}")
        for part, pattern in (("train", "data_batch_*.bin"), ("test", "test_batch.bin"))
    ]
    return Data("cifar10", reference.source, splits[0], splits[1], CIFAR10_CLASSES)


def _cifar10_part(folder: Path, part: str, pattern: str) -> tuple[Tensor, Tensor]:
    # The binary format: records of one label byte and 3 × 32 × 32 pixels, channel by channel.
    if paths := sorted(folder.glob(pattern)):
        records = [np.fromfile(path, dtype=np.uint8) for path in paths]
        for path, record in zip(paths, records, strict=True):
            if len(record) == 0 or len(record) % 3073:
                got = f"{path} with {len(record)} bytes"
                expected = "a whole number of records of 3073 bytes"
                raise ValueError(fault("CIFAR-10 file", expected, got, "copy or download it again"))
        table = torch.from_numpy(np.concatenate(records)).view(-1, 3073)
        return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]
    archives = sorted(folder.glob(f"{part}*.npz"))
    if len(archives) == 1:
        arrays = _required_arrays(archives[0], ("x", "y"))
        return numeric_tensor("x", arrays["x"]), numeric_tensor("y", arrays["y"])
    expected = f"one with {pattern} or one {part}*.npz"
    pickled = [
        place for place in (folder, folder / "cifar-10-batches-py") if (place / "data_batch_1").is_file()
    ]
    if pickled:
        remedy = "download the binary version (cifar-10-binary.tar.gz), which is the same data"
        got = f"the Python version in {pickled[0]}, whose pickles are not read"
        raise ValueError(fault("CIFAR-10 folder", expected, got, remedy))
    got = f"{len(archives)} such npz files and no such bin file in {folder}"
    raise FileNotFoundError(fault("CIFAR-10 folder", expected, got, "check the folder"))


def _npz(reference: Reference) -> Data:
    roles = ("x", "y", "x_train", "y_train", "x_test", "y_test", "classes")
    options = reference.options({**NORMALISATION, "held_out": _share, **dict.fromkeys(roles, str)})
    names = {role: options.get(role, role) for role in roles}
    path = existing_file("npz file", reference.place)
    arrays = read_arrays("npz file", path, set(names.values()))
    scaling = _scaling(options)
    absent = [name for role, name in names.items() if role in options and name not in arrays]
    if absent:
        got = f"no array {', '.join(absent)} in {path}"
        raise ValueError(fault("npz file", "one with the arrays named as options", got, "check their names"))

    def part(suffix: str) -> TensorSplit | None:
        x, y = (arrays.get(names[role + suffix]) for role in "xy")
        if x is None:
            return None
        targets = None if y is None else numeric_tensor(names["y" + suffix], y)
        inputs = numeric_tensor(names["x" + suffix], x)
        return TensorSplit(inputs, targets, scaling=scaling, name=f"{path.name} ({names['x' + suffix]})")

    train, test = part("_train"), part("_test")
    if train is None and test is None:
        whole = part("")
        if whole is None:
            with np.load(path, allow_pickle=False) as archive:
                got = f"only {', '.join(archive.files) or 'nothing'} in {path}"
            remedy = "rename them, or name them as options: npz:FILE?x=NAME&y=NAME"
            raise ValueError(fault("npz file", "one with the arrays x[, y] or x_train, ...", got, remedy))
        train, test = hold_out(whole, options.get("held_out", HELD_OUT))
    elif "held_out" in options:
        remedy = "leave it away"
        raise ValueError(
            fault("held_out", f"absent where {path} has a train or test part", options["held_out"], remedy)
        )
    classes = arrays.get(names["classes"])
    return Data(
        path.stem,
        reference.source,
        train,
        test,
        None if classes is None else tuple(str(name) for name in classes),
    )


def _image_folder(reference: Reference) -> Data:
    options = reference.options({**NORMALISATION, **PREPARATION, "held_out": _share})
    prepare = _image_preparation(options)
    folder = existing_folder("image folder", reference.place)
    train_folder = folder / "train"
    if not train_folder.is_dir():
        classes = _class_folders(folder)
        everything = ImageFiles(folder, classes, prepare)
        labels = torch.tensor([label for _, label in everything.examples])
        train, test = _divided(everything, labels, options, f"images of {folder}")
        return Data(folder.name, reference.source, train, test, classes)
    test_folder = next(
        (folder / name for name in ("val", "valid", "validation", "test") if (folder / name).is_dir()), None
    )
    classes = _class_folders(train_folder)
    workers = options.get("workers", 0)
    train, test = (
        None
        if part is None
        else DatasetSplit(ImageFiles(part, classes, prepare), workers=workers, name=str(part))
        for part in (train_folder, test_folder)
    )
    return Data(folder.name, reference.source, train, test, classes)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """The images in a folder's class folders, read when they are asked for.

    Args:
        folder: has one folder per class.
        classes: the names of the class folders in the order of their numbers.
        prepare: makes an input of an opened image.
    """

    endings = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

    def __init__(self, folder: Path, classes: Sequence[str], prepare: "ImagePreparation") -> None:
        unknown = sorted(set(_class_folders(folder)) - set(classes))
        if unknown:
            remedy = "give both parts the same class folders"
            raise ValueError(
                fault(f"class folders of {folder}", "those of the training part", unknown[0], remedy)
            )
        self.prepare = prepare
        self.examples = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in self.endings
        ]
        if not self.examples:
            remedy = f"put images ({', '.join(sorted(self.endings))}) into the class folders"
            raise ValueError(fault(f"image folder {folder}", "one with images", "none", remedy))

    def __len__(self) -> int:
        """Counts the images."""
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Reads an image: its input, shape (3, size, size), and its class."""
        path, label = self.examples[index]
        try:
            with optional_package("PIL.Image", "vision").open(path) as image:
                return self.prepare(image), label
        except OSError as error:  # Pillow's own errors are OSErrors too
            got = f"{path} ({first_line(error)})"
            raise ValueError(fault("image", "a readable image file", got, "remove or replace it")) from error


@dataclass(frozen=True)
class ImagePreparation:
    """Turns an image into an input: resize, cut out the centre, scale, normalise.

    Attributes:
        resize: the length of the shorter side after resizing, in pixels.
        size: the side of the central square that is cut out, in pixels.
        scaling: what then turns bytes into numbers.
    """

    resize: int
    size: int
    scaling: Scaling

    def __call__(self, image: Any) -> Tensor:
        """Prepares one image.

        Args:
            image: a `PIL.Image.Image` of any mode.

        Returns:
            The input, shape (3, size, size).
        """
        image = image.convert("RGB")
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, round(side * scale)) for side in image.size)
        bilinear = optional_package("PIL.Image", "vision").Resampling.BILINEAR
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), bilinear).crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(
            2, 0, 1
        )  # (height, width, 3) -> (3, height, width)
        return self.scaling(pixels.unsqueeze(0)).squeeze(0)


def _image_preparation(options: Mapping[str, Any]) -> ImagePreparation:
    optional_package("PIL.Image", "vision")  # said before a folder is searched
    size = checks.integer_between("size", options.get("size", 224), 1, None)
    # 256 for 224, as torchvision's own evaluation does, and the same share for other sizes.
    resize = checks.integer_between("resize", options.get("resize", round(size * 256 / 224)), size, None)
    scaling = _scaling({"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | dict(options))
    scaling.check("images", torch.empty(1, 3, 1, 1, dtype=torch.uint8))
    return ImagePreparation(resize, size, scaling)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(
        place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")
    )
    if not names:
        remedy = "put the images of each class into a folder of its own"
        raise ValueError(fault(f"image folder {folder}", "one with a folder for each class", "none", remedy))
    return tuple(names)


def _hugging_face(reference: Reference) -> Data:
    named = ("config", "train", "test", "input", "target", "tokenizer")
    known = {**NORMALISATION, **PREPARATION, "held_out": _share, "length": int, **dict.fromkeys(named, str)}
    options = reference.options(known)
    datasets = optional_package("datasets", "text")
    try:
        if (Path(reference.place) / "dataset_dict.json").is_file():
            parts = datasets.load_from_disk(reference.place)
        else:
            parts = datasets.load_dataset(reference.place, name=options.get("config"))
    except Exception as error:  # the hub's, the reader's and the connection's errors have no common class
        got = f"{type(error).__name__}: {first_line(error)}"
        remedy = "check the name and the connection, or give a folder that holds the data set"
        argument = f"data set {reference.source!r}"
        raise ConnectionError(fault(argument, "at hand or possible to download", got, remedy)) from error
    train_name = options.get("train", "train" if "train" in parts else next(iter(parts)))
    others = [name for name in ("test", "validation") if name in parts and name != train_name]
    test_name = options.get("test", others[0] if others else None)
    for name in (train_name, test_name):
        if name is not None:
            checks.one_of(f"part of {reference.source!r}", name, list(parts))
    columns = parts[train_name].features
    images = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
    texts = [name for name, feature in columns.items() if getattr(feature, "dtype", None) == "string"]
    input_name = options.get("input", next(iter(images or texts), None))
    if input_name is None or input_name not in [*images, *texts]:
        expected = f"a column of images or text of {reference.source!r}"
        remedy = f"name one of {', '.join(columns)}"
        raise ValueError(fault("input", expected, repr(input_name), remedy))
    labels = [name for name, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels") if name in columns and name not in labels]
    target_name = options.get("target", next(iter(labels), None))
    if target_name is not None:
        checks.one_of("target", target_name, list(columns))
    collate = (
        ImageCollation(input_name, target_name, _image_preparation(options))
        if input_name in images
        else _text_collation(input_name, target_name, reference, options)
    )
    workers = options.get("workers", 0)
    if test_name is None:
        targets = None if target_name is None else torch.tensor(parts[train_name][target_name][:])
        train, test = _divided(parts[train_name], targets, options, reference.source, collate)
    else:
        train, test = (
            DatasetSplit(parts[name], collate=collate, workers=workers, name=f"{reference.source} {name}")
            for name in (train_name, test_name)
        )
    names = getattr(columns[target_name], "names", None) if target_name is not None else None
    return Data(reference.place, reference.source, train, test, None if names is None else tuple(names))


@dataclass(frozen=True)
class ImageCollation:
    """Makes a batch of a Hugging Face data set's rows with an image.

    Attributes:
        input_name: the column with the image.
        target_name: the column with the label; None where there is none.
        prepare: makes an input of an image.
    """

    input_name: str
    target_name: str | None
    prepare: ImagePreparation

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
        """Makes a batch.

        Args:
            rows: the examples.

        Returns:
            Inputs, shape (batch, 3, size, size), and targets, shape (batch,), where there are labels.
        """
        inputs = torch.stack([self.prepare(row[self.input_name]) for row in rows])
        return (inputs,) if self.target_name is None else (inputs, _targets(rows, self.target_name))


@dataclass(frozen=True)
class TextCollation:
    """Makes a batch of a Hugging Face data set's rows with a text.

    Attributes:
        input_name: the column with the text.
        target_name: the column with the label; None where there is none.
        tokenizer: a transformers tokenizer.
        length: the largest number of tokens; longer texts are cut.
    """

    input_name: str
    target_name: str | None
    tokenizer: Callable[..., Mapping[str, Tensor]]
    length: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        """Makes a batch.

        Args:
            rows: the examples.

        Returns:
            The tokenizer's tensors by name, padded to the longest text, and targets where there are labels.
        """
        texts = [row[self.input_name] for row in rows]
        inputs = dict(
            self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        )
        return (inputs,) if self.target_name is None else (inputs, _targets(rows, self.target_name))


def _targets(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return numeric_tensor(f"column {name}", np.array([row[name] for row in rows]))


def _text_collation(
    input_name: str, target_name: str | None, reference: Reference, options: Mapping[str, Any]
) -> TextCollation:
    if "tokenizer" not in options:
        remedy = f"write {reference.source}{'&' if reference.given_options else '?'}tokenizer=MODEL_NAME"
        raise ValueError(fault("tokenizer", f"named for the text column {input_name!r}", "none", remedy))
    transformers = optional_package("transformers", "text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options["tokenizer"])
    except Exception as error:  # as for the data set itself
        got = f"{type(error).__name__}: {first_line(error)}"
        remedy = "check the name and the connection, or give a folder that holds the tokenizer"
        argument = f"tokenizer {options['tokenizer']!r}"
        raise ConnectionError(fault(argument, "at hand or possible to download", got, remedy)) from error
    # Tokenizers without a limit of their own say 1e30.
    length = checks.integer_between(
        "length", options.get("length", min(tokenizer.model_max_length, 512)), 1, None
    )
    return TextCollation(input_name, target_name, tokenizer, length)


def _divided(
    dataset: Any,
    labels: Tensor | None,
    options: Mapping[str, Any],
    name: str,
    collate: Callable[[list[Any]], Any] | None = None,
) -> tuple[DatasetSplit | None, DatasetSplit | None]:
    # hold_out for data that is read when it is asked for.
    groups = held_out_indices(len(dataset), labels, options.get("held_out", HELD_OUT))
    train, test = (
        DatasetSplit(
            Subset(dataset, indices.tolist()), collate=collate, workers=options.get("workers", 0), name=name
        )
        if len(indices)
        else None
        for indices in groups
    )
    return train, test


def _from_function(reference: Reference) -> Data:
    returned = call_function("data", reference)
    if isinstance(returned, Data):
        return replace(returned, source=reference.source)
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        expected = f"a Data or a pair (train, test) as the return value of {reference.source}"
        raise TypeError(fault("data", expected, got, "return a pair; either may be None"))
    train, test = (
        None if part is None else as_split(part, name)
        for part, name in zip(returned, ("train", "test"), strict=True)
    )
    return Data(reference.place.rpartition(":")[2], reference.source, train, test)


DATA_SOURCES: Mapping[str, Callable[[Reference], Data]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagefolder": _image_folder,
    "npz": _npz,
    "hf": _hugging_face,
    FILE_PREFIX: _from_function,
}
"""For every prefix of a data source the function that loads it."""


def _required_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_arrays("npz file", path, names)
    missing = [name for name in names if name not in arrays]
    if missing:
        got = f"no {', '.join(missing)} in {path}"
        raise ValueError(fault("npz file", f"one with the arrays {', '.join(names)}", got, "check the file"))
    return arrays


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _share(text: str) -> float:
    return checks.share("held_out", float(text), zero_allowed=True)


NORMALISATION: Mapping[str, Callable[[str], Any]] = {"mean": _numbers, "std": _numbers}
PREPARATION: Mapping[str, Callable[[str], Any]] = {"size": int, "resize": int, "workers": int}


def _scaling(options: Mapping[str, Any]) -> Scaling:
    return Scaling(mean=options.get("mean"), std=options.get("std"))
