"""Embeddings of different widths: a map between them, or an error if the method has no map."""

from torch import nn

from kdhooks import KDHooksError, Model


def projection(
    method: str, student: Model, teacher: Model, wanted: bool, option: str = "projector"
) -> nn.Linear | None:
    """Create a bias-free map from the student's width to the teacher's, if `wanted`.

    Raises:
        KDHooksError: the map is not wanted, and the widths differ.
    """
    d, e = student.embedding_dim, teacher.embedding_dim
    if wanted:
        return nn.Linear(d, e, bias=False)
    if d != e:
        raise KDHooksError(
            f"{method}: student and teacher embeddings must be equally wide; found {d} and {e}; "
            f"set {option} = true, or build the student with the teacher's width"
        )
    return None


def need_teachers_width(
    method: str, student: Model, teacher: Model, theirs: str = "the teacher's rows", more: str = ""
) -> None:
    """Refuse widths that differ. more: a further way out, added to the message."""
    d, e = student.embedding_dim, teacher.embedding_dim
    if d != e:
        raise KDHooksError(
            f"{method}: the student's embedding must be as wide as {theirs}; found {d} and {e}; "
            "build the student with the teacher's width (in arcface_torch: "
            f"config.embedding_size = {e}){more}"
        )
