"""Embeddings of two widths: the map between them, and the refusal of methods that have none."""

from torch import nn

from kdhooks import KDHooksError, Model


def projection(
    method: str, student: Model, teacher: Model, wanted: bool, option: str = "projector"
) -> nn.Linear | None:
    """The student's embedding to the teacher's width, without bias, if the option asks for it.

    Raises:
        KDHooksError: it does not, and the widths differ.
    """
    d, e = student.embedding_dim, teacher.embedding_dim
    if wanted:
        return nn.Linear(d, e, bias=False)
    if d != e:
        raise KDHooksError(
            f"{method}: student and teacher embeddings must be equally wide; found {d} and {e}; "
            f"set {option} = true, or give the student the teacher's width"
        )
    return None


def need_teachers_width(
    method: str, student: Model, teacher: Model, theirs: str = "the teacher's rows", more: str = ""
) -> None:
    """more: another way out, behind the one that all have."""
    d, e = student.embedding_dim, teacher.embedding_dim
    if d != e:
        raise KDHooksError(
            f"{method}: the student's embedding must be as wide as {theirs}; found {d} and {e}; "
            "give the student the teacher's width (in arcface_torch: "
            f"config.embedding_size = {e}){more}"
        )
