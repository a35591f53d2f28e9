"""Logit distillation (KD), Hinton et al., NIPS workshop 2014, arXiv:1503.02531.

The student's softmax over the classes follows the teacher's, both softened by a temperature.
Differs from the paper: the scores are those of a face trainer, scale · cos, each side's with its
own classifier rows. Published face recipes differ in whether a margin stays in the scores; it is
an option, 0 by default.
"""

from torch import Tensor, nn

from kdhooks import ClassShard, ComparedClassifiers, KDHooksError, Wanted, hookimpl
from kdhooks.declarations import Weight
from kdhooks_plugins._margin import scores


class SoftenedScores(nn.Module):
    """T² · KL(teacher ‖ student) over all classes, the mean over the batch."""

    def __init__(self, temperature: float = 4.0, scale: float = 64.0, margin: float = 0.0) -> None:
        super().__init__()
        self.temperature, self.scale, self.margin = temperature, scale, margin

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        classifier: ClassShard,
        head: ClassShard,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier, head -> ()."""
        teacher, scale = teacher.detach(), self.scale / self.temperature
        classifier = classifier.frozen().measured()

        def compare(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s = scores(student, labels, chunk, scale, self.margin)
            z_t = scores(teacher, labels, classifier.part(chunk), scale, self.margin)
            return Wanted(logs=[z_s, z_t], means=[(z_t - z_s, z_t), (z_t, z_t)])

        (log_s, log_t), (gap, mean) = head.over_classes(compare, student)
        divergence = (gap - log_t + log_s).mean()
        entropy = (log_t - mean).mean()  # near 0: the teacher says one class only
        return self.temperature**2 * divergence, {"teacher_entropy": entropy.detach()}


class KD:
    """L = T² · mean KL(softmax(σ cos_t / T) ‖ softmax(σ cos_s / T))."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: float = 4.0,
        scale: float = 64.0,
        margin: float = 0.0,
    ) -> None:
        """
        temperature: T; at scale 64 a teacher stays close to one-hot even at 4.
        scale: σ of both sides, as a rule the trainer's.
        margin: taken off the cosine of the own class on both sides (CosFace).
        """
        for option, found in (("temperature", temperature), ("scale", scale)):
            if found <= 0:
                raise KDHooksError(f"kd: {option} must be above 0; found {found}")
        if margin < 0:
            raise KDHooksError(f"kd: margin must be at least 0; found {margin}")
        self.weight = weight
        self.temperature, self.scale, self.margin = temperature, scale, margin

    @hookimpl
    def classifier_share(self) -> ComparedClassifiers:
        loss = SoftenedScores(self.temperature, self.scale, self.margin)
        return ComparedClassifiers("kd", loss, self.weight)
