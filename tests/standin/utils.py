"""A learning rate schedule and a logger, which the trainer also keeps in separate files."""

import torch


class PolynomialWarmup(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, then linear decay; only groups that exist now have a base rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, total: int) -> None:
        self.warmup, self.total = warmup, total
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        step = self.last_epoch
        factor = step / self.warmup if 0 < step <= self.warmup else 1 - step / self.total
        pairs = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        return [base * max(factor, 0.01) for base, _ in pairs]


class Writer:
    """Records the calls that TensorBoard's writer would get."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, str, float]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.logged.append((global_step, tag, scalar_value))


class CallBackLogging:
    def __init__(self, frequent: int, rank: int) -> None:
        self.frequent, self.rank, self.writer = frequent, rank, Writer()

    def __call__(self, global_step: int, losses: list[float]) -> None:
        if self.rank == 0 and global_step % self.frequent == 0:
            self.writer.add_scalar("loss", losses[-1], global_step)
