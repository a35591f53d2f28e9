"""Cross-Architecture Distillation for Face Recognition, Zhao et al., ACM MM 2023, arXiv:2306.14662.

From the paper (abstract, and a summary with most equations): URFM, learnable centres that attend
over the pixels of both sides with a facial positional encoding, makes local features of them;
their attention maps and they themselves are matched; APT trains prompts in the frozen teacher.
Reconstruction: all else. The map that is matched is that of the local features' self-attention,
the one map of equal shape on both sides. Both facial distances, anchor and γ. The piecewise index
in half-cells, since its own defaults make but four buckets of a 7 × 7 grid. L, t, widths, weights
and what both sides share. And what keeps the two sides, both of which are trained, from agreeing on
constants, which the plain equation allows: LayerNorm, features standardised over the batch, a
guard, and the teacher's classification term.
"""

import logging

from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    EmbeddingTap,
    FeatureTap,
    KDHooksError,
    Model,
    Stage,
    hookimpl,
)
from kdhooks.declarations import Weight
from kdhooks_plugins._blocks import SUPPORTED, last_block, transformer_blocks
from kdhooks_plugins._facial_positions import NOSE, FacialPositions
from kdhooks_plugins._local_features import ATTENTIONS, LocalFeatures
from kdhooks_plugins._maps import Grid
from kdhooks_plugins._prompts import Prompts
from kdhooks_plugins._urfm import LocalCentres, PixelFeatures, SelfAttention
from kdhooks_plugins.fcd import EmbeddingDistance
from kdhooks_plugins.proxylesskd import MarginSoftmax
from kdhooks_plugins.saliency import load_saliency

log = logging.getLogger("kdhooks")

DISTANCES = ("relative", "saliency")
_PROMPTS = 8


class TeacherClasses(nn.Module):
    """The prompted teacher tells its own classes apart: ArcFace on its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = MarginSoftmax(m=0.5, m2=0.0, scale=64.0)

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        loss: tuple[Tensor, dict[str, Tensor]] = self.softmax(teacher, None, labels, classifier)
        return loss


class CAKD:
    """L = λ_a · d(Attn_S, Attn_T) + λ_f · MSE(MSA(h_S), MSA(h_T)), the teacher prompted."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        centres: int = 16,
        width: int = 512,
        heads: int = 8,
        distance: str = "relative",
        saliency: Tensor | str | None = None,
        gamma: float = 1.0,
        anchor: tuple[float, float] = NOSE,
        pieces: tuple[float, float, float] = (4.0, 12.0, 24.0),
        attention: str = "mse",
        attention_weight: float = 1.0,
        feature_weight: float = 1.0,
        standardise: bool = True,
        share_msa: bool = True,
        detach_teacher_side: bool = False,
        embedding_weight: float = 0.0,
        prompts: int | None = None,
        prompt_tokens_in_f: bool = False,
        teacher_cls_weight: float = 0.0,
        checkpointing: bool = False,
        collapse_below: float = 1e-3,
        check_every: int = 100,
    ) -> None:
        """
        weight: of all terms together; attention_weight, feature_weight, embedding_weight and
            teacher_cls_weight are factors of it.
        centres: L, local features a face; width: d of URFM and MSA; heads: of both.
        distance: D_face, how pixel and anchor differ: "relative" in their distances to the five
            landmarks of an aligned face, "saliency" in how active the teacher is there.
        saliency: for that, a map (h w), or a file of one: what `saliency.saliency_map` gives.
        gamma: of D_face; anchor: (x, y) in the 112 × 112 template, by default the tip of the nose.
        pieces: α, β, γ' of the piecewise index: buckets of half a cell up to α, then wider, the
            last one, β, from γ' on.
        attention: "mse" L² · MSE of the maps; "kl" KL(teacher ‖ student) of their rows.
        standardise: bring MSA(h) to mean 0 and variance 1 over the batch before it is matched;
            False: the equation as it stands, which invites constants.
        share_msa: one self-attention for both sides.
        detach_teacher_side: match the student's side to the teacher's alone; the teacher's
            projection then stays as drawn, and prompts are left to teacher_cls_weight.
        embedding_weight: λ_e of mean ‖s - t‖² of the unit embeddings.
        prompts: t, prompts a block of the teacher; 0 for none, and then it runs without grad. By
            default 8 where the teacher has transformer blocks, and 0 where not, as in a CNN.
        prompt_tokens_in_f: the prompts behind the last block are pixel features too.
        teacher_cls_weight: of an ArcFace loss of the prompted teacher on its own classifier.
        checkpointing: compute the teacher's blocks anew in backward, to save memory.
        collapse_below, check_every: every so many steps, 0 for never, refuse to go on when the
            teacher's MSA(h) differs less than this between images: its variance over the batch,
            divided by its mean square, so 1 at most.
        """
        _one_of("distance", distance, DISTANCES)
        _one_of("attention", attention, ATTENTIONS)
        for option, least, found in (
            ("centres", 2, centres),
            ("heads", 1, heads),
            ("gamma", 0, gamma),
            ("attention_weight", 0, attention_weight),
            ("feature_weight", 0, feature_weight),
            ("embedding_weight", 0, embedding_weight),
            ("prompts", 0, prompts or 0),
            ("teacher_cls_weight", 0, teacher_cls_weight),
            ("check_every", 0, check_every),
        ):
            if found < least:
                raise KDHooksError(f"cakd: {option} must be at least {least}; found {found}")
        if width < heads or width % heads:
            raise KDHooksError(
                f"cakd: width must be a multiple of heads; found {width} and {heads}"
            )
        if (distance == "saliency") != (saliency is not None):
            raise KDHooksError(
                "cakd: saliency, a map (h w), belongs to distance 'saliency', which needs it; "
                f"found distance '{distance}' and {'no' if saliency is None else 'a'} map; "
                "kdhooks_plugins.saliency.saliency_map makes one"
            )
        idle = detach_teacher_side and not teacher_cls_weight
        if prompts and idle:
            raise KDHooksError(
                "cakd: nothing would train the prompts, since detach_teacher_side leaves them to "
                "the teacher's classification; set teacher_cls_weight, or prompts = 0"
            )
        self.weight = weight
        self.centres, self.width, self.heads = centres, width, heads
        self.positions = FacialPositions(
            distance, gamma, anchor, pieces, None if saliency is None else load_saliency(saliency)
        )
        self.attention = attention
        self.attention_weight, self.feature_weight = attention_weight, feature_weight
        self.standardise, self.share_msa = standardise, share_msa
        self.detach_teacher_side = detach_teacher_side
        self.embedding_weight, self.teacher_cls_weight = embedding_weight, teacher_cls_weight
        self.prompts = 0 if prompts is None and idle else prompts
        self.prompt_tokens_in_f = prompt_tokens_in_f
        self.checkpointing = checkpointing
        self.collapse_below, self.check_every = collapse_below, check_every

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = _last("student", student), _last("teacher", teacher)
        t = self._prompts_a_block(teacher)
        loss = LocalFeatures(
            self._side(Grid.of(ours, "cakd: student")),
            self._side(Grid.of(theirs, "cakd: teacher"), t if self.prompt_tokens_in_f else 0),
            LocalCentres(self.centres, self.width, self.heads, self.positions.rows),
            [SelfAttention(self.width, self.heads) for _ in range(1 if self.share_msa else 2)],
            attention=self.attention,
            attention_weight=self.attention_weight,
            feature_weight=self.feature_weight,
            standardise=self.standardise,
            prompted=t > 0,
            detach_teacher_side=self.detach_teacher_side,
            collapse_below=self.collapse_below,
            check_every=self.check_every,
        )
        return FeatureTap(
            "cakd",
            loss,
            self.weight,
            student=(ours.path,),
            teacher=(theirs.path,),
            needs_labels=False,
        )

    def _side(self, grid: Grid, prompts: int = 0) -> PixelFeatures:
        return PixelFeatures(grid, self.positions.buckets(grid.size), self.width, prompts)

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
        weight = _times(self.weight, self.embedding_weight)
        return EmbeddingTap("cakd_embedding", EmbeddingDistance("l2"), weight, needs_labels=False)

    @hookimpl
    def classifier_share(self, teacher: Model) -> ClassifierShare | None:
        if not self.teacher_cls_weight:
            return None
        if not self._prompts_a_block(teacher):
            raise KDHooksError(
                "cakd: teacher_cls_weight trains the teacher's prompts, and it has none; leave it "
                "at 0"
            )
        weight = _times(self.weight, self.teacher_cls_weight)
        return ClassifierShare("cakd_teacher", TeacherClasses(), weight)

    @hookimpl
    def adapt_teacher(self, teacher: Model) -> Prompts | None:
        t = self._prompts_a_block(teacher)
        if not t:
            if self.prompts is None:
                log.warning(
                    "cakd: the teacher has no transformer blocks of a kind that prompts can join, "
                    "so it gets none"
                )
            return None
        assert teacher.module is not None
        blocks = transformer_blocks(teacher.module)
        stage = _last("teacher", teacher)
        joined = (stage.path, last_block(blocks, stage)) if self.prompt_tokens_in_f else None
        return Prompts(blocks, t, joined=joined, checkpointing=self.checkpointing)

    def _prompts_a_block(self, teacher: Model) -> int:
        """t, for this teacher."""
        if self.prompts == 0 or teacher.module is None:
            t = 0
        elif transformer_blocks(teacher.module):
            t = self.prompts or _PROMPTS
        elif self.prompts:
            raise KDHooksError(
                f"cakd: prompts join transformer blocks, and the teacher "
                f"{type(teacher.module).__name__} has none of a kind that they can join; supported "
                f"are {SUPPORTED}; set prompts = 0, or leave it out, to let the teacher run as it "
                "is"
            )
        else:
            t = 0
        if self.prompt_tokens_in_f and not t:
            raise KDHooksError("cakd: prompt_tokens_in_f needs prompts, and the teacher has none")
        return t


def _last(side: str, model: Model) -> Stage:
    if not model.stages:
        way_out = f"name it as taps.{side}.stages in the recipe, or {side}_stages="
        if side == "teacher" and model.module is None:
            way_out = "it is no torch module; kdhooks.onnx.to_torch turns an ONNX file into one"
        raise KDHooksError(f"cakd needs the {side}'s last stage; found no stages; {way_out}")
    return model.stages[-1]


def _times(weight: Weight, factor: float) -> Weight:
    return (lambda step: factor * weight(step)) if callable(weight) else factor * weight


def _one_of(option: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise KDHooksError(f"cakd: {option} must be one of {known}; found '{found}'")
