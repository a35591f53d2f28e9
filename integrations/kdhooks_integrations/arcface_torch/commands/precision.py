"""Writes int8 and float16 forms of the exported ONNX file, and compares their embeddings."""

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
"""The least mean cosine between a form's embeddings and those of the float file."""


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
        help="folder or zip of aligned faces, from some of which --int8 determines the ranges of "
        "the activations (default: none)",
    )
    add(
        "--calibration-images",
        type=at_least(1),
        metavar="N",
        help="largest number of faces for the calibration; at most half of all faces if the others "
        f"are needed to check the file (default: {CALIBRATING})",
    )
    add(
        "--calibration-method",
        choices=tuple(METHODS),
        help="how to determine a range from the values of an activation; all except minmax keep "
        f"every activation of every face in memory (default: {DEFAULT_METHOD})",
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
        help="make the images and embeddings of model_float16.onnx float16, which insightface does "
        "not support (default: off, they are float32)",
    )
    add(
        "--data",
        type=path,
        metavar="FACES",
        help="folder or zip of aligned faces on which the files are checked (default: those of "
        "--calibrate that are not used for the calibration)",
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
        help="least mean cosine to the embeddings of model.onnx; below it, nothing is written "
        f"(default: {LEAST_COSINE['int8']} for int8, {LEAST_COSINE['float16']} for float16)",
    )


def check_precision(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and forms that cannot be checked."""
    if options.int8 and options.calibrate is None:
        raise KDHooksError(
            "export: --int8 needs faces for the calibration; found no --calibrate; name a folder "
            "or zip of aligned faces"
        )
    if options.calibrate is not None and not options.int8:
        raise KDHooksError(
            "export: --calibrate is for --int8; found it without --int8; add --int8, or name the "
            "faces by --data"
        )
    if options.float16_images and not options.float16:
        raise KDHooksError(
            "export: --float16-images is for --float16; found it without --float16; add --float16"
        )
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
                f"export: --{name.replace('_', '-')} is for --int8; found it without --int8; add "
                "--int8"
            )


@dataclass(frozen=True)
class Kept:
    """A file in lower precision that was written, and its comparison with the float file."""

    name: str  # the file's name
    lines: tuple[str, ...]  # the comparison, as text


def write_forms(options: argparse.Namespace, chosen: Chosen, folder: Path) -> list[Kept]:
    """Write the forms to the folder of model.onnx; raise if their embeddings differ too much."""
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
            f"lowest {cosines.min():.4f}"
        )
        if chosen.pairs is not None:
            before, after = (_accuracy(each, chosen.pairs) for each in (plain, found))
            count = len(chosen.pairs.same)
            lines.append(f"accuracy on {count:,} pairs: {after:.2f} % (float: {before:.2f} %)")
        kept.append(Kept(file.name, tuple(lines)))
    return kept


def _embeddings(files: Sequence[Path], faces: Faces) -> list[Floats]:
    """Return the embeddings (n d) of each file."""
    # The scale is passed, since the quantised images of a graph may not reach 1, and then it cannot
    # be found in the graph.
    models = [OnnxModel(read_recognition_file(file, (127.5, 127.5))) for file in files]
    found: list[list[Floats]] = [[] for _ in models]
    for images in faces.batches():
        for model, parts in zip(models, found, strict=True):
            parts.append(model(images).double().numpy())
    return [np.concatenate(parts) for parts in found]


def _refuse_if_far(form: str, cosines: Floats, least: float) -> None:
    if not cosines.mean() >= least:
        way_out = (
            "calibrate on more faces, on faces like those that the network will see, or with "
            "another --calibration-method"
            if form == "int8"
            else "its activations may be too large for float16"
        )
        raise KDHooksError(
            f"export: the embeddings of the {form} file must have a mean cosine of at least "
            f"{least} to those of the float file; found {cosines.mean():.4f} on {len(cosines):,} "
            "faces; "
            f"{way_out}; --least-cosine sets another limit"
        )


def _accuracy(embeddings: Floats, pairs: PairSet) -> float:
    """Return the accuracy in per cent, without mirror images."""
    scores = pair_scores(embeddings, pairs.rows)
    return 100 * verify(scores, pairs.same, pairs.folds, fars=()).accuracy


def _megabytes(file: Path) -> str:
    """Return the size of an ONNX file, including weights that are stored in a separate file."""
    size = sum(os.path.getsize(path) for path in file.parent.glob(f"{file.name}*"))
    return f"{size / 1e6:.1f}"
