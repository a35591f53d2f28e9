"""The settings: who teaches whom, on which images, and which rows a table has.

All students of a setting see the same images in the same order, from the same initial weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from benchmarks.papers import rows
from benchmarks.papers.material import Images
from benchmarks.papers.networks import (
    CHAIN_STAGES,
    ChainNet,
    SmallViT,
    narrow_gated,
    wide_gated,
)
from kdhooks import StudentView
from kdhooks_demo.network import STAGES, SmallFaceNet
from kdhooks_demo.training import Row, Settings

SHORT = "short"
_VIEWS = ("plain", "mirror", "mild")
_ALL = Images(_VIEWS)
_SEVERAL = Images(_VIEWS, single=False)


@dataclass(frozen=True)
class Setting:
    """One table of the results.

    recorded: names and paths of the teacher's features that are recorded besides its embeddings.
    taught: how the teacher itself is distilled from SFace, if it is not SFace.
    more_seeds: the rows with five seeds, in place of three.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    images: Images
    students: Settings
    recorded: Mapping[str, str] = field(default_factory=dict)
    taught: Settings | None = None
    teacher_stages: tuple[str, ...] = ()
    more_seeds: tuple[str, ...] = ()
    teachers: tuple["Setting", ...] = ()  # use the teachers of these settings
    study: tuple[Row, ...] = ()  # rows that only a sweep has
    probes: nn.Module | None = None  # the students' view of the test images


_LOW = StudentView(low_resolution={"sizes": [14, 20, 28]})

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            SHORT,
            "Who learns fastest: SFace to a student of another family, 1.7 passes",
            rows.SHORT,
            _SEVERAL,
            Settings(images_seen=30_000, batch=30),
            recorded={"maps14": "conv_12_relu", "maps7": "conv_14_relu"},
            study=rows.SHORT_STUDY,
        ),
        Setting(
            "A",
            "SFace to a student of another family: methods on embeddings and classes",
            rows.A,
            _ALL,
            Settings(images_seen=150_000),
            more_seeds=(rows.LABELS, "proxylesskd", "coupleface", "eckd"),
            study=rows.STUDY,
        ),
        Setting(
            "B",
            "SFace to a student of the same layout, at an eighth of its width: methods on features",
            rows.B,
            _SEVERAL,
            Settings(images_seen=150_000, student=ChainNet, stages=CHAIN_STAGES),
            recorded={
                "maps28": "conv_6_relu",
                "maps14": "conv_12_relu",
                "maps7": "conv_14_relu",
            },
            more_seeds=(rows.LABELS, "acsr"),
        ),
        Setting(
            "C",
            "A network with learned attention to a narrow one: acsr on the gates of CBAM",
            rows.C,
            _ALL,
            Settings(images_seen=150_000, student=narrow_gated, stages=STAGES),
            teacher_stages=STAGES,
            taught=Settings(images_seen=150_000, student=wide_gated),
            more_seeds=(rows.LABELS, "acsr (gates)"),
        ),
        Setting(
            "D",
            "A transformer to a convolutional network: cakd with prompts",
            rows.D,
            _ALL,
            Settings(images_seen=150_000, student=SmallFaceNet, stages=STAGES[-1:]),
            taught=Settings(
                images_seen=150_000, student=SmallViT, adamw=True, lr=1e-3, weight_decay=0.05
            ),
            teacher_stages=("blocks.5",),
            more_seeds=(rows.LABELS, "cakd"),
            study=rows.D_STUDY,
        ),
        Setting(
            "E",
            "Faces of 14 to 28 pixels: the teacher sees all of 112",
            rows.E,
            _ALL,
            Settings(images_seen=150_000, view=_LOW),
            more_seeds=(rows.LABELS,),
            probes=_LOW,
        ),
        Setting(
            "M",
            "Masked faces: half of the student's training, and every probe",
            rows.M,
            _ALL,
            Settings(images_seen=150_000, view=StudentView(mask={"p": 0.5})),
            probes=StudentView(mask={"p": 1.0}),
        ),
    )
}

SETTINGS["S"] = Setting(
    "S",
    "Two teachers, those of C and D, against each of them alone",
    rows.S,
    _ALL,
    Settings(images_seen=150_000),
    teachers=(SETTINGS["C"], SETTINGS["D"]),
)
