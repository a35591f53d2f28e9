"""Logit distillation (KD), Hinton et al., NIPS workshop 2014, arXiv:1503.02531.

The student's softmax over the classes follows the teacher's, both softened by a temperature.
Differs from the paper: the scores are the cosines between an embedding and its own side's class
rows, as in face trainers. By default they are divided by their standard deviation over the classes
(logit standardization, Sun et al., CVPR 2024, arXiv:2403.01731) and the loss is multiplied by the
scale; `standardize = false` multiplies the cosines by the scale instead. Some published face
recipes keep a margin in the scores and others do not; it is an option, 0 by default.
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
from kdhooks_plugins._standard_scores import standard


class SoftenedScores(nn.Module):
    """The batch mean of T² · KL(teacher ‖ student) over all classes.

    It is multiplied by the scale if the scores are standardized.
    """

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

        z = None
        if self.standardize:
            sides = (student, head), (teacher, classifier)
            z = standard(*sides, labels, scale=scale, margin=margin, temperature=temperature)

        def compare(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s = scores(student, labels, chunk, scale, margin)
            z_t = scores(teacher, labels, classifier.part(chunk), scale, margin)
            if not z:
                return Wanted(logs=[z_s, z_t], means=[(z_t - z_s, z_t), (z_t, z_t)])
            moments = z.moments(z_s)
            z_s, z_t = z(z_s, z_t)
            constant = z_s.detach()
            means = [(z_t - z_s, z_t), (z_t, z_t), (constant, constant), *moments]
            return Wanted(logs=[z_s, z_t], means=means)

        (log_s, log_t), (gap, mean, *rest) = head.over_classes(compare, student)
        if z:  # adds the gradient through the deviation of the student's scores
            by_student, *moments = rest
            change = z.change(*moments)
            log_s = log_s + by_student * change
            gap = gap - (mean - gap).detach() * change
        divergence = (gap - log_t + log_s).mean()
        entropy = (log_t - mean).mean()  # near 0 if the teacher is one-hot
        factor = self.scale if self.standardize else 1.0
        return factor * temperature**2 * divergence, {"teacher_entropy": entropy.detach()}


class KD(Options):
    """L = σ · T² · mean KL(softmax(z_t / T) ‖ softmax(z_s / T)), z each side's standard scores.

    Without `standardize`: L = T² · mean KL(softmax(σ cos_t / T) ‖ softmax(σ cos_s / T)).
    """

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    temperature: Scheduled = option(
        4.0,
        "T, which softens the scores of both sides. A lower T gives more weight to the own class "
        "and less to all others; see `kd/teacher_entropy`.",
        above=0,
    )
    scale: float = option(
        64.0,
        "σ, usually the trainer's scale: the factor of the cosines of both sides. With "
        "`standardize` it multiplies the loss instead, to keep the term in proportion to the "
        "trainer's loss.",
        above=0,
    )
    margin: Scheduled = option(
        0.0,
        "m, subtracted from the cosine of the sample's own class on both sides, as in CosFace. "
        "Published face recipes use 0.4 or no margin.",
        least=0,
        most=2,
    )
    standardize: bool = option(
        True,
        "Divide each sample's cosines by their standard deviation over the classes; false: "
        "multiply them by σ, as in the paper.",
    )

    @hookimpl
    def classifier_share(self) -> ComparedClassifiers:
        loss = SoftenedScores(
            self.temperature, self.scale, self.margin, standardize=self.standardize
        )
        return ComparedClassifiers("kd", loss, self.weight)
