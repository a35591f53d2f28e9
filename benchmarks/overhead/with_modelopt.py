"""The step with modelopt, which swaps the student's class for one that runs the teacher."""

# Nothing but this measurement needs the package.
# pyright: reportMissingImports=false

import modelopt.torch.distill as mtd
from torch import Tensor, nn

from benchmarks.overhead.ways import TAPPED, Pair, Step, cosine_gap


class _Cosine(nn.modules.loss._Loss):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(b d), (b d) -> ()."""
        return cosine_gap(student, teacher)


def converted(pair: Pair) -> Step:
    """The weights of all losses, that of the labels included, must sum to 1.

    Each loss has a fifth, so the gradient has a fifth of the usual length.
    """
    criterion = {(name, name): nn.MSELoss() for name in TAPPED}
    config = {
        "teacher_model": pair.teacher,
        "criterion": {**criterion, ("embedding", "embedding"): _Cosine()},
        "loss_balancer": mtd.StaticLossBalancer([0.2] * 4),
    }
    model = mtd.convert(pair.student, [("kd_loss", config)])

    def step(images: Tensor, labels: Tensor) -> None:
        task_loss = pair.task_loss(model(images), labels)
        model.compute_kd_loss(student_loss=task_loss).backward()

    return step
