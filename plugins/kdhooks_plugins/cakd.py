"""Cross-Architecture Distillation for Face Recognition, Zhao et al., ACM MM 2023, arXiv:2306.14662.

From the paper (abstract, and a summary with most equations): URFM has learnable centres that attend
over the pixels of both sides with a facial positional encoding, and turns them into local features.
The local features and their attention maps are matched. APT trains prompts in the frozen teacher,
whose outputs are among the pixel features.
Reconstruction: everything else. The matched map is that of the local features' self-attention, the
only map with the same shape on both sides. Further: both facial distances, the anchor point and γ;
the piecewise index in half-cells, since its own defaults make only four buckets of a 7 × 7 grid;
L, t, widths, weights, and the parts that both sides share.
Ours: a separate URFM for the teacher. If matching trains one URFM from both sides, as in the plain
equations, the sides agree on easy features and not on a person's identity. The teacher's URFM and
the prompts therefore learn from an anchor: a linear map must recover the teacher's embedding from
its local features. Also ours: queries and keys of a fixed size, h added to MSA(h), LayerNorm,
pixels and local features standardised over the batch, and a guard against collapse.
"""

import logging

from torch import nn

from kdhooks import (
    ClassifierShare,
    EmbeddingTap,
    FeatureTap,
    KDHooksError,
    Model,
    Options,
    Scheduled,
    Stage,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._blocks import SUPPORTED, last_block, transformer_blocks
from kdhooks_plugins._cakd_options import URFM, Collapse, Matching, PromptTokens
from kdhooks_plugins._cakd_terms import Embeddings, TeacherClasses
from kdhooks_plugins._facial_positions import FacialPositions
from kdhooks_plugins._local_features import LocalFeatures
from kdhooks_plugins._maps import Grid
from kdhooks_plugins._prompts import Prompts
from kdhooks_plugins._urfm import LocalCentres, PixelFeatures, SelfAttention

log = logging.getLogger("kdhooks")

_PROMPTS = 8


class CAKD(Options):
    """L = λ_a · d(Attn_S, Attn_T) + λ_f · MSE(MSA(h_S), MSA(h_T)), the teacher prompted."""

    weight: Weight = option(20.0, "The factor of all terms together.", least=0)
    urfm: URFM = option(URFM(), "The size of the local features.")
    positions: FacialPositions = option(FacialPositions(), "Where a pixel lies on the face.")
    matching: Matching = option(Matching(), "The distances between the two sides.")
    prompts: PromptTokens = option(PromptTokens(), "Prompts in the teacher.")
    collapse: Collapse = option(Collapse(), "The guard against constant local features.")
    embedding_weight: Scheduled = option(
        0.0,
        "λ_e, the factor of mean ‖s - t‖² of the embeddings at unit length. It is multiplied by "
        "`weight`.",
        least=0,
    )
    teacher_cls_weight: Scheduled = option(
        0.0,
        "λ_t, the factor of an ArcFace loss of the prompted teacher on its own classifier. It is "
        "multiplied by `weight`.",
        least=0,
    )

    def check(self) -> None:
        if self.prompts.number and self._idle:
            raise self.refused(
                "prompts",
                "would never be trained, since matching.teacher_side 'detached' leaves them to the "
                "teacher's classification; set teacher_cls_weight, or prompts = { number = 0 }",
            )

        if not (
            self.matching.attention_weight or self.matching.feature_weight or self.embedding_weight
        ):
            raise self.refused(
                "matching",
                "would not train the student: attention_weight, feature_weight and the option "
                "embedding_weight are all 0; set one of them",
            )

    @property
    def _idle(self) -> bool:
        """Whether no option trains the prompts."""
        return self.matching.teacher_side == "detached" and not self.teacher_cls_weight

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = _last("student", student), _last("teacher", teacher)
        urfm, matching, t = self.urfm, self.matching, self._prompts_a_block(teacher)
        anchor = None
        if matching.teacher_side == "anchored":
            anchor = nn.Linear(urfm.centres * urfm.width, teacher.embedding_dim, bias=False)
        loss = LocalFeatures(
            self._side(Grid.of(ours, "cakd: student")),
            self._side(Grid.of(theirs, "cakd: teacher"), t if self._joined else 0),
            LocalCentres(urfm.centres, urfm.width, urfm.heads, self.positions.rows),
            [SelfAttention(urfm.width, urfm.heads) for _ in range(1 if matching.share_msa else 2)],
            attention=matching.attention,
            attention_weight=matching.attention_weight,
            feature_weight=matching.feature_weight,
            standardise=matching.standardise,
            prompted=t > 0 and matching.teacher_side != "detached",
            fixed=matching.teacher_side != "shared",
            anchor=anchor,
            anchor_weight=matching.anchor_weight,
            collapse_below=self.collapse.below,
            check_every=self.collapse.every,
        )
        return FeatureTap(
            "cakd",
            loss,
            self.weight,
            student=(ours.path,),
            teacher=(theirs.path,) if anchor is None else (theirs.path, teacher.embedding),
            needs_labels=False,
        )

    def _side(self, grid: Grid, prompts: int = 0) -> PixelFeatures:
        return PixelFeatures(grid, self.positions.buckets(grid.size), self.urfm.width, prompts)

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap | None:
        if not self.embedding_weight:
            return None
        d, e = student.embedding_dim, teacher.embedding_dim
        if d != e:
            raise KDHooksError(
                "cakd: embedding_weight compares embeddings, which must be equally wide; found "
                f"{d} and {e}; leave it at 0 and add the method fcd with projector = true"
            )
        loss = Embeddings(self.embedding_weight)
        return EmbeddingTap("cakd_embedding", loss, self.weight, needs_labels=False)

    @hookimpl
    def classifier_share(self, teacher: Model) -> ClassifierShare | None:
        if not self.teacher_cls_weight:
            return None
        if not self._prompts_a_block(teacher):
            raise KDHooksError(
                "cakd: teacher_cls_weight trains the teacher's prompts, and it has none; leave it "
                "at 0"
            )
        return ClassifierShare("cakd_teacher", TeacherClasses(self.teacher_cls_weight), self.weight)

    @hookimpl
    def adapt_teacher(self, teacher: Model) -> Prompts | None:
        t = self._prompts_a_block(teacher)
        if not t:
            if self._number is None:
                log.warning(
                    "cakd: the teacher gets no prompts, since it has no transformer blocks of a "
                    "supported kind"
                )
            return None
        assert teacher.module is not None
        blocks = transformer_blocks(teacher.module)
        stage = _last("teacher", teacher)
        joined = (stage.path, last_block(blocks, stage)) if self._joined else None
        return Prompts(blocks, t, joined=joined, checkpointing=self.prompts.checkpointing)

    @property
    def _joined(self) -> bool:
        """Whether the teacher's prompts, if there are any, are pixel features too."""
        return self.prompts.in_features is not False

    @property
    def _number(self) -> int | None:
        return 0 if self.prompts.number is None and self._idle else self.prompts.number

    def _prompts_a_block(self, teacher: Model) -> int:
        """t, for this teacher."""
        number = self._number
        if number == 0 or teacher.module is None:
            t = 0
        elif transformer_blocks(teacher.module):
            t = number or _PROMPTS
        elif number:
            raise KDHooksError(
                f"cakd: prompts join transformer blocks, and the teacher "
                f"{type(teacher.module).__name__} has none of a kind that they can join; supported "
                f"are {SUPPORTED}; set prompts = {{ number = 0 }}, or leave it out, to let the "
                "teacher run as it is"
            )
        else:
            t = 0
        if self.prompts.in_features and not t:
            raise KDHooksError("cakd: prompts.in_features needs prompts, and the teacher has none")
        return t


def _last(side: str, model: Model) -> Stage:
    if not model.stages:
        way_out = f"name it as taps.{side}.stages in the recipe, or {side}_stages="
        if side == "teacher" and model.module is None:
            way_out = "it is no torch module; kdhooks.onnx.to_torch turns an ONNX file into one"
        raise KDHooksError(f"cakd needs the {side}'s last stage; found no stages; {way_out}")
    return model.stages[-1]
