"""Logit distillation (KD), Hinton et al., NIPS workshop 2014, arXiv:1503.02531.

The student's softmax over the classes follows the teacher's, both softened by a temperature.
Differs from the paper: the scores are those of a face trainer, scale · cos, each side's with its
own classifier rows. Published face recipes differ in whether a margin stays in the scores; it is
an option, 0 by default.
"""

from torch import Tensor, nn

from kdhooks import (
    ClassShard,
    ComparedClassifiers,
    Options,
    Scheduled,
    Varying,
    Wanted,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._margin import scores
from kdhooks_plugins._standard_scores import Sharpness


class SoftenedScores(nn.Module):
    """T² · KL(teacher ‖ student) over all classes, the mean over the batch."""

    def __init__(
        self,
        temperature: Scheduled = 4.0,
        scale: float = 64.0,
        margin: Scheduled = 0.0,
        *,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.margin = Varying(temperature), Varying(margin)
        self.scale, self.standardize = scale, standardize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        classifier: ClassShard,
        head: ClassShard,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier, head -> ()."""
        teacher, temperature, margin = teacher.detach(), self.temperature.now, self.margin.now
        scale = 1.0 if self.standardize else self.scale / temperature
        classifier = classifier.frozen().measured()
        head = head.measured()

        def both(student: Tensor, chunk: ClassShard) -> tuple[Tensor, Tensor]:
            z_s = scores(student, labels, chunk, scale, margin)
            return z_s, scores(teacher, labels, classifier.part(chunk), scale, margin)

        sharp = Sharpness.of(both, student, head, temperature) if self.standardize else None

        def compare(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s, z_t = both(student, chunk)
            if sharp is None:
                return Wanted(logs=[z_s, z_t], means=[(z_t - z_s, z_t), (z_t, z_t)])
            z_s, z_t = z_s * sharp.student, z_t * sharp.teacher
            constant = z_s.detach()
            means = [(z_t - z_s, z_t), (z_t, z_t), (constant, constant)]
            return Wanted(logs=[z_s, z_t], means=means)

        (log_s, log_t), (gap, mean, *by_student) = head.over_classes(compare, student)
        if sharp is not None:  # what log_s and gap change by the deviation of the student's scores
            log_s = log_s + by_student[0] * sharp.change
            gap = gap - (mean - gap).detach() * sharp.change
        divergence = (gap - log_t + log_s).mean()
        entropy = (log_t - mean).mean()  # near 0: the teacher says one class only
        return temperature**2 * divergence, {"teacher_entropy": entropy.detach()}


class KD(Options):
    """L = T² · mean KL(softmax(σ cos_t / T) ‖ softmax(σ cos_s / T))."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    temperature: Scheduled = option(
        4.0,
        "T, which softens the scores of both sides. At scale 64 a teacher is close to one-hot "
        "even at 4.",
        above=0,
    )
    scale: float = option(
        64.0, "σ, the factor of the cosines of both sides; usually the trainer's scale.", above=0
    )
    margin: Scheduled = option(
        0.0,
        "m, subtracted from the cosine of the sample's own class on both sides, as in CosFace. "
        "Published face recipes use 0.4 or none.",
        least=0,
        most=2,
    )

    standardize: bool = option(
        False,
        "Divide each sample's scores by their standard deviation over the classes, so that σ does "
        "not count.",
    )

    @hookimpl
    def classifier_share(self) -> ComparedClassifiers:
        loss = SoftenedScores(
            self.temperature, self.scale, self.margin, standardize=self.standardize
        )
        return ComparedClassifiers("kd", loss, self.weight)
