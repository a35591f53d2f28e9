"""Smaller forms of the exported ONNX file, and what they keep of its embeddings of real faces."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdhooks.arguments import at_least, share
from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import PairSet
from kdhooks.onnx.files import read_recognition_file
from kdhooks.onnx.lower_precision import DEFAULT_METHOD, METHODS, write_float16, write_int8
from kdhooks.onnx.session import OnnxModel
from kdhooks.verification import Floats, pair_scores, unit, verify
from kdhooks_integrations.arcface_torch.commands.checked_faces import CALIBRATING, Chosen, Faces
from kdhooks_integrations.arcface_torch.commands.parsing import path

LEAST_COSINE = {"int8": 0.99, "float16": 0.999}
"""Of a form's embeddings to the float file's, on average over the faces that are checked."""


def add_precision(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--int8",
        action="store_true",
        help="also write model_int8.onnx, whose weights and activations are int8 (default: off)",
    )
    add(
        "--calibrate",
        type=path,
        metavar="FACES",
        help="folder or zip of aligned faces, of which some give the ranges of the activations of "
        "--int8 (default: none)",
    )
    add(
        "--calibration-images",
        type=at_least(1),
        metavar="N",
        help="how many faces give the ranges, at most; half of the faces at most, if the others "
        f"check the file (default: {CALIBRATING})",
    )
    add(
        "--calibration-method",
        choices=tuple(METHODS),
        help="how a range follows from the values of an activation; all but minmax keep every "
        f"activation of every face in memory (default: {DEFAULT_METHOD})",
    )
    add(
        "--float16",
        action="store_true",
        help="also write model_float16.onnx, whose weights and activations are float16 "
        "(default: off)",
    )
    add(
        "--float16-images",
        action="store_true",
        help="let model_float16.onnx take images and return embeddings in float16, which "
        "insightface does not (default: off, they are float32)",
    )
    add(
        "--data",
        type=path,
        metavar="FACES",
        help="folder or zip of aligned faces on which the files are checked (default: those of "
        "--calibrate that give no ranges)",
    )
    add(
        "--pairs",
        type=path,
        metavar="FILE",
        help="pairs of the faces in the format of LFW's pairs.txt, on which the accuracy of each "
        "file is measured (default: none)",
    )
    add(
        "--least-cosine",
        type=share,
        metavar="COSINE",
        help="mean cosine to the embeddings of model.onnx under which nothing is written "
        f"(default: {LEAST_COSINE['int8']} for int8, {LEAST_COSINE['float16']} for float16)",
    )


def check_precision(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and forms that can't be checked."""
    if options.int8 and options.calibrate is None:
        raise KDHooksError(
            "export: --int8 needs faces that give the ranges of the activations; found no "
            "--calibrate; name a folder or zip of aligned faces"
        )
    if options.calibrate is not None and not options.int8:
        raise KDHooksError(
            "export: --calibrate is for --int8; found it without; add --int8, or name the faces "
            "by --data"
        )
    if options.float16_images and not options.float16:
        raise KDHooksError("export: --float16-images is for --float16; found it without; add it")
    if options.float16 and options.data is None and options.calibrate is None:
        raise KDHooksError(
            "export: --float16 needs faces on which the file is checked; found no --data; name a "
            "folder or zip of aligned faces"
        )
    for name in ("data", "pairs", "least_cosine"):
        if getattr(options, name) is not None and not (options.int8 or options.float16):
            raise KDHooksError(
                f"export: --{name.replace('_', '-')} is for --int8 and --float16; found neither; "
                "add one of them"
            )
    for name in ("calibration_images", "calibration_method"):
        if getattr(options, name) is not None and not options.int8:
            raise KDHooksError(
                f"export: --{name.replace('_', '-')} is for --int8; found it without; add --int8"
            )


@dataclass(frozen=True)
class Kept:
    """How a form compares with the float file."""

    name: str  # of the file
    lines: tuple[str, ...]


def write_forms(options: argparse.Namespace, chosen: Chosen, folder: Path) -> list[Kept]:
    """Beside model.onnx in the folder; raises if a form's embeddings differ too much."""
    source, forms = folder / "model.onnx", {}
    method = options.calibration_method or DEFAULT_METHOD
    if chosen.calibrating is not None:
        forms["int8"] = folder / "model_int8.onnx"
        write_int8(source, forms["int8"], chosen.calibrating.batches(), method)
    if options.float16:
        forms["float16"] = folder / "model_float16.onnx"
        write_float16(source, forms["float16"], images=options.float16_images)
    plain, *others = _embeddings([source, *forms.values()], chosen.checked)
    kept = []
    for (form, file), found in zip(forms.items(), others, strict=True):
        cosines = (unit(plain) * unit(found)).sum(axis=1)
        _refuse_if_far(form, cosines, options.least_cosine or LEAST_COSINE[form])
        lines = [f"{_megabytes(file)} MB instead of {_megabytes(source)} MB"]
        if chosen.calibrating is not None and form == "int8":
            count = len(chosen.calibrating.names)
            lines.append(f"calibrated on {count:,} faces, by {method}")
        which = "faces" if chosen.calibrating is None else "other faces"
        lines.append(
            f"cosine to float on {len(cosines):,} {which}: {cosines.mean():.4f} on average, "
            f"{cosines.min():.4f} at least"
        )
        if chosen.pairs is not None:
            before, after = (_accuracy(each, chosen.pairs) for each in (plain, found))
            count = len(chosen.pairs.same)
            lines.append(f"accuracy on {count:,} pairs: {after:.2f} % (float: {before:.2f} %)")
        kept.append(Kept(file.name, tuple(lines)))
    return kept


def _embeddings(files: Sequence[Path], faces: Faces) -> list[Floats]:
    """(n d) of each file."""
    # Its scale need not be found in the graph, whose quantised images may end before 1.
    models = [OnnxModel(read_recognition_file(file, (127.5, 127.5))) for file in files]
    found: list[list[Floats]] = [[] for _ in models]
    for images in faces.batches():
        for model, parts in zip(models, found, strict=True):
            parts.append(model(images).double().numpy())
    return [np.concatenate(parts) for parts in found]


def _refuse_if_far(form: str, cosines: Floats, least: float) -> None:
    if not cosines.mean() >= least:
        way_out = (
            "calibrate on more faces, or on faces like those that the network will see, or by "
            "another --calibration-method"
            if form == "int8"
            else "its activations may be too large for float16"
        )
        raise KDHooksError(
            f"export: the embeddings of the {form} file must have a mean cosine of {least} or more "
            f"to those of the float file; found {cosines.mean():.4f} on {len(cosines):,} faces; "
            f"{way_out}; --least-cosine allows less"
        )


def _accuracy(embeddings: Floats, pairs: PairSet) -> float:
    """In per cent, without mirror images."""
    scores = pair_scores(embeddings, pairs.rows)
    return 100 * verify(scores, pairs.same, pairs.folds, fars=()).accuracy


def _megabytes(file: Path) -> str:
    """With the weights that lie in a file beside it."""
    size = sum(os.path.getsize(path) for path in file.parent.glob(f"{file.name}*"))
    return f"{size / 1e6:.1f}"
