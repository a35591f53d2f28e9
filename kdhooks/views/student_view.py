"""The built-in views, each with a probability, in the order in which they arise in a camera."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.kinds import OptionError
from kdhooks.options import Options, option
from kdhooks.pixel_range import check_pixels
from kdhooks.views.blocks import Blocks
from kdhooks.views.blur import Blur
from kdhooks.views.draws import Draws
from kdhooks.views.grey import Grey
from kdhooks.views.low_resolution import LowResolution
from kdhooks.views.mask import Mask


class ViewTable(Options, subject="student_view"):
    """The student's views in training, applied in the order of this table if they are set."""

    mask: Mask | None = option(None, "A mask over nose, mouth and chin.")
    grey: Grey | None = option(None, "Images without colour.")
    blur: Blur | None = option(None, "A Gaussian blur.")
    low_resolution: LowResolution | None = option(
        None, "Images with fewer pixels, resampled to the input size again."
    )
    blocks: Blocks | None = option(None, "Compression in blocks, as in JPEG.")

    rules: ClassVar[Mapping[str, Any]] = {"minProperties": 1}

    def check(self) -> None:
        if not self.parts():
            raise OptionError(
                f"must name at least one view ({', '.join(KINDS)}); found an empty table",
                subject=type(self).subject,
            )

    def parts(self) -> dict[str, "Part"]:
        """Return the views that are set, by name, in the order of the table."""
        found = {name: getattr(self, name) for name in KINDS}
        return {name: part for name, part in found.items() if part is not None}


_ABSOLUTE = (Mask, Blocks)  # these know what black and white are, the others work on any scale
Part = Mask | Grey | Blur | LowResolution | Blocks
KINDS: dict[str, type[Part]] = {
    "mask": Mask,
    "grey": Grey,
    "blur": Blur,
    "low_resolution": LowResolution,
    "blocks": Blocks,
}


class StudentView(nn.Module):
    """Views of faces as cameras see them: masked, grey, blurred, small, compressed.

        view = StudentView(low_resolution={"sizes": [14, 28]}, mask={"p": 0.5})

    The random numbers of each image are independent. Each view has its own, so that adding a view
    does not change those of the others.
    """

    def __init__(self, **options: object) -> None:
        """options: the tables of `[student_view]` in a recipe, by name."""
        super().__init__()
        self.table = ViewTable.read(options)
        self.parts = nn.ModuleDict(
            {name: part.module() for name, part in self.table.parts().items()}
        )
        self.expect_first_batch()

    @classmethod
    def of(cls, table: ViewTable) -> Self:
        return cls(**table.parts())

    def expect_first_batch(self) -> None:
        """Check the scale of the next images, if a view needs black and white."""
        self._checked = not any(isinstance(part, _ABSOLUTE) for part in self.table.parts().values())

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """(b 3 h w) in [-1, 1], RGB -> (b 3 h w) of the same dtype."""
        if images.shape[1] != 3:
            raise KDHooksError(
                "student_view needs RGB images (b 3 h w) for the built-in views; found the shape "
                f"{tuple(images.shape)}; use a view of your own as student_view"
            )
        if not self._checked:  # in the first batch only, since this waits for the device
            check_pixels(
                images,
                "student_view: images for the views mask and blocks",
                "scale the images before the student, or use a view of your own",
            )
            self._checked = True
        parts = self.table.parts()
        numbers = draws.uniform(sum(kind.numbers for kind in KINDS.values()))
        seen = images.to(torch.promote_types(images.dtype, torch.float32))
        end = 0
        for name, kind in KINDS.items():
            start, end = end, end + kind.numbers
            if name in parts:
                changed = self.parts[name](seen, numbers[:, start + 1 : end])
                drawn = numbers[:, start, None, None, None] < parts[name].p
                seen = torch.where(drawn, changed, seen)
        return seen.to(images.dtype)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.table.parts().values()))
