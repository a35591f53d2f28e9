"""`kdhooks evaluate` measures how well models tell people apart, and whether they agree.

    kdhooks evaluate student/model.onnx buffalo_l --data faces/lfw.bin faces/cfp_fp.bin
    kdhooks evaluate ours=work_dirs/x/model.pt teacher --network r50 --recipe kd.toml \\
        --data lfw112.zip --pairs pairs.txt --far 1e-2 1e-3 --picture roc.png
    kdhooks evaluate work_dirs/x/model.pt --network r50 --data faces --protocol insightface

MODEL is one of: an ONNX file; a checkpoint (with --network); the name of an installed insightface
pack; "teacher", the recipe's teacher (several are joined); or "teacher.0", the first of several.
NAME=MODEL gives it another name.

The table has a row for each model, and one for any two models, where one embeds the first image of
each pair and the other the second. It shows the accuracy with its standard deviation over the
folds, the EER, and the TAR at each FAR.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import FOLDS, read_pair_sets
from kdhooks.recipe import Recipe
from kdhooks.views.student_view import StudentView, ViewTable
from kdhooks.views.viewing import Viewing
from kdhooks_integrations.arcface_torch.commands.compared import compare
from kdhooks_integrations.arcface_torch.commands.embedding import SUBJECT, Embedder
from kdhooks_integrations.arcface_torch.commands.evaluate_options import (
    BATCH,
    FARS,
    TRAINERS_BATCH,
    check_evaluate,
    evaluate_parser,
)
from kdhooks_integrations.arcface_torch.commands.models import Checkpoints, open_models
from kdhooks_integrations.arcface_torch.commands.networks import enter_trainer
from kdhooks_integrations.arcface_torch.commands.parsing import as_json, quiet_stdout
from kdhooks_integrations.arcface_torch.commands.pictures import as_input, as_verified
from kdhooks_integrations.arcface_torch.commands.results import (
    as_content,
    as_sentences,
    as_table,
    can_draw,
    draw,
    write_text,
)

_SHAPE = (3, 112, 112)


def main(argv: Sequence[str]) -> int:
    options = evaluate_parser(__doc__).parse_args(argv)
    check_evaluate(options)
    picture: Path | None = options.picture
    if picture is not None and not can_draw():
        picture = None
    enter_trainer(options.trainer)
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    embedder = _embedder(options, recipe)
    trainers = options.protocol == "insightface"
    fars = tuple(dict.fromkeys(options.far or FARS))
    printed = options.json == Path("-")
    with quiet_stdout(printed):
        sets = read_pair_sets(options.data, options.pairs, options.folds or FOLDS, SUBJECT)
        how = Checkpoints(
            options.network or (), options.embedding_size, options.weights, options.fp16 or None
        )
        models = open_models(options.models, recipe, how, options.root)
        compared = [
            compare(models, tested, embedder, fars, trainers, _progress(tested.name))
            for tested in sets
        ]
    seen = None if embedder.view is None else _described(embedder.view)
    if not printed:
        print(as_table(compared, fars, trainers), end="\n\n")
        for sentence in as_sentences(compared, options.flip, seen):
            print(sentence)
    if options.json is not None:
        content = {
            "protocol": options.protocol,
            "flip": options.flip,
            "view": seen,
            "models": [{"model": model.name, "source": model.source} for model in models],
            "sets": as_content(compared),
        }
        if printed:
            print(as_json(content))
        else:
            write_text(f"{as_json(content)}\n", options.json, "--json")
    if picture is not None:
        draw(compared, picture)
    return 0


def _embedder(options: argparse.Namespace, recipe: Recipe | None) -> Embedder:
    trainers = options.protocol == "insightface"
    return Embedder(
        shape=_SHAPE if recipe is None else recipe.input_shape,
        device=options.device,
        batch=options.batch_size or (TRAINERS_BATCH if trainers else BATCH),
        flip=options.flip,
        view=_view(recipe) if options.view and recipe is not None else None,
        scaled=as_verified if trainers else as_input,
        whole_batches=trainers,
    )


def _view(recipe: Recipe) -> Viewing:
    table = recipe.student_view
    if not isinstance(table, ViewTable):  # only Python code can give a module instead
        raise KDHooksError(
            "evaluate: --view applies the student_view of the recipe; found a recipe without one; "
            "add [student_view] to it, or leave --view out"
        )
    return Viewing(StudentView.of(table), recipe.seed)


def _described(view: Viewing) -> str:
    return f"{view.view.extra_repr()}, seed {view.seed}"


def _progress(name: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        # The next line, which may be an error, overwrites this one.
        end = "\n" if done == total else "\r"
        print(f"{name}: {done} of {total} images", end=end, file=sys.stderr, flush=True)

    return show
