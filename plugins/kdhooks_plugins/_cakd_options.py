"""The option groups of cakd."""

from typing import Literal

from kdhooks import Options, Scheduled, option


class URFM(Options, subject="cakd: urfm"):
    """The size of URFM and of the self-attention after it."""

    centres: int = option(16, "L, the number of local features of a face.", least=2)
    width: int = option(
        512, "d, the number of channels of a local feature; a multiple of `heads`.", least=1
    )
    heads: int = option(8, "The number of heads of URFM and of the self-attention.", least=1)

    def check(self) -> None:
        if self.width % self.heads:
            raise self.refused(
                "width", f"must be a multiple of heads; found {self.width} and {self.heads}"
            )


class Matching(Options, subject="cakd: matching"):
    """The distances between the two sides, and the modules that they share."""

    attention: Literal["mse", "kl"] = option(
        "mse",
        "The distance between the attention maps. mse: L² times the mean squared difference; kl: "
        "KL(teacher ‖ student) of their rows.",
    )
    attention_weight: Scheduled = option(
        1.0, "λ_a, the factor of the maps' distance. It is multiplied by `weight`.", least=0
    )
    feature_weight: Scheduled = option(
        1.0, "λ_f, the factor of the features' distance. It is multiplied by `weight`.", least=0
    )
    standardise: bool = option(
        True,
        "Scale MSA(h) to mean 0 and variance 1 over the batch before comparing; false: the plain "
        "equation, which constant features on both sides can satisfy.",
    )
    teacher_side: Literal["anchored", "fixed", "detached", "shared"] = option(
        "anchored",
        "How the teacher's URFM, self-attention and prompts are trained. anchored: by a linear map "
        "that must recover the teacher's embedding from its local features; fixed: matching trains "
        "the prompts, and the rest keeps its initial weights; detached: only `teacher_cls_weight` "
        "trains the prompts, and the rest keeps its initial weights; shared: matching trains both "
        "sides, which share URFM.",
    )
    anchor_weight: Scheduled = option(
        0.25,
        "λ_r, the factor of the anchor, if `teacher_side` is anchored. It is multiplied by "
        "`weight`.",
        least=0,
    )
    share_msa: bool = option(
        True, "Use the same self-attention for both sides, if `teacher_side` is shared."
    )

    def check(self) -> None:
        if not self.share_msa and self.teacher_side != "shared":
            raise self.refused(
                "share_msa",
                f"belongs to teacher_side 'shared'; found teacher_side '{self.teacher_side}', "
                "with which each side has its own self-attention",
            )
        if self.has("anchor_weight") and self.teacher_side != "anchored":
            raise self.refused(
                "anchor_weight",
                f"belongs to teacher_side 'anchored'; found teacher_side '{self.teacher_side}'",
            )
        if self.anchor_weight == 0:
            raise self.refused(
                "anchor_weight",
                "must be above 0, since only the anchor trains the teacher's side; found 0; "
                "teacher_side = 'fixed' or 'detached' does not need it",
            )


class PromptTokens(Options, subject="cakd: prompts"):
    """APT: trained tokens in the blocks of the frozen teacher."""

    number: int | None = option(
        None,
        "t, the number of prompts in each block. With 0 the teacher runs without gradients. The "
        "default is 8 if the teacher has transformer blocks and some loss trains the prompts, and "
        "0 otherwise.",
        least=0,
    )
    in_features: bool | None = option(
        None,
        "Also use the prompts that leave the last block as pixel features, with their own "
        "positions. The default is true if the teacher gets prompts.",
    )
    checkpointing: bool = option(
        False, "Compute the teacher's blocks again in the backward pass, to save memory."
    )


class Collapse(Options, subject="cakd: collapse"):
    """The guard against a collapse, in which both sides agree on constant features."""

    below: float = option(
        1e-5,
        "Stop if the teacher's MSA(h) differs less than this between images. The measure is its "
        "variance over the batch divided by its mean square, which is at most 1.",
        least=0,
        most=1,
    )
    every: int = option(
        100,
        "The number of steps between two checks; 0 for no checks.",
        least=0,
        unit="steps",
    )
