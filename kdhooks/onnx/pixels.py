"""How an ONNX graph wants the pixels of its images, derived from what its first computations see.

Three ranges of pixels are tried, 0..255, -1..1 and 0..1:

- Pixels 0..255 or 0..1 are wanted if they arrive as usual for networks: black between -3 and -0.9,
  white between 0.9 and 3. That holds (x - 127.5) / 128, 2 x - 1 and the statistics of ImageNet.
- Pixels -1..1 are wanted if they arrive as they are, which is the convention of insightface and
  arcface_torch for a graph that scales nothing.
- If the first computation is a BatchNormalization, its statistics take the place of the usual
  range: their mean must lie near the middle of the pixels that arrive, and their deviation be 5 to
  45 % of the range (50 % is the most that pixels can have). One that is called bn_data, as MXNet's
  networks have it, gets 0..255.
- If images are quantised, most of what arrives must lie within the numbers that this clips to, and
  take up an eighth of them at least.
- Images of uint8 can only be 0..255.

The scale counts as unknown, and must be specified, unless exactly one range fits: scales that
differ in space, an operator that is not known on the way, two values of the image that meet
(normalisation by the image's own statistics), an inverted image, other ranges.

Channels are RGB by convention. The order counts as unknown, and must be specified, if the graph
changes it (it may take BGR and turn it to RGB, or vice versa), or if it takes the third channel to
be brighter than the first: in pictures red is brighter than blue.
"""

from __future__ import annotations

import numpy as np

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import Array
from kdhooks.onnx.probes import Arrival

_RANGES = {(0.0, 1.0): (0.0, 255.0), (127.5, 127.5): (-1.0, 1.0), (0.0, 255.0): (0.0, 1.0)}
_BRIGHTER = 0.1  # deviations; red and blue differ by 0.35 in ImageNet


def check_order(arrivals: list[Arrival], name: str) -> None:
    """Refuse a graph that changes the order of the channels, or seems to take BGR."""
    way_out = 'specify teacher.input.order, "rgb" or "bgr"'
    for arrival in arrivals:
        order = list(dict.fromkeys(arrival.channels[arrival.gain != 0].tolist()))
        if order != sorted(order):
            raise KDHooksError(
                f"{name} puts the channels of its images in another order, {order}, and nothing "
                f"in it tells whether it takes RGB or BGR; {way_out}"
            )
        if order == [0, 1, 2] and arrival.gain.all() and _seems_bgr(arrival):
            raise KDHooksError(
                f"{name} takes the third channel of its images to be brighter than the first, as "
                f"if they were BGR; {way_out}"
            )


def mean_std(arrivals: list[Arrival], unknown: str, name: str) -> tuple[float, float]:
    """What must be done to pixels before the graph, as (pixel - mean) / std."""
    way_out = "say what it expects: mean and std in teacher.input, mean_std=(mean, std) in Python"
    if unknown:
        raise KDHooksError(
            f"the scale of the images that {name} expects can't be derived, for {unknown}; "
            f"{way_out}, and order if the channels are BGR"
        )
    if not arrivals:
        return 127.5, 127.5
    fitting = [
        scale
        for scale, (low, high) in _RANGES.items()
        if all(_fits(arrival, low, high) for arrival in arrivals)
    ]
    if len(fitting) == 1:
        return fitting[0]
    limits = [x.limits for x in arrivals if x.limits is not None]
    if limits and not fitting:
        low, high = limits[0]
        raise KDHooksError(
            f"{name} quantises its images to numbers from {low:.4g} to {high:.4g}, which are not "
            f"what any usual scale of 0..255 or -1..1 brings there; {way_out}"
        )
    statistics = [x.statistics for x in arrivals if x.statistics is not None]
    if statistics:
        mean, deviation = (_shown([x]) for x in statistics[0])
        raise KDHooksError(
            f"{name} begins with a BatchNormalization, whose statistics are expected to tell the "
            f"range of its images, but mean {mean} and deviation {deviation} do not; {way_out}"
        )
    black, white = ([x.black + x.gain * pixel for x in arrivals] for pixel in (0, 255))
    raise KDHooksError(
        f"a graph that scales its images is expected to bring 0..255 to -1..1, but {name} brings "
        f"it to {_shown(black)}..{_shown(white)}; {way_out}"
    )


def _fits(arrival: Arrival, low: float, high: float) -> bool:
    """Whether images with pixels from low to high are what the computation expects."""
    start, end = (arrival.black + arrival.gain * pixel for pixel in (low, high))
    if arrival.limits is not None:
        return _are_within(arrival.limits, float(np.min(start)), float(np.max(end)))
    if arrival.bn_data:
        return high == 255
    if arrival.statistics is not None:
        mean, deviation = arrival.statistics
        width = np.abs(end - start)
        near = np.abs(mean - (start + end) / 2) <= width / 4
        return bool(np.all(near & (deviation >= 0.05 * width) & (deviation <= 0.45 * width)))
    if low < 0:
        return np.allclose(start, -1, atol=0.02) and np.allclose(end, 1, atol=0.02)
    return bool(np.all((start >= -3) & (start <= -0.9) & (end >= 0.9) & (end <= 3)))


def _are_within(limits: tuple[float, float], start: float, end: float) -> bool:
    """Calibration may have clipped either end, or widened the range until it was symmetric."""
    low, high = limits
    slack = (high - low) / 4
    return low - slack <= start and end <= high + slack and end - start >= (high - low) / 8


def _seems_bgr(arrival: Arrival) -> bool:
    """Whether the pixel that counts as average is clearly higher in the third channel.

    A computation without statistics expects values of mean 0 and deviation 1.
    """
    mean, deviation = arrival.statistics or (np.zeros(1), np.ones(1))
    average, unit = (mean - arrival.black) / arrival.gain, np.abs(deviation / arrival.gain)
    red, blue = (average[arrival.channels == channel].mean() for channel in (0, 2))
    return bool(blue > red + _BRIGHTER * unit.mean())


def _shown(values: list[Array]) -> str:
    low, high = min(x.min() for x in values), max(x.max() for x in values)
    return f"{low:.4g}" if np.isclose(low, high) else f"({low:.4g} to {high:.4g})"
