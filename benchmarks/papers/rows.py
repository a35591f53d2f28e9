"""The rows of the tables: each is a small student, trained on labels alone or with methods too.

Weights are those that sweeps on the pairs of folds 7 and 8 found best; see docs/results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from benchmarks.papers.material import PLAIN, SEVERAL
from benchmarks.papers.networks import larger
from kdhooks_demo.training import Row

Method: TypeAlias = dict[str, Any]

LABELS = "labels alone"
TEACHER = "teacher"
SWEPT = (1.0, 4.0, 16.0)  # times the method's weight below

FCD: Method = {"name": "fcd", "weight": 512.0}
COUPLEFACE: Method = {"name": "coupleface", "weight": 64.0, "k": 100}
ECKD: Method = {"name": "eckd", "weight": 16.0}
# In place of the labels' loss, with its scale and margin: the teacher's rows are the classifier.
PROXYLESSKD: Method = {"name": "proxylesskd", "scale": 32.0, "m": 0.3}
CAKD: Method = {"name": "cakd", "weight": 20.0, "urfm": {"width": 128, "heads": 4}}
URFM: Method = {**CAKD, "prompts": {"number": 0}}
ACSR: Method = {"name": "acsr", "weight": 30.0}
AT: Method = {"name": "at", "weight": 1.0}
REVIEWKD: Method = {"name": "reviewkd", "weight": 0.25, "mid": 16}
RKD: Method = {"name": "rkd", "weight": 1.0}
SP: Method = {"name": "sp", "weight": 50.0}
CC: Method = {"name": "cc", "weight": 400.0}
EKD: Method = {"name": "ekd", "weight": 4.0}
AIRD: Method = {"name": "aird", "weight": 512.0}
ICDFACE: Method = {"name": "icdface", "weight": 32.0}
FITNET: Method = {"name": "fitnet", "weight": 1920.0}
FSKD: Method = {"name": "fskd", "weight": 20.0}
THKD: Method = {"name": "thkd", "weight": 4.0, "scale": 32.0}
ADADISTILL: Method = {"name": "adadistill", "scale": 32.0, "m": 0.3}
MARGINDISTILLATION: Method = {
    "name": "margindistillation",
    "scale": 32.0,
    "low": 0.1,
    "high": 0.3,
}
KD: Method = {"name": "kd", "weight": 1.0, "scale": 32.0}
GKD: Method = {"name": "gkd", "weight": 1.0, "scale": 32.0}
_WARMED_UP = {"value": 1.0, "warmup": 200}

_BASE = Row(LABELS)
_ON_EMBEDDINGS = (
    Row("fcd", [FCD]),
    Row("coupleface", [COUPLEFACE]),
    Row("eckd", [ECKD]),
    Row("icdface", [ICDFACE], labels=0.1),
    Row("ekd", [EKD]),
    Row("rkd", [RKD]),
    Row("sp", [SP]),
    Row("cc", [CC]),
)
_ON_CLASSES = (
    Row("proxylesskd", [PROXYLESSKD], labels=0.0),
    Row("margindistillation", [MARGINDISTILLATION], labels=0.0),
    Row("adadistill", [ADADISTILL], labels=0.0),
    Row("thkd", [THKD]),
    Row("kd", [KD]),
    Row("gkd", [GKD]),
)
_ON_FEATURES = (
    Row("acsr", [ACSR]),
    Row("fskd", [FSKD]),
    Row("fitnet", [FITNET]),
    Row("at", [AT]),
    Row("reviewkd", [REVIEWKD]),
)

SHORT = (
    _BASE,
    *_ON_EMBEDDINGS,
    *_ON_CLASSES,
    *_ON_FEATURES,
    Row("cakd (URFM)", [URFM]),
    Row("eckd + coupleface", [ECKD, COUPLEFACE]),
    Row("proxylesskd + acsr", [PROXYLESSKD, ACSR], labels=0.0),
)
# Rows that compare the choices inside a method, on the pairs of folds 7 and 8.
SHORT_STUDY = (
    Row("kd, plain scores", [{**KD, "standardize": False}]),
    Row("gkd, no margin", [{**GKD, "margin": 0.0, "weight": 4.0}]),
    Row("gkd, groups by probability", [{**GKD, "tau": 0.93}]),
    Row("gkd, groups by probability, warmed up", [{**GKD, "tau": 0.93, "weight": _WARMED_UP}]),
    Row(
        "gkd, groups by probability, plain scores",
        [{**GKD, "tau": 0.93, "standardize": False, "weight": 0.0625}],
    ),
    Row("acsr, not centred", [{**ACSR, "center": False}]),
    Row("acsr, channels alone", [{**ACSR, "attention": "channel"}]),
    Row("acsr, pixels alone", [{**ACSR, "attention": "spatial"}]),
    Row("coupleface, bank", [{**COUPLEFACE, "relations": "bank"}]),
)

A = (_BASE, *_ON_EMBEDDINGS, *_ON_CLASSES)
B = (_BASE, *_ON_FEATURES)

# Setting C: the gates of CBAM, whose logits both networks compute, shallow to deep.
_GATES = {
    f"{side}_{kind}_gates": [f"{stage}.1.{kind}" for stage in ("stage1", "stage2", "stage4")]
    for side in ("student", "teacher")
    for kind in ("channel", "spatial")
}
C = (
    _BASE,
    Row("fcd", [FCD]),
    Row("acsr (gates)", [{**ACSR, **_GATES}], live=True),
    Row("acsr (gates, not centred)", [{**ACSR, **_GATES, "center": False}], live=True),
)
D = (
    _BASE,
    Row("fcd", [FCD]),
    Row("cakd", [CAKD], live=True),
    Row("cakd without prompts", [URFM], live=True),
)
D_STUDY = tuple(
    Row(f"cakd, {side}", [{**CAKD, "matching": {"teacher_side": side}}], live=True)
    for side in ("fixed", "shared")
)
E = (
    _BASE,
    Row("fcd", [FCD]),
    Row("coupleface", [COUPLEFACE]),
    Row("aird", [AIRD]),
    Row("proxylesskd", [PROXYLESSKD], labels=0.0),
)
# A teacher alone stands twice in the joined embedding, so that all students are of one size.
S = (
    _BASE,
    Row("fcd, teacher of C", [FCD], teachers=(0, 0)),
    Row("fcd, teacher of D", [FCD], teachers=(1, 1)),
    Row("fcd, both", [FCD]),
)
M = (_BASE, Row("fcd", [FCD]), Row("coupleface", [COUPLEFACE]))


# Rows that test why a method stays ahead in a long training, on the pairs of folds 7 and 8.
_CHANGES: dict[str, dict[str, Any]] = {
    "plain views": {"part": PLAIN},
    "people with several images": {"part": SEVERAL},
    "batch 120": {"changes": {"batch": 120, "lr": 0.2}},
    "larger student": {"changes": {"student": larger}},
}
STUDY = (
    *(
        replace(row, name=f"{row.name}, {change}", **more)
        for change, more in _CHANGES.items()
        for row in (_BASE, Row("fcd", [FCD]))
    ),
    # ekd compares images of one person, of which a random batch has almost none.
    *(
        replace(row, name=f"{row.name}, four images of a person", together=4)
        for row in (_BASE, Row("ekd", [EKD]))
    ),
    Row("fcd, a tenth of the labels' loss", [FCD], labels=0.1),
    Row("fcd, no labels", [FCD], labels=0.0),
    Row("fcd + coupleface", [FCD, COUPLEFACE]),
)


def swept(rows: Sequence[Row], factors: Sequence[float] = SWEPT) -> Iterator[Row]:
    """Return labels alone, and each method with a weight at several multiples of that weight."""
    for row in rows:
        if row.name == LABELS:
            yield row
        elif row.labels and len(row.methods) == 1:
            (method,) = row.methods
            assert isinstance(method, dict)
            for factor in factors:
                weight = method["weight"] * factor
                yield replace(
                    row, name=f"{row.name} x {weight:g}", methods=[{**method, "weight": weight}]
                )
