"""An ONNX node with its inputs evaluated, and the error if it cannot be converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import Array, require

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True)
class Node:
    """A node with its inputs evaluated on one image: an Array is constant, a Tensor is not."""

    operator: str
    name: str
    inputs: Sequence[Array | Tensor | None]  # None: omitted
    attributes: dict[str, Any]  # as onnx reads them

    @classmethod
    def of(cls, proto: NodeProto, inputs: Sequence[Array | Tensor | None]) -> Node:
        value_of: Callable[..., Any] = require("onnx.helper").get_attribute_value
        return cls(
            operator=f"{proto.domain}.{proto.op_type}".removeprefix("ai.onnx").lstrip("."),
            name=proto.name or proto.output[0],
            inputs=inputs,
            attributes={attribute.name: value_of(attribute) for attribute in proto.attribute},
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor)]

    def constant(self, index: int) -> Array:
        value = self.inputs[index]
        if not isinstance(value, np.ndarray):
            raise self.refusal(f"its input {index} depends on the image")
        return value

    def optional(self, index: int) -> Array | None:
        """Return a constant input, or None if it is omitted."""
        given = index < len(self.inputs) and self.inputs[index] is not None
        return self.constant(index) if given else None

    def setting(self, name: str, index: int) -> list[int] | None:
        """Return whole numbers, which older opsets keep in an attribute and newer in an input."""
        given = self.optional(index)
        numbers = self.attributes.get(name) if given is None else given.reshape(-1).tolist()
        return None if numbers is None else [int(number) for number in numbers]

    def refusal(self, reason: str) -> KDHooksError:
        return KDHooksError(
            f"ONNX operator {self.operator} (node {self.name!r}) cannot become a torch module: "
            f"{reason}; use OnnxModel, which runs any graph but has no taps"
        )
