"""The scale of images: kdhooks converts from RGB in [-1, 1], (pixel - 127.5) / 127.5."""

from torch import Tensor

from kdhooks.errors import KDHooksError

_BEYOND = 0.2
"""The largest share of numbers outside, as noise is; about a third is if scaled as for ImageNet."""


def check_pixels(images: Tensor, subject: str, way_out: str) -> None:
    """Check that images (b 3 h w) are in [-1, 1], and not in [0, 1]. This waits for the device.

    subject, way_out: the beginning and the end of the message of the KDHooksError.
    """
    images = images.detach()
    low, high = (float(bound) for bound in images.aminmax())
    beyond = float((images.abs() > 1.01).float().mean())
    if beyond > _BEYOND or low >= 0 < high:
        raise KDHooksError(
            f"{subject} must be RGB in [-1, 1], (pixel - 127.5) / 127.5; found numbers from "
            f"{low:.3g} to {high:.3g} in the first batch; {way_out}"
        )
