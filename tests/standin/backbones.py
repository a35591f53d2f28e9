"""Small residual networks with the module names of arcface_torch's IResNet, and one without."""

import torch
from torch import Tensor, nn

_WIDTHS = {"tiny": (8, 8, 16, 16), "wide": (8, 16, 16, 24)}


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = nn.Conv2d(inside, outside, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv1(self.bn1(x)))
        out += self.downsample(x)  # in place, as in arcface_torch
        return out


class IResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], num_features: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.prelu = nn.PReLU(8)
        self.layer1 = Block(8, widths[0])
        self.layer2 = Block(widths[0], widths[1])
        self.layer3 = Block(widths[1], widths[2])
        self.layer4 = Block(widths[2], widths[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(widths[3] * 4, num_features)
        self.features = nn.BatchNorm1d(num_features)
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 32 32) -> (b d)."""
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        embedding: Tensor = self.features(self.fc(x))
        return embedding


class FrozenNorms(IResNet):
    """Does not use batch statistics, so that two ranks can equal one process."""

    def train(self, mode: bool = True) -> "FrozenNorms":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self


class Plain(nn.Sequential):
    """A network of another family, without stages that kdhooks knows."""

    def __init__(self, num_features: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Flatten(),
            nn.Linear(512, num_features),
            nn.BatchNorm1d(num_features),
        )


def get_model(name: str, dropout: float, fp16: bool, num_features: int) -> nn.Module:
    if name == "plain":
        return Plain(num_features)
    if name == "frozen":
        return FrozenNorms(_WIDTHS["tiny"], num_features, dropout)
    if name in _WIDTHS:
        return IResNet(_WIDTHS[name], num_features, dropout)
    raise ValueError
