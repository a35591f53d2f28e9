"""Derives the pixel scale that an ONNX graph expects, from the inputs of its first computations.

Three ranges of pixels are tried: 0..255, -1..1 and 0..1.

- The graph expects 0..255 or 0..1 if it scales these to a range that is usual for networks: black
  between -3 and -0.9, white between 0.9 and 3. This includes (x - 127.5) / 128, 2 x - 1 and the
  mean and deviation of ImageNet.
- The graph expects -1..1 if it leaves these unchanged, which is the convention of insightface and
  arcface_torch for a graph that does not scale its images.
- If the first computation is a BatchNormalization, its statistics replace the usual range: their
  mean must be near the middle of the range that arrives there, and their deviation 5 to 45 % of
  that range (50 % is the largest possible). One with the name bn_data, as in networks of MXNet,
  expects 0..255.
- If the graph quantises its images, the range that arrives must lie mostly within the range to
  which the quantisation clips, and cover at least an eighth of it.
- Images of uint8 can only be 0..255.

Unless exactly one range fits, the scale is unknown and must be specified. This happens if the scale
varies within the image, if an unknown operator scales it, if two values of the image are combined
(as in normalisation by the image's own statistics), if the image is inverted, or if the graph
expects any other range.

Channels are RGB by convention. The order is unknown and must be specified if the graph changes it
(from BGR to RGB, or vice versa), or if the graph expects the third channel to be brighter than the
first: in pictures, red is brighter than blue.
"""

from __future__ import annotations

import numpy as np

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import Array
from kdhooks.onnx.probes import Arrival

_RANGES = {(0.0, 1.0): (0.0, 255.0), (127.5, 127.5): (-1.0, 1.0), (0.0, 255.0): (0.0, 1.0)}
_BRIGHTER = 0.1  # standard deviations; red and blue differ by 0.35 in ImageNet


def check_order(arrivals: list[Arrival], name: str) -> None:
    """Refuse a graph that changes the order of the channels, or seems to take BGR."""
    way_out = 'specify teacher.input.order, "rgb" or "bgr"'
    for arrival in arrivals:
        order = list(dict.fromkeys(arrival.channels[arrival.gain != 0].tolist()))
        if order != sorted(order):
            raise KDHooksError(
                f"{name} puts the channels of its images in another order, {order}, but does not "
                f"show whether it takes RGB or BGR; {way_out}"
            )
        if order == [0, 1, 2] and arrival.gain.all() and _seems_bgr(arrival):
            raise KDHooksError(
                f"{name} expects the third channel of its images to be brighter than the first, "
                f"as if they were BGR; {way_out}"
            )


def mean_std(arrivals: list[Arrival], unknown: str, name: str) -> tuple[float, float]:
    """Return the mean and std for which the graph expects (pixel - mean) / std."""
    way_out = "specify mean and std in teacher.input, or mean_std=(mean, std) in Python"
    if unknown:
        raise KDHooksError(
            f"the scale of the images that {name} expects can't be derived, because {unknown}; "
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
            f"{name} quantises its images to numbers from {low:.4g} to {high:.4g}, which fits no "
            f"usual scale of 0..255 or -1..1; {way_out}"
        )
    statistics = [x.statistics for x in arrivals if x.statistics is not None]
    if statistics:
        mean, deviation = (_shown([x]) for x in statistics[0])
        raise KDHooksError(
            f"{name} starts with a BatchNormalization, whose statistics are expected to fit one "
            f"range of images, but mean {mean} and deviation {deviation} do not; {way_out}"
        )
    black, white = ([x.black + x.gain * pixel for x in arrivals] for pixel in (0, 255))
    raise KDHooksError(
        f"a graph that scales its images is expected to map 0..255 to -1..1, but {name} maps "
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
    """Whether pixels fit a quantised range, which calibration may have clipped or made symmetric.

    limits: the quantised range. start, end: the range of the pixels that arrive.
    """
    low, high = limits
    slack = (high - low) / 4
    return low - slack <= start and end <= high + slack and end - start >= (high - low) / 8


def _seems_bgr(arrival: Arrival) -> bool:
    """Whether the graph expects an average pixel that is clearly brighter in the third channel.

    A computation without statistics expects values of mean 0 and deviation 1.
    """
    mean, deviation = arrival.statistics or (np.zeros(1), np.ones(1))
    average, unit = (mean - arrival.black) / arrival.gain, np.abs(deviation / arrival.gain)
    red, blue = (average[arrival.channels == channel].mean() for channel in (0, 2))
    return bool(blue > red + _BRIGHTER * unit.mean())


def _shown(values: list[Array]) -> str:
    low, high = min(x.min() for x in values), max(x.max() for x in values)
    return f"{low:.4g}" if np.isclose(low, high) else f"({low:.4g} to {high:.4g})"
