"""The lines of the table: one small student each, by labels alone or by methods beside them.

Weights are those that `--sweep` found best on the validation pairs; see docs/results/lfw.md.
"""

from collections.abc import Sequence

from kdhooks_demo.training import Row

LABELS = "labels alone"
SWEPT = (1.0, 4.0, 16.0)  # times the method's weight below

FCD = {"name": "fcd", "weight": 512.0}
COUPLEFACE = {"name": "coupleface", "weight": 64.0, "k": 100}
ECKD = {"name": "eckd", "weight": 16.0}
# In place of the labels' loss, with its scale and margin: the teacher's rows are the classifier.
PROXYLESSKD = {"name": "proxylesskd", "scale": 32.0, "m": 0.3}
CAKD = {
    "name": "cakd",
    "weight": 1.0,
    "urfm": {"width": 128, "heads": 4},
    "prompts": {"number": 0},
}
ACSR = {"name": "acsr", "weight": 0.08}
AT = {"name": "at", "weight": 1.0}
REVIEWKD = {"name": "reviewkd", "weight": 0.25, "mid": 16}
RKD = {"name": "rkd", "weight": 1.0}
SP = {"name": "sp", "weight": 50.0}
THKD = {"name": "thkd", "weight": 4.0, "scale": 32.0}
ADADISTILL = {"name": "adadistill", "scale": 32.0, "m": 0.3}
MARGINDISTILLATION = {"name": "margindistillation", "scale": 32.0, "low": 0.1, "high": 0.3}
KD = {"name": "kd", "weight": 1.0, "scale": 32.0}
GKD = {"name": "gkd", "weight": 0.0625, "scale": 32.0}

ROWS = (
    Row(LABELS),
    Row("fcd", [FCD]),
    Row("proxylesskd", [PROXYLESSKD], labels=False),
    Row("coupleface", [COUPLEFACE]),
    Row("eckd", [ECKD]),
    Row("cakd (URFM)", [CAKD]),
    Row("acsr", [ACSR]),
    Row("rkd", [RKD]),
    Row("sp", [SP]),
    Row("at", [AT]),
    Row("reviewkd", [REVIEWKD]),
    Row("kd", [KD]),
    Row("gkd", [GKD]),
    Row("thkd", [THKD]),
    Row("margindistillation", [MARGINDISTILLATION], labels=False),
    Row("adadistill", [ADADISTILL], labels=False),
    Row("eckd + coupleface", [ECKD, COUPLEFACE]),
    Row("proxylesskd + acsr", [PROXYLESSKD, ACSR], labels=False),
)


def swept(factors: Sequence[float] = SWEPT) -> list[Row]:
    """Each method that has a weight beside the labels, at several multiples of it."""
    found = [ROWS[0]]
    for row in ROWS:
        if row.labels and len(row.methods) == 1:
            (method,) = row.methods
            assert isinstance(method, dict)
            for factor in factors:
                weight = method["weight"] * factor
                found.append(Row(f"{row.name} x {weight:g}", [{**method, "weight": weight}]))
    return found
