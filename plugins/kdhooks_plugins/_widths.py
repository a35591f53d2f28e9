"""The one refusal of methods that put the student's embedding before the teacher's rows."""

from kdhooks import KDHooksError, Model


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
