"""Images moved, turned and mirrored at random while they train."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft import checks


class Augmented:
    """Batches of (images, labels) whose images are changed at random, differently in every pass.

    Every image is turned by an angle, mirrored and shifted by whole pixels, as random crops of padded images
    are; what comes in from outside is zero. Only images that are turned are interpolated (bilinearly): all
    others keep their pixels, as an interpolated shift would blur what the network has to tell apart. What a
    pass draws follows from the seed and the number of the pass, so that a resumed training sees the same
    images.

    Args:
        batches: (images, labels) pairs or images alone, of shape (batch, channels, height, width), floating.
        shift: the largest shift in whole pixels, in either direction and axis; all shifts are as likely.
        rotation: the largest angle in degrees, in either direction.
        flip: whether half of the images are mirrored left to right.
        seed: decides what is drawn.

    Raises:
        TypeError: the shift is no whole number.
        ValueError: a number is negative.

    Examples:
        >>> data = [(torch.ones(2, 1, 4, 4), torch.zeros(2).long())]
        >>> images, labels = next(iter(Augmented(data, shift=1)))
        >>> images.shape, float(images.max())
        (torch.Size([2, 1, 4, 4]), 1.0)
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        shift: int = 0,
        rotation: float = 0.0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        checks.integer_between("shift", shift, 0, None)
        if not rotation >= 0:
            raise ValueError(checks.fault("rotation", "at least 0", rotation, "use 0 for none"))
        self.batches = batches
        self.shift, self.rotation, self.flip, self.seed = shift, rotation, flip, seed
        self.passes = 0

    @classmethod
    def parse(cls, batches: Iterable[Any], text: str, *, seed: int = 0) -> "Augmented":
        """Makes one from text.

        Args:
            batches: what to change.
            text: such as "shift=2,rotation=10,flip".
            seed: decides what is drawn.

        Returns:
            The batches.

        Raises:
            ValueError: the text is not of this form.
        """
        options: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            try:
                numbers = {"shift": int, "rotation": float}
                options[name] = numbers[name](value) if value else {"flip": True}[name]
            except (KeyError, ValueError):
                expected = "such as shift=2,rotation=10,flip"
                raise ValueError(checks.fault("augment", expected, repr(part), "name only these")) from None
        return cls(batches, **options, seed=seed)

    def resume_at(self, passes: int) -> None:
        """Continues an interrupted training: the next pass draws as pass number `passes`."""
        self.passes = checks.integer_between("passes", passes, 0, None)

    def __len__(self) -> int:
        """Counts the batches."""
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Any]:
        """Starts another pass."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        self.passes += 1
        for batch in self.batches:
            if isinstance(batch, list | tuple) and len(batch) == 2:
                yield self._changed(batch[0], generator), batch[1]
            else:
                yield self._changed(batch, generator)

    def _changed(self, images: Any, generator: torch.Generator) -> Tensor:
        if not (isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()):
            got = type(images).__name__
            if isinstance(images, Tensor):
                got = f"{images.dtype} of shape {tuple(images.shape)}"
            expected = "floating images of shape (batch, channels, height, width)"
            raise ValueError(checks.fault("inputs", expected, got, "leave augmentation out"))
        count, _, height, width = images.shape
        draw = torch.rand(4, count, generator=generator, dtype=torch.float64) * 2 - 1
        angle = draw[0] * math.radians(self.rotation)
        mirror = 1 - 2 * (draw[3] < 0).double() if self.flip else torch.ones(count, dtype=torch.float64)
        cosine, sine = angle.cos(), angle.sin()
        # Both ends are as likely as what lies between them.
        shift = (draw[1:3] * (self.shift + 0.5)).round().clamp(-self.shift, self.shift)
        # affine_grid's coordinates run from −1 to 1 along either axis: an angle has to know their lengths.
        along = [mirror * cosine, -mirror * sine * height / width, shift[0] * 2 / width]
        down = [sine * width / height, cosine, shift[1] * 2 / height]
        # Places in half precision would be off by pixels.
        wide = images if images.dtype == torch.float64 else images.float()
        matrices = torch.stack([torch.stack(along, 1), torch.stack(down, 1)], 1).to(wide)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        mode = "bilinear" if self.rotation else "nearest"
        moved = F.grid_sample(wide, grid, mode=mode, padding_mode="zeros", align_corners=False)
        return moved.to(images.dtype)
