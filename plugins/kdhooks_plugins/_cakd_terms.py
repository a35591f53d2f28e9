"""Two more terms of cakd: the distance of both embeddings, and the teacher's ArcFace loss."""

from torch import Tensor, nn

from kdhooks import ClassShard, Scheduled, Varying
from kdhooks_plugins.fcd import EmbeddingDistance
from kdhooks_plugins.proxylesskd import MarginSoftmax


class Embeddings(nn.Module):
    """λ_e · mean ‖s - t‖² at unit length."""

    def __init__(self, factor: Scheduled = 1.0) -> None:
        super().__init__()
        self.factor = Varying(factor)
        self.distance = EmbeddingDistance("l2")

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        distance: Tensor = self.distance(student, teacher, labels)
        return self.factor.now * distance


class TeacherClasses(nn.Module):
    """λ_t · ArcFace of the prompted teacher on its own class rows, to keep classes separable."""

    def __init__(self, factor: Scheduled = 1.0) -> None:
        super().__init__()
        self.factor = Varying(factor)
        self.softmax = MarginSoftmax(m=0.5, m2=0.0, scale=64.0)

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        loss, notes = self.softmax(teacher, None, labels, classifier)
        return self.factor.now * loss, notes
