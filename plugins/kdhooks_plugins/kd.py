"""Logit distillation (KD), Hinton et al., NIPS workshop 2014, arXiv:1503.02531.

The student's softmax over the classes follows the teacher's, both softened by a temperature.
Differs from the paper: the scores are those of a face trainer, scale · cos, each side's with its
own classifier rows. Published face recipes differ in whether a margin stays in the scores; it is
an option, 0 by default.
"""

from dataclasses import replace

from torch import Tensor, nn

from kdhooks import ClassifierShare, ClassShard, KDHooksError, hookimpl
from kdhooks.declarations import Weight


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
        log_s = self._log_p(student, labels, head)
        classifier = replace(classifier, weight=classifier.weight.detach())
        log_t = self._log_p(teacher.detach(), labels, classifier)
        p_t = log_t.exp()
        divergence = classifier.sum(p_t * (log_t - log_s)).mean()
        entropy = -classifier.sum(p_t * log_t).mean()  # near 0: the teacher says one class only
        return self.temperature**2 * divergence, {"teacher_entropy": entropy.detach()}

    def _log_p(self, embedding: Tensor, labels: Tensor, rows: ClassShard) -> Tensor:
        """(b d), (b) -> (b c)."""
        cosines = rows.cosines(embedding)
        if self.margin:
            margin = embedding.new_full((len(embedding),), -self.margin)
            cosines = rows.add(cosines, labels, margin)
        return rows.log_softmax(self.scale / self.temperature * cosines)


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
    def classifier_share(self) -> ClassifierShare:
        loss = SoftenedScores(self.temperature, self.scale, self.margin)
        return ClassifierShare("kd", loss, self.weight, mode="compare")
