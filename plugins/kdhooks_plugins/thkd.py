"""Teacher-head distillation (TH-KD), Ben-Baruch et al., 2022, arXiv:2201.06945.

From the paper and its code: the student's embedding goes through the teacher's frozen classifier,
and its softened scores are pulled to the teacher's.
Differs from the code: its additional embedding term is a separate method, `fcd`; scores are scaled
cosines. The paper's other half, a teacher trained on a student's head, does not need a hook.
"""

from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    Model,
    Options,
    Scheduled,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._widths import need_teachers_width
from kdhooks_plugins.kd import SoftenedScores


class SharedHead(nn.Module):
    """T² · KL(teacher ‖ student), with the teacher's class rows on both sides."""

    def __init__(self, temperature: Scheduled = 4.0, scale: float = 64.0) -> None:
        super().__init__()
        self.scores = SoftenedScores(temperature, scale)

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        rows = classifier.frozen().measured()
        found: tuple[Tensor, dict[str, Tensor]] = self.scores(student, teacher, labels, rows, rows)
        return found


class THKD(Options):
    """L = T² · mean KL(softmax(σ cos(t, w) / T) ‖ softmax(σ cos(s, w) / T)), w teacher rows."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    temperature: Scheduled = option(4.0, "T, which softens the scores of both sides.", above=0)
    scale: float = option(
        64.0, "σ, the factor of all cosines; usually the trainer's scale.", above=0
    )

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        more = ", or use kd, where each has its own rows"
        need_teachers_width("thkd", student, teacher, more=more)
        loss = SharedHead(self.temperature, self.scale)
        return ClassifierShare("thkd", loss, self.weight)
